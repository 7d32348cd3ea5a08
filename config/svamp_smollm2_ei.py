# Expert Iteration for SVAMP, after svamp_smollm2_sft.
# $ python ei.py config/svamp_smollm2_ei.py && python eval.py --init_from=out/svamp_smollm2_ei --task=svamp --max_new_tokens=96
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 6.0 GiB, 1.5 GiB when finished.
# Not run: it needs a GPU and the model hub.
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
base = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/svamp_smollm2_ei'
n_rounds = 2
k = 16                      # short solutions are cheap
max_rows = 512
max_new_tokens = 96
epochs = 4.0
batch_size = 64
micro_tokens = 4096         # as for gsm8k_smollm2_sft
lr = 1e-4
min_lr = 1e-6
