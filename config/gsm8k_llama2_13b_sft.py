# The paper's SFT: Llama-2 13B on GSM8K. As gsm8k_llama2_7b_sft, but for
# $ python data/gsm8k/prepare.py && torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_13b_sft.py
# Memory: 64.9 GiB on each of 8 GPUs of 80 GB. Disk: 533.4 GiB, 242.4 GiB when finished.
# FSDP: a GPU holds 24.3 GiB of weights, gradients and averages and 2.4 of gathered blocks; beside these 10.7 for a
# micro-batch, or to draw samples a bf16 copy of all weights, 24.2, and 14.1 of cache (for prompts of up to 250 tokens).
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.48, 0.53, 0.68, 0.84 (as recalled).
from config.gsm8k_llama2_7b_sft import *

init_from = 'meta-llama/Llama-2-13b-hf'
out_dir = 'out/gsm8k_llama2_13b_sft'
max_rows = 24               # 24 * (512 of its own + 256 of the prompt) * 0.78 MiB of bf16 keys and values = 14.1 GiB
