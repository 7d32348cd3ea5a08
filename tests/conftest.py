"""What several test files need: small models and tokenizers, made once, and how scripts are started."""
import io
import itertools
import json
import logging
import os
import runpy
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# Bit-equal is promised for equally many threads, and models this small gain nothing from a second one.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a test that reaches for the network should fail at once
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')

import torch  # noqa: E402

from config import run  # noqa: E402
from data import Problem  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from sample import learn_bpe, load_tokenizer  # noqa: E402
from sft import cross_entropy, finetune, solution_examples  # noqa: E402

run.listen_for_stop = lambda: None  # pytest keeps its handlers
logging.getLogger('c10d-NullHandler-dcp_logger').disabled = True  # a line for each tensor of a state

TEXTS = ['Question: Tom has 3 apples and buys 14 more. How many apples does Tom have?\n'
         'Answer: Tom has 3+14=<<3+14=17>>17 apples.\n#### 17',
         'Question: Ann sells 4 pens for 5 dollars each. How much money does Ann get?\n'
         'Answer: Ann gets 4*5=<<4*5=20>>20 dollars.\n#### 20']
GPT2 = dict(family='gpt2', n_kv_head=4, norm='layer', activation='gelu_tanh', rope_theta=0.0, qkv_bias=True,
            out_bias=True, mlp_bias=True)

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true',
                     help='also faults at many moments, three processes, whole chains')

def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes long; runs with --slow')
    config.addinivalue_line('markers', 'cuda: needs a CUDA GPU')
    if getattr(config.option, 'dist', 'no') == 'load':  # pytest-xdist: what a file's tests share is made once
        config.option.dist = 'loadfile'

def pytest_collection_modifyitems(config, items):
    for item in items:
        if 'slow' in item.keywords and not config.getoption('--slow'):
            item.add_marker(pytest.mark.skip(reason='slow: runs with --slow'))
        if 'cuda' in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a CUDA GPU'))

def real_data(*parts):
    """A path within the folder that DATA_DIR names; skips the test where it is not there."""
    path = os.path.join(os.environ.get('DATA_DIR', 'nowhere'), *parts)
    if not os.path.exists(path):
        pytest.skip(f'needs {"/".join(parts)} in the folder that the environment variable DATA_DIR names')
    return path

def until(condition, job):
    deadline = time.time() + 300
    while not condition():
        assert job.poll() is None, f'ended with {job.returncode} before there was progress'
        assert time.time() < deadline, 'no progress'
        time.sleep(0.01)

def script_command(script, coin, out, *flags):
    """A script's command line that starts it from the coin's policy; later flags win."""
    few = [] if script in ('eval.py', 'rewards.py') else ['--eval_problems=8']
    base = [f'--base={coin}/policy'] if script in ('ei.py', 'rcrl.py') else []
    return [script, f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={out}', '--device=cpu',
            '--max_new_tokens=40', '--max_rows=16', *few, *base, *flags]

def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])

# What takes longest is often a process's start: here it runs one script after another.
ONE_BY_ONE = """import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name='__main__')"""

def run_all(n, commands):
    """Runs scripts, each a list of its name and flags, in one start of n processes -> what each printed."""
    place = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(), 'WORLD_SIZE': str(n)} if n > 1 else {}
    start = [sys.executable, '-c', ONE_BY_ONE, json.dumps(commands)]
    jobs = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | place | {'RANK': str(number)}) for number in range(n)]
    try:
        said = [job.communicate(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * n, said
    return [out for out, _ in said]

def run_script(*command, code=0):
    """Runs a script in this process, where there is nothing to import, and checks its exit code. -> what it
    printed (stdout, stderr)"""
    out, err, ended = io.StringIO(), io.StringIO(), 0
    matmul, precision = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    with (pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err),
          torch.random.fork_rng(devices=[])):
        patch.chdir(ROOT)
        patch.setattr(sys, 'argv', list(command))
        patch.setattr(sys, 'excepthook', sys.excepthook)  # what a script changes for its process ends with it
        try:
            runpy.run_path(command[0], run_name='__main__')
        except SystemExit as stop:
            ended = stop.code or 0
        except Exception as error:
            with pytest.raises(SystemExit) as stop:  # or it was a bug
                sys.excepthook(type(error), error, error.__traceback__)
            ended = stop.value.code
        finally:
            matmul.fp32_precision = precision
    assert ended == code, f'{command} ended with {ended}:\n{out.getvalue()}\n{err.getvalue()}'
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())

