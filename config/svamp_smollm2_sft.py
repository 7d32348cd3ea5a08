# SFT of SmolLM2-135M-Instruct on 300 worked problems of MAWPS and ASDiv-A, on one CPU core.
# $ python data/smollm2.py && python data/svamp/prepare.py && python sft.py config/svamp_smollm2_sft.py
# Measured: 11 minutes, 8 GiB (by svamp_smollm2_ei, the same loop), validation maj@1 36 (± 4); see assets/smollm2.md.
task = 'svamp'
init_from = 'out/smollm2'
out_dir = 'out/svamp_smollm2_sft'
n_worked = 300              # for the other 500 questions of the chain only the answer is known
max_steps = 60              # 60 * 16 / 300 = 3.2 epochs
batch_size = 16
micro_tokens = 1024         # a CPU needs no more rows at a time
lr = 1e-4
min_lr = 1e-6
eval_interval = 30
eval_problems = 128
max_new_tokens = 96         # solutions are one to three short lines
max_rows = 128
