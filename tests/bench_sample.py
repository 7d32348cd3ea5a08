"""
How fast is the sampler? The same random weights, prompts and output lengths for ours and for each engine that is installed, in
interleaved rounds, with the medians and their ratios to ours. A run by hand, not a test: nothing here can fail.

The work: prompts of 20 to 150 tokens, K samples of each, whose lengths are log-normal with median 75 and at most 128, known to
nobody in advance (an engine is stopped there, or its row's surplus is not counted). Tokens a second are of the samples alone.

$ python tests/bench_sample.py                                     # the Llama shape in fp32, one thread, 32 prompts * 8
$ python tests/bench_sample.py --prompts=4 --k=96 --dtype=bfloat16
$ python tests/bench_sample.py --shape=gpt2 --threads=2
$ python tests/bench_sample.py --shape=llama7b --device=cuda --dtype=bfloat16 --prompts=8 --k=32 --engines=ours
"""
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# -----------------------------------------------------------------------------
shape = 'llama'       # 'demo' (0.8M), 'llama' (8 layers, 512 wide), 'gpt2' (124M), 'llama1b', 'llama7b'
prompts = 32
k = 8                 # samples a prompt
median_tokens = 75    # of the samples' lengths
spread = 0.5          # standard deviation of the logarithm of a length
most_tokens = 128     # the longest sample
shortest = 20         # tokens of a prompt
longest = 150
engines = 'ours,transformers_dynamic,transformers_static'
max_rows = 256        # ours: samples decoded at a time
batch = 64            # transformers: samples decoded at a time
dtype = 'float32'     # or 'bfloat16'
threads = 1
rounds = 3
device = 'cpu'
seed = 0
# -----------------------------------------------------------------------------

SHAPES = {
    'demo': dict(vocab_size=704, n_layer=4, n_head=4, n_kv_head=1, n_embd=128, head_dim=32, n_inner=352),
    'llama': dict(vocab_size=4096, n_layer=8, n_head=8, n_kv_head=8, n_embd=512, head_dim=64, n_inner=1408, tied=False),
    'gpt2': dict(family='gpt2', vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, head_dim=64, n_inner=3072, norm='layer',
                 activation='gelu_tanh', rope_theta=0.0, qkv_bias=True, out_bias=True, mlp_bias=True),
    'llama1b': dict(vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, head_dim=64, n_inner=5632, tied=False),
    'llama7b': dict(vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, n_inner=11008, tied=False),
}

if __name__ == '__main__':
    from config import override
    settings = override(globals())
    os.environ['OMP_NUM_THREADS'] = str(threads)  # before torch is loaded
    import random
    import resource
    import statistics
    import tempfile

    import torch

    from config import UserError
    from model import ModelConfig, Transformer, cache_bytes, setup
    from sample import Sampler

    if shape not in SHAPES:
        raise UserError(f'shape is one of {", ".join(SHAPES)}')
    torch.set_num_threads(threads)
    device, dtype = setup(device, dtype, seed)
    with torch.device(device):
        model = Transformer(ModelConfig(block_size=512, **SHAPES[shape])).init_weights().to(dtype).requires_grad_(False)
    V, rng = model.config.vocab_size, random.Random(seed)
    texts = [[rng.randrange(V) for _ in range(rng.randint(shortest, longest))] for _ in range(prompts)]
    lengths = [[min(most_tokens, max(1, round(median_tokens * rng.lognormvariate(0, spread)))) for _ in range(k)] for _ in range(prompts)]
    n_tokens = sum(map(sum, lengths))

    class NoTokenizer:
        """Ids in, ids out; no id ends a sample."""
        eos, vocab_size, labels, newline_ids = -1, V, None, ()

    def ours():
        sampler = Sampler(model, NoTokenizer(), max_rows, dtype)
        rows = [p for p in texts for _ in range(k)]
        samples = sampler.generate(rows, 1, [n for row in lengths for n in row], 1.0)
        assert sum(len(s.ids) for s in samples) == n_tokens

    theirs = None

    def transformers_loop(cache):
        global theirs
        if theirs is None:
            from transformers import AutoModelForCausalLM
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        rows = sorted(((p, n) for p, row in zip(texts, lengths) for n in row), key=lambda row: -len(row[0]))
        for i in range(0, len(rows), batch):
            part = rows[i:i + batch]
            width = max(len(p) for p, _ in part)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part], device=device)
            most = max(n for _, n in part)  # as if each row's EOS came where its length ends: the batch runs to the longest
            theirs.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=True, top_k=0, pad_token_id=0,
                            cache_implementation=cache)

    runs = {'ours': ours, 'transformers_dynamic': lambda: transformers_loop('dynamic'), 'transformers_static': lambda: transformers_loop('static')}
    names = engines.split(',')
    for name in names:
        if name not in runs:
            raise UserError(f'engines are a list of {", ".join(runs)}')
        runs[name]()  # warm-up
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if device.type == 'cuda':
                torch.cuda.synchronize()
            start = time.perf_counter()
            runs[name]()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)

    # The roofline: matrix products of that work at the rate of one product of max_rows rows with the largest weight.
    linear = 2 * sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name.startswith('blocks'))
    head = 2 * model.head.weight.numel()
    a, w = torch.randn(max_rows, model.config.n_embd, dtype=dtype, device=device), model.blocks[0].mlp.up.weight
    rate = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, w)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        rate = max(rate, 10 * 2 * a.numel() * len(w) / (time.perf_counter() - start))
    bound = n_tokens * rate / (linear * (n_tokens + sum(map(len, texts))) + head * n_tokens)  # the prompts are read once each
    print(f'{shape}, {dtype}, {device}, {threads} threads: {prompts} prompts * {k} = {n_tokens:,} tokens; '
          f'{rate / 1e9:.0f} GFLOP/s, so that matrix products alone allow {bound:.0f} tokens/s')
    print('| engine | tokens/s (median) | to ours (median of pairs) | of the matrix-product roofline |\n|---|---|---|---|')
    for name in names:
        speed = n_tokens / statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds['ours'], seconds[name])) if 'ours' in names else float('nan')
        print(f'| {name} | {speed:.0f} | {ratio:.2f} | {100 * speed / bound:.0f}% |')
    peak = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cache = cache_bytes(model.config, min(prompts, max_rows), max(map(len, texts)), min(prompts * k, max_rows), most_tokens, dtype, device)
    print(f'peak memory of this process: {peak / 2 ** 30:.2f} GiB; our cache: {cache / 2 ** 30:.2f} GiB')
