# The paper's PPO: Llama-2 13B on GSM8K from the SFT checkpoint, sparse reward. As gsm8k_llama2_7b_ppo_sparse, except
# $ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_13b_sft.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_13b_ppo_sparse.py
# Memory: 68.0 GiB on each of 8 GPUs of 80 GB. Disk: 114.3 GiB, 104.8 GiB when finished.
# A GPU holds all bf16 weights and adapters, 25.8 GiB, and the adapters' gradients and averages, 4.7; beside these it
# needs 11.4 for a micro-batch, or 37.5 of cache to draw samples. Sharded it would hold less, but draw from a copy.
# All weights take FSDP: 24.3 GiB of the policy, 3.0 of the reference, 2.4 of gathered blocks.
# With --lora_rank=0 --lr=1e-6 --max_rows=20 --shard=fsdp: 65.6 GiB of 80 GB.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.51, 0.55, 0.67, 0.85 (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

init_from = 'out/gsm8k_llama2_13b_sft'
out_dir = 'out/gsm8k_llama2_13b_ppo_sparse'
shard = 'ddp'               # samples are drawn from the weights themselves
max_rows = 64               # 64 * (512 of its own + 256 of the prompt) * 0.78 MiB of bf16 keys and values = 37.5 GiB
