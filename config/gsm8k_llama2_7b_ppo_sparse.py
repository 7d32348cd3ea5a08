# The paper's PPO: Llama-2 7B on GSM8K from the SFT checkpoint, sparse reward (Havrilla et al. 2024, section 3).
# $ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_7b_sft.py && torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_sparse.py
# $ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_llama2_7b_ppo_sparse --task=gsm8k --max_new_tokens=512
# Memory: 52.6 GiB on each of 8 GPUs of 80 GB. Disk: 61.2 GiB, 55.2 GiB when finished.
# One such GPU is enough. By the line that the script prints, for prompts of up to 250 tokens, a GPU holds bf16 weights
# and adapters, 13.6 GiB, and 3.0 of the adapters' gradients and averages; the reference is the same weights without
# the adapters. Beside these 8.3 for a micro-batch, or 36.0 of cache to draw samples. A state on the disk has only the
# adapters.
# All weights instead take FSDP: 12.6 GiB of the policy, 1.6 of the reference, 1.6 of gathered blocks.
# With --lora_rank=0 --lr=1e-6 --max_rows=64: 52.3 GiB of 80 GB, and on the disk as gsm8k_llama2_7b_sft.
# 250 iterations * 1,024 = 256,000 samples, 250 * 4 * 4 = 4,000 updates.
# Not run. The paper's maj@1: 0.44, maj@96 0.49, rerank@96 0.58, pass@96 0.77, from SFT's 0.41, 0.47, 0.54, 0.72 (as recalled).
task = 'gsm8k'
init_from = 'out/gsm8k_llama2_7b_sft'
out_dir = 'out/gsm8k_llama2_7b_ppo_sparse'
n_iterations = 250
n_rollouts = 1024
n_per_question = 4
temperature = 0.7
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 96               # 96 * (512 of its own + 256 of the prompt) * 0.5 MiB of bf16 keys and values = 36.0 GiB
epochs = 4
minibatch = 256
micro_tokens = 8192
grad_checkpointing = True
kl_coef = 0.05
lora_rank = 128             # paper (as recalled)
lr = 1e-5                   # ours: adapters take some ten times the rate of all weights
min_lr = 1e-6
