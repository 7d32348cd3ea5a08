# Expert Iteration for SVAMP, after svamp_smollm2_sft.
# $ python ei.py config/svamp_smollm2_ei.py && python eval.py --init_from=out/svamp_smollm2_ei --task=svamp
# Hardware: one GPU of 8 GB or more. Not run: it needs a GPU and the model hub.
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
base = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/svamp_smollm2_ei'
n_rounds = 2
k = 16                      # short solutions are cheap
max_rows = 1024
max_new_tokens = 96
epochs = 4.0
batch_size = 64
lr = 1e-4
min_lr = 1e-6
