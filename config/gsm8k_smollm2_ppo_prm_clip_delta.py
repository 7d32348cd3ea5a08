# gsm8k_smollm2_ppo_sparse with a process reward, clipped and then as a difference (Gao et al. 2024), beside the
# sparse one.
# $ python rewards.py config/gsm8k_smollm2_prm.py && python ppo.py config/gsm8k_smollm2_ppo_prm_clip_delta.py
# Memory: 10.3 GiB on one GPU of 16 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# Not run: it needs a GPU and the model hub.
from config.gsm8k_smollm2_ppo_sparse import *

out_dir = 'out/gsm8k_smollm2_ppo_prm_clip_delta'
reward = 'prm'
reward_model = 'out/gsm8k_smollm2_prm'
refine = 'clip_delta'
eta_quantile = 0.4          # the better 60% of steps get 0
