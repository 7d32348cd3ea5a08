# Expert Iteration after svamp_smollm2_sft: 800 questions, the first 300 of which have worked solutions.
# $ python ei.py config/svamp_smollm2_ei.py
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
base = 'out/smollm2'        # each round starts anew from it, as in the paper
out_dir = 'out/svamp_smollm2_ei'
n_questions = 800
n_worked = 300
n_rounds = 2
k = 4                       # 800 * 4 * 2 = 6,400 samples
max_new_tokens = 96
max_rows = 128
max_steps = 60              # a round: as many updates from the base as SFT had
batch_size = 16
micro_tokens = 1024
lr = 1e-4
min_lr = 1e-6
eval_problems = 128
