"""Settings from recipes and flags, a run's folder, the log: in process, and through the command line of a small script."""
import io
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process

import config
from config import Log, UserError, bar, override, resuming, start_run

SCRIPT = '''"""A script of the tests.

$ python script.py --k=2"""
import sys
from os import sep
sys.path.insert(0, {root!r})
from config import UserError, override, start_run
# ----------
# sampling
k = 4                # samples, as in "# of samples"
temperature = 0.7
seeds = (0, 1)       # one run each
names = ['a']
stop = ()
long = [
    1.5,
]  # of several lines
# ----------
name = 'demo'        # any text, # or = in it too
# run
greedy = False       # no sampling
mode = ''            # what the script shall do
K, CONSTANT, _private, nothing, table = 1, 2, 3, None, {{}}
CONSTANT_TOO = 5     # no setting
_hidden = 6
empty = None
first = second = 7


def helper():
    inner = 1


if __name__ == '__main__':
    late = 8
    settings = override(globals())
    print('work begins', type(temperature), name)
    if mode == 'user':
        raise UserError('nothing there\\n  to read')
    if mode == 'stop':
        raise KeyboardInterrupt
    if mode == 'bug':
        raise ValueError('a bug')
below = 9
'''
NAMES = ['k', 'temperature', 'seeds', 'names', 'stop', 'long', 'name', 'greedy', 'mode']


@pytest.fixture(autouse=True)
def keep_excepthook(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT.format(root=ROOT))
    return str(path)


@pytest.fixture
def settings(file):
    """globals() of the script, imported rather than run."""
    module = types.ModuleType('script')
    module.__file__ = file
    exec(compile(open(file).read(), file, 'exec'), vars(module))
    return vars(module)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name='recipe.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


# -----------------------------------------------------------------------------
# settings

def test_what_a_setting_is(settings):
    assert list(override(settings, [])) == NAMES


def test_override_changes_globals_and_returns_all(settings):
    values = override(settings, ['--k=2', '--greedy', '--name=a=b'])
    assert (settings['k'], settings['greedy'], settings['name']) == (2, True, 'a=b')
    assert values == {name: settings[name] for name in NAMES}
    assert settings['first'] == 7 and settings['CONSTANT_TOO'] == 5


CASTS = [
    # a flag's text, or a recipe's literal where it begins with '=': -> value
    ('k', '3', 3), ('k', '-3', -3), ('k', '1e6', 1000000), ('k', '1_000', 1000), ('k', '2.0', 2), ('k', '=5', 5),
    ('k', '=1e3', 1000),
    ('temperature', '1', 1.0), ('temperature', '3e-4', 3e-4), ('temperature', '-.5', -0.5),
    ('temperature', '=2', 2.0),
    ('name', 'a=b', 'a=b'), ('name', '', ''), ('name', '3', '3'), ('name', 'true', 'true'), ('name', "'q'", "'q'"),
    ('name', '="x"', 'x'),
    ('name', 'config/x.py', 'config/x.py'), ('name', 'None', 'None'), ('name', ' two words ', ' two words '),
    ('greedy', 'true', True), ('greedy', 'True', True), ('greedy', 'false', False), ('greedy', 'False', False),
    ('greedy', '=True', True),
    ('seeds', '1,2', (1, 2)), ('seeds', '[1,2]', (1, 2)), ('seeds', '(1,)', (1,)), ('seeds', '()', ()),
    ('seeds', '=[3, 1e3]', (3, 1000)),
    ('names', '"a","b"', ['a', 'b']), ('names', '=("c",)', ['c']),
    ('stop', '["x", 1, 2.5, True]', ('x', 1, 2.5, True)), ('long', '1,2', [1.0, 2.0]),
]


def as_argv(recipe, name, text):
    return [recipe(f'\n{name} {text}\n') if text.startswith('=') else f'--{name}={text}']


def test_casts(settings, recipe):
    start = dict(settings)
    for name, text, value in CASTS:
        settings.update(start)
        found = override(settings, as_argv(recipe, name, text))[name]
        assert found == value and type(found) is type(value) and settings[name] is found, (name, text)
        if isinstance(value, (tuple, list)):
            assert [type(x) for x in found] == [type(x) for x in value], (name, text)


