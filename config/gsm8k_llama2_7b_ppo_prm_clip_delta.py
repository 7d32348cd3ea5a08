# gsm8k_llama2_7b_ppo_sparse with a process reward, clipped and then as a difference (Gao et al. 2024), beside the
# sparse one.
# $ torchrun --nproc_per_node=8 rewards.py config/gsm8k_llama2_7b_prm.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_prm_clip_delta.py
# Not run: it needs a GPU and the model hub.
# Memory: 65.1 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# As for gsm8k_llama2_7b_ppo_sparse, and 12.6 GiB of a GPU for the reward model in bf16.
from config.gsm8k_llama2_7b_ppo_sparse import *

out_dir = 'out/gsm8k_llama2_7b_ppo_prm_clip_delta'
reward = 'prm'
reward_model = 'out/gsm8k_llama2_7b_prm'
refine = 'clip_delta'
eta_quantile = 0.4          # the better 60% of steps get 0
