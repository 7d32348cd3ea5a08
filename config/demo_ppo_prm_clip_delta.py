# The PRM reward, clipped and then as a difference (Gao et al. 2024): needless steps earn nothing.
# $ python ppo.py config/demo_ppo_prm_clip_delta.py      (after config/demo_sft.py and config/demo_prm.py)
from config.demo_ppo_prm import *

out_dir = 'out/demo_ppo_prm_clip_delta'
refine = 'clip_delta'
eta_quantile = 0.4          # the better 60% of steps get 0
