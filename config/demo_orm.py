# The demo's outcome reward model: solutions of the demo's SFT policy, right or wrong by their final answers.
# $ python rewards.py config/demo_orm.py      (after config/demo_ei.py)
kind = 'orm'
init_from = 'out/demo_sft'  # the policy that is judged
base = 'out/demo_ei'        # where the reward model starts: who solves better judges better
out_dir = 'out/demo_orm'
samples = 'out/demo_ei/samples_round1.jsonl'  # the SFT policy's solutions, drawn there already
n_questions = 2500          # all of train but the validation slice
k = 4                       # as they were drawn
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
epochs = 1.0
batch_size = 16             # a small model gains more from many updates than from exact ones
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
