# PPO after svamp_smollm2_sft: sparse reward, all weights. For a GPU: a CPU core would take eight minutes an iteration.
# $ python ppo.py config/svamp_smollm2_ppo.py
# Measured: 4 minutes on an H100 beside six other runs, 10.1 GiB; validation maj@1 32, 32, 33 before, 41, 43, 44 after
# (seeds 0 to 2, standard error 3), KL 0.02 nats a token. On 800 questions, lr = 5e-5 fell from 36 to 13 in three
# iterations. See assets/smollm2.md.
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
out_dir = 'out/svamp_smollm2_ppo'
n_iterations = 32           # 32 * 512 = 16,384 samples; only questions and their answers are used
n_rollouts = 512
n_per_question = 8
max_new_tokens = 96
max_rows = 256
advantage = 'group'         # a critic would need more samples than the run has
kl_coef = 0.01
epochs = 1
minibatch = 128
micro_tokens = 1024
lr = 1e-5                   # 3e-6 ended alike (one seed)
min_lr = 1e-6
warmup = 0.1
eval_interval = 8
save_interval = 8
compile = 'off'
