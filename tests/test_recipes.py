"""The recipes in config/: each loads into its script, names files that exist, and fits the GPU it names."""
import importlib
import os
import re

import pytest
import torch
from conftest import GPT2, ROOT
from test_rewards import log_of

from config import override
from model import ModelConfig, Transformer
from sample import disk_needed, memory_needed

RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config'))
                 if name.endswith('.py') and name not in ('__init__.py', 'run.py'))
REAL = [name for name in RECIPES if not name.startswith('demo')]
# part of a recipe's name -> its script
SCRIPTS = {'_ppo': 'ppo', '_rcrl': 'rcrl', '_ei': 'ei', '_orm.': 'rewards', '_prm.': 'rewards'}

FIELDS = 'vocab_size block_size n_layer n_head n_kv_head n_embd head_dim n_inner'.split()
SHAPES = {part: ModelConfig(**more | dict(zip(FIELDS, sizes))) for part, more, *sizes in (
    ('smollm2', {}, 49152, 8192, 30, 9, 3, 576, 64, 1536),
    ('qwen2.5-0.5b', {'qkv_bias': True}, 151936, 32768, 24, 14, 2, 896, 64, 4864),
    ('gpt2', GPT2, 50257, 1024, 12, 12, 12, 768, 64, 3072),
    ('7b', {'tied': False}, 32000, 4096, 32, 32, 32, 4096, 128, 11008))}

def read(file):
    with open(os.path.join(ROOT, file)) as f:
        return f.read()

def settings_of(name, *flags):
    """-> (the recipe's script, its settings)"""
    script = next((script for part, script in SCRIPTS.items() if part in name), 'sft')
    defaults = dict(vars(importlib.import_module(script)))
    settings = override(dict(defaults), [os.path.join(ROOT, 'config', name), *flags])
    assert any(settings[key] != defaults[key] for key in settings)
    return script, settings

def test_recipes_load_into_their_scripts():
    found = {name: settings_of(name) for name in RECIPES}
    sft, sft_long, ei = (found[f'demo_{which}.py'][1] for which in ('sft', 'sft_long', 'ei'))
    for name, (script, s) in found.items():
        text, budget = read(f'config/{name}'), s['max_new_tokens']
        assert s['out_dir'] == f'out/{name[:-3]}'
        assert text.startswith('#') and f' {script}.py config/{name}' in text  # the exact command
        for command in re.findall(r'eval\.py --init_from.*?(?=&&|\n|  )', text):  # in the same budget
            assert f'--max_new_tokens={budget}' in command or budget == 256, (name, command)
        if name.startswith('demo_ppo'):  # from EI's checkpoint, with at most as many samples
            assert s['init_from'] == ei['init_from'] and s['n_questions'] == ei['n_questions']
            assert s['n_iterations'] * s['n_rollouts'] <= ei['n_questions'] * ei['k'] * ei['n_rounds']
    # the control takes as many updates as SFT and the rounds of EI together
    assert sft_long['max_steps'] == sft['max_steps'] + ei['n_rounds'] * ei['max_steps']
    assert sft_long['batch_size'] == sft['batch_size'] == ei['batch_size']

def test_commands_name_files_that_exist():
    for file in ['README.md', 'config/demo.sh'] + [f'config/{name}' for name in RECIPES]:
        named = re.findall(r'(?:config|data|tests)/[\w/.]*\.(?:py|sh)|(?<=python )\w+\.py', read(file))
        assert named and not [path for path in named if not os.path.exists(os.path.join(ROOT, path))], file

@pytest.mark.parametrize('name', REAL)
def test_the_memory_that_a_header_states_fits_the_gpu_that_it_names(name):
    text = read(f'config/{name}').replace('\n# ', ' ')
    first = r'Memory: ([\d.]+) GiB on (?:one GPU|each of 8 GPUs) of (\d+) GB\. Disk: [\d.]+ .iB, '
    others = re.findall(r'With (--\S+(?: --\S+)*): ([\d.]+) GiB of (\d+) GB', text)
    for flags, size, card in [('', *re.search(first, text).groups()), *others]:
        assert float(size) * 2 ** 30 <= 0.95 * int(card) * 1e9
        settings_of(name, *flags.split())

