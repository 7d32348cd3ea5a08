"""Settings from recipes and flags; a run's device, folder and log."""
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from functools import partial
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process

from config import UserError, check, override, read_source, run
from config.run import Log, fast_cpu_matmul, origin, setup, start_run

SCRIPT = '''"""A script of the tests.

$ python script.py --k=2"""
import sys
from os import sep
sys.path.insert(0, {root!r})
from config import UserError, override
# ----------
# sampling
k = 4                # samples, as in "# of samples" (at least 1)
temperature = 0.7
top_p = 1.0          # of the mass (above 0, at most 1), or (as they say) all
lam = 0.5            # (0 to 1)
seeds = (0, 1)       # one run each
names = [
    'a',
]  # of several lines
stop = ()
name = 'demo'        # any text, # or = in it too
shard = 'auto'       # 'auto' | 'ddp' | 'fsdp': over processes
source = 'bpe'       # 'bpe' | 'gpt2' | a folder
greedy = False       # no sampling
mode = ''            # what the script shall do
CONSTANT_TOO = 5     # no setting
_hidden = 6
empty = None
first = second = 7


if __name__ == '__main__':
    late = 8
    override(globals())
    print('work begins', type(temperature), name)
    if mode:
        raise dict(user=UserError('nothing there\\n  to read'), stop=KeyboardInterrupt,
                   bug=ValueError('a bug'))[mode]
'''
NAMES = 'k temperature top_p lam seeds names stop name shard source greedy mode'.split()

@pytest.fixture(autouse=True)
def keep_excepthook(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)

@pytest.fixture
def settings(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT.format(root=ROOT))
    space = {'__file__': str(path), '__name__': 'script'}
    exec(compile(path.read_text(), path, 'exec'), space)
    return space

@pytest.fixture
def recipe(tmp_path):
    def write(text, name='recipe.py'):
        path = tmp_path / name
        return path.write_text(text) and str(path)
    return write

def test_what_a_setting_is_and_what_is_printed(settings, capsys, monkeypatch):
    assert list(override(settings, [])) == NAMES and capsys.readouterr().out == ''
    monkeypatch.setattr(sys, 'argv', ['script.py', '--k=2', '--greedy', '--name=a=b'])
    assert override(settings) == {name: settings[name] for name in NAMES}
    assert (settings['k'], settings['greedy'], settings['name']) == (2, True, 'a=b')
    printed = capsys.readouterr().out
    assert all(f'{name}=' in printed for name in [*NAMES, '*k', ' temperature', '*greedy', '*name'])
    assert printed.count('*') == 4 and max(map(len, printed.splitlines())) <= 110

CASTS = {  # {setting: {text of a flag, or with = before it of a recipe: value}}
    'k': {'3': 3, '1e6': 1000000, '1_000': 1000, '2.0': 2, '=1e3': 1000},
    'temperature': {'1': 1.0, '3e-4': 3e-4, '-.5': -0.5, '=2': 2.0},
    'name': {'': '', '3': '3', "'q'": "'q'", '="x"': 'x', 'config/x.py': 'config/x.py', ' a b ': ' a b '},
    'greedy': {'true': True, 'False': False, '=True': True},
    'seeds': {'1,2': (1, 2), '[1,2]': (1, 2), '(1,)': (1,), '()': (), '=[3, 1e3]': (3, 1000)},
    'names': {'"a","b"': ['a', 'b'], '=("c",)': ['c']},
    'stop': {'["x", 1, 2.5, True]': ('x', 1, 2.5, True)},
    'top_p': {'1': 1.0, '0.1': 0.1}, 'lam': {'0': 0.0, '1': 1.0},
    'shard': {'ddp': 'ddp', '="fsdp"': 'fsdp'}, 'source': {'some/folder': 'some/folder'}}
