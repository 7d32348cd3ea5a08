# The demo's Expert Iteration: final answers of 2,500 questions, the first 500 of which also have worked solutions.
# $ python ei.py config/demo_ei.py      (after config/demo_sft.py)
init_from = 'out/demo_sft'  # draws the first round's samples
reset = 'previous'          # a round goes on from the last policy; the paper's 'base' takes twice as many updates
out_dir = 'out/demo_ei'
n_worked = 500
n_questions = 2500          # all of train but the validation slice
n_rounds = 2
k = 4                       # 2,500 * 4 * 2 = 20,000 samples
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
max_steps = 250             # a round: with the 150 of demo_sft, 650 in all, as many as demo_sft_long takes
batch_size = 16
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
