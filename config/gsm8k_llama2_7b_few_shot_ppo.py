# The paper's PPO without SFT: Llama-2 7B on GSM8K from the pretrained weights, sparse reward (Havrilla et al. 2024).
# $ python data/gsm8k/prepare.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_few_shot_ppo.py
# $ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_llama2_7b_few_shot_ppo --few_shot=2 --task=gsm8k --max_new_tokens=512
# Memory: 51.6 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# As for gsm8k_llama2_7b_ppo_sparse, of which this is a variant, with longer prompts.
# Not run. The paper's maj@1: 0.05 prompted, 0.32 after PPO (as recalled).
from config.gsm8k_llama2_7b_ppo_sparse import *

init_from = 'meta-llama/Llama-2-7b-hf'
out_dir = 'out/gsm8k_llama2_7b_few_shot_ppo'
few_shot = 2                # worked examples before every question, in training as at evaluation
max_rows = 64               # 64 * (512 of its own + 608 of the prompt) * 0.5 MiB of bf16 keys and values = 35.0 GiB