REFUSED = {
    'k': {'an int': ['2.5', 'x', '', 'True', '"3"', '1e999', '=True', '=None', '=float("nan")', '2+2',
                     '__import__("os")', '=len'], 'at least 1': ['0', '=-3']},
    'temperature': {'a finite float': ['nan', '1e999', 'True', '=float("nan")', '="0.5"', '=10 ** 400']},
    'greedy': {'True or False': ['1', 'yes', '', 'TRUE', '=1', '="True"']},
    'name': {'a string': ['=3', '=None', '=["a"]']},
    'seeds': {'a tuple': ['1', '', '"12"', '={1: 2}'], 'each element an int': ['1,2.5', '1,True']},
    'names': {'a list': ['a,b'], 'each element a string': ['1,2']},
    'stop': {'each element a plain value': ['[None]'], 'a tuple': ['[float]'],
             'each element a finite float': ['=[float("nan")]']},
    'top_p': {'above 0, at most 1': ['0', '1.1', '=-1']}, 'lam': {'0 to 1': ['-0.1', '1.01']},
    'shard': {"'auto', 'ddp' or 'fsdp'": ['x', '', '="DDP"']}}

def as_argv(recipe, name, text):
    return [recipe(f'\n{name} {text}\n') if text.startswith('=') else f'--{name}={text}']

@pytest.mark.parametrize('name', CASTS)
def test_values(settings, recipe, name):
    start = dict(settings)
    for text, value in CASTS[name].items():
        settings.update(start)
        found = override(settings, as_argv(recipe, name, text))[name]
        assert repr(found) == repr(value) and settings[name] is found, text  # types, too, also of elements

def refusal(settings, argv):
    """The message with which override refuses argv, having changed nothing."""
    before = dict(settings)
    with pytest.raises(UserError) as refused:
        override(settings, argv)
    assert settings == before and '\n' not in str(refused.value)
    return str(refused.value)

@pytest.mark.parametrize('name', REFUSED)
def test_refused_values_name_setting_value_place_and_what_is_wanted(settings, recipe, name):
    for wanted, text in ((wanted, text) for wanted, texts in REFUSED[name].items() for text in texts):
        message = refusal(settings, as_argv(recipe, name, text))
        place = 'recipe.py:2' if text.startswith('=') else f'--{name}={text}'
        assert message.startswith(f'{name} must be ') and message.endswith(f'{place})'), message
        assert wanted in message, message

@pytest.mark.parametrize('argv, expected', [
    ('--temprature=1', 'unknown setting temprature (--temprature=1); nearest: temperature'),
    ('--xyzzy=1', '--help'),
    *((f'--{name}=1', f'unknown setting {name}')
      for name in ('CONSTANT_TOO', '_hidden', 'late', 'empty', 'sep', 'first', '__file__')),
    ('--k', '--k needs a value; write --k=...'), ('--greedy True', "cannot read 'True'"),
    ('--name', 'write --name=...'), ('-k=3', 'write --k=3'), ('k=3', 'write --k=3'),
    ('demo', "cannot read 'demo'; flags are --name=value"),
    ('--k=1 --k=x', '--k=x'), ('--seeds=() --seeds=1.5,2', 'an int')])  # the script's type is kept
def test_refused_arguments(settings, argv, expected):
    assert expected in refusal(settings, argv.split())

def test_recipes_and_flags_apply_in_order(settings, recipe):
    one = recipe('k = 10\ntemperature = 1\n', 'one.py')
    two = recipe('import math\n_n = 3\nk = _n * 7\ndef f(): pass\nclass C: pass\n', 'two.py')
    three = recipe('name = __file__\nif __name__ == "__main__":\n    k = 9\n', 'three.py')
    assert override(settings, ['--k=1', one])['k'] == 10 and override(settings, [one, '--k=1'])['k'] == 1
    values = override(settings, ('--temperature=2', one, two, '--greedy', three))
    assert (values['k'], values['temperature'], values['greedy'], values['name']) == (21, 1.0, True, three)
    assert 'f' not in settings and 'math' not in settings

@pytest.mark.parametrize('text, expected', [
    ('k = 3\ntemprature = 1\n', 'unknown setting temprature (PATH:2); nearest: temperature'),
    ('k = 3\nk = k +\n', 'PATH:2: SyntaxError: invalid syntax'), ('k = 3\0\n', 'PATH:'),
    ('k = 3\n\nk = 1 / 0\n', 'PATH:3: ZeroDivisionError: division by zero'),
    ('k = temperature\n', 'PATH:1: NameError'),  # the script's settings are not there
    ('def _f():\n    return {}["x"]\nk = _f()\n', "PATH:2: KeyError: 'x'"),
    ('from config.demo_sft import *\n', 'unknown setting'),
    ('k = 1\nk = 2\nk = "x"\n', "k must be an int, not 'x' (PATH:3)"),
    ('for i in range(3): k = i\n', 'unknown setting i (PATH:1)'),
    ('/no/where.py', 'PATH: FileNotFoundError'),
    *((f'{ROOT}/config/{name}.py', 'PATH is no recipe') for name in ('run', '__init__'))])