@pytest.fixture
def script():
    return run_script

def run_process(*command, code=0):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, f'{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}'
    return done

class Killed(BaseException):
    """Ends run_script as kill -9 ends a process: nothing that the script catches."""

def dies_after(n, function):
    """function, whose call number n + 1 raises Killed."""
    calls = itertools.count()

    def dying(*args, **kwargs):
        if next(calls) == n:
            raise Killed
        return function(*args, **kwargs)
    return dying

def tiny_config(vocab_size, **changes):
    shape = dict(block_size=96, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, n_inner=64)
    return ModelConfig(vocab_size=vocab_size, **(shape | changes))

def loud(model, seed=0):
    """Weights so large that a fault in positions or masks shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if p.dim() == 1 else 1.5 / p.shape[1] ** 0.5
            gain = 1 if p.dim() == 1 and name.endswith('weight') else 0
            p.copy_(torch.randn(p.shape, generator=generator) * std + gain)
    return model

def tiny(vocab_size, seed=0, **changes):
    return loud(Transformer(tiny_config(vocab_size, **changes)), seed)

@pytest.fixture(scope='session')
def bpe():
    return learn_bpe(TEXTS, 120)

@pytest.fixture(scope='session', params=[{}, GPT2], ids=['llama', 'gpt2'])
def family(request):
    """Padding on learned positions shows what rotary ones hide."""
    return request.param

@pytest.fixture(scope='session')
def model(family, bpe):
    return tiny(bpe.vocab_size + 7, **family)

def coin_problem(i, x=1):
    """Question i of the coin's task with a right (x = 1) or a wrong solution (2): a step, and its answer."""
    return Problem(f'What is number {i}?', f'1+{x}=<<1+{x}={1 + x}>>{1 + x}\n#### {1 + x}', str(1 + x))

def write_task(folder, splits):
    """Writes task/train.jsonl and so on from {split: problems} -> the folder's path."""
    (folder / 'task').mkdir()
    for split, problems in splits.items():
        rows = [json.dumps({'question': p.question, 'answer': p.solution}) + '\n' for p in problems]
        (folder / 'task' / f'{split}.jsonl').write_text(''.join(rows))

@torch.no_grad()
def coin_logprobs(folder, example, n=16):
    """(ln P(right solution), ln P(wrong one)) of a checkpoint, exactly: the means over n questions. Their
    difference is the coin's log-odds. example(problem, tokenizer) makes a row, whose learned tokens count."""
    model, tokenizer = Transformer.from_pretrained(str(folder)), load_tokenizer(str(folder))
    rows = [[example(coin_problem(i, x), tokenizer) for i in range(n)] for x in (1, 2)]
    return tuple(-cross_entropy(model, examples).item() / n for examples in rows)

def make_coin(folder):
    """Writes task/, whose every answer is 2, and policy/, which learned to answer 2 and 3 equally often: a
    coin that RL can load. -> the folder"""
    problems = [coin_problem(i) for i in range(320)]
    write_task(folder, {'train': problems, 'test': problems[:16]})
    texts = [f'{p.question}\n{p.solution}' for p in (coin_problem(1, 1), coin_problem(2, 2))]
    tokenizer = learn_bpe(texts, 20)
    torch.manual_seed(0)
    policy = Transformer(tiny_config(tokenizer.vocab_size, block_size=128)).init_weights()
    examples = solution_examples([coin_problem(i, x) for i in range(64) for x in (1, 2)], tokenizer)
    finetune(policy, examples, max_steps=120, batch_size=32, lr=5e-3, min_lr=1e-4)
    policy.save_pretrained(str(folder / 'policy'), tokenizer)
    return folder

@pytest.fixture(scope='session')
def coin(tmp_path_factory):
    return make_coin(tmp_path_factory.mktemp('coin'))
