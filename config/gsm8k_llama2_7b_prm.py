# The process reward model for the SFT policy of gsm8k_llama2_7b_sft.
# $ torchrun --nproc_per_node=8 rewards.py config/gsm8k_llama2_7b_prm.py
# Hardware: as for gsm8k_llama2_7b_sft, whose optimizer it shares; 7,217 questions * 2 solutions * about 4 steps * 8 = 460,000 samples.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
kind = 'prm'
init_from = 'out/gsm8k_llama2_7b_sft'
out_dir = 'out/gsm8k_llama2_7b_prm'
k = 2
rollouts = 8
max_rows = 192              # as for gsm8k_llama2_7b_ei
epochs = 1.0
batch_size = 64
micro_tokens = 8192
grad_checkpointing = True
lr = 1e-5
min_lr = 1e-7
