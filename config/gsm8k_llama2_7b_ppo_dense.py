# gsm8k_llama2_7b_ppo_sparse with the heuristic dense reward beside the sparse one.
# $ torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_dense.py      (after config/gsm8k_llama2_7b_sft.py)
# Memory: 52.6 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.43, 0.47, 0.53, 0.71 (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

out_dir = 'out/gsm8k_llama2_7b_ppo_dense'
reward = 'dense'
