"""Bad days: a torn state, a full disk, a signal, a kill, a loss that is no number."""
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_all, script_command, tiny, until
from fault_campaign import flip_a_bit, start_and_kill

from config import UserError
from config.run import Checkpoints, bit_sum
from model import Transformer, autocast, make_optimizer
from sample import Example, activation_bytes
from sft import cross_entropy, finetune

def made(seed=0, lora=0, **changes):
    """({'model': a model}, its optimizer), as Checkpoints take them."""
    model = tiny(130, seed, **changes)
    model = model.add_lora(lora) if lora else model
    return {'model': model}, make_optimizer(model, 1e-2, 0.1)

def bits(models, optimizer=None):
    return bit_sum(models['model'].parameters())

def update(models, optimizer):
    models['model'](torch.arange(12)[None]).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return bits(models)

@pytest.fixture
def trained(tmp_path):
    """A model after three updates, its optimizer, and a state of each update; the oldest is gone."""
    learner, checkpoints = made(), Checkpoints(str(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(step, *learner, {'step': step, 'bits': update(*learner)})
    return learner, checkpoints

def test_to_save_changes_nothing_and_what_is_loaded_learns_the_same(tmp_path):
    """Also before weights have learned: in a critic's warm-up the policy has no averages yet."""
    whole, saved, checkpoints = made(), made(), Checkpoints(str(tmp_path))
    assert checkpoints.load(*whole) is None
    for step in range(3):
        checkpoints.save(step, *saved, {'step': step, 'best': None})
        loaded = made(seed=1)
        assert checkpoints.load(*loaded) == {'step': step, 'best': None}
        assert update(*whole) == update(*saved) == update(*loaded)

def test_a_state_belongs_to_its_model_and_the_weights_that_do_not_learn(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(1, *made(lora=2), {'step': 1})
    assert checkpoints.load(*made(lora=2)) == {'step': 1}
    for other, match in ((dict(seed=1), 'other weights that do not learn'),
                         (dict(n_layer=1), 'has no model.blocks.1.')):
        with pytest.raises(UserError, match=match):
            checkpoints.load(*made(lora=2, **other))

def test_the_last_two_states_are_kept_without_code(trained, tmp_path, bpe):
    """safetensors and JSON: nothing is unpickled, and no script executes what a file or a model says."""
    learner, checkpoints = trained
    os.makedirs(f'{checkpoints.folder}/unfinished')  # left by a kill
    fresh = made()
    assert checkpoints.steps() == ['00000002', '00000003']
    assert checkpoints.load(*fresh)['bits'] == bits(*fresh) == bits(*learner)
    learner[0]['model'].add_value_head().save_pretrained(str(tmp_path / 'best'), bpe)
    for folder in (f'{checkpoints.folder}/00000003', tmp_path / 'best'):
        assert {os.path.splitext(name)[1] for name in os.listdir(folder)} == {'.safetensors', '.json'}
    root = pathlib.Path(ROOT)
    for path in (*root.glob('*.py'), root / 'data' / '__init__.py', root / 'config' / 'run.py'):
        source = path.read_text()
        executes = r'(?<![\w.])(eval|exec|compile)\(|pickle|trust_remote_code\s*=\s*True'
        assert not re.search(executes, source), path
        assert all('weights_only=True' in line for line in source.splitlines() if 'torch.load(' in line), path

def unreadable(path):
    """As on a disk with a bad block: reading fails."""
    os.remove(path)
    os.mkdir(path)

@pytest.mark.parametrize('file', ['shard', 'state.json', 'sha256.json'])
@pytest.mark.parametrize('harm', [lambda path: flip_a_bit(path, random.Random(0)), os.remove, unreadable,
                                  lambda path: os.truncate(path, os.path.getsize(path) // 2)])
def test_a_broken_state_is_named_and_the_one_before_is_taken(trained, capsys, file, harm):
    learner, checkpoints = trained
    newest, fresh = f'{checkpoints.folder}/00000003', made()
    harm(next(f'{newest}/{name}' for name in os.listdir(newest) if name.startswith(file)))
    state = checkpoints.load(*fresh)
    assert state['step'] == 2 and bits(*fresh) == state['bits'] != bits(*learner)
    assert '00000003 is broken' in capsys.readouterr().out
    assert sorted(os.listdir(checkpoints.folder)) == ['00000002', '00000003.broken']
    os.remove(f'{checkpoints.folder}/00000002/state.json')
    for _ in range(2):
        with pytest.raises(UserError, match='00000002 is broken .state.json.* none is whole'):
            checkpoints.load(*fresh)

def test_a_full_disk_leaves_what_was_there(trained, tmp_path, bpe, request):
    """A limit on a file's size stands for the disk: the system refuses the write in the same place."""
    (models, optimizer), checkpoints = trained
    model, before = models['model'], bits(models)
    model.save_pretrained(str(tmp_path / 'best'), bpe)
    with torch.no_grad():
        model.embed.weight.add_(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    with pytest.raises(UserError, match='not written .*too large.*; whole states .*: 00000002, 00000003'):
        checkpoints.save(4, models, optimizer, {'step': 4})
    with pytest.raises(UserError, match='not written'):
        model.save_pretrained(str(tmp_path / 'best'), bpe)
    assert checkpoints.load(*made())['step'] == 3
    assert sorted(os.listdir(checkpoints.folder)) == ['00000002', '00000003']
    assert bit_sum(Transformer.from_pretrained(str(tmp_path / 'best')).parameters()) == before

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_activations_take_what_the_formula_says(family, dtype):
    """Against the storages that autograd really keeps for backward."""
    wide = dict(n_layer=3, n_embd=256, n_head=4, n_kv_head=4, head_dim=64, n_inner=704, block_size=512)
    model, cpu, sizes = tiny(512, **(wide | family)), torch.device('cpu'), {}

    def keep(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(cpu, dtype):
        cross_entropy(model, [Example(list(range(129)), 1)] * 16)
    for p in model.parameters():
        sizes.pop(p.untyped_storage().data_ptr(), None)
    expected = activation_bytes(model.config, 16 * 128, 128, dtype, False, cpu)
    assert 0.8 < sum(sizes.values()) / expected < 1.25

def command(name, coin, out, scale=1):
    learn = '--batch_size=8 --lr=1e-3 --save_interval=2'
    flags = {'sft': f'{learn} --max_steps={12 * scale} --eval_interval=6',
             'ei': f'{learn} --max_steps={8 * scale} --n_questions=40 --k={4 * scale} --n_rounds=2',
             'ppo': f'--n_iterations={4 * scale} --n_rollouts=32 --minibatch=16 --epochs=2 --lr=1e-3 '
                    '--eval_interval=3 --save_interval=1 --show=0',
             'rcrl': f'{learn} --max_steps={8 * scale} --n_questions=24 --n_worked=5 --k={3 * scale} '
                     '--rollouts=3 --eval_interval=4 --right_share=0',
             'rewards': f'{learn} --kind=prm --n_questions=16 --k={3 * scale} --rollouts=2 --heldout=6 '
                        '--epochs=2'}
    return script_command(f'{name}.py', coin, out, *flags[name].split())

def assert_same_run(a, b, n):
    """The same weights to the bit, and the same samples: at least n files."""
    files = [path for path in pathlib.Path(a).rglob('*')
             if re.fullmatch(r'model\.safetensors|(samples|labels).*\.jsonl', path.name)]
    assert len(files) >= n, files
    for path in files:
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes() != b'', path

def test_a_signal_ends_the_step_and_says_how_to_go_on(coin, tmp_path):
    runs = [command(name, coin, tmp_path / 'whole' / name) for name in ('sft', 'ppo')]
    for name, number in (('sft', signal.SIGTERM), ('ppo', signal.SIGINT)):
        job = subprocess.Popen([sys.executable, *command(name, coin, tmp_path / name)], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until((tmp_path / name / 'log.jsonl').exists, job)
        job.send_signal(number)
        said = job.communicate(timeout=120)[1].splitlines()
        said = [line for line in said if not re.match(r'W\d{4} .* torch/', line)]  # torch warns where CUDA is
        assert job.returncode == 0 and len(said) == 2 and said[1].startswith('stopped after'), said
        runs.append(said[1].split('to go on: python ')[1].split())
        assert runs[-1][-1] == '--init_from=resume'
    run_all(1, runs)
    for name, n_files in (('sft', 2), ('ppo', 3)):
        assert_same_run(tmp_path / 'whole' / name, tmp_path / name, n_files)

@pytest.mark.slow
@pytest.mark.parametrize('name, scale', [('sft', 2), ('ppo', 1)])  # so that some is left to interrupt
def test_killed_at_random_moments_it_ends_the_same(coin, tmp_path, name, scale):
    """The short form of fault_campaign.py: one kill, without warning, whatever it is doing."""
    run_all(1, [command(name, coin, tmp_path / 'whole', scale)])
    count = start_and_kill(command(name, coin, tmp_path / 'run', scale), str(tmp_path / 'run'), 1, 0.1, name)
    assert count == {'kills': 1, 'resumed': 1, 'broken states': 0, 'states lost': 0}
    assert_same_run(tmp_path / 'whole', tmp_path / 'run', 2)

def test_what_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path):
    rows = [Example(list(range(n, n + 12)), 4) for n in range(4)]
    with pytest.raises(UserError, match='loss .*bad_batch.json'):
        finetune(tiny(130), rows, max_steps=9, batch_size=4, lr=1e30, warmup=0, out_dir=str(tmp_path))
    batch = json.loads((tmp_path / 'bad_batch.json').read_text())
    assert sorted(batch['ids']) == [e.ids for e in rows]
    assert batch['n_prompt'] == [4] * 4 and batch['step'] > 1

@pytest.mark.slow
@pytest.mark.parametrize('name, kind, most, flags, match', [
    ('ppo', resource.RLIMIT_FSIZE, 2000, '', ''),
    ('sft', resource.RLIMIT_AS, 3 * 2 ** 30, '--micro_tokens=10000000 --batch_size=30000 --max_steps=1',
     'out of memory in update 1.*lower micro_tokens')])
def test_too_little_disk_or_memory_ends_in_one_line(coin, tmp_path, name, kind, most, flags, match):
    """Limits of the process stand for both; less address space than the batch takes."""
    start = [sys.executable, *command(name, coin, tmp_path), *flags.split()]
    done = subprocess.run(start, cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(kind, (most, -1)))
    assert done.returncode == 2 and re.fullmatch(f'error: .*{match}.*\n', done.stderr), done.stderr[-2000:]
