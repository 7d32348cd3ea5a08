# The paper's PPO: Llama-2 7B on GSM8K from the SFT checkpoint, sparse reward (Havrilla et al. 2024, section 3).
# $ python sft.py config/gsm8k_llama2_7b_sft.py && python ppo.py config/gsm8k_llama2_7b_ppo_sparse.py
# $ python eval.py --init_from=out/gsm8k_llama2_7b_ppo_sparse --task=gsm8k
# Hardware: policy with AdamW in fp32 6.7B * 16 bytes = 108 GB, the reference and the sampler's copy in bf16 27 GB: 135 GB
# before activations, which one GPU of 141 GB hardly leaves room for; sharding or LoRA, neither of which is there yet, would.
# 250 iterations * 1,024 = 256,000 samples, 250 * 4 * 4 = 4,000 updates.
# Not run. The paper's maj@1: 0.44, maj@96 0.49, rerank@96 0.58, pass@96 0.77, from SFT's 0.41, 0.47, 0.54, 0.72 (as recalled).
task = 'gsm8k'
init_from = 'out/gsm8k_llama2_7b_sft'
out_dir = 'out/gsm8k_llama2_7b_ppo_sparse'
n_iterations = 250
n_rollouts = 1024
n_per_question = 4
temperature = 0.7
max_rows = 16               # 16 * (256 of its own + 300 of the prompt) * 0.5 MB of bf16 keys and values = 4 GB at the most
epochs = 4
minibatch = 256
micro_tokens = 2048         # beside all of the above little memory is left for activations
grad_checkpointing = True
kl_coef = 0.05
lr = 1e-6                   # ours: the paper's rate is for LoRA
min_lr = 1e-7
