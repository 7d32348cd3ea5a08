"""
How fast is the sampler? The same random weights, prompts and output lengths for ours and for each engine that
is installed, in interleaved rounds, with the medians and their ratios to ours. A run by hand, not a test:
nothing here can fail.

The work: prompts of 20 to 150 tokens, K samples of each, whose lengths are log-normal with median 75 and at
most 128, known to nobody in advance. Ours, vLLM and OpenVINO GenAI take a budget for each sample and end it
there; transformers and CTranslate2 know none, so that a batch runs to its longest sample and the others'
surplus is not counted. Tokens a second are of the samples alone.

Every engine runs in a process of its own, on the same pinned cores, and by the python that --pythons names
for it (default: this one), since they want different versions of torch: an environment with vllm (on a CPU:
one of its CPU builds), one with openvino-genai and optimum-intel[openvino], one with ctranslate2,
transformers and torch.

--against=FOLDER times the code of another checkout instead, at some shapes, and prints its time over that of
this one with the 95% interval of the median: at 1 or more this code is not slower.

$ python tests/bench_sample.py                          # the Llama shape in fp32, one thread, 32 prompts * 8
$ python tests/bench_sample.py --prompts=4 --k=96 --dtype=bfloat16
$ python tests/bench_sample.py --shape=gpt2 --threads=2
$ python tests/bench_sample.py --engines=all --pythons=vllm=envs/vllm/bin/python,openvino=envs/ov/bin/python
$ python tests/bench_sample.py --scan=k --engines=ours  # a table over K; also rows, prompt, spread and shape
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
spread = 0.5          # standard deviation of the logarithm of a length
most_tokens = 128     # the longest sample
shortest = 20         # tokens of a prompt
longest = 150
engines = 'ours,transformers_dynamic,transformers_static'  # some of ENGINES; 'all': those that are installed
pythons = ''          # 'vllm=PYTHON,openvino=PYTHON': of engines that are not installed beside this one
against = ''          # another checkout, whose code is timed instead of other engines
max_rows = 256        # ours, vLLM, OpenVINO: samples decoded at a time
batch = 64            # transformers, CTranslate2: samples decoded at a time
scan = ''             # one of SCANS: a table over some values of a setting, a round each
dtype = 'float32'     # or 'bfloat16'
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
    'llama1b': dict(vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, head_dim=64,
                    n_inner=5632, tied=False),
    'llama7b': dict(vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128,
                    n_inner=11008, tied=False),
}

SCANS = {  # what --scan=NAME sets, a line of the table each
    'rows': [dict(max_rows=n, batch=n) for n in (16, 32, 64, 128, 256)],
    'k': [dict(prompts=128 // n, k=n) for n in (1, 4, 16, 64)],
    'prompt': [dict(shortest=n, longest=n) for n in (20, 80, 160, 320)],
    'spread': [dict(spread=x, most_tokens=300) for x in (0.0, 0.25, 0.5, 0.75)],
    'shape': [dict(shape=name, n_layer=layers, prompts=n, k=k, median_tokens=tokens, most_tokens=2 * tokens)
              for name, layers, n, k, tokens in (('llama', 2, 16, 8, 32), ('llama', 2, 2, 96, 32),
                                                 ('smollm2', 2, 8, 8, 16), ('demo', 4, 64, 4, 32),
                                                 ('gpt2', 2, 8, 8, 16))],
}


# -----------------------------------------------------------------------------
# the engines: each takes the folder of the exported model and the work's settings, and returns a function of
# rows, which are (prompt ids, tokens to draw), that draws them and returns the number of tokens that it drew

def set_up(work):
    """-> (device, dtype), as the scripts of the checkout whose code this process runs set them up."""
    import torch
    try:
        from config.run import setup
    except ImportError:
        from model import setup
    torch.set_num_threads(work.threads)
    return setup(work.device, work.dtype, work.seed)

def batches(rows, batch):
    """For an engine without a budget for each row: [(prompts of similar length, the most tokens of one)]."""
    rows = sorted(rows, key=lambda row: -len(row[0]))
    parts = [rows[i:i + batch] for i in range(0, len(rows), batch)]
    return [([p for p, _ in part], max(n for _, n in part)) for part in parts]

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
        drawn = 0
        for part, most in batches(rows, work.batch):
            width = max(map(len, part))
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

def openvino(folder, work):
    subprocess.run([sys.executable, '-m', 'optimum.commands.optimum_cli', 'export', 'openvino',
                    '--weight-format', 'fp32', '--task', 'text-generation-with-past', '--model', folder,
                    folder + '/openvino'], check=True, stdout=2)
    import openvino as ov
    import openvino_genai as genai
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.cache_size = work.max_rows, 2  # GiB
    scheduler.enable_prefix_caching = True
    precision = {'float32': 'f32', 'bfloat16': 'bf16'}[work.dtype]
    # The cache in the type of the products too: by default it is 8-bit, which is other arithmetic.
    properties = {'INFERENCE_PRECISION_HINT': precision, 'KV_CACHE_PRECISION': precision,
                  'INFERENCE_NUM_THREADS': work.threads, 'DYNAMIC_QUANTIZATION_GROUP_SIZE': 0}
    pipeline = genai.ContinuousBatchingPipeline(folder + '/openvino', scheduler, 'CPU', properties)
    n_runs = 0

    def run(rows):
        nonlocal n_runs
        n_runs += 1  # other ids in every round, since nothing empties its prefix cache
        given = [ov.Tensor([[(i + n_runs) % work.vocab_size for i in p]]) for p, _ in rows]
        settings = dict(do_sample=True, temperature=1.0, ignore_eos=True)
        parameters = [genai.GenerationConfig(max_new_tokens=n, **settings) for _, n in rows]
        return sum(len(one.m_generation_ids[0]) for one in pipeline.generate(given, parameters))
    return run

def ctranslate2(folder, work):
    subprocess.run([sys.executable, '-m', 'ctranslate2.converters.transformers', '--model', folder,
                    '--output_dir', folder + '/ctranslate2'], check=True, stdout=2)
    import ctranslate2 as ct2
    generator = ct2.Generator(folder + '/ctranslate2', device=work.device, compute_type=work.dtype,
                              inter_threads=1, intra_threads=work.threads)

    def run(rows):
        drawn = 0
        for part, most in batches(rows, work.batch):
            words = [[f't{i}' for i in p] for p in part]
            found = generator.generate_batch(words, max_length=most, min_length=most, sampling_topk=0,
                                             include_prompt_in_result=False)
            drawn += sum(len(one.sequences_ids[0]) for one in found)
        return drawn
    return run

# name: (function, the module that must be installed, whether it runs on a GPU)
ENGINES = {
    'ours': (ours, 'torch', True),
    'transformers_dynamic': (transformers, 'transformers', True),
    'transformers_static': (lambda folder, work: transformers(folder, work, 'static'), 'transformers', True),
    'vllm': (vllm, 'vllm', True),
    'openvino': (openvino, 'openvino_genai', False),
    'ctranslate2': (ctranslate2, 'ctranslate2', True),
}


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
            self.fail(f'is not installed for {python or "this python"}; --pythons={name}=PYTHON: another one')

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

def timed(script, folder, engines, rounds, optional=False):
    """Times engines, (name, python, root) each, in processes that stay and take turns: A B, B A, ... -> the
    Workers. One that is not installed, or fails, is refused, or if `optional` left out with a line."""
    from config import UserError
    workers = []
    try:
        for engine in engines:
            try:
                workers.append(Worker(script, folder, *engine))
            except UserError as error:
                if not optional:
                    raise
                print(f'left out: {error}')
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

def save_words(folder, n):
    """A tokenizer of n words, since some engines load no folder without one; nothing is ever tokenized."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f't{i}': i for i in range(n)}, unk_token='t0'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(unk_token='t0', bos_token='t1', eos_token='t2')
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)

