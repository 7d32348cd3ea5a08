# SFT of SmolLM2-135M on GSM8K: what one small GPU does in minutes.
# $ python data/gsm8k/prepare.py && python sft.py config/gsm8k_smollm2_sft.py
# $ python eval.py --init_from=out/gsm8k_smollm2_sft --task=gsm8k
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# (135M * 16 bytes = 2.0 GiB and activations.) With --init_from=Qwen/Qwen2.5-0.5B --micro_tokens=2048: 12.6 GiB of 16 GB.
# With --micro_tokens=16384: 16.3 GiB of 24 GB, in fewer and larger pieces.
# Measured with --init_from=out/smollm2 (data/smollm2.py) --compile=off --micro_tokens=16384: 5 minutes on an H100 beside
# nine other runs; maj@1 9.1 of the first 1,024 test problems (standard error 0.9), pass@8 26. Not run from the hub.
task = 'gsm8k'
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/gsm8k_smollm2_sft'
epochs = 4.0                # 7,217 / 64 * 4 = 452 updates
batch_size = 64
micro_tokens = 4096         # what 8 GB have room for; the result does not depend on it
lr = 1e-4                   # five times the paper's, for a model fifty times smaller
min_lr = 1e-6
