# SFT of GPT-2 small (124M) on GSM8K's 7,217 training solutions (7,473 less the validation slice).
# $ python data/gsm8k/prepare.py && python sft.py config/gsm8k_gpt2_sft.py && python eval.py --init_from=out/gsm8k_gpt2_sft --task=gsm8k
# Hardware: one GPU of 8 GB: fp32 weights, gradients and two moments are 124M * 16 bytes = 2 GB, the rest is activations.
# Not run: this recipe needs a GPU and the model hub. GPT-2 small solves few GSM8K problems whatever one does (some percent).
task = 'gsm8k'
init_from = 'gpt2'          # 1,024 tokens of context; the longest question with its solution takes 433
out_dir = 'out/gsm8k_gpt2_sft'
epochs = 8.0                # a small model wants more passes than the paper's 4
batch_size = 128            # 7,217 / 128 = 57 updates an epoch, 452 in all
micro_tokens = 16384        # logits are the largest tensor: at most 16,384 * 50,257 * 4 bytes = 3.3 GB in fp32
lr = 1e-4
min_lr = 1e-6
