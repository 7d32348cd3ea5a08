# The paper's Expert Iteration without SFT: Llama-2 7B on GSM8K from the pretrained weights (Havrilla et al. 2024).
# $ python data/gsm8k/prepare.py && torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_7b_few_shot_ei.py
# $ torchrun --nproc_per_node=8 eval.py --init_from=meta-llama/Llama-2-7b-hf --few_shot=2 --task=gsm8k --max_new_tokens=512 --out_dir=out/llama2_7b_prompted     (where it starts)
# Memory: 56.3 GiB on each of 8 GPUs of 80 GB. Disk: 376.5 GiB, 150.6 GiB when finished.
# 7,217 questions * 96 samples * 5 rounds = 3,464,160 samples; k = 4 is a cheap choice (as recalled).
# Not run. The paper's maj@1: 0.05 prompted, 0.31 after five rounds (as recalled).
task = 'gsm8k'
init_from = 'meta-llama/Llama-2-7b-hf'
base = 'meta-llama/Llama-2-7b-hf'
out_dir = 'out/gsm8k_llama2_7b_few_shot_ei'
few_shot = 2                # worked examples in the first round's prompts; later rounds have none
include_sft = False         # no human solution is learned from
n_rounds = 5                # paper: 4 to 5 from a pretrained model
k = 96
temperature = 1.0
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 80               # 80 * (512 of its own + 608 of the prompt) * 0.5 MiB of bf16 keys and values = 43.8 GiB
epochs = 4.0
batch_size = 128
micro_tokens = 8192
grad_checkpointing = True
lr = 2e-5
min_lr = 2e-7
