"""The recipes in config/: each loads into its script, names files that exist, and states the memory and the disk that the script will print."""
import functools
import importlib
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2, ROOT, real_data

import model
import rewards
from config import override
from model import ModelConfig, Transformer, disk_needed, memory_needed, sharding
from sample import load_tokenizer

RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config')) if name.endswith('.py') and name != '__init__.py')
SCRIPTS = {'_ppo': 'ppo', '_rcrl': 'rcrl', '_ei': 'ei', '_orm.': 'rewards', '_prm.': 'rewards'}  # part of a recipe's name -> its script
LLAMA = dict(vocab_size=32000, block_size=4096, head_dim=128, tied=False)
SHAPES = {  # part of a checkpoint's name -> the public shape of the model, or of the one that it was made of
    'smollm2': ModelConfig(vocab_size=49152, block_size=8192, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64, n_inner=1536),
    'qwen2.5-0.5b': ModelConfig(vocab_size=151936, block_size=32768, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, head_dim=64, n_inner=4864,
                                qkv_bias=True),
    'gpt2': ModelConfig(**GPT2 | dict(n_kv_head=12), vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, head_dim=64, n_inner=3072),
    '7b': ModelConfig(n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, n_inner=11008, **LLAMA),
    '13b': ModelConfig(n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, n_inner=13824, **LLAMA)}
LONGEST_PROMPT = {'gsm8k': 250, 'svamp': 110, 'two examples': 600}  # tokens


def settings_of(name, *flags):
    """-> the recipe's script, its settings and its text"""
    script = next((script for part, script in SCRIPTS.items() if part in name), 'sft')
    settings, path = dict(vars(importlib.import_module(script))), os.path.join(ROOT, 'config', name)
    defaults = dict(settings)
    values = override(settings, [path, *flags])
    assert any(values[key] != defaults[key] for key in values)
    with open(path) as f:
        return script, values, f.read()


def test_recipes_load_into_their_scripts(capsys):
    found = {name: settings_of(name) for name in RECIPES}
    for name, (script, values, text) in found.items():
        assert values['out_dir'] == f'out/{name[:-3]}'
        assert text.startswith('#') and f' {script}.py config/{name}' in text  # what it is for, and the exact command
        budget = f'--max_new_tokens={values["max_new_tokens"]}'  # evaluated as it was trained
        for command in re.findall(r'eval\.py --init_from.*?(?=&&|\n|  )', text):
            assert budget in command or values['max_new_tokens'] == 256, (name, command)
    sft, sft_long, ei = (found[f'demo_{which}.py'][1] for which in ('sft', 'sft_long', 'ei'))
    for name in RECIPES:
        if name.startswith('demo_ppo'):  # like with like: from the same checkpoint, with as many samples as Expert Iteration or fewer
            ppo = found[name][1]
            assert ppo['init_from'] == ei['init_from'] and ppo['n_questions'] == ei['n_questions']
            assert ppo['n_iterations'] * ppo['n_rollouts'] <= ei['n_questions'] * ei['k'] * ei['n_rounds']
    # a recipe's own arithmetic: the control takes as many updates as SFT and the rounds of EI together
    assert sft_long['max_steps'] == sft['max_steps'] + ei['n_rounds'] * ei['max_steps']
    assert sft_long['batch_size'] == sft['batch_size'] == ei['batch_size']


def test_commands_name_files_that_exist():
    for file in ['README.md', 'config/demo.sh'] + [f'config/{name}' for name in RECIPES]:
        with open(os.path.join(ROOT, file)) as f:
            named = re.findall(r'(?:config|data|tests)/[\w/.]*\.(?:py|sh)|(?<=python )\w+\.py', f.read())
        assert named and not [path for path in named if not os.path.exists(os.path.join(ROOT, path))]


# -----------------------------------------------------------------------------
# what headers say of memory and disk

@functools.cache
def transformer(part, learns=False, lora_rank=0, value_head=False):
    with torch.device('meta'):
        m = Transformer(SHAPES[part]).to(torch.float32 if learns and not lora_rank else torch.bfloat16).requires_grad_(learns)
        if value_head:
            m.add_value_head()
        return m.add_lora(lora_rank) if lora_rank else m


def part_of(path):
    return next(part for part in SHAPES if part in path.lower())


