# PPO of SmolLM2-135M on GSM8K, sparse reward.
# $ python sft.py config/gsm8k_smollm2_sft.py && python ppo.py config/gsm8k_smollm2_ppo_sparse.py
# $ python eval.py --init_from=out/gsm8k_smollm2_ppo_sparse --task=gsm8k
# Memory: 10.0 GiB on one GPU of 16 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# 200 iterations * 1,024 = 204,800 samples, 200 * 2 * 4 = 1,600 updates.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
init_from = 'out/gsm8k_smollm2_sft'
out_dir = 'out/gsm8k_smollm2_ppo_sparse'
n_iterations = 200
n_rollouts = 1024
n_per_question = 8          # a weak policy is seldom right: more samples more often show a difference
max_rows = 512
epochs = 2
minibatch = 256
micro_tokens = 8192
lr = 5e-6
min_lr = 5e-7
critic_lr = 1e-5
