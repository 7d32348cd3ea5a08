# The paper's SFT: Llama-2 7B on GSM8K (Havrilla et al. 2024, section 3).
# $ python data/gsm8k/prepare.py && python sft.py config/gsm8k_llama2_7b_sft.py
# Hardware: fp32 weights, gradients and two moments are 6.7e9 * 16 bytes = 108 GB before activations: one GPU of 141 GB, and
# several smaller ones only once training is sharded, which it is not yet.
# Not run. The paper's maj@1 on GSM8K after SFT: 0.41, maj@96 0.47, pass@96 0.72 (as recalled).
task = 'gsm8k'
init_from = 'meta-llama/Llama-2-7b-hf'  # needs access to the repository on the hub, or a folder with the files
out_dir = 'out/gsm8k_llama2_7b_sft'
epochs = 4.0                # paper (as recalled): 7,217 / 128 * 4 = 226 updates
batch_size = 128            # paper (as recalled)
micro_tokens = 8192         # activations of 32 layers are what memory is short of
grad_checkpointing = True
lr = 2e-5                   # paper (as recalled), cosine to 2e-7
min_lr = 2e-7
warmup = 0.03
max_rows = 64               # 64 * (256 of its own + 300 of the prompt) * 0.5 MB of bf16 keys and values = 18 GB, beside the optimizer
