# The paper's Expert Iteration: Llama-2 7B on GSM8K from the SFT checkpoint (Havrilla et al. 2024, section 3).
# $ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_7b_sft.py && torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_7b_ei.py
# $ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_llama2_7b_ei --task=gsm8k --max_new_tokens=512
# Memory: 60.6 GiB on each of 8 GPUs of 80 GB. Disk: 301.2 GiB, 75.3 GiB when finished.
# As for gsm8k_llama2_7b_sft, and a checkpoint for each round; states are removed after it. 7,217
# questions * 96 samples * 2 rounds = 1,385,664 samples.
# Not run. The paper's maj@1 after EI: 0.48, maj@96 0.55, pass@96 0.80, from 0.41, 0.47 and 0.72 after SFT (as recalled).
task = 'gsm8k'
init_from = 'out/gsm8k_llama2_7b_sft'
base = 'meta-llama/Llama-2-7b-hf'  # fine-tuned from the pretrained weights again, every round
out_dir = 'out/gsm8k_llama2_7b_ei'
n_rounds = 2                # from an SFT checkpoint two suffice (as recalled)
k = 96
temperature = 1.0
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 128              # 128 * (512 of its own + 256 of the prompt) * 0.5 MiB of bf16 keys and values = 48.0 GiB, beside 12.6 of weights
epochs = 4.0                # the SFT settings
batch_size = 128
micro_tokens = 8192
grad_checkpointing = True
lr = 2e-5
min_lr = 2e-7
