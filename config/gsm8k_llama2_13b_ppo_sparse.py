# The paper's PPO: Llama-2 13B on GSM8K from the SFT checkpoint, sparse reward. As gsm8k_llama2_7b_ppo_sparse, but for
# $ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_13b_sft.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_13b_ppo_sparse.py
# Hardware: 8 GPUs of 80 GB. A GPU holds 25.8 GiB of bf16 weights and adapters and 4.7 of the adapters' gradients and averages; beside
# these 9.2 for a micro-batch, or to draw samples a merged copy, 24.2, and 12.5 of cache for 32 rows: 67.3 GiB; with shard = 'fsdp' 43.0, and with 96 rows 68.0. All
# weights (lora_rank = 0, lr = 1e-6) under FSDP: 24.3 GiB of the policy, 3.0 of the reference, 2.4 of gathered blocks: 66.4 in all.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.51, 0.55, 0.67, 0.85 (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

init_from = 'out/gsm8k_llama2_13b_sft'
out_dir = 'out/gsm8k_llama2_13b_ppo_sparse'
shard = 'fsdp'              # what is left goes to more rows
max_rows = 96               # 96 * (256 of its own + 250 of the prompt) * 0.8 MiB of bf16 keys and values = 37.5 GiB
