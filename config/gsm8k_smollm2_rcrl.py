# Return-conditioned RL of SmolLM2-135M on GSM8K, on solutions of Expert Iteration's policy.
# $ python ei.py config/gsm8k_smollm2_ei.py && python rcrl.py config/gsm8k_smollm2_rcrl.py
# $ python eval.py --init_from=out/gsm8k_smollm2_rcrl --task=gsm8k && python eval.py --init_from=out/gsm8k_smollm2_rcrl --task=gsm8k --condition=bad
# Hardware: one GPU of 8 GB or more; 7,217 questions * 8 = 57,736 solutions, and at most 3 rollouts for each of their steps.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
init_from = 'out/gsm8k_smollm2_ei'
base = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/gsm8k_smollm2_rcrl'
k = 8
rollouts = 4
right_share = 0.75
unlabelled = 0.1            # so that it makes sense to ask what the policy does without a label
max_rows = 512
epochs = 4.0
batch_size = 64
lr = 1e-4
min_lr = 1e-6
