# The demo's SFT: 1,000 worked solutions, from the base model.
# $ python sft.py config/demo_sft.py      (after config/demo_base.py)
init_from = 'out/demo_base'
out_dir = 'out/demo_sft'
n_worked = 1000
epochs = 10.0               # 1,000 * 10 / 32 = 313 updates
batch_size = 32
micro_tokens = 2048
lr = 2e-3
min_lr = 1e-4
eval_interval = 100
max_new_tokens = 110
max_rows = 256