REFUSED = [
    ('k', '2.5', 'an int'), ('k', 'x', 'an int'), ('k', '', 'an int'), ('k', 'True', 'an int'),
    ('k', '"3"', 'an int'), ('k', '1e999', 'an int'),
    ('k', '=True', 'an int'), ('k', '="3"', 'an int'), ('k', '=2.5', 'an int'), ('k', '=None', 'an int'),
    ('k', '=float("nan")', 'an int'),
    ('k', '2+2', 'an int'), ('k', '__import__("os")', 'an int'), ('k', '1 2', 'an int'), ('k', '=len', 'an int'),
    ('k', '=[1]', 'an int'),
    ('temperature', 'nan', 'a finite float'), ('temperature', 'inf', 'a finite float'),
    ('temperature', '1e999', 'a finite float'),
    ('temperature', 'True', 'a finite float'), ('temperature', 'fast', 'a finite float'),
    ('temperature', '=float("nan")', 'a finite float'),
    ('temperature', '="0.5"', 'a finite float'), ('temperature', '=10 ** 400', 'a finite float'),
    ('temperature', '1j', 'a finite float'),
    ('greedy', '1', 'True or False'), ('greedy', '0', 'True or False'), ('greedy', 'yes', 'True or False'),
    ('greedy', '', 'True or False'),
    ('greedy', 'TRUE', 'True or False'), ('greedy', '=1', 'True or False'), ('greedy', '="True"', 'True or False'),
    ('name', '=3', 'a string'), ('name', '=None', 'a string'), ('name', '=["a"]', 'a string'),
    ('seeds', '1', 'a tuple'), ('seeds', 'x', 'a tuple'), ('seeds', '', 'a tuple'),
    ('seeds', '1,2.5', 'each element an int'),
    ('seeds', '"12"', 'a tuple'), ('seeds', '="12"', 'a tuple'), ('seeds', '={1: 2}', 'a tuple'),
    ('seeds', '1,True', 'each element an int'),
    ('names', 'a,b', 'a list'), ('names', '1,2', 'each element a string'),
    ('stop', '[None]', 'each element a plain value'),
    ('stop', '[float]', 'a tuple'), ('stop', '=[float("nan")]', 'each element a finite float'),
]


def refusal(settings, argv):
    """The message with which override refuses argv, having changed nothing."""
    before = dict(settings)
    with pytest.raises(UserError) as refused:
        override(settings, argv)
    assert settings == before and '\n' not in str(refused.value)
    return str(refused.value)


def test_refused_values_name_setting_value_place_and_type(settings, recipe):
    for name, text, expected in REFUSED:
        message = refusal(settings, as_argv(recipe, name, text))
        place = 'recipe.py:2' if text.startswith('=') else f'--{name}={text}'
        assert message.startswith(f'{name} must be ') and expected in message and f'{place})' in message, message


REFUSED_ARGUMENTS = [
    (['--temprature=1'], ['temprature', '--temprature=1', 'nearest: temperature']),
    (['--TEMP=1'], ['TEMP', 'nearest: temperature']),
    (['--xyzzy=1'], ['xyzzy', '--help']),
    (['--CONSTANT_TOO=1'], ['unknown setting CONSTANT_TOO']), (['--_hidden=1'], ['unknown setting _hidden']),
    (['--late=1'], ['unknown setting late']), (['--below=1'], ['unknown setting below']),
    (['--inner=1'], ['unknown setting inner']),
    (['--empty=1'], ['unknown setting empty']), (['--sep=x'], ['unknown setting sep']),
    (['--first=1'], ['unknown setting first']), (['--__file__=x'], ['unknown setting __file__']),
    (['--k', '3'], ['--k needs a value; write --k=3']), (['--k'], ['write --k=...']), (['--k', '--greedy'], ['write --k=...']),
    (['--name'], ['write --name=...']), (['--greedy', 'True'], ['write --greedy=True']),
    (['-k=3'], ['write --k=3']), (['-k', '3'], ['write --k']), (['k=3'], ['write --k=3']),
    (['demo'], ["'demo'", '--name=value', '.py']),
    (['--'], ['unknown setting']), (['--k=1', '--k=x'], ['--k=x']),
    (['--seeds=()', '--seeds=1.5,2'], ['each element an int', '--seeds=1.5,2']),  # the type is the script's, not the last value's
]


def test_refused_arguments(settings):
    for argv, expected in REFUSED_ARGUMENTS:
        message = refusal(settings, argv)
        assert all(part in message for part in expected), message


