# The demo's base model: a small Llama trained from scratch as a plain language model, on unlabelled text of the
# task's world.
# $ python data/arithmetic/prepare.py && python sft.py config/demo_base.py
text_file = 'data/arithmetic/base.jsonl'  # 24,256 texts: facts, one-step problems, tales, bare questions
out_dir = 'out/demo_base'
n_layer = 4
n_head = 4
n_kv_head = 1               # one key head for all four: a decoding step is bound by reading keys and values
n_embd = 128                # 0.8M parameters
block_size = 256            # the longest text has 103 tokens, the longest solution with its question 125
n_merges = 500              # words of the small world become single tokens
epochs = 1.0                # 24,000 / 16 = 1,500 updates; 256 texts are held out
batch_size = 16             # a small model gains more from many updates than from exact ones
micro_tokens = 2048         # small micro-batches have little padding and fit the caches of a CPU
lr = 2e-3                   # at 3e-3 some seeds are half as good
min_lr = 1e-4
eval_interval = 2000        # once, at the end
max_new_tokens = 110        # the longest solution has 73 tokens; a policy may need more
max_rows = 1024             # a small model decodes many rows at a time
