"""The recipes in config/: each loads into its script, names files that exist, and states the memory and disk
that the script prints. `python tests/test_recipes.py --write` puts these numbers into the headers."""
import functools
import importlib
import os
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import GPT2, ROOT, real_data
from test_rewards import log_of

import data
from config import override
from model import ModelConfig, Transformer, sharding
from sample import disk_needed, load_tokenizer, memory_needed

RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config'))
                 if name.endswith('.py') and name not in ('__init__.py', 'run.py'))
REAL = [name for name in RECIPES if not name.startswith(('demo', 'svamp'))]  # these run on a CPU
DOCS = ['README.md'] + [f'assets/{name}' for name in os.listdir(f'{ROOT}/assets') if name.endswith('.md')]
# part of a recipe's name -> its script; part of a checkpoint's name -> the public shape of the model
SCRIPTS = {'_ppo': 'ppo', '_rcrl': 'rcrl', '_ei': 'ei', '_orm.': 'rewards', '_prm.': 'rewards'}

FIELDS = 'vocab_size block_size n_layer n_head n_kv_head n_embd head_dim n_inner'.split()
SHAPES = {part: ModelConfig(**more | dict(zip(FIELDS, sizes))) for part, more, *sizes in (
    ('smollm2', {}, 49152, 8192, 30, 9, 3, 576, 64, 1536),
    ('qwen2.5-0.5b', {'qkv_bias': True}, 151936, 32768, 24, 14, 2, 896, 64, 4864),
    ('gpt2', GPT2, 50257, 1024, 12, 12, 12, 768, 64, 3072),
    ('7b', {'tied': False}, 32000, 4096, 32, 32, 32, 4096, 128, 11008),
    ('13b', {'tied': False}, 32000, 4096, 40, 40, 40, 5120, 128, 13824))}
LONGEST_PROMPT = {'gsm8k': 250, 'svamp': 110, 'two examples': 600}  # tokens

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
    for file in DOCS + ['config/demo.sh'] + [f'config/{name}' for name in RECIPES]:
        named = re.findall(r'(?:config|data|tests|assets)/[\w/.]*\.(?:py|sh)|assets/\w+\.md|(?<=python )\w+\.py',
                           read(file))
        assert named and not [path for path in named if not os.path.exists(os.path.join(ROOT, path))], file

@functools.cache
def transformer(part, learns=False, lora_rank=0, value_head=False):
    with torch.device('meta'):
        m = Transformer(SHAPES[part]).to(torch.float32 if learns and not lora_rank else torch.bfloat16)
        m = m.requires_grad_(learns).add_value_head() if value_head else m.requires_grad_(learns)
        return m.add_lora(lora_rank) if lora_rank else m

def printed(script, s):
    """-> (the most memory, the disk at most, when finished) that the script prints on GPUs: on meta devices,
    which have no memory and for the arithmetic are no CPU."""
    def part_of(path):
        return next(part for part in SHAPES if part in path.lower())

    def load(path, learns=False, shard='none', value_head=False):
        m = transformer(part_of(path), learns, s['lora_rank'] * learns, value_head)
        m.shard = sharding(shard, m, torch.device('cuda'))
        m.grad_checkpointing = s['grad_checkpointing']
        return m

    def needed(models, learns, draws):
        prompt = LONGEST_PROMPT['two examples' if s.get('few_shot') else s['task']]
        rows = (s['max_rows'], prompt, s['max_new_tokens']) if draws else ()
        line = memory_needed(models, torch.bfloat16, s['micro_tokens'] if learns else 0, 0, *rows)
        return re.match(r'memory of a process at most about ([\d.]+) GiB', line)[1]

    first, base, shard = s['init_from'], s.get('base') or s['init_from'], s['shard']
    others = [load(s['reward_model'])] if s.get('reward_model') else []
    if script in ('sft', 'ppo'):  # learns and samples
        policy = load(first, True, shard, s.get('advantage') == 'gae')
        others += [load(first)] if script == 'ppo' and not s['lora_rank'] else []
        for m in others:
            m.shard = policy.shard
        sizes = [needed([policy] + others, True, True)]
    else:  # samples, then learns; rcrl validates, too
        sizes = [needed([load(first)] + others, False, True)]
        sizes.append(needed([load(base, True, shard, script == 'rewards')] + others, True, script == 'rcrl'))
    n_exports = {'sft': 2, 'ppo': 2, 'rcrl': 3, 'rewards': 1, 'ei': s.get('n_rounds', 0) + 1}[script]
    line = disk_needed(SHAPES[part_of(base)], n_exports, s.get('keep_states', 0), s['lora_rank'])
    disk = re.match(r'disk at most about ([\d.]+ .iB), ([\d.]+ .iB) when', line)
    return max(sizes, key=float) + ' GiB', *disk.groups()

