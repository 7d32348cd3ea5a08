# The outcome reward model for the SFT policy of gsm8k_llama2_7b_sft.
# $ torchrun --nproc_per_node=8 rewards.py config/gsm8k_llama2_7b_orm.py
# Memory: 60.6 GiB on each of 8 GPUs of 80 GB. Disk: 251.0 GiB, 100.4 GiB when finished.
# 7,217 questions * 8 = 57,736 samples.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
kind = 'orm'
init_from = 'out/gsm8k_llama2_7b_sft'
out_dir = 'out/gsm8k_llama2_7b_orm'
k = 8
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 128              # as for gsm8k_llama2_7b_ei
epochs = 1.0
batch_size = 64
micro_tokens = 8192
grad_checkpointing = True
lr = 1e-5
min_lr = 1e-7
