# The paper's Expert Iteration: Llama-2 13B on GSM8K from the SFT checkpoint. As gsm8k_llama2_7b_ei, but for
# $ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_13b_sft.py && torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_13b_ei.py
# Memory: 61.7 GiB on each of 8 GPUs of 80 GB. Disk: 581.9 GiB, 145.5 GiB when finished.
# Not run. The paper's maj@1, maj@96, rerank@96, pass@96: 0.53, 0.59, 0.71, 0.88 (as recalled).
from config.gsm8k_llama2_7b_ei import *

init_from = 'out/gsm8k_llama2_13b_sft'
base = 'meta-llama/Llama-2-13b-hf'
out_dir = 'out/gsm8k_llama2_13b_ei'
max_rows = 64               # 64 * (512 of its own + 256 of the prompt) * 0.78 MiB of bf16 keys and values = 37.5 GiB, beside 24.2 of weights
