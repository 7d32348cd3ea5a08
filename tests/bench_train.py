"""
How fast are the training steps? sft.finetune against the loop that one would write with transformers: the same weights, rows and
batch size, in interleaved rounds, with medians and their ratio. Rows have the lengths of GSM8K's (a question of about 60 tokens, a
solution of about 120, log-normal); ids are random, which changes nothing about the speed. A run by hand, not a test.

MFU counts the operations that the real tokens need (model.flops, backward as two forward passes), against the measured peak of a
large matrix product in the same type on as many threads. Each engine runs in a process of its own, on the same pinned cores.

$ python tests/bench_train.py                              # the 8-layer, 512-wide Llama shape in fp32
$ python tests/bench_train.py --shape=gpt2 --rows=64 --batch_size=16
$ python tests/bench_train.py --shape=gpt2 --length=256 --rows=64 --batch_size=8 --engines=ours      # all rows of one length
$ python tests/bench_train.py --shape=llama1b --device=cuda --dtype=bfloat16 --rows=2048 --batch_size=128 --engines=ours
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench_sample import SHAPES, pin, ratio, serve, started

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


def ours(folder, work):
    import torch

    from model import Transformer, setup
    from sample import Example
    from sft import finetune
    torch.set_num_threads(work.threads)
    device, dtype = setup(work.device, work.dtype, work.seed)
    model = Transformer.from_pretrained(folder, device)

    def run(rows):
        finetune(model, [Example(*row) for row in rows], max_steps=len(rows) // work.batch_size, batch_size=work.batch_size,
                 micro_tokens=work.micro_tokens, lr=1e-5, dtype=dtype, compile=work.compile)
        return work.n_tokens
    return run


def transformers(folder, work):
    """Shuffled rows, padded to the batch's longest, labels of -100 at prompts and padding, in pieces of micro_tokens."""
    import random

    import torch
    from transformers import AutoModelForCausalLM

    from model import autocast, make_optimizer, setup
    torch.set_num_threads(work.threads)
    device, dtype = setup(work.device, work.dtype, work.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def run(rows):
        optimizer = make_optimizer(model, 1e-5, 0.0)
        order = random.Random(work.seed).sample(range(len(rows)), len(rows))
        for step in range(len(rows) // work.batch_size):
            batch = [rows[i] for i in order[step * work.batch_size:(step + 1) * work.batch_size]]
            width = max(len(ids) for ids, _ in batch)
            n, each = sum(len(ids) - n_prompt for ids, n_prompt in batch), max(1, work.micro_tokens // width)
            for i in range(0, len(batch), each):
                part = batch[i:i + each]
                ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=device)
                mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part], device=device)
                labels = torch.tensor([[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in part], device=device)
                with autocast(device, dtype):
                    (model(ids, attention_mask=mask, labels=labels).loss * sum(len(ids) - p for ids, p in part) / n).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return work.n_tokens
    return run


ENGINES = {'ours': (ours, 'torch'), 'transformers': (transformers, 'transformers')}

if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        serve(ENGINES)
        raise SystemExit
    from config import UserError, override
    override(globals())
    names = engines.split(',')
    for name in names:
        if name not in ENGINES:
            raise UserError(f'engines are a list of {", ".join(ENGINES)}')
    if shape not in SHAPES:
        raise UserError(f'shape is one of {", ".join(SHAPES)}')
    pin(threads, device)
    import random
    import statistics
    import tempfile

    import torch

    from model import ModelConfig, Transformer, memory_bandwidth, memory_needed, peak_flops, setup

    torch.set_num_threads(threads)
    torch_device, torch_dtype = setup(device, dtype, seed)
    model = Transformer(ModelConfig(block_size=512, **SHAPES[shape])).init_weights()
    rng, V = random.Random(seed), model.config.vocab_size
    examples = []
    for _ in range(rows):
        n_prompt, n = round(min(200, 60 * rng.lognormvariate(0, 0.4))), round(min(310, 120 * rng.lognormvariate(0, 0.4)))
        if length:
            n_prompt, n = 60, length - 60
        examples.append(([rng.randrange(V) for _ in range(n_prompt + n)], n_prompt))
    updates = rows // batch_size
    done = examples[:updates * batch_size]
    n_tokens = sum(len(ids) - 1 for ids, _ in done)
    flops = 3 * sum(model.flops([len(ids) - 1], len(ids) - n_prompt) for ids, n_prompt in done)
    with tempfile.TemporaryDirectory() as folder:
        folder += '/model'
        model.save_pretrained(folder)
        with open(folder + '/work.json', 'w') as f:
            json.dump(dict(rows=done, warm_up=done[:batch_size], n_tokens=n_tokens, batch_size=batch_size, micro_tokens=micro_tokens, dtype=dtype,
                           threads=threads, device=device, compile=compile, seed=seed), f)
        with started(os.path.abspath(__file__), names, folder) as workers:
            for _ in range(rounds):
                for worker in workers:
                    worker.go()
    peak = peak_flops(torch_device, torch_dtype, seconds=1.0)
    print(f'{shape}, {dtype}, {device}, {threads} threads: {updates} updates * {batch_size} rows, {n_tokens:,} tokens; '
          f'peak {peak / 1e9:,.0f} GFLOP/s, {memory_bandwidth(torch_device) / 1e9:,.0f} GB/s')
    print('| engine | tokens/s (median) | to ours (median of pairs) | MFU | cores busy | peak GiB |\n|---|---|---|---|---|---|')
    for worker in workers:
        median = statistics.median(worker.seconds)
        print(f'| {worker.name} | {n_tokens / median:,.0f} | {ratio(workers, worker):.2f} | {100 * flops / median / peak:.0f}% '
              f'| {worker.cores():.2f} | {worker.peak / 2 ** 30:.2f} |')
    # On a GPU the arithmetic is to be held against ours' peak; on a CPU that has Python, the libraries and what the heap keeps as well.
    print('by arithmetic: ' + memory_needed([model.to(torch_device)], torch_dtype, micro_tokens, max(len(ids) for ids, _ in done)))
