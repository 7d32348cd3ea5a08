# The raw PRM reward, which pays for every step that looks good: compare its number of steps with demo_ppo_prm_clip_delta's.
# $ python ppo.py config/demo_ppo_prm.py      (after config/demo_sft.py and config/demo_prm.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_prm'
reward = 'prm'
reward_model = 'out/demo_prm'