def printed(script, s):
    """-> (GiB, GiB, GiB): the most memory, and the disk at most and when finished, of the lines that the script prints for these settings on
    GPUs. On the meta device, which has no memory and for the arithmetic is no CPU."""
    def load(path, learns=False, shard='none', value_head=False):
        m = transformer(part_of(path), learns, s['lora_rank'] * learns, value_head)
        m.shard, m.grad_checkpointing = sharding(shard, m, torch.device('cuda')), s['grad_checkpointing']
        return m

    def needed(models, learns, draws):
        rows = (s['max_rows'], LONGEST_PROMPT['two examples' if s.get('few_shot') else s['task']], s['max_new_tokens']) if draws else ()
        return memory_needed(models, torch.bfloat16, s['micro_tokens'] if learns else 0, 0, *rows)

    first, base, shard = s['init_from'], s.get('base') or s['init_from'], s['shard']
    scorer = [load(s['reward_model'])] if s.get('reward_model') else []
    if script == 'sft':
        lines, n_exports = [needed([load(first, True, shard)], True, True)], 2
    elif script == 'ei':
        lines = [needed([load(first)] + scorer, False, True), needed([load(base, True, shard)] + scorer, True, False)]
        n_exports = s['n_rounds'] + 1
    elif script == 'ppo':
        policy = load(first, True, shard, s['advantage'] == 'gae')
        for m in scorer:
            m.shard = policy.shard
        reference = [] if s['lora_rank'] else [load(first, shard=policy.shard)]
        lines, n_exports = [needed([policy] + reference + scorer, True, True)], 2
    else:  # rcrl samples and validates, rewards only learns after its samples were drawn
        lines = [needed([load(first)], False, True), needed([load(base, True, shard, script == 'rewards')], True, script == 'rcrl')]
        n_exports = 3 if script == 'rcrl' else 1
    memory = max(float(re.match(r'memory of a process at most about ([\d.]+) GiB', line)[1]) for line in lines)
    disk = re.match(r'disk at most about ([\d.]+) GiB, ([\d.]+ .iB) when', disk_needed(SHAPES[part_of(base)], n_exports, s.get('keep_states', 0), s['lora_rank']))
    return memory, disk[1] + ' GiB', disk[2]


def test_headers_state_the_memory_and_the_disk_that_the_scripts_compute(monkeypatch, capsys):
    for name in RECIPES:
        if name.startswith('demo'):
            continue
        script, s, text = settings_of(name)
        text = text.replace('\n# ', ' ')
        gib, gpus, gb, disk, finished = re.search(r'Memory: ([\d.]+) GiB on (one GPU|each of 8 GPUs) of (\d+) GB\. '
                                                  r'Disk: ([\d.]+ .iB), ([\d.]+ .iB) when finished', text).groups()
        monkeypatch.setattr(model, 'world_size', lambda: 1 if gpus == 'one GPU' else 8)
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=int(gb) * 1e9))
        assert printed(script, s) == (float(gib), disk, finished), name
        stated = [(gib, gb)]
        for flags, gib, gb in re.findall(r'With (--\S+(?: --\S+)*): ([\d.]+) GiB of (\d+) GB', text):
            assert printed(script, settings_of(name, *flags.split())[1])[0] == float(gib), (name, flags)
            stated.append((gib, gb))
        assert all(float(gib) * 2 ** 30 <= 0.95 * float(gb) * 1e9 for gib, gb in stated), name  # it fits what it recommends
        for rows, own, prompt, mib, product in re.findall(r'# (\d+) \* \((\d+) of its own \+ (\d+) of the prompt\) \* ([\d.]+) MiB .* = ([\d.]+) GiB', text):
            assert (int(rows), int(own)) == (s['max_rows'], s['max_new_tokens']), name
            assert int(rows) * (int(own) + int(prompt)) * float(mib) / 1024 == pytest.approx(float(product), rel=0.01), name


def test_the_arithmetic_is_that_of_known_runs():
    """GiB by micro_tokens, for one GPU in bf16, beside the output projection's fp32 copy and gradient."""
    for name, expected in (('smollm2', [16.0, 9.5, 6.3]), ('qwen2.5-0.5b', [32.0, 20.2, 14.4]), ('gpt2', [9.0, 5.9, 4.4])):
        model = transformer(name, True)
        projection = 10 * model.head.weight.numel() / 2 ** 30
        found = [memory_needed([model], torch.bfloat16, n, 433) for n in (16384, 8192, 4096)]
        assert [float(re.search(r'about ([\d.]+) GiB', line)[1]) - projection for line in found] == pytest.approx(expected, abs=0.1)
    assert 12 * 6.74e9 / 2 ** 30 == pytest.approx(75.3, abs=0.05)  # 81 GB
    line = disk_needed(SHAPES['7b'], 2, 1)
    assert line.startswith('disk at most about 276.1 GiB, 125.5 GiB when finished: up to 3 states of 75.3 GiB, then 1, and 2 checkpoints of 25.1')
    assert float(re.search(r'3 states of ([\d.]+) GiB', disk_needed(SHAPES['7b'], 2, 1, lora_rank=128))[1]) < 4


