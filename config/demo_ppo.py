# The demo's PPO: sparse rewards, from the same SFT checkpoint as Expert Iteration.
# $ python ppo.py config/demo_ppo.py      (after config/demo_sft.py)
init_from = 'out/demo_sft'
out_dir = 'out/demo_ppo'
n_questions = 6000          # all of train but the validation slice
n_iterations = 20
n_rollouts = 1024
n_per_question = 4
temperature = 1.0
max_new_tokens = 110
max_rows = 1024
epochs = 2
minibatch = 128
micro_tokens = 4096
lr = 3e-4
min_lr = 3e-5
weight_decay = 0.0
eval_interval = 5
