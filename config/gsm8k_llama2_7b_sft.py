# The paper's SFT: Llama-2 7B on GSM8K (Havrilla et al. 2024, section 3).
# $ python data/gsm8k/prepare.py && torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_7b_sft.py
# Memory: 50.7 GiB on each of 8 GPUs of 80 GB. Disk: 276.1 GiB, 125.5 GiB when finished.
# fp32 weights, gradients and Adam's two averages are 6.7e9 * 16 bytes = 100 GiB, so shard = 'auto' takes FSDP. By the
# line that the script prints, for prompts of up to 250 tokens, a GPU then holds 12.6 GiB of these and 1.6 of gathered
# blocks, and beside them 7.8 for a micro-batch, or to draw samples a bf16 copy of all weights, 12.6, and 24.0 of cache.
# A state on the disk is 6.7e9 * 12 bytes = 75.3 GiB, and best/ and last/ take 25.1 each in fp32.
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
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 64               # 64 * (512 of its own + 256 of the prompt) * 0.5 MiB of bf16 keys and values = 24.0 GiB
