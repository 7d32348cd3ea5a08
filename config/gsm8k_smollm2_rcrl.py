# Return-conditioned RL of SmolLM2-135M on GSM8K, on solutions of Expert Iteration's policy.
# $ python ei.py config/gsm8k_smollm2_ei.py && python rcrl.py config/gsm8k_smollm2_rcrl.py
# $ python eval.py --init_from=out/gsm8k_smollm2_rcrl --task=gsm8k && python eval.py --init_from=out/gsm8k_smollm2_rcrl --task=gsm8k --condition=bad
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 6.0 GiB, 3.0 GiB when finished.
# 7,217 questions * 8 = 57,736 solutions, and at most 3 rollouts for each of their steps.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
init_from = 'out/gsm8k_smollm2_ei'
base = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/gsm8k_smollm2_rcrl'
k = 8
rollouts = 4
right_share = 0.75
unlabelled = 0.1            # so that it makes sense to ask what the policy does without a label
max_rows = 256              # they are drawn beside what learns
epochs = 4.0
batch_size = 64
micro_tokens = 4096         # as for gsm8k_smollm2_sft
lr = 1e-4
min_lr = 1e-6
