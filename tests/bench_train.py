"""
How fast are the training steps? sft.finetune against the loop that one would write with transformers: the
same weights, rows and batch size, in interleaved rounds, with medians and their ratio. Rows have the lengths
of GSM8K's (a question of about 60 tokens, a solution of about 120, log-normal); ids are random, which changes
nothing about the speed. A run by hand, not a test. --against=FOLDER: see bench_sample.py.

MFU counts the operations that the real tokens need (model.flops, backward as two forward passes), against the
measured peak of a large matrix product in the same type on as many threads. Each engine runs in a process of
its own, on the same pinned cores.

$ python tests/bench_train.py                              # the 8-layer, 512-wide Llama shape in fp32
$ python tests/bench_train.py --shape=gpt2 --rows=64 --batch_size=16
$ python tests/bench_train.py --shape=gpt2 --length=256 --rows=64 --batch_size=8   # all rows of one length
$ python tests/bench_train.py --against=../before          # a checkout of an earlier commit
$ python tests/bench_train.py --shape=llama1b --device=cuda --dtype=bfloat16 --rows=2048 --engines=ours
"""
import json
import statistics
import sys
import tempfile
import types

from bench_sample import (AGAINST, ROOT, against_line, check_settings, pin, random_model, ratio, serve,
                          set_up, timed)

# -----------------------------------------------------------------------------
shape = 'llama'       # see SHAPES in bench_sample.py
n_layer = 0           # 0: the shape's own
rows = 256            # examples in all
batch_size = 32
micro_tokens = 4096
prompt_tokens = 60    # of a row, the median: as in GSM8K
solution_tokens = 120
length = 0            # tokens of every row; 0: they differ
engines = 'ours,transformers'
against = ''          # another checkout, whose code is timed instead of other engines, at the shapes of WORKS
dtype = 'float32'     # of the matrix products; weights are fp32
threads = 1
rounds = 3
device = 'cpu'
compile = False
seed = 0
# -----------------------------------------------------------------------------

WORKS = [dict(shape='demo', rows=64, batch_size=16, micro_tokens=2048, prompt_tokens=38, solution_tokens=48),
         dict(shape='gpt2', n_layer=2, rows=4, batch_size=4),
         dict(shape='smollm2', n_layer=2, rows=4, batch_size=4)]

def ours(folder, work):
    from model import Transformer
    from sample import Example
    from sft import finetune
    device, dtype = set_up(work)
    model = Transformer.from_pretrained(folder, device)

    def run(rows):
        finetune(model, [Example(*row) for row in rows], max_steps=len(rows) // work.batch_size, dtype=dtype,
                 batch_size=work.batch_size, micro_tokens=work.micro_tokens, lr=1e-5, compile=work.compile)
        return work.n_tokens
    return run

def transformers(folder, work):
    """Shuffled rows, padded to the batch's longest, in pieces of micro_tokens; a label of -100 counts not."""
    import random

    import torch
    from transformers import AutoModelForCausalLM

    from model import autocast, make_optimizer
    device, dtype = set_up(work)
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
                mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]
                labels = [[-100] * p + ids[p:] + [-100] * (width - len(ids)) for ids, p in part]
                mask, labels = torch.tensor(mask, device=device), torch.tensor(labels, device=device)
                with autocast(device, dtype):
                    loss = model(ids, attention_mask=mask, labels=labels).loss
                    (loss * sum(len(ids) - p for ids, p in part) / n).backward()
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
    from config import override
    settings = override(globals())
    names = check_settings(settings, ENGINES)
    pin(threads, device)
    import random

    from model import memory_bandwidth, peak_flops
    from sample import memory_needed
    torch_device, torch_dtype = set_up(types.SimpleNamespace(**settings))

    if against:
        print(f'{dtype}, {device}, {threads} threads\n{AGAINST}')
    for changes in WORKS if against else [{}]:
        globals().update(settings | changes)
        model, rng, examples = random_model(shape, n_layer), random.Random(seed), []
        for _ in range(rows // batch_size * batch_size):
            n_prompt, n = (round(min(most, median * rng.lognormvariate(0, 0.4)))
                           for most, median in ((200, prompt_tokens), (310, solution_tokens)))
            if length:
                n_prompt, n = 60, length - 60
            examples.append(([rng.randrange(model.config.vocab_size) for _ in range(n_prompt + n)], n_prompt))
        n_tokens = sum(len(ids) - 1 for ids, _ in examples)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder + '/model')
            work = dict(rows=examples, warm_up=examples[:batch_size], n_tokens=n_tokens)
            with open(folder + '/model/work.json', 'w') as f:
                json.dump(settings | changes | work, f)
            if against:
                title = ', '.join(f'{name}={value}' for name, value in changes.items())
                print(against_line(title, __file__, folder + '/model', against, n_tokens, rounds))
                continue
            workers = timed(__file__, folder + '/model', [(name, '', ROOT) for name in names], rounds)
        flops = 3 * sum(model.flops([len(ids) - 1], len(ids) - n_prompt) for ids, n_prompt in examples)
        peak = peak_flops(torch_device, torch_dtype, seconds=1.0)
        print(f'{shape}, {dtype}, {device}, {threads} threads: {rows // batch_size} updates * {batch_size} '
              f'rows, {n_tokens:,} tokens; peak {peak / 1e9:,.0f} GFLOP/s, '
              f'{memory_bandwidth(torch_device) / 1e9:,.0f} GB/s')
        print('| engine | tokens/s (median) | to ours (median of pairs) | MFU | cores busy | peak GiB |\n'
              '|---|---|---|---|---|---|')
        for worker in workers:
            median = statistics.median(worker.seconds)
            print(f'| {worker.name} | {n_tokens / median:,.0f} | {ratio(workers, worker):.2f} '
                  f'| {100 * flops / median / peak:.0f}% | {worker.cores():.2f} '
                  f'| {worker.peak / 2 ** 30:.2f} |')
        # On a GPU this is to be held against ours' peak; on a CPU that has Python, the libraries and what the
        # heap keeps as well.
        longest = max(len(ids) for ids, _ in examples)
        print('by arithmetic: ' + memory_needed([model.to(torch_device)], torch_dtype, micro_tokens, longest))
