# Return-conditioned RL after svamp_smollm2_ei, on one CPU core: one label a solution, since most have one step.
# $ python rcrl.py config/svamp_smollm2_rcrl.py
# Measured: 15 minutes, 8.7 GiB, validation maj@1 37 after [GOOD], 37 after [BAD] (± 4); see
# assets/smollm2.md.
task = 'svamp'
init_from = 'out/svamp_smollm2_ei'  # draws the solutions that are labelled
base = 'out/svamp_smollm2_sft'      # where fine-tuning starts; in the paper, the base
out_dir = 'out/svamp_smollm2_rcrl'
n_questions = 800
n_worked = 300
k = 2                       # 800 * 2 = 1,600 solutions
granularity = 'solution'
max_new_tokens = 96
max_rows = 128
max_steps = 60
batch_size = 16
micro_tokens = 1024
lr = 1e-4
min_lr = 1e-6
eval_interval = 60
eval_problems = 128