def test_a_recipe_that_fails(settings, recipe, text, expected):
    path = recipe(text) if '\n' in text else text
    assert expected.replace('PATH', path) in refusal(settings, [path])

def test_a_notebook_and_help(settings, capsys):
    notebook = {'lr': 1.0, '_x': 1, 'os': os, 'f': len, 'N': 3}
    assert override(notebook, ['--lr=2']) == {'lr': 2.0}
    for space, argv in ((notebook, ['-h']), (settings, ['--k=x', '--help'])):
        with pytest.raises(SystemExit):
            override(space, argv)
    text = capsys.readouterr().out
    assert 'A script of the tests.\n\n$ python script.py --k=2\n' in text
    assert '# sampling\nk = 4                # samples, as in' in text and text.endswith("shall do\n")

def test_command_line(settings):
    """Errors are one line and code 2, bugs a traceback; a reader that has enough ends a script quietly."""
    file = settings['__file__']
    for flag, code, stderr in (('--k=x', 2, "error: k must be an int, not 'x' (--k=x)\n"),
                               ('--mode=user', 2, 'error: nothing there to read\n'),
                               ('--mode=stop', 130, 'stopped by Ctrl-C: what was written so far is kept\n'),
                               ('--name=a=b', 0, '')):
        done = run_process(file, '--temperature=1', flag, code=code)
        assert done.stderr == stderr and ("work begins <class 'float'>" in done.stdout) == ('k=' not in flag)
    assert done.stdout.endswith(' a=b\n')
    done = run_process(file, '--mode=bug', code=1)
    assert 'Traceback' in done.stderr and done.stderr.endswith('ValueError: a bug\n')
    done = run_process('-c', 'import sys, config; print({"torch", "numpy"} & set(sys.modules))')
    assert done.stdout == 'set()\n'
    code = 'import sys, config; sys.excepthook = config.one_line\nfor _ in range(20000): print("x" * 100)'
    done = subprocess.run(f"{sys.executable} -c '{code}' | head -1", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == 'x' * 100 + '\n' and not done.stderr

@pytest.fixture
def out(tmp_path):
    return tmp_path / 'a' / 'out'

def begin(out, resume=False, **changes):
    first = dict(out_dir=str(out), init_from='scratch', lr=0.5, seeds=(1, 2), overwrite=False, device='cpu')
    return start_run(first | changes, resume)

def stored(out):
    return json.loads((out / 'config.json').read_text())

def test_start_run_writes_the_settings_and_resuming_what_has_changed(out, capsys, monkeypatch):
    out.mkdir(parents=True)
    (out / 'config.json.tmp').write_text('{')  # killed before its settings were written
    commands = ["sft.py '--name=two words'", 'sft.py --init_from=resume', 'sft.py --lr=0.1']
    other = 'resumed with other settings than before: lr 0.5 -> 0.1, new None -> 1\n'
    resumed = dict(resume=True, init_from='resume', device='cuda', overwrite=True)
    steps = ({}, ''), (resumed, ''), ({'lr': 0.1, 'new': 1} | resumed, other)
    for command, (changes, said) in zip(commands, steps):
        monkeypatch.setattr(sys, 'argv', shlex.split(command))
        begin(out, **changes)
        assert capsys.readouterr().out == said
        if not changes:
            assert stored(out) == dict(out_dir=str(out), init_from='scratch', lr=0.5, seeds=[1, 2],
                                       overwrite=False, device='cpu', _job='', _id=stored(out)['_id'],
                                       _commands=commands[:1])
            (out / 'weights').write_text('x')  # survives, overwrite or not
    config = stored(out)
    assert (config['lr'], config['init_from'], config['_commands']) == (0.1, 'scratch', commands)
    assert sorted(os.listdir(out)) == ['config.json', 'log.jsonl', 'weights']

def test_only_a_restart_of_the_same_job_goes_on_unasked(out, monkeypatch):
    monkeypatch.setenv('RUN_JOB', 'mine')
    begin(out, init_from='base')
    for job, found in (('mine', (True, 'base')), ('another', (False, 'scratch')), ('', (False, 'scratch'))):
        monkeypatch.setenv('RUN_JOB', job)
        assert origin('scratch', str(out)) == found and origin('resume', str(out)) == (True, 'base')
        assert origin('scratch', str(out / 'elsewhere')) == (False, 'scratch')
    begin(out / 'alone')
    assert not origin('scratch', str(out / 'alone'))[0]  # no job is not a job
    (out / 'last').mkdir()
    assert origin('resume', str(out), 'best')[0]
    for folder, match in ((out / 'elsewhere', 'no run to resume'), (out, 'kept no state')):
        with pytest.raises(UserError, match=match):
            origin('resume', str(folder))

def test_a_run_is_replaced_only_when_asked_and_never_what_is_needed(out, monkeypatch):
    begin(out)
    for folder in (out / 'best', out.parent / 'kept'):
        folder.mkdir()
        (folder / 'file').write_text('x')
    (out / 'link').symlink_to(out.parent / 'kept')
    (out.parent / 'elsewhere').symlink_to(out / 'best')
    begin(out / 'inner')  # another run within
    needed = [str(out / 'best'), str(out.parent / 'elsewhere')]  # the checkpoint that the run starts from
    for changes, match in (({'overwrite': False}, f'{out}.*--init_from=resume.*--overwrite'), ({}, 'inner'),
                           *(({'init_from': path}, path) for path in needed)):
        with pytest.raises(UserError, match=match):
            begin(out, lr=0.1, **{'overwrite': True} | changes)
    with monkeypatch.context() as patch, pytest.raises(UserError, match='choose another'):
        patch.chdir(out)
        begin('.', overwrite=True)
    os.rename(out / 'inner', out.parent / 'inner')
    for module, name, how in ((run.shutil, 'rmtree', 'overwrite'), (os, 'replace', 'resume')):  # a full disk
        with monkeypatch.context() as patch, pytest.raises(UserError, match='No space left'):
            patch.setattr(module, name, Mock(side_effect=OSError(28, 'No space left on device')))
            begin(out, lr=0.1, **{how: True})
        assert stored(out)['lr'] == 0.5 and (out / 'best' / 'file').exists()
    begin(out, lr=0.1, overwrite=True)
    assert sorted(os.listdir(out)) == ['config.json', 'log.jsonl']
    assert (out.parent / 'kept' / 'file').exists()
    assert stored(out)['lr'] == 0.1 and len(stored(out)['_commands']) == 1

@pytest.mark.parametrize('content', [None, '{"model_type": "llama"}', '{"_comm', '[1]', '"_commands"'])
def test_what_is_no_run_is_never_removed_or_resumed(out, content):
    out.mkdir(parents=True)
    (out / 'precious').write_text('x')
    if content is not None:
        (out / 'config.json').write_text(content)
    for how in ({}, {'overwrite': True}, {'resume': True}):
        with pytest.raises(UserError, match=f'{out}.* no run'):
            begin(out, **how)
    for out_dir in (out / 'precious', out / 'precious' / 'below', ''):
        with pytest.raises(UserError, match='out_dir'):
            begin(out_dir)
    assert (out / 'precious').read_text() == 'x'
    assert (out / 'config.json').exists() == (content is not None)

def test_log(tmp_path, capsys, monkeypatch):
    def rows():
        def refuse(name):
            raise AssertionError(f'{name} is no JSON')
        return [json.loads(line, parse_constant=refuse) for line in open(tmp_path / 'log.jsonl')]
    now = [1000.0]
    monkeypatch.setattr(run.time, 'time', lambda: now[0])
    log = Log(str(tmp_path))
    now[0] += 2.5
    values = dict(loss=1.23456, tokens=123456, lr=2e-5, rate=12345.678, note='x', ok=True)
    log(100, **values, bad=math.nan, worse=-math.inf)
    assert capsys.readouterr().out == ('step 100 | loss 1.2346 | tokens 123456 | lr 2e-05 | rate 12346 | '
                                       'note x | ok True | bad nan | worse -inf\n')
    row, = rows()  # on disk before the next one
    assert 0.1 < row.pop('memory') < 64
    assert row == values | {'step': 100, 'time': 2.5, 'bad': None, 'worse': None}
    log(np.int64(1), a=np.float32(0.5), b=torch.tensor(2.0, requires_grad=True), c=torch.tensor(3),
        d=np.float64('nan'), e=torch.tensor(math.inf), f=np.bool_(True))
    assert rows()[1].items() >= dict(step=1, a=0.5, b=2.0, c=3, d=None, e=None, f=True).items()
    for content in ('', '{"step": 1, "ti', '{"step": 1, "time": 3.0}', '{"step": 1, "time": 3.0}\n'):
        (tmp_path / 'log.jsonl').write_text(content)  # a crash while it wrote a line
        log, kept = Log(str(tmp_path), resume=True), content.count('\n')
        now[0] += 5
        log(2)
        assert [(row['step'], row['time']) for row in rows()] == [(1, 3.0)] * kept + [(2, 5 + 3 * kept)]
    Log(str(tmp_path))(1)
    assert len(rows()) == 1
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "time": 3.0}\nno json\n')
    with pytest.raises(UserError, match='log.jsonl'):
        Log(str(tmp_path), resume=True)