def test_recipes_and_flags_apply_in_order(settings, recipe):
    one = recipe('k = 10\ntemperature = 1\n', 'one.py')
    two = recipe('import math\nfrom os import path\n_n = 3\nk = _n * 7\ndef f(): pass\nclass C: pass\n', 'two.py')
    assert override(settings, ['--k=1', one])['k'] == 10
    assert override(settings, [one, '--k=1'])['k'] == 1
    values = override(settings, ('--temperature=2', one, two))
    assert values['k'] == 21 and values['temperature'] == 1.0
    assert 'f' not in settings and 'math' not in settings


def test_recipe_has_a_namespace_of_its_own(settings, recipe):
    path = recipe('name = __file__\nstop = (__name__,)\nif __name__ == "__main__":\n    k = 9\n')
    values = override(settings, [path])
    assert values['name'] == path and values['k'] == 4
    with pytest.raises(UserError, match=r'recipe.py:1: NameError'):
        override(settings, [recipe('k = temperature\n')])  # the script's settings are not there


BROKEN_RECIPES = [
    ('k = 3\ntemprature = 1\n', 'unknown setting temprature (PATH:2); nearest: temperature'),
    ('k = 3\nk = k +\n', 'PATH:2: SyntaxError: invalid syntax'),
    ('k = 3\n\nk = 1 / 0\n', 'PATH:3: ZeroDivisionError: division by zero'),
    ('def _f():\n    return {}["x"]\nk = _f()\n', "PATH:2: KeyError: 'x'"),
    ('import no_such_module_here\n', "PATH:1: ModuleNotFoundError: No module named 'no_such_module_here'"),
    ('\nopen("no/such/file")\n', "PATH:2: FileNotFoundError"),
    ('k = 1\nk = 2\nk = "x"\n', "k must be an int, not 'x' (PATH:3)"),
    ('k = 3\0\n', 'PATH:'), ('for i in range(3): k = i\n', 'unknown setting i (PATH:1)'),
]


def test_recipe_that_fails(settings, recipe, tmp_path):
    for text, expected in BROKEN_RECIPES:
        path = recipe(text)
        assert expected.replace('PATH', path) in refusal(settings, [path])
    (tmp_path / 'folder.py').mkdir()
    for path, reason in (('nowhere.py', 'No such file'), ('folder.py', 'Is a directory')):
        assert f'{path}: {reason}' in refusal(settings, [str(tmp_path / path)])


def test_printed(settings, capsys):
    override(settings, ['--k=3', '--name=x'])
    out = capsys.readouterr().out
    assert '*k=3' in out and "*name='x'" in out and '*' not in out.split("*name='x'")[1]
    assert max(map(len, out.splitlines())) <= 120
    assert all(f'{name}=' in out for name in NAMES)
    override(settings, [])
    assert capsys.readouterr().out == ''


