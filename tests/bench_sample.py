"""
How fast is the sampler? The same random weights, prompts and output lengths for ours, transformers and vLLM,
in interleaved rounds, with the medians and their ratios to ours. A run by hand, not a test: nothing here can
fail.

The work: prompts of 20 to 150 tokens, K samples of each, whose lengths are log-normal with median 75 and at
most 128, known to nobody in advance. Ours and vLLM take a budget for each sample and end it there;
transformers knows none, so that a batch runs to its longest sample and the others' surplus is not counted.
Tokens a second are of the samples only. Every engine runs in a process of its own, on the same pinned cores.

--against=FOLDER times the code of another checkout instead, at some shapes, and prints its time over that of
this one with the 95% interval of the median: at 1 or more this code is not slower.

$ python tests/bench_sample.py                          # the Llama shape in fp32, one thread, 32 prompts * 8
$ python tests/bench_sample.py --prompts=4 --k=96 --dtype=bfloat16
$ python tests/bench_sample.py --shape=gpt2 --threads=2
$ python tests/bench_sample.py --engines=ours,vllm --vllm_python=envs/vllm/bin/python
$ python tests/bench_sample.py --against=../before      # a checkout of an earlier commit
$ python tests/bench_sample.py --shape=llama7b --device=cuda --dtype=bfloat16 --prompts=8 --engines=ours,vllm
"""
import contextlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, sys.argv[4] if sys.argv[1:2] == ['--worker'] else ROOT)

# -----------------------------------------------------------------------------
shape = 'llama'       # one of SHAPES
n_layer = 0           # 0: the shape's own
prompts = 32
k = 8                 # samples a prompt
median_tokens = 75    # of the samples' lengths
most_tokens = 128     # the longest sample
engines = 'ours,transformers_dynamic,transformers_static'  # some of ENGINES
vllm_python = ''      # the interpreter of an environment with vLLM, which wants its own torch; '': this one
against = ''          # another checkout, whose code is timed instead of other engines, at the shapes of WORKS
max_rows = 256        # ours, vLLM: samples decoded at a time
batch = 64            # transformers: samples decoded at a time
dtype = 'float32'     # 'float32' | 'bfloat16'
threads = 1           # and as many cores, the first ones that this process may use
rounds = 3            # with against at least nine
device = 'cpu'
seed = 0
# -----------------------------------------------------------------------------

SHAPES = {
    'demo': dict(vocab_size=704, n_layer=4, n_head=4, n_kv_head=1, n_embd=128, head_dim=32, n_inner=352),
    'llama': dict(vocab_size=4096, n_layer=8, n_head=8, n_kv_head=8, n_embd=512, head_dim=64, n_inner=1408,
                  tied=False),
    'gpt2': dict(vocab_size=50304, n_layer=12, n_head=12, n_kv_head=12, n_embd=768, head_dim=64, n_inner=3072,
                 family='gpt2', norm='layer', activation='gelu_tanh', rope_theta=0.0, qkv_bias=True,
                 out_bias=True, mlp_bias=True),
    'smollm2': dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64,
                    n_inner=1536),
    'qwen05b': dict(vocab_size=151936, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, head_dim=64,
                    n_inner=4864, qkv_bias=True),
    'llama1b': dict(vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, head_dim=64,
                    n_inner=5632, tied=False),
    'llama7b': dict(vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128,
                    n_inner=11008, tied=False),
}

WORKS = [dict(shape=name, n_layer=layers, prompts=n, k=k, median_tokens=tokens, most_tokens=2 * tokens)
         for name, layers, n, k, tokens in (('llama', 2, 16, 8, 32), ('llama', 2, 2, 96, 32),
                                            ('smollm2', 2, 8, 8, 16), ('demo', 4, 64, 4, 32),
                                            ('gpt2', 2, 8, 8, 16))]


# -----------------------------------------------------------------------------
# the engines: each takes the folder of the exported model and the work's settings, and returns a function
# that draws for rows (prompt ids, tokens to draw) and returns how many tokens it drew

def set_up(work):
    """-> (device, dtype), as the scripts of the checkout whose code this process runs set them up."""
    import torch
    try:
        from config.run import setup
    except ImportError:
        from model import setup
    torch.set_num_threads(work.threads)
    return setup(work.device, work.dtype, work.seed)