def test_the_arithmetic_is_that_of_known_runs():
    """GiB by micro_tokens, for one GPU in bf16, beside the output projection's fp32 copy and gradient."""
    for name, *expected in (('smollm2', 16.0, 9.5, 6.3), ('qwen2.5-0.5b', 32.0, 20.2, 14.4),
                            ('gpt2', 9.0, 5.9, 4.4)):
        with torch.device('meta'):
            m = Transformer(SHAPES[name])
        m.shard, m.grad_checkpointing = 'none', False
        lines = [memory_needed([m], torch.bfloat16, n, 433) for n in (16384, 8192, 4096)]
        head = 10 * m.head.weight.numel() / 2 ** 30
        found = [float(re.search(r'about ([\d.]+) GiB', line)[1]) - head for line in lines]
        assert found == pytest.approx(expected, rel=0.02)
    assert disk_needed(SHAPES['7b'], 2, 1) == (  # a state: 12 * 6.74e9 bytes = 75.3 GiB
        'disk at most about 276.1 GiB, 125.5 GiB when finished: up to 3 states of 75.3 GiB, then 1, and 2 '
        'checkpoints of 25.1 GiB')

@pytest.mark.slow
def test_the_demos_chain_runs_tiny(script, tmp_path):
    out, task = str(tmp_path), [f'--task={tmp_path}', '--device=cpu', '--max_new_tokens=20']
    script('data/arithmetic/prepare.py', f'--out={out}', '--n_train=300', '--n_test=12', '--n_base=400')
    steps = '--eval_problems=4 --max_steps=4 --n_worked=20'
    for command, name, flags in (
            ('sft', 'base', f'{steps} --text_file={out}/base.jsonl --n_layer=1 --n_merges=9 --n_embd=8'),
            ('sft', 'sft', f'{steps} --init_from={out}/base'),
            ('ei', 'ei', f'{steps} --init_from={out}/sft --base={out}/base --n_questions=30 --k=2'),
            ('ppo', 'ppo', f'--init_from={out}/sft --n_questions=30 --n_iterations=2 --n_rollouts=32 '
             '--minibatch=16 --eval_problems=4'),
            ('rcrl', 'rcrl', f'{steps} --init_from={out}/ei --base={out}/base --n_questions=9'
             ' --right_share=0'),
            ('rewards', 'orm', f'--init_from={out}/sft --base={out}/ei --samples={out}/samples.jsonl --k=2 '
             '--n_questions=30 --batch_size=4 --balance=False --heldout=8')):
        script(f'{command}.py', f'config/demo_{name}.py', *task, f'--out_dir={out}/{name}', *flags.split())
        if name == 'ei':  # a policy this small has none right among its solutions: so labels are made
            samples = read(f'{out}/ei/samples_round1.jsonl')
            samples = re.sub(r'("samples": .*?"correct": )false', r'\1true', samples)
            (tmp_path / 'samples.jsonl').write_text(samples)
    runs = [f'{out}/{run}' for run in ('sft', 'ei', 'ppo', 'rcrl')]
    for folder in runs:
        script('eval.py', f'--init_from={folder}', *task, f'--scorer={out}/orm', '--k=4')
    table = script('eval.py', '--compare', *runs).stdout
    assert table.count('| 12 |') == 4 and table.count('of its different equation sequences') == 3
    assert '| maj@1 | maj@4 | rerank@4 | weighted@4 | pass@4 |' in table
    assert [row['samples_drawn'] for row in log_of(tmp_path / 'ei', 'samples_drawn')] == [60, 120]
