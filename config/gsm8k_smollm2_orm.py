# The outcome reward model for the SFT policy of gsm8k_smollm2_sft.
# $ python rewards.py config/gsm8k_smollm2_orm.py
# Memory: 6.5 GiB on one GPU of 8 GB. Disk: 5.0 GiB, 2.0 GiB when finished.
# 7,217 questions * 8 = 57,736 samples.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
kind = 'orm'
init_from = 'out/gsm8k_smollm2_sft'
out_dir = 'out/gsm8k_smollm2_orm'
k = 8                       # a weak policy is seldom right: more samples find more of both kinds
max_rows = 512
epochs = 2.0
batch_size = 64
micro_tokens = 4096         # as for gsm8k_smollm2_sft
lr = 5e-5
min_lr = 1e-6
