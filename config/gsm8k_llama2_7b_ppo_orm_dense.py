# gsm8k_llama2_7b_ppo_sparse with the ORM's score at the end of every step beside the sparse reward, clipped and then
# as a difference (Gao et al. 2024; ours): raw sums of scores pay for needless steps.
# $ torchrun --nproc_per_node=8 rewards.py config/gsm8k_llama2_7b_orm.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_orm_dense.py
# Memory: 65.1 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# As for gsm8k_llama2_7b_ppo_sparse, and 12.6 GiB of a GPU for the reward model in bf16.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.46, 0.52, 0.59, 0.76 (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

out_dir = 'out/gsm8k_llama2_7b_ppo_orm_dense'
reward = 'orm_dense'
reward_model = 'out/gsm8k_llama2_7b_orm'
refine = 'clip_delta'
eta_quantile = 0.4          # the better 60% of steps get 0
