# The heuristic dense reward: each step whose result the reference solution has next earns its share of 1.
# $ python ppo.py config/demo_ppo_dense.py      (after config/demo_sft.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_dense'
reward = 'dense'            # uses the reference solutions of all questions, not only their final answers
