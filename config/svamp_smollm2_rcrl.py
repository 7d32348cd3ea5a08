# Return-conditioned RL after svamp_smollm2_ei: one label a solution, since most have one step.
# $ python rcrl.py config/svamp_smollm2_rcrl.py
task = 'svamp'
init_from = 'out/svamp_smollm2_ei'  # draws the solutions that are labelled
base = 'out/smollm2'
out_dir = 'out/svamp_smollm2_rcrl'
n_questions = 800
n_worked = 300
k = 4
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
