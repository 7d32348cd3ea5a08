# Prioritised level replay: half of the questions are drawn again, by their mean |advantage| and how long ago that was.
# $ python ppo.py config/demo_ppo_replay.py      (after config/demo_sft.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_replay'
replay = 0.5