def ours(folder, work):
    from model import Transformer
    from sample import Sampler
    device, dtype = set_up(work)
    model = Transformer.from_pretrained(folder, device, dtype).requires_grad_(False)

    class NoTokenizer:
        """Ids in, ids out; no id ends a sample."""
        ends, vocab_size, labels, newline_ids = (), model.config.vocab_size, None, ()

    sampler = Sampler(model, NoTokenizer(), work.max_rows, dtype)

    def run(rows):
        return sum(len(s.ids) for s in sampler.generate([p for p, _ in rows], 1, [n for _, n in rows], 1.0))
    return run

def transformers(folder, work, cache='dynamic'):
    import torch
    from transformers import AutoModelForCausalLM
    device, dtype = set_up(work)  # the faster matrix products of fast_cpu_matmul, too
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def run(rows):
        rows, drawn = sorted(rows, key=lambda row: -len(row[0])), 0  # prompts of similar length together
        for i in range(0, len(rows), work.batch):
            part, budgets = zip(*rows[i:i + work.batch])
            width, most = max(map(len, part)), max(budgets)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, top_k=0,
                                 do_sample=True, pad_token_id=0, cache_implementation=cache)
            drawn += out[:, width:].numel()
        return drawn
    return run

def vllm(folder, work):
    os.environ |= {'VLLM_ENABLE_V1_MULTIPROCESSING': '0', 'VLLM_NO_USAGE_STATS': '1', 'HF_HUB_OFFLINE': '1'}
    if work.device == 'cpu':
        os.environ['VLLM_CPU_OMP_THREADS_BIND'] = ','.join(map(str, work.cores))
        os.environ['VLLM_CPU_KVCACHE_SPACE'] = '2'  # GiB, more than is used
    from vllm import LLM, SamplingParams
    llm = LLM(folder, skip_tokenizer_init=True, dtype=work.dtype, max_model_len=work.block_size,
              max_num_seqs=work.max_rows, seed=work.seed, enable_prefix_caching=True)

    def run(rows):
        given = [{'prompt_token_ids': p} for p, _ in rows]
        parameters = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
                      for _, n in rows]
        found = llm.generate(given, parameters, use_tqdm=False)
        llm.reset_prefix_cache()  # within a round a prompt's samples share it; over rounds would be cheating
        return sum(len(one.outputs[0].token_ids) for one in found)
    return run

ENGINES = {  # name: (function, the module that must be installed)
    'ours': (ours, 'torch'), 'transformers_dynamic': (transformers, 'transformers'),
    'transformers_static': (lambda folder, work: transformers(folder, work, 'static'), 'transformers'),
    'vllm': (vllm, 'vllm')}


# -----------------------------------------------------------------------------
# an engine's own process: it answers 'ready', and then every line 'go' by a line: seconds, CPU seconds, bytes
# of its peak memory

def serve(engines):
    """The process's side. engines: {name: (function, module, ...)}. What libraries print goes to stderr."""
    name, folder = sys.argv[2:4]
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)
    function, module = engines[name][:2]
    if importlib.util.find_spec(module) is None:
        answers.write('missing\n')
        return
    with open(os.path.join(folder, 'work.json')) as f:
        work = types.SimpleNamespace(**json.load(f))
    run = function(folder, work)
    run(work.warm_up)
    if work.device == 'cpu':  # the peak from here on: neither loading nor converting
        with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    answers.write('ready\n')
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        drawn = run(work.rows)
        if work.device == 'cuda':
            import torch
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        assert drawn >= work.n_tokens, f'{drawn} tokens drawn, not {work.n_tokens}'
        answers.write(f'{seconds} {time.process_time() - cpu} {peak_memory(work.device)}\n')

def peak_memory(device):
    """Bytes: of this process, or where the device is a GPU those that torch took there."""
    if device == 'cuda':
        import torch
        return torch.cuda.max_memory_allocated()
    if not os.path.exists('/proc/self/status'):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))

