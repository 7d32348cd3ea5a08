# Expert Iteration after svamp_smollm2_sft: 2,407 questions, of which 300 have worked solutions.
# $ python ei.py config/svamp_smollm2_ei.py
# $ torchrun --standalone --nproc_per_node=2 ei.py config/svamp_smollm2_ei.py     # on two CPU cores
# Measured: 4 minutes on an H100 beside six other runs, 4.2 GiB; validation maj@1 32, 32, 33 before, 48, 49, 46 after a
# round and 57, 54, 53 after both (seeds 0 to 2, standard error 3). On two CPU cores a round took 46 minutes and 6.9 GiB
# a process (seed 0: 36 before, 55 after, of 128 questions). See assets/smollm2.md.
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
base = 'out/smollm2'        # where each round starts, as in the paper
out_dir = 'out/svamp_smollm2_ei'
n_worked = 300
n_rounds = 2
k = 4                       # 2,407 * 4 * 2 = 19,256 samples
max_new_tokens = 96
max_rows = 128
epochs = 4.0                # of a growing set: some 310 and 440 updates
batch_size = 16
micro_tokens = 1024
lr = 1e-4
min_lr = 1e-6
compile = 'off'
