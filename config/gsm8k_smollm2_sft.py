# SFT of SmolLM2-135M on GSM8K: what one small GPU does in minutes.
# $ python data/gsm8k/prepare.py && python sft.py config/gsm8k_smollm2_sft.py
# $ python eval.py --init_from=out/gsm8k_smollm2_sft --task=gsm8k
# Hardware: one GPU of 8 GB or more (135M * 16 bytes = 2.2 GB and activations). Qwen2.5-0.5B: --init_from=Qwen/Qwen2.5-0.5B, 16 GB.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/gsm8k_smollm2_sft'
epochs = 4.0                # 7,217 / 64 * 4 = 452 updates
batch_size = 64
micro_tokens = 16384        # logits: at most 16,384 * 49,152 * 4 bytes = 3.2 GB in fp32
lr = 1e-4                   # five times the paper's, for a model fifty times smaller
min_lr = 1e-6
