"""
How fast are the training steps? sft.finetune against the loop that one would write with transformers: the same weights, rows and
batch size, in interleaved rounds, with medians and their ratio. Rows have the lengths of GSM8K's (a question of about 60 tokens, a
solution of about 120, log-normal); ids are random, which changes nothing about the speed. A run by hand, not a test.

MFU counts the operations that the real tokens need (model.flops, backward as two forward passes), against the measured peak of a
large matrix product in the same type on as many threads.

$ python tests/bench_train.py                              # the 8-layer, 512-wide Llama shape in fp32
$ python tests/bench_train.py --shape=gpt2 --rows=64 --batch_size=16
$ python tests/bench_train.py --shape=gpt2 --length=256 --rows=64 --batch_size=8 --engines=ours      # all rows of one length
$ python tests/bench_train.py --shape=llama1b --device=cuda --dtype=bfloat16 --rows=2048 --batch_size=128 --engines=ours
"""
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# -----------------------------------------------------------------------------
shape = 'llama'       # see SHAPES in bench_sample.py
rows = 256            # examples in all
batch_size = 32
micro_tokens = 4096
length = 0            # tokens of every row; 0: as in GSM8K
engines = 'ours,transformers'
dtype = 'float32'     # of the matrix products; weights are fp32
threads = 2
rounds = 3
device = 'cpu'
compile = False
seed = 0
# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from config import override
    override(globals())
    os.environ['OMP_NUM_THREADS'] = str(threads)  # before torch is loaded
    import random
    import resource
    import statistics
    import tempfile

    import torch
    from bench_sample import SHAPES

    from config import UserError
    from model import ModelConfig, Transformer, autocast, make_optimizer, peak_flops, setup
    from sample import Example
    from sft import finetune, n_learned

    torch.set_num_threads(threads)
    device, dtype = setup(device, dtype, seed)
    if shape not in SHAPES:
        raise UserError(f'shape is one of {", ".join(SHAPES)}')
    model = Transformer(ModelConfig(block_size=512, **SHAPES[shape])).init_weights().to(device)
    rng, V = random.Random(seed), model.config.vocab_size
    examples = []
    for _ in range(rows):
        n_prompt, n = (60, length - 60) if length else (round(min(200, 60 * rng.lognormvariate(0, 0.4))), round(min(310, 120 * rng.lognormvariate(0, 0.4))))
        examples.append(Example([rng.randrange(V) for _ in range(n_prompt + n)], n_prompt))
    updates = rows // batch_size
    n_tokens = sum(len(e.ids) - 1 for e in examples[:updates * batch_size])
    flops = 3 * sum(model.flops([len(e.ids) - 1], n_learned([e])) for e in examples[:updates * batch_size])

    def ours(steps=updates):
        finetune(model, examples, max_steps=steps, batch_size=batch_size, micro_tokens=micro_tokens, lr=1e-5, dtype=dtype, compile=compile)

    theirs = None

    def transformers_loop(steps=updates):
        """Shuffled rows, padded to the batch's longest, labels of -100 at prompts and padding, in pieces of micro_tokens."""
        global theirs
        if theirs is None:
            from transformers import AutoModelForCausalLM
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
                for module in theirs.modules():
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
        optimizer = make_optimizer(theirs, 1e-5, 0.0)
        order = random.Random(seed).sample(range(rows), rows)
        for step in range(steps):
            batch = [examples[i] for i in order[step * batch_size:(step + 1) * batch_size]]
            width = max(len(e.ids) for e in batch)
            n, each = n_learned(batch), max(1, micro_tokens // width)
            for i in range(0, batch_size, each):
                part = batch[i:i + each]
                ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in part], device=device)
                mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in part], device=device)
                labels = torch.tensor([[-100] * e.n_prompt + e.ids[e.n_prompt:] + [-100] * (width - len(e.ids)) for e in part], device=device)
                with autocast(device, dtype):
                    (theirs(ids, attention_mask=mask, labels=labels).loss * n_learned(part) / n).backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    runs = {'ours': ours, 'transformers': transformers_loop}
    names = engines.split(',')
    for name in names:
        if name not in runs:
            raise UserError(f'engines are a list of {", ".join(runs)}')
        runs[name](1)  # warm-up
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if device.type == 'cuda':
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    peak = peak_flops(device, dtype, seconds=1.0)
    print(f'{shape}, {dtype}, {device}, {threads} threads: {updates} updates * {batch_size} rows, {n_tokens:,} tokens; peak {peak / 1e9:,.0f} GFLOP/s')
    print('| engine | tokens/s (median) | to ours (median of pairs) | MFU |\n|---|---|---|---|')
    for name in names:
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds['ours'], seconds[name])) if 'ours' in names else float('nan')
        print(f'| {name} | {n_tokens / median:,.0f} | {ratio:.2f} | {100 * flops / median / peak:.0f}% |')
    memory = torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f'peak memory of this process: {memory / 2 ** 30:.2f} GiB')