def claims(name, text):
    """-> [(start, end, what has to stand there)] of the header's numbers"""
    def find(pattern):
        return re.finditer(pattern.replace(' ', r'(?: |\n# )').replace('SIZE', r'([\d.]+ .iB)'), text)

    def computed(gb, *flags):
        card = SimpleNamespace(total_memory=int(gb) * 1e9)
        with mock.patch('torch.distributed.is_initialized', lambda: True), \
                mock.patch('torch.distributed.get_world_size', lambda: n_gpus), \
                mock.patch('torch.cuda.get_device_properties', lambda device: card):
            found = printed(*settings_of(name, *flags))
        assert float(found[0][:-4]) * 2 ** 30 <= 0.95 * card.total_memory, (name, flags)  # it fits
        return found

    m, = find(r'Memory: SIZE on (one GPU|each of 8 GPUs) of (\d+) GB\. Disk: SIZE, SIZE when finished')
    n_gpus = 1 if m[2] == 'one GPU' else 8
    whole = [(*m.span(i), value) for i, value in zip((1, 4, 5), computed(m[3]))]
    return whole + [(*m.span(2), computed(m[3], *m[1].split())[0])
                    for m in find(r'With (--\S+(?: --\S+)*): SIZE of (\d+) GB')]

@pytest.mark.parametrize('name', REAL)
def test_headers_state_the_memory_and_the_disk_that_the_scripts_compute(name):
    text, (_, s) = read(f'config/{name}'), settings_of(name)
    for start, end, value in claims(name, text):
        assert text[start:end] == value, text[start - 20:end + 20]
    numbers = re.search(r'Memory: (\S+) GiB on .* GPUs? of (\d+) GB\. Disk: (\S+) GiB, (\S+) GiB', text)
    assert f'config/{name}` | {" | ".join(numbers.groups())} |' in read('assets/gpus.md')
    cache = r'# (\d+) \* \((\d+) of its own \+ (\d+) of the prompt\) \* ([\d.]+) MiB .* = ([\d.]+) GiB'
    for rows, own, prompt, mib, product in re.findall(cache, text):
        assert (int(rows), int(own)) == (s['max_rows'], s['max_new_tokens'])
        found = int(rows) * (int(own) + int(prompt)) * float(mib) / 1024
        assert found == pytest.approx(float(product), rel=0.01)

def test_the_arithmetic_is_that_of_known_runs():
    """GiB by micro_tokens, for one GPU in bf16, beside the output projection's fp32 copy and gradient."""
    for name, *expected in (('smollm2', 16.0, 9.5, 6.3), ('qwen2.5-0.5b', 32.0, 20.2, 14.4),
                            ('gpt2', 9.0, 5.9, 4.4)):
        m = transformer(name, True)
        m.shard, m.grad_checkpointing = 'none', False
        lines = [memory_needed([m], torch.bfloat16, n, 433) for n in (16384, 8192, 4096)]
        head = 10 * m.head.weight.numel() / 2 ** 30
        found = [float(re.search(r'about ([\d.]+) GiB', line)[1]) - head for line in lines]
        assert found == pytest.approx(expected, rel=0.02)
    assert disk_needed(SHAPES['7b'], 2, 1) == (  # a state: 12 * 6.74e9 bytes = 75.3 GiB
        'disk at most about 276.1 GiB, 125.5 GiB when finished: up to 3 states of 75.3 GiB, then 1, and 2 '
        'checkpoints of 25.1 GiB')
    line = disk_needed(SHAPES['7b'], 2, 1, lora_rank=128)
    assert float(re.search(r'3 states of ([\d.]+) GiB', line)[1]) < 4

