# PPO without SFT at demo size: from a base model that is shown two worked examples, in training and evaluation.
# $ python ppo.py config/demo_few_shot_ppo.py      (after config/demo_few_shot_base.py)
# $ python eval.py --init_from=out/demo_few_shot_ppo --few_shot=2 --k=16 --n_problems=500 --max_new_tokens=110 --max_rows=512
from config.demo_ppo import *

init_from = 'out/demo_few_shot_base'
out_dir = 'out/demo_few_shot_ppo'
few_shot = 2
max_rows = 512
