# The raw PRM reward, which pays for every step that looks good: compare its number of steps with that of
# demo_ppo_prm_clip_delta.
# $ python ppo.py config/demo_ppo_prm.py      (after config/demo_sft.py and config/demo_prm.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_prm'
reward = 'prm'
reward_model = 'out/demo_prm'
advantage = 'gae'           # rewards stand on steps: what counts for a token is the return from there on
lam = 1.0
critic_lr = 1e-2            # of the value head only
value_coef = 0.5
