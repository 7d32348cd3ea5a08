# PPO after svamp_smollm2_sft: sparse reward, all weights, on one CPU core; four minutes an iteration, 6.2 GiB.
# $ python ppo.py config/svamp_smollm2_ppo.py
# Not run at this rate. At lr = 5e-5 validation maj@1 fell from 36 to 13 in three iterations (approx_kl 0.04).
task = 'svamp'
init_from = 'out/svamp_smollm2_sft'
out_dir = 'out/svamp_smollm2_ppo'
n_questions = 800           # only their answers are used
n_iterations = 6            # 6 * 256 = 1,536 samples, a quarter of Expert Iteration's
n_rollouts = 256
n_per_question = 4
max_new_tokens = 96
max_rows = 256
advantage = 'group'         # a critic would need more samples than the run has
kl_coef = 0.01
epochs = 1
minibatch = 64
micro_tokens = 1024
lr = 1e-5
min_lr = 1e-6
warmup = 0.1
eval_interval = 3
eval_problems = 128
save_interval = 3
