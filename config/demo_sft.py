# The demo's SFT: 500 worked solutions, from the base model.
# $ python sft.py config/demo_sft.py      (after config/demo_base.py)
init_from = 'out/demo_base'
out_dir = 'out/demo_sft'
n_worked = 500
max_steps = 150             # 150 * 16 / 500 = 4.8 epochs
batch_size = 16
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
eval_interval = 75
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
