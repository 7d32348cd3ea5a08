"""The recipes in config/ and the commands that the README and the demo give: each loads, and the demo's chain runs, tiny."""
import importlib
import json
import os
import re

import pytest
from conftest import ROOT

from config import override

RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config')) if name.endswith('.py') and name != '__init__.py')


SCRIPTS = {'_ppo': 'ppo', '_rcrl': 'rcrl', '_ei': 'ei', '_orm.': 'rewards', '_prm.': 'rewards'}  # part of a recipe's name -> its script


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_loads_into_its_script(name, capsys):
    script = next((script for part, script in SCRIPTS.items() if part in name), 'sft')
    settings = dict(vars(importlib.import_module(script)))
    path = os.path.join(ROOT, 'config', name)
    before = dict(settings)
    values = override(settings, [path])
    assert settings['out_dir'] == f'out/{name[:-3]}' and any(values[key] != before[key] for key in values)
    with open(path) as f:
        text = f.read()
    assert text.startswith('#') and f' {script}.py config/{name}' in text  # what it is for, and the exact command
    if name.startswith('demo_ppo'):  # like with like: from the same checkpoint, with as many samples as Expert Iteration or fewer
        ei = dict(vars(importlib.import_module('ei')))
        override(ei, [os.path.join(ROOT, 'config', 'demo_ei.py')])
        assert settings['init_from'] == ei['init_from'] and settings['n_questions'] == ei['n_questions']
        assert settings['n_iterations'] * settings['n_rollouts'] <= ei['n_questions'] * ei['k'] * ei['n_rounds']
    # a recipe's own arithmetic: the control takes as many updates as SFT and the rounds of EI together
    if name == 'demo_sft_long.py':
        sft, ei = dict(vars(importlib.import_module('sft'))), dict(vars(importlib.import_module('ei')))
        override(sft, [path.replace('_long', '')])
        override(ei, [path.replace('sft_long', 'ei')])
        assert values['max_steps'] == sft['max_steps'] + ei['n_rounds'] * ei['max_steps']
        assert values['batch_size'] == sft['batch_size'] == ei['batch_size']


@pytest.mark.parametrize('file', ['README.md', 'config/demo.sh'] + [f'config/{name}' for name in RECIPES])
def test_commands_name_files_that_exist(file):
    with open(os.path.join(ROOT, file)) as f:
        text = f.read()
    named = re.findall(r'(?:config|data|tests)/[\w/.]*\.(?:py|sh)|(?<=python )\w+\.py', text)
    assert named and not [path for path in named if not os.path.exists(os.path.join(ROOT, path))]


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
