# The demo's base model: a small Llama trained from scratch as a plain language model on unlabelled text of the task's world.
# $ python data/arithmetic/prepare.py && python sft.py config/demo_base.py
text_file = 'data/arithmetic/base.jsonl'  # 30,000 texts: facts, one-step problems, questions without answers
out_dir = 'out/demo_base'
n_layer = 4
n_head = 4
n_kv_head = 1               # one key head for all four: a decoding step is bound by reading keys and values
n_embd = 128                # 0.8M parameters
n_merges = 500              # words of the small world become single tokens
epochs = 2.0
batch_size = 32             # a small model gains more from many updates than from exact ones
micro_tokens = 2048         # small micro-batches have little padding and fit the caches of a CPU
lr = 4e-3
min_lr = 2e-4
warmup = 0.03
eval_interval = 1000
eval_problems = 64          # a base model is judged by its loss; maj@1 is near zero
max_new_tokens = 110        # the longest solution has about 100 tokens