def test_budgets_leave_room_for_the_data_sets_own_solutions(tmp_path):
    """How many train solutions exceed one, by tokenizer; prompts are as short as the arithmetic assumes."""
    (tmp_path / 'train.jsonl').symlink_to(os.path.abspath(real_data('gsm8k', 'train.jsonl')))
    problems, shown = data.load_problems(str(tmp_path), 'train'), data.load_problems(str(tmp_path), 'val')[:2]
    wordy = [p for p in problems if len(p.solution) > 360]  # characters: no shorter one has 250 tokens
    asking = sorted(problems, key=lambda p: len(p.question))[-100:]
    cut = {}
    for name in ('mistral', 'gpt2'):
        tok = load_tokenizer(real_data('tokenizers', name))
        solutions = [tok.encode_pair(data.prompt(p.question), data.completion(p.solution))[1] for p in wordy]
        cut[name] = [sum(len(ids) >= budget for ids in solutions) for budget in (256, 384, 512)]  # and an EOS
        for examples, most in (((), 'gsm8k'), (shown, 'two examples')):
            prompts = [tok.encode_prompt(data.prompt(p.question, examples)) for p in asking]
            assert max(map(len, prompts)) <= LONGEST_PROMPT[most]
    assert len(problems) == 7217 and cut == {'mistral': [243, 6, 0], 'gpt2': [22, 0, 0]}  # 3.4%, 0.3% at 256

@pytest.mark.slow
def test_the_demos_chain_runs_tiny(script, tmp_path):
    out, task = str(tmp_path), [f'--task={tmp_path}', '--device=cpu', '--max_new_tokens=20']
    script('data/arithmetic/prepare.py', f'--out={out}', '--n_train=300', '--n_test=12', '--n_base=400')
    for command, name, flags in (
            ('sft', 'base', 'STEPS --text_file=OUT/base.jsonl --n_layer=1 --n_merges=9 --n_embd=8'),
            ('sft', 'sft', 'STEPS --init_from=OUT/base --n_worked=20'),
            ('ei', 'ei', 'STEPS --init_from=OUT/sft --base=OUT/base --n_worked=20 --n_questions=30 --k=2'),
            ('ppo', 'ppo', 'EVAL --init_from=OUT/sft --n_questions=30 --n_iterations=2 --n_rollouts=32 '
             '--minibatch=16'),
            ('rcrl', 'rcrl', 'STEPS --init_from=OUT/ei --base=OUT/base --n_questions=10 --n_worked=20 '
             '--right_share=0'),
            ('rewards', 'orm', '--init_from=OUT/sft --base=OUT/ei --samples=OUT/samples.jsonl --k=2 '
             '--n_questions=30 --batch_size=4 --balance=False --heldout=8')):
        few = {'STEPS': '--eval_problems=4 --max_steps=4', 'EVAL': '--eval_problems=4', 'OUT': out}
        flags = re.sub('|'.join(few), lambda found: few[found[0]], flags)
        script(f'{command}.py', f'config/demo_{name}.py', *task, f'--out_dir={out}/{name}', *flags.split())
        if name == 'ei':  # a policy this small has none right among its solutions: so labels are made
            samples = read(f'{out}/ei/samples_round1.jsonl')
            samples = re.sub(r'("samples": .*?"correct": )false', r'\1true', samples)
            (tmp_path / 'samples.jsonl').write_text(samples)
    runs = [f'{out}/{run}' for run in ('sft', 'ei', 'ppo', 'rcrl')]
    for folder in runs:
        script('eval.py', f'--init_from={folder}', *task, f'--scorer={out}/orm', '--k=4')
    script('eval.py', f'--init_from={out}/rcrl', *task, '--condition=bad', '--k=0')
    table = re.sub(' +', ' ', script('eval.py', '--compare', '--all', *runs).stdout)
    assert '12 problems' in table and table.count(f'| {out}/') == 5 and 'known_sequences |' in table
    assert '| maj@1 | difference | p | maj@4 | rerank@4 | weighted@4 | pass@1 |' in table
    assert [row['samples_drawn'] for row in log_of(tmp_path / 'ei', 'samples_drawn')] == [60, 120]
    assert len(log_of(tmp_path / 'ei', 'val_maj1')) == 2


if __name__ == '__main__' and '--write' in sys.argv:
    for recipe in REAL:
        header = read(f'config/{recipe}')
        for start, end, value in sorted(claims(recipe, header), reverse=True):
            header = header[:start] + value + header[end:]
        with open(os.path.join(ROOT, 'config', recipe), 'w') as f:
            f.write(header)
