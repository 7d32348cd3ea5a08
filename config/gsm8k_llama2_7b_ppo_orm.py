# gsm8k_llama2_7b_ppo_sparse with the ORM's score of the whole solution as the reward.
# $ torchrun --nproc_per_node=8 rewards.py config/gsm8k_llama2_7b_orm.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_orm.py
# Memory: 65.1 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# As for gsm8k_llama2_7b_ppo_sparse, and 12.6 GiB of a GPU for the reward model in bf16.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.46, 0.51, 0.59, 0.79 (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

out_dir = 'out/gsm8k_llama2_7b_ppo_orm'
reward = 'orm'
reward_model = 'out/gsm8k_llama2_7b_orm'
reward_right = 0.0          # only the score: ours, as Havrilla et al. 2024 don't say whether it stood alone
