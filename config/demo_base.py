# The demo's base model: a small Llama trained from scratch as a plain language model, on unlabelled text of the
# task's world.
# $ python data/arithmetic/prepare.py && python sft.py config/demo_base.py
text_file = 'data/arithmetic/base.jsonl'  # 30,000 texts: facts, one-step problems, tales, bare questions
out_dir = 'out/demo_base'
n_layer = 4
n_head = 4
n_kv_head = 1               # one key head for all four: a decoding step is bound by reading keys and values
n_embd = 128                # 0.8M parameters
block_size = 256            # the longest text has 130 tokens, the longest solution with its question 157
n_merges = 500              # words of the small world become single tokens
epochs = 2.0                # 29,744 * 2 / 16 = 3,718 updates
batch_size = 16             # a small model gains more from many updates than from exact ones
micro_tokens = 2048         # small micro-batches have little padding and fit the caches of a CPU
lr = 3e-3
min_lr = 1e-4
eval_interval = 2000
max_new_tokens = 110        # the longest solution has about 100 tokens
max_rows = 1024             # a small model decodes many rows at a time
