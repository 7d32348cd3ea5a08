# SFT of GPT-2 small (124M) on GSM8K's 7,217 training solutions (7,473 less the validation slice).
# $ python data/gsm8k/prepare.py && python sft.py config/gsm8k_gpt2_sft.py && python eval.py --init_from=out/gsm8k_gpt2_sft --task=gsm8k
# Memory: 6.6 GiB on one GPU of 8 GB. Disk: 5.1 GiB, 2.3 GiB when finished.
# fp32 weights, gradients and two moments are 124M * 16 bytes = 1.9 GiB; the rest is activations, or keys and values
# to draw samples.
# Not run: it needs a GPU and the model hub. GPT-2 small solves only some percent of GSM8K, whatever one does.
task = 'gsm8k'
init_from = 'gpt2'          # 1,024 tokens of context; the longest question with its solution takes 433
out_dir = 'out/gsm8k_gpt2_sft'
epochs = 8.0                # a small model wants more passes than the paper's 4
batch_size = 128            # 7,217 / 128 = 57 updates an epoch, 452 in all
micro_tokens = 8192         # activations of 12 layers; logits are computed by chunks
lr = 1e-4
min_lr = 1e-6
