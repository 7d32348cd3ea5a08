# The outcome reward model for the SFT policy of gsm8k_llama2_7b_sft.
# $ python rewards.py config/gsm8k_llama2_7b_orm.py
# Hardware: as for gsm8k_llama2_7b_sft, whose optimizer it shares; 7,217 questions * 8 = 57,736 samples.
# Not run: it needs a GPU and the model hub.
task = 'gsm8k'
kind = 'orm'
init_from = 'out/gsm8k_llama2_7b_sft'
out_dir = 'out/gsm8k_llama2_7b_orm'
k = 8
max_rows = 192              # 192 * (256 of its own + 300 of the prompt) * 0.5 MB of bf16 keys and values = 53 GB at the most
epochs = 1.0
batch_size = 64
micro_tokens = 8192
grad_checkpointing = True
lr = 1e-5
min_lr = 1e-7