def test_argv_is_the_command_line_by_default(settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--k=8'])
    assert override(settings)['k'] == 8
    monkeypatch.setattr(sys, 'argv', ['script.py'])
    override(settings)
    assert capsys.readouterr().out.count('settings') == 2


def test_without_a_file():
    notebook = {'lr': 1.0, '_x': 1, 'os': os, 'f': len, 'N': 3}
    assert override(notebook, ['--lr=2']) == {'lr': 2.0}
    with pytest.raises(SystemExit):
        override(notebook, ['-h'])


def test_help(settings, capsys):
    for argv in (['--help'], ['--k=x', '-h']):
        with pytest.raises(SystemExit):
            override(settings, argv)
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == ['A script of the tests.', '', '$ python script.py --k=2']
        rows = [line.split(maxsplit=1) for line in lines if line.startswith('  --')]
        assert [row[0][2:].split('=')[0] for row in rows] == NAMES
        text = '\n'.join(lines)
        assert 'sampling:\n  --k=4' in text and 'run:\n  --greedy=False' in text
        assert '---:' not in text and 'work begins' not in text
        assert '  --k=4              samples, as in "# of samples"' in lines and '  --temperature=0.7' in lines
        assert [line for line in lines if 'any text, # or = in it too' in line and "--name='demo'" in line]
        assert [line for line in lines if '--long=[1.5]' in line and line.endswith('of several lines')]
        assert 'no setting' not in text and 'CONSTANT' not in text


# -----------------------------------------------------------------------------
# through the command line

def test_command_line(file):
    for flag, code, stderr in (('--k=x', 2, "error: k must be an int, not 'x' (--k=x)\n"), ('--mode=user', 2, 'error: nothing there to read\n'),
                               ('--mode=stop', 130, 'stopped by Ctrl-C: what was written so far is kept\n'), ('--name=a=b', 0, '')):
        done = run_process(file, '--temperature=1', flag, code=code)
        assert done.stderr == stderr and ("work begins <class 'float'>" in done.stdout) == ('k=' not in flag)
    assert done.stdout.endswith(' a=b\n')
    done = run_process(file, '--mode=bug', code=1)  # keeps its traceback
    assert 'Traceback' in done.stderr and done.stderr.endswith('ValueError: a bug\n')


def test_importing_config_is_quick():
    code = 'import sys, config; print("torch" in sys.modules or "numpy" in sys.modules)'
    assert run_process('-c', code).stdout == 'False\n'


# -----------------------------------------------------------------------------
# a run's folder

@pytest.fixture
def out(tmp_path):
    return tmp_path / 'a' / 'out'


def values(out, **changes):
    return dict(out_dir=str(out), init_from='scratch', lr=0.5, seeds=(1, 2), overwrite=False, device='cpu') | changes


def stored(out):
    return json.loads((out / 'config.json').read_text())


def test_start_run_writes_the_settings(out, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['sft.py', '--name=two words'])
    start_run(values(out))
    config = stored(out)
    assert config.pop('_commands') == ["sft.py '--name=two words'"] and config.pop('_job') == ''
    assert config == values(out) | {'seeds': [1, 2]}
    assert os.listdir(out) == ['config.json']


def test_only_a_restart_of_the_same_job_goes_on_unasked(out, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'a name that other jobs have, too')
    monkeypatch.setenv('RUN_JOB', 'mine')
    start_run(values(out))
    assert stored(out)['_job'] == 'mine'
    for restarts in '01':  # its own agent may count none
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', restarts)
        monkeypatch.setenv('RUN_JOB', 'mine')
        assert resuming('scratch', str(out)) and resuming('resume', str(out)) and not resuming('scratch', str(out / 'elsewhere'))
        for another in ('another', ''):
            monkeypatch.setenv('RUN_JOB', another)
            assert not resuming('scratch', str(out)) and resuming('resume', str(out))
    start_run(values(out) | {'out_dir': str(out / 'alone')})
    assert not resuming('scratch', str(out / 'alone'))  # no job is not a job
    with pytest.raises(UserError, match='no run to resume'):
        resuming('resume', str(out / 'elsewhere'))


def test_processes_that_would_learn_on_their_own_are_refused(out, monkeypatch):
    start_run(values(out) | {'shard': 'none'})
    monkeypatch.setattr(config, 'SEVERAL', True)
    with pytest.raises(UserError, match="shard = 'none' is for one process"):
        start_run(values(out) | {'shard': 'none'}, overwrite=True)
    start_run(values(out) | {'shard': 'ddp'}, overwrite=True)


def test_a_run_killed_before_its_settings_were_written_starts_again(out):
    out.mkdir(parents=True)
    (out / 'config.json.tmp').write_text('{')
    start_run(values(out))
    assert os.listdir(out) == ['config.json']


def test_a_run_is_not_replaced_unasked(out):
    start_run(values(out))
    (out / 'weights').write_text('x')
    with pytest.raises(UserError) as refused:
        start_run(values(out, lr=0.1))
    assert all(part in str(refused.value) for part in (str(out), '--init_from=resume', '--overwrite'))
    assert (out / 'weights').exists() and stored(out)['lr'] == 0.5


def test_overwrite(out):
    start_run(values(out))
    (out / 'best').mkdir()
    (out / 'best' / 'weights').write_text('x')
    (out / 'log.jsonl').write_text('{}\n')
    (out.parent / 'kept').mkdir()
    (out.parent / 'kept' / 'file').write_text('x')
    (out / 'link').symlink_to(out.parent / 'kept')
    start_run(values(out, lr=0.1), overwrite=True)
    assert os.listdir(out) == ['config.json'] and stored(out)['lr'] == 0.1 and len(stored(out)['_commands']) == 1
    assert (out.parent / 'kept' / 'file').exists()


def test_what_is_no_run_is_never_removed_or_resumed(out):
    out.mkdir(parents=True)
    (out / 'precious').write_text('x')
    for content in (None, '{}', '{"model_type": "llama"}', '{"_comm', '[1]', '"_commands"'):
        if content is not None:
            (out / 'config.json').write_text(content)
        for how in ({}, {'overwrite': True}, {'resume': True}, {'resume': True, 'overwrite': True}):
            with pytest.raises(UserError, match=f'{out}.* no run'):
                start_run(values(out), **how)
        assert (out / 'precious').exists() and (content is None) == (not (out / 'config.json').exists())


def test_overwrite_keeps_what_is_needed(out, monkeypatch, tmp_path):
    start_run(values(out))
    (out / 'best').mkdir()
    with pytest.raises(UserError, match='best'):  # the checkpoint that the run starts from
        start_run(values(out, init_from=str(out / 'best')), overwrite=True)
    (out / 'link').symlink_to(out / 'best')
    (tmp_path / 'elsewhere').symlink_to(out / 'best')
    with pytest.raises(UserError, match='elsewhere'):
        start_run(values(out, init_from=str(tmp_path / 'elsewhere')), overwrite=True)
    with monkeypatch.context() as m:
        m.chdir(out)
        with pytest.raises(UserError, match='choose another'):
            start_run(values('.'), overwrite=True)
    start_run(values(out / 'inner'))  # another run within
    with pytest.raises(UserError, match='inner'):
        start_run(values(out), overwrite=True)
    assert sorted(os.listdir(out)) == ['best', 'config.json', 'inner', 'link']


def test_a_removal_that_stops_can_be_repeated(out, monkeypatch):
    start_run(values(out))
    (out / 'best').mkdir()
    with monkeypatch.context() as m:
        m.setattr(config.shutil, 'rmtree', lambda path: (_ for _ in ()).throw(PermissionError(13, 'Permission denied')))
        with pytest.raises(UserError, match='Permission denied'):
            start_run(values(out), overwrite=True)
    assert stored(out)
    start_run(values(out), overwrite=True)
    assert os.listdir(out) == ['config.json']


def test_resume(out, capsys, monkeypatch):
    for argv in (['sft.py'], ['sft.py', '--init_from=resume'], ['sft.py', '--lr=0.1']):
        monkeypatch.setattr(sys, 'argv', argv)
        changes = {'lr': 0.1, 'new': 1} if argv[1:] == ['--lr=0.1'] else {}
        resume = len(argv) > 1
        if resume:
            changes |= {'init_from': 'resume', 'device': 'cuda', 'overwrite': True}
        start_run(values(out, **changes), resume=resume, overwrite=resume)
        (out / 'weights').write_text('x')  # survives, overwrite or not
        printed = capsys.readouterr().out
        if changes.get('lr'):
            assert printed == 'resumed with other settings than before: lr 0.5 -> 0.1, new None -> 1\n'
        else:
            assert printed == ''
    config = stored(out)
    assert config['lr'] == 0.1 and config['init_from'] == 'scratch'
    assert config['_commands'] == ['sft.py', 'sft.py --init_from=resume', 'sft.py --lr=0.1']
    assert sorted(os.listdir(out)) == ['config.json', 'weights']


def test_nothing_to_resume(out):
    for _ in range(2):
        with pytest.raises(UserError, match='no run to resume'):
            start_run(values(out), resume=True)
        assert not out.exists() or not os.listdir(out)
        out.mkdir(parents=True, exist_ok=True)
    start_run(values(out))  # an empty folder is fine


def test_out_dir_that_cannot_be(tmp_path):
    (tmp_path / 'file').write_text('x')
    for out_dir in (tmp_path / 'file', tmp_path / 'file' / 'below', ''):
        with pytest.raises(UserError, match='out_dir'):
            start_run(values(out_dir))
    assert (tmp_path / 'file').read_text() == 'x'


def test_config_is_written_whole_or_not_at_all(out, monkeypatch):
    start_run(values(out))
    before = (out / 'config.json').read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match='No space left'):
        start_run(values(out, lr=0.1), resume=True)
    assert (out / 'config.json').read_bytes() == before


