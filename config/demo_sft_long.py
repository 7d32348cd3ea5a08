# The demo's control: SFT on the same 500 solutions for as many updates as SFT and both rounds of Expert Iteration
# together. If EI gained only by training longer, this run would gain as much.
# $ python sft.py config/demo_sft_long.py      (after config/demo_base.py)
init_from = 'out/demo_base'
out_dir = 'out/demo_sft_long'
n_worked = 500
max_steps = 650             # 150 + 2 * 250
batch_size = 16
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
eval_interval = 325         # the best of two checkpoints by validation maj@1, as EI chooses from two rounds
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
