# Return-conditioned RL after svamp_smollm2_ei: one label a solution, since most have one step.
# $ python rcrl.py config/svamp_smollm2_rcrl.py
# $ torchrun --standalone --nproc_per_node=2 rcrl.py config/svamp_smollm2_rcrl.py     # on two CPU cores
# Measured: 59 minutes on two CPU cores, 7.5 GiB a process, after a round of svamp_smollm2_ei; validation maj@1 50
# (standard error 3) after [GOOD] and after [BAD]. On an H100 53, 50, 55 (seeds 0 to 2) after three of four epochs, where
# it was stopped, 2 minutes beside six other runs. See assets/smollm2.md.
task = 'svamp'
init_from = 'out/svamp_smollm2_ei'  # draws the solutions that are labelled
base = 'out/smollm2'                # where fine-tuning starts, as in the paper
out_dir = 'out/svamp_smollm2_rcrl'
n_worked = 300
k = 2                       # 2,407 * 2 = 4,814 solutions
granularity = 'solution'
max_new_tokens = 96
max_rows = 128
epochs = 4.0                # 506 to 586 updates, by what was drawn
batch_size = 16
micro_tokens = 1024
lr = 1e-4
min_lr = 1e-6
compile = 'off'