def roofline(model, texts, lengths, device, dtype):
    """-> (FLOP/s, bytes/s, tokens/s that matrix products alone allow, tokens/s that reading alone allows).

    Matrix products of that work, at the rate of one product of max_rows rows with the largest weight; the
    prompts are read once each. And the bytes that decoding must read: all weights every max_rows tokens, a
    sample's own keys and values for each of its tokens, and those of its prompt once a step for all of its
    samples."""
    import torch

    from model import memory_bandwidth
    c, n_tokens, head = model.config, sum(map(sum, lengths)), model.head.weight.numel()
    linear = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
    flops = 2 * linear * (n_tokens + sum(map(len, texts))) + 2 * head * n_tokens
    model.to(device)
    a, rate = torch.randn(max_rows, c.n_embd, dtype=dtype, device=device), 0.0
    with torch.inference_mode(), model.packed(dtype):
        up = model.blocks[0].mlp.up
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(10):
                up(a)
            if device.type == 'cuda':
                torch.cuda.synchronize()
            rate = max(rate, 10 * 2 * a.numel() * up.out_features / (time.perf_counter() - start))
    cells = sum(sum(n * n / 2 for n in row) + len(p) * max(row) for p, row in zip(texts, lengths))
    read = (linear + head) * n_tokens / max_rows + 2 * c.n_layer * c.n_kv_head * c.head_dim * cells
    bandwidth = memory_bandwidth(device)
    return rate, bandwidth, n_tokens * rate / flops, n_tokens * bandwidth / (read * a.element_size())


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        serve(ENGINES)
        raise SystemExit
    from config import UserError, override
    settings = override(globals())
    scan = scan or ('shape' if against else '')
    if shape not in SHAPES:
        raise UserError(f'shape is one of {", ".join(SHAPES)}')
    if scan and scan not in SCANS:
        raise UserError(f'scan is one of {", ".join(SCANS)}')
    names, optional = engines.split(','), engines == 'all'
    if optional:
        names = [name for name in ENGINES if device == 'cpu' or ENGINES[name][2]]
    interpreters = dict(item.partition('=')[::2] for item in pythons.split(',') if item)
    for name in names + list(interpreters):
        if name not in ENGINES:
            raise UserError(f'engines are a list of {", ".join(ENGINES)}, or all; not {name!r}')
        if device != 'cpu' and not ENGINES[name][2]:
            raise UserError(f'{name} runs on the CPU alone')
    for name, python in interpreters.items():
        if not os.path.exists(python):
            raise UserError(f'pythons: {name} has no python at {python!r}')
    if against and not os.path.exists(os.path.join(against, 'sample.py')):
        raise UserError(f'against: {against!r} is no checkout')
    cores = pin(threads, device)
    import random

    from sample import cache_bytes
    torch_device, torch_dtype = set_up(types.SimpleNamespace(**settings))

    print(f'{scan or shape}, {dtype}, {device}, {threads} threads')
    print(AGAINST if against else
          '| work | engine | tokens | tokens/s (median) | to ours (median of pairs) | of the matrix products '
          '| of the bandwidth | cores busy | peak GiB |\n|---|---|---|---|---|---|---|---|---|')
    for changes in SCANS.get(scan, [dict(prompts=prompts, k=k)]):
        globals().update(settings | changes)
        title = ', '.join(f'{name}={value}' for name, value in changes.items())
        model, rng = random_model(shape, n_layer).to(torch_dtype), random.Random(seed)
        C, V = model.config, model.config.vocab_size
        texts = [[rng.randrange(V) for _ in range(rng.randint(shortest, longest))] for _ in range(prompts)]
        lengths = [[min(most_tokens, max(1, round(median_tokens * rng.lognormvariate(0, spread))))
                    for _ in range(k)] for _ in range(prompts)]
        rows, n_tokens = [(p, n) for p, row in zip(texts, lengths) for n in row], sum(map(sum, lengths))
        if max(len(p) + n for p, n in rows) > C.block_size:
            raise UserError(f'a prompt and its samples take more than the context of {C.block_size} tokens')
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            save_words(folder, V)
            work = dict(rows=rows, warm_up=rows[::4], n_tokens=n_tokens, cores=cores, block_size=C.block_size)
            with open(os.path.join(folder, 'work.json'), 'w') as f:
                json.dump(settings | changes | work | {'vocab_size': V}, f)
            if against:
                print(against_line(title, __file__, folder, against, n_tokens, rounds))
                continue
            run = [(name, interpreters.get(name, ''), ROOT) for name in names]
            workers = timed(__file__, folder, run, 1 if scan else rounds, optional)
        rate, bandwidth, by_products, by_reading = roofline(model, texts, lengths, torch_device, torch_dtype)
        for worker in workers:
            speed = n_tokens / statistics.median(worker.seconds)
            print(f'| {title} | {worker.name} | {n_tokens:,} | {speed:,.0f} | {ratio(workers, worker):.2f} '
                  f'| {100 * speed / by_products:.0f}% | {100 * speed / by_reading:.0f}% '
                  f'| {worker.cores():.2f} | {worker.peak / 2 ** 30:.2f} |')
        if not scan:
            print(f'{rate / 1e9:,.0f} GFLOP/s: matrix products alone allow {by_products:,.0f} tokens/s')
            print(f'{bandwidth / 1e9:,.0f} GB/s: reading weights, keys and values alone allows '
                  f'{by_reading:,.0f} tokens/s')
            sizes = min(prompts, max_rows), max(map(len, texts)), min(prompts * k, max_rows), most_tokens
            print(f'our cache, at most: {cache_bytes(C, *sizes, torch_dtype, device) / 2 ** 30:.2f} GiB')
