# A base model for runs without SFT: as demo_base, but it reads several texts in a row, questions with answers among
# them, so that worked examples before a question mean something to it.
# $ python data/arithmetic/prepare.py && python sft.py config/demo_few_shot_base.py
from config.demo_base import *

texts_per_row = 8           # facts, one-step problems, tales and bare questions, a blank line between them
out_dir = 'out/demo_few_shot_base'
block_size = 512            # two worked examples, the question and the solution
epochs = 6.0                # (24,256 / 8 - 256 held out) * 6 / 4 = 4,164 updates
batch_size = 4              # rows of 8 texts: twice as many texts an update as demo_base
