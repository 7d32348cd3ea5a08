# SFT of SmolLM2-135M-Instruct on 300 worked problems of MAWPS and ASDiv-A: on one CPU core, or a GPU.
# $ python data/smollm2.py && python data/svamp/prepare.py && python sft.py config/svamp_smollm2_sft.py
# On a GPU give this chain's recipes --max_rows=1024 --micro_tokens=8192.
# Measured: 11 minutes on a core (with 128 validation questions), 1 on an H100; validation maj@1 32, 32, 33 (seeds 0
# to 2); see assets/smollm2.md.
task = 'svamp'
init_from = 'out/smollm2'
out_dir = 'out/svamp_smollm2_sft'
n_worked = 300              # of the other 2,107 questions only the answer is known
max_steps = 60              # 60 * 16 / 300 = 3.2 epochs; 400 updates don't help (assets/smollm2.md)
batch_size = 16
micro_tokens = 1024         # a CPU needs no more rows at a time
lr = 1e-4
min_lr = 1e-6
eval_interval = 30
max_new_tokens = 96         # solutions are one to three short lines
max_rows = 128
compile = 'off'             # on an H100 compiling takes as long as 300 of these updates, and gains nothing
