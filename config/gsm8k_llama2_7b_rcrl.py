# The paper's return-conditioned RL: Llama-2 7B on GSM8K (Havrilla et al. 2024, section 3), on solutions of Expert
# Iteration's policy.
# $ torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_7b_ei.py && torchrun --nproc_per_node=8 rcrl.py config/gsm8k_llama2_7b_rcrl.py
# $ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_llama2_7b_rcrl --task=gsm8k --max_new_tokens=512      (--condition=bad: told [BAD] before every step)
# Memory: 50.7 GiB on each of 8 GPUs of 80 GB. Disk: 301.2 GiB, 150.6 GiB when finished.
# 7,217 questions * 8 = 57,736 solutions, and at most 7 rollouts for each of their steps.
# Not run. The paper's maj@1 after RCRL: 0.45, maj@96 0.50, rerank@96 0.54, pass@96 0.73, from SFT's 0.41, 0.47, 0.54, 0.72 (as recalled).
task = 'gsm8k'
init_from = 'out/gsm8k_llama2_7b_ei'
base = 'meta-llama/Llama-2-7b-hf'
out_dir = 'out/gsm8k_llama2_7b_rcrl'
k = 8
rollouts = 8
threshold = 0.5             # paper (as recalled)
right_share = 0.75          # the paper found an even mix the worst (as recalled)
max_new_tokens = 512        # 256 would cut 3.4% of the data set's own solutions off, in Llama's tokens
max_rows = 64               # as for gsm8k_llama2_7b_sft
epochs = 4.0                # the SFT settings
batch_size = 128
micro_tokens = 8192
grad_checkpointing = True
lr = 2e-5
min_lr = 2e-7
