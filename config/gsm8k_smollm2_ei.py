# Expert Iteration of SmolLM2-135M on GSM8K, with few samples a question.
# $ python sft.py config/gsm8k_smollm2_sft.py && python ei.py config/gsm8k_smollm2_ei.py
# $ python eval.py --init_from=out/gsm8k_smollm2_ei --task=gsm8k && python eval.py --compare out/gsm8k_smollm2_sft out/gsm8k_smollm2_ei
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 6.5 GiB, 2.0 GiB when finished.
# 7,217 questions * 8 samples * 3 rounds = 173,208 samples.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
init_from = 'out/gsm8k_smollm2_sft'
base = 'HuggingFaceTB/SmolLM2-135M'
out_dir = 'out/gsm8k_smollm2_ei'
n_rounds = 3
k = 8                       # a weak policy is seldom right: more samples help more than more rounds
max_rows = 512
epochs = 4.0
batch_size = 64
micro_tokens = 4096         # as for gsm8k_smollm2_sft
lr = 1e-4
min_lr = 1e-6