class Worker:
    """This side of it. python: the interpreter, by default this one; root: the checkout whose code it runs.
    UserError where the engine is not installed, or with the last line of its output where it fails."""

    def __init__(self, script, folder, name, python='', root=ROOT):
        self.name, self.seconds, self.cpu = name, [], []
        self.log = tempfile.TemporaryFile('w+', errors='replace')
        command = [os.path.abspath(python) if python else sys.executable, os.path.abspath(script)]
        self.process = subprocess.Popen(command + ['--worker', name, folder, root], cwd=root, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        if self.answer() == 'missing':
            self.fail(f'is not installed for {python or "this python"}')

    def fail(self, why):
        from config import UserError
        self.stop()
        raise UserError(f'{self.name} {why}')

    def answer(self):
        line = self.process.stdout.readline().strip()
        if not line:
            self.log.seek(0)
            said = [line for line in self.log.read().splitlines() if line.strip()] or ['it said nothing']
            if os.environ.get('BENCH_DEBUG'):
                print(*said, sep='\n')
            self.fail(f'failed: {said[-1].strip()[:300]} (BENCH_DEBUG=1 shows all of its output)')
        return line

    def go(self):
        self.process.stdin.write('go\n')
        self.process.stdin.flush()
        seconds, cpu, self.peak = map(float, self.answer().split())
        self.seconds.append(seconds)
        self.cpu.append(cpu)

    def cores(self):
        """How many it kept busy: with clearly less than its threads, something else ran beside it, and the
        times mean little."""
        return sum(self.cpu) / sum(self.seconds)

    def stop(self):
        self.process.stdin.close()
        self.process.wait()

def timed(script, folder, engines, rounds):
    """Times engines, (name, python, root) each, in processes that stay and take turns: A B, B A, ... -> the
    Workers."""
    workers = []
    try:
        for engine in engines:
            workers.append(Worker(script, folder, *engine))
        for i in range(rounds):
            for worker in workers[::-1 if i % 2 else 1]:
                worker.go()
    finally:
        for worker in workers:
            worker.stop()
    return workers

def ratio(workers, worker):
    """How much faster than ours: the median over rounds, nan without ours."""
    ours = next((one.seconds for one in workers if one.name == 'ours'), [math.nan])
    return statistics.median(a / b for a, b in zip(ours, worker.seconds))

def median_and_interval(ratios):
    """'1.020 (0.991 to 1.052)': the median of six or more and its 95% interval. How many of n numbers lie
    below the true median is binomial with p = 1/2, so that two of them are the interval's ends."""
    ordered, n = sorted(ratios), len(ratios)
    cut = sum(2 * sum(math.comb(n, i) for i in range(j + 1)) <= 0.05 * 2 ** n for j in range(n // 2))
    return f'{statistics.median(ordered):.3f} ({ordered[cut - 1]:.3f} to {ordered[-cut]:.3f})'

AGAINST = ('| work | tokens/s (this) | CPU time, other / this | wall time, other / this | cores busy |\n'
           '|---|---|---|---|---|')

def against_line(title, script, folder, other, n_tokens, rounds):
    """A line of that table: this checkout's code and the other's take turns."""
    both = [('ours', '', root) for root in (ROOT, os.path.abspath(other))]
    ours, others = timed(script, folder, both, max(9, rounds))
    ratios = [median_and_interval([b / a for a, b in zip(one, two)])
              for one, two in ((ours.cpu, others.cpu), (ours.seconds, others.seconds))]
    speed = n_tokens / statistics.median(ours.seconds)
    busy = f'{ours.cores():.2f}, {others.cores():.2f}'
    return f'| {title} | {speed:,.0f} | {ratios[0]} | {ratios[1]} | {busy} |'

def pin(threads, device='cpu'):
    """Keeps this process, and those it starts, to as many of its cores as there are threads -> the cores.
    To be called before torch is loaded."""
    from config import UserError
    os.environ |= dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(threads))
    if device != 'cpu' or not hasattr(os, 'sched_setaffinity'):
        return list(range(threads))
    cores = sorted(os.sched_getaffinity(0))
    if threads > len(cores):
        raise UserError(f'threads = {threads}, but this process may use {len(cores)} cores')
    os.sched_setaffinity(0, cores[:threads])
    return cores[:threads]

def random_model(shape, n_layer):
    from model import ModelConfig, Transformer
    fields = dict(block_size=512) | SHAPES[shape] | (dict(n_layer=n_layer) if n_layer else {})
    return Transformer(ModelConfig(**fields)).init_weights()

def check_settings(settings, engines):
    """Names of the engines; UserError."""
    from config import UserError
    names, folder = settings['engines'].split(','), settings['against']
    for wrong, said in ((not set(names) <= set(engines), f'engines are a list of {", ".join(engines)}'),
                        (settings['shape'] not in SHAPES, f'shape is one of {", ".join(SHAPES)}'),
                        (folder and not os.path.exists(os.path.join(folder, 'sample.py')),
                         f'against: {folder!r} is no checkout')):
        if wrong:
            raise UserError(said)
    return names

def ceilings(model, rows, device, dtype):
    """Tokens a second that matrix products allow, at the rate of a large one, and that reading allows: all
    weights for every max_rows tokens, a sample's own keys and values for each of its tokens, and those of its
    prompt once a step for all of the prompt's samples."""
    from model import memory_bandwidth, peak_flops
    c, n_tokens = model.config, sum(n for _, n in rows)
    n_prompt = sum(len(prompt) for prompt, _ in rows) / k
    flops = model.flops([n_prompt], 0) + model.flops([1] * n_tokens, n_tokens)
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.head.weight.numel()
    cells = sum(n * n / 2 + len(prompt) * n / k for prompt, n in rows)
    n_read = weights * n_tokens / max_rows + 2 * c.n_layer * c.n_kv_head * c.head_dim * cells
    by_reading = n_tokens * memory_bandwidth(device) / (n_read * dtype.itemsize)
    return n_tokens * peak_flops(device, dtype, 1.0) / flops, by_reading


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        serve(ENGINES)
        raise SystemExit
    from config import override
    settings = override(globals())
    names = check_settings(settings, ENGINES)
    cores = pin(threads, device)
    import random

    from sample import cache_bytes
    torch_device, torch_dtype = set_up(types.SimpleNamespace(**settings))

    print(f'{dtype}, {device}, {threads} threads\n{AGAINST if against else ""}')
    for changes in WORKS if against else [dict(shape=shape, prompts=prompts, k=k)]:
        globals().update(settings | changes)
        title = ', '.join(f'{name}={value}' for name, value in changes.items())
        model, rng = random_model(shape, n_layer).to(torch_dtype), random.Random(seed)
        C, V = model.config, model.config.vocab_size
        texts = [[rng.randrange(V) for _ in range(rng.randint(20, 150))] for _ in range(prompts)]
        rows = [(text, min(most_tokens, max(1, round(median_tokens * rng.lognormvariate(0, 0.5)))))
                for text in texts for _ in range(k)]
        n_tokens = sum(n for _, n in rows)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            work = dict(rows=rows, warm_up=rows[::4], n_tokens=n_tokens, cores=cores, block_size=C.block_size)
            with open(os.path.join(folder, 'work.json'), 'w') as f:
                json.dump(settings | changes | work, f)
            if against:
                print(against_line(title, __file__, folder, against, n_tokens, rounds))
                continue
            pythons = {'vllm': vllm_python}
            workers = timed(__file__, folder, [(name, pythons.get(name, ''), ROOT) for name in names], rounds)
        by_products, by_reading = ceilings(model.to(torch_device), rows, torch_device, torch_dtype)
        print(f'{title}: {n_tokens:,} tokens; matrix products allow {by_products:,.0f} tokens/s, reading '
              f'weights, keys and values {by_reading:,.0f}')
        print('| engine | tokens/s (median) | to ours (median of pairs) | cores busy | peak GiB |\n'
              '|---|---|---|---|---|')
        for worker in workers:
            print(f'| {worker.name} | {n_tokens / statistics.median(worker.seconds):,.0f} '
                  f'| {ratio(workers, worker):.2f} | {worker.cores():.2f} | {worker.peak / 2 ** 30:.2f} |')
        sizes = min(prompts, max_rows), max(map(len, texts)), min(prompts * k, max_rows), most_tokens
        print(f'our cache, at most: {cache_bytes(C, *sizes, torch_dtype, device) / 2 ** 30:.2f} GiB')
