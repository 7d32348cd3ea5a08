# SFT of SmolLM2-135M for SVAMP: trained on MAWPS and ASDiv-A, tested on SVAMP's 1,000 problems (its authors' protocol).
# $ python data/svamp/prepare.py && python sft.py config/svamp_smollm2_sft.py
# $ python eval.py --init_from=out/svamp_smollm2_sft --task=svamp --max_new_tokens=96
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# Not run: it needs a GPU and the model hub.
task = 'svamp'
init_from = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/svamp_smollm2_sft'
epochs = 4.0
batch_size = 64
micro_tokens = 4096         # as for gsm8k_smollm2_sft
max_new_tokens = 96         # solutions are one to three short lines
lr = 1e-4
min_lr = 1e-6