def test_trackers(out, monkeypatch):
    module = Mock(__spec__='installed')
    for name in ('tensorboard', 'torch.utils.tensorboard', 'wandb', 'trackio'):
        monkeypatch.setitem(sys.modules, name, None if name == 'trackio' else module)
    with pytest.raises(UserError, match='trackio.* not installed'):
        begin(out, tracker='trackio')
    assert not out.exists()
    for tracker in ('tensorboard', 'wandb'):
        log = begin(out, tracker=tracker, overwrite=True)
        log(np.int64(3), loss=torch.tensor(1.5), note='x', bad=math.nan)
        for again in ('resume', 'overwrite'):
            begin(out, tracker=tracker, **{again: True})
    added = module.SummaryWriter.return_value.add_scalar.call_args_list
    assert call('loss', 1.5, 3) in added and [x.args[0] for x in added] == ['step', 'time', 'memory', 'loss']
    assert [x.args for x in module.SummaryWriter.call_args_list] == [(str(out),)] * 3
    first, resumed, new = [x.kwargs['name'] for x in module.init.call_args_list]
    assert first == resumed != new
    assert call({'loss': 1.5}, step=3) in module.init.return_value.log.call_args_list

def test_fast_matmul_is_true_fp32(request):
    matmul = torch.backends.mkldnn.matmul
    request.addfinalizer(partial(setattr, matmul, 'fp32_precision', matmul.fp32_precision))
    fast_cpu_matmul()
    a, b = torch.randn(300, 200), torch.randn(100, 200)
    assert (torch.nn.functional.linear(a, b) - (a.double() @ b.double().T)).abs().max() < 1e-4

@pytest.mark.parametrize('arguments, match', [
    (('abacus',), "device 'abacus' cannot be used"), (('cpu', 'float8'), 'dtype is')])
def test_setup_refuses(arguments, match):
    with pytest.raises(UserError, match=match):
        setup(*arguments)

@pytest.mark.parametrize('bf16', [True, False])
def test_slow_bf16_is_told(monkeypatch, capsys, bf16):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_f': True, 'avx512_bf16': bf16})
    assert setup('cpu', 'bfloat16')[1] == torch.bfloat16 and setup('cpu')[1] == torch.float32
    assert capsys.readouterr().out.count('warning: this CPU has no bf16') == (not bf16)

@pytest.mark.parametrize('name', ['sft', 'eval', 'rewards', 'ei', 'rcrl', 'ppo'])
def test_what_would_fail_after_hours_is_refused_at_the_start(name):
    comments, _ = read_source(vars(importlib.import_module(name)))
    wrong = dict(max_rows=0, max_new_tokens=0, micro_tokens=0, batch_size=0, max_steps=-1, epochs=0)
    for setting in wrong.keys() & comments.keys():
        with pytest.raises(ValueError):
            check(wrong[setting], comments[setting])
