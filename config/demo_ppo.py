# The demo's PPO: sparse reward, from the same SFT checkpoint and on the same questions as Expert Iteration.
# $ python ppo.py config/demo_ppo.py      (after config/demo_sft.py)
init_from = 'out/demo_sft'
out_dir = 'out/demo_ppo'
n_questions = 2500          # all of train but the validation slice; only their final answers are used
n_iterations = 10           # 10 * 1,024 = 10,240 samples, half of Expert Iteration's
n_rollouts = 1024
n_per_question = 4
temperature = 0.7
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
advantage = 'group'         # a critic this small would need more samples than the run has
kl_coef = 0.0               # 0.01 was slower, and the run is too short to drift far
epochs = 1                  # a fresh sample costs less than a second pass over an old one
minibatch = 128             # 10 * 1,024 / 128 = 80 updates; with 64 the first ones do harm, by noise
micro_tokens = 2048
lr = 3e-4                   # at 1e-3 noise undoes in the first iterations what the rest repairs
min_lr = 2e-5
warmup = 0.1
eval_interval = 5
