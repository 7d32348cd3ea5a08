# Expert Iteration after svamp_smollm2_sft, on one CPU core: 800 questions, 300 of which have worked solutions.
# $ python ei.py config/svamp_smollm2_ei.py
# Measured: 33 minutes, 8.7 GiB, validation maj@1 36 before, 34 and 31 (± 4) after its rounds: no gain; see
# assets/smollm2.md.
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
reset = 'previous'          # a round goes on from the last policy; 60 updates from the base: 35 and 36
out_dir = 'out/svamp_smollm2_ei'
n_questions = 800
n_worked = 300
n_rounds = 2
k = 4                       # 800 * 4 * 2 = 6,400 samples
max_new_tokens = 96
max_rows = 128
max_steps = 60              # a round
batch_size = 16
micro_tokens = 1024
lr = 1e-4
min_lr = 1e-6
eval_problems = 128
