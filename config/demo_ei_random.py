# The control of the filter: as many new solutions of each question as Expert Iteration would keep, right or wrong. What
# this run gains comes from more data and updates; what Expert Iteration gains beyond it, from knowing the right answer.
# $ python ei.py config/demo_ei_random.py      (after config/demo_sft.py)
from config.demo_ei import *

out_dir = 'out/demo_ei_random'
reward = 'random'
