# Backtracking: at first most questions start after some steps of the reference solution, so rewards are near.
# $ python ppo.py config/demo_ppo_backtrack.py      (after config/demo_sft.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_backtrack'
backtrack = 0.8             # falls to 0 ...
backtrack_until = 0.5       # ... half-way
