# The demo's outcome reward model: solutions of the demo's SFT policy, right or wrong by their final answers.
# $ python rewards.py config/demo_orm.py      (after config/demo_sft.py)
kind = 'orm'
init_from = 'out/demo_sft'  # the policy that is judged, and whose weights the reward model starts from
out_dir = 'out/demo_orm'
n_questions = 3000
k = 4
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
epochs = 2.0
batch_size = 32
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