def test_budgets_leave_room_for_the_data_sets_own_solutions(tmp_path):
    """How many of the train solutions are longer than a budget, by tokenizer, and that prompts are no longer than the headers' arithmetic says."""
    source = real_data('gsm8k', 'train.jsonl')
    (tmp_path / 'train.jsonl').write_text(open(source, encoding='utf-8').read(), encoding='utf-8')
    problems, examples = rewards.load_problems(str(tmp_path), 'train'), rewards.load_problems(str(tmp_path), 'val')[:2]
    wordy = [p for p in problems if len(p.solution) > 360]  # characters: no shorter one has 250 tokens
    asking = sorted(problems, key=lambda p: len(p.question))[-100:]
    cut = {}
    for name in ('mistral', 'gpt2'):
        tok = load_tokenizer(real_data('tokenizers', name))
        solutions = [tok.encode_pair(rewards.prompt(p.question), rewards.completion(p.solution))[1] for p in wordy]
        cut[name] = [sum(len(ids) + 1 > budget for ids in solutions) for budget in (256, 384, 512)]  # + 1: the EOS
        assert max(len(tok.encode_prompt(rewards.prompt(p.question))) for p in asking) <= LONGEST_PROMPT['gsm8k']
        assert max(len(tok.encode_prompt(rewards.prompt(p.question, examples))) for p in asking) <= LONGEST_PROMPT['two examples']
    assert len(problems) == 7217 and cut == {'mistral': [243, 6, 0], 'gpt2': [22, 0, 0]}  # of 7,217: 3.4% and 0.3% at 256


@pytest.mark.slow
def test_the_demos_chain_runs_tiny(script, tmp_path):
    script('data/arithmetic/prepare.py', f'--out={tmp_path}', '--n_train=300', '--n_test=12', '--n_base=400')
    common = [f'--task={tmp_path}', '--max_steps=4', '--eval_problems=4', '--max_new_tokens=20', '--device=cpu']
    script('sft.py', 'config/demo_base.py', *common, f'--text_file={tmp_path}/base.jsonl', f'--out_dir={tmp_path}/demo_base', '--n_layer=1',
           '--n_merges=50', '--n_embd=16', '--n_head=2')
    script('sft.py', 'config/demo_sft.py', *common, f'--init_from={tmp_path}/demo_base', f'--out_dir={tmp_path}/demo_sft', '--n_worked=20')
    script('ei.py', 'config/demo_ei.py', *common, f'--init_from={tmp_path}/demo_sft', f'--base={tmp_path}/demo_base',
           f'--out_dir={tmp_path}/demo_ei', '--n_worked=20', '--n_questions=30', '--k=2')
    script('ppo.py', 'config/demo_ppo.py', *common[:1], *common[2:], f'--init_from={tmp_path}/demo_sft', f'--out_dir={tmp_path}/demo_ppo',
           '--n_questions=30', '--n_iterations=2', '--n_rollouts=32', '--minibatch=16')
    script('rcrl.py', 'config/demo_rcrl.py', *common, f'--init_from={tmp_path}/demo_ei', f'--base={tmp_path}/demo_base', '--n_questions=10',
           f'--out_dir={tmp_path}/demo_rcrl', '--n_worked=20', '--right_share=0')
    # the solutions that EI's first round drew from the SFT policy, of which a policy this small has none right: so labels are made
    rows = [json.loads(line) for line in open(tmp_path / 'demo_ei' / 'samples_round1.jsonl')]
    for row in rows:
        row['samples'][0]['correct'] = True
    (tmp_path / 'samples.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    script('rewards.py', 'config/demo_orm.py', common[0], *common[3:], f'--init_from={tmp_path}/demo_sft', f'--base={tmp_path}/demo_ei',
           f'--samples={tmp_path}/samples.jsonl', '--k=2', '--n_questions=30', '--batch_size=4', '--balance=False', '--heldout=8',
           f'--out_dir={tmp_path}/demo_orm')
    for run in ('demo_sft', 'demo_ei', 'demo_ppo', 'demo_rcrl'):
        script('eval.py', f'--init_from={tmp_path}/{run}', f'--task={tmp_path}', f'--scorer={tmp_path}/demo_orm', '--k=4', '--max_new_tokens=20')
    script('eval.py', f'--init_from={tmp_path}/demo_rcrl', f'--task={tmp_path}', '--condition=bad', '--k=0', '--max_new_tokens=20')
    table = script('eval.py', '--compare', *(f'{tmp_path}/{run}' for run in ('demo_sft', 'demo_ei', 'demo_ppo', 'demo_rcrl'))).stdout
    assert table.count('| 12 |') == 5 and table.count('of its different equation sequences') == 3 and '| maj@1 | maj@4 | rerank@4 | weighted@4 | pass@4 |' in table
    rows = [json.loads(line) for line in open(tmp_path / 'demo_ei' / 'log.jsonl')]
    explored = [row for row in rows if 'samples_drawn' in row]
    assert [row['samples_drawn'] for row in explored] == [60, 120]
    for key in ('share_correct', 'share_truncated', 'unique_equations', 'solved', 'new_solutions', 'dataset'):
        assert key in explored[0]
    assert sum('val_maj1' in row for row in rows) == 2