# -----------------------------------------------------------------------------
# the log

def rows(out):
    def no_constants(name):
        raise AssertionError(f'{name} is no JSON')
    return [json.loads(line, parse_constant=no_constants) for line in (out / 'log.jsonl').read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(config.time, 'time', lambda: now[0])
    return now


def test_log(tmp_path, capsys, clock):
    log = Log(str(tmp_path))
    clock[0] += 2.5
    log(100, loss=1.23456, tokens=123456, lr=2e-5, rate=12345.678, note='x', ok=True, bad=math.nan, worse=-math.inf)
    assert rows(tmp_path) == [{'step': 100, 'time': 2.5, 'loss': 1.23456, 'tokens': 123456, 'lr': 2e-5, 'rate': 12345.678,
                               'note': 'x', 'ok': True, 'bad': None, 'worse': None}]  # on disk before the next one
    assert capsys.readouterr().out == ('step 100 | loss 1.235 | tokens 123456 | lr 2e-05 | rate 12346 | note x | ok True | '
                                       'bad nan | worse -inf\n')
    log(200)
    assert [row['step'] for row in rows(tmp_path)] == [100, 200] and capsys.readouterr().out == 'step 200\n'


def test_log_takes_scalars_of_numpy_and_torch(tmp_path):
    log = Log(str(tmp_path))
    log(np.int64(1), a=np.float32(0.5), b=torch.tensor(2.0, requires_grad=True), c=torch.tensor(3), d=np.float64('nan'),
        e=torch.tensor(math.inf), f=np.bool_(True), g=torch.tensor([0.25]))
    del (row := rows(tmp_path)[0])['time']
    assert row == dict(step=1, a=0.5, b=2.0, c=3, d=None, e=None, f=True, g=0.25) and isinstance(row['c'], int)


def test_log_resumed(tmp_path, clock):
    log = Log(str(tmp_path))
    for step in (1, 2):
        clock[0] += 10
        log(step)
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": 3, "ti')  # a crash while writing
    clock[0] += 1000
    log = Log(str(tmp_path), resume=True)
    clock[0] += 5
    log(3, loss=1.0)
    assert [(row['step'], row['time']) for row in rows(tmp_path)] == [(1, 10), (2, 20), (3, 25)]
    Log(str(tmp_path), resume=True)
    assert len(rows(tmp_path)) == 3
    Log(str(tmp_path))(1)
    assert len(rows(tmp_path)) == 1


def test_log_resumed_from_little(tmp_path):
    for content, kept in (('', 0), ('{"step": 1, "ti', 0), ('{"step": 1, "time": 3.0}', 0), ('{"step": 1, "time": 3.0}\n', 1)):
        (tmp_path / 'log.jsonl').write_text(content)
        Log(str(tmp_path), resume=True)(2)
        assert [row['step'] for row in rows(tmp_path)] == [1] * kept + [2]
        assert rows(tmp_path)[-1]['time'] >= 3.0 * kept


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_bar(monkeypatch, tmp_path, capsys):
    for terminal in (True, False):
        err = Stream(terminal)
        monkeypatch.setattr(sys, 'stderr', err)
        log = Log(str(tmp_path))
        for step in bar(range(3), desc='train'):
            log(step)
        progress = bar(desc='sample', total=5)
        progress.update(5)
        progress.close()
        shown = err.getvalue()
        assert all((part in shown) == terminal for part in ('train', 'sample', '/5'))
        assert shown.endswith('\r') if terminal else shown == ''  # the line is left empty
        assert capsys.readouterr().out == 'step 0\nstep 1\nstep 2\n'


def test_read_rows(tmp_path):
    path = tmp_path / 'rows.jsonl'
    assert config.read_rows(str(path)) == [] and not path.exists()
    path.write_text('{"a": 1}\n{"b": 2}\n{"c"')  # a crash tore the last line
    assert config.read_rows(str(path)) == [{'a': 1}, {'b': 2}]
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'
    path.write_text('{"a": 1}\nno json\n')
    with pytest.raises(config.UserError, match='rows.jsonl'):
        config.read_rows(str(path))


def test_a_reader_that_has_enough_ends_a_script_quietly():
    """As `python ppo.py --help | head -1` does: what is written after the pipe broke is dropped."""
    code = 'import sys; from config import one_line; sys.excepthook = one_line\nfor _ in range(20000): print("x" * 100)'
    done = subprocess.run(f"{sys.executable} -c '{code}' | head -1", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'x' * 100 + '\n' and not done.stderr
