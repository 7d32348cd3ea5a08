"""Several processes: gloo on the CPU runs the path that GPUs run with NCCL. One process is the oracle."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import model
from config import UserError
from conftest import ROOT, run_all, tiny_config, until
from model import Transformer, meet
from test_faults import assert_same_run

TINY = ['--max_new_tokens=40', '--device=cpu', '--micro_tokens=512', '--max_rows=16']
SFT = ['--batch_size=7', '--max_steps=5', '--eval_interval=3', '--lr=1e-3', '--n_worked=20']  # 7: no multiple of the processes
# A small rate: Adam divides a gradient by its own size, so that at a large one the rounding errors of small gradients grow with each step.
PPO = ['--n_rollouts=20', '--minibatch=20', '--epochs=1', '--n_iterations=3', '--lr=1e-4', '--critic_lr=1e-3', '--temperature=1.0', '--show=0',
       '--eval_interval=3', '--n_questions=40']
PPO_KEYS = ['policy_loss', 'grad_norm', 'share_correct', 'kl_k3', 'entropy', 'approx_kl', 'reward_kl', 'response_tokens']
GROUP = ['--advantage=group', '--lora_rank=4', '--epochs=2']


def command(coin, out, script, *flags):
    few = ['--eval_problems=10'] if script in ('sft.py', 'ei.py', 'ppo.py', 'rcrl.py') else []
    return [script, *TINY, *few, f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={out}', *flags]


def torchrun(n):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def log_of(folder, key):
    rows = [row for row in map(json.loads, open(os.path.join(folder, 'log.jsonl'))) if key in row]
    assert rows, f'{folder}: no {key}'
    return rows


def assert_close(a, b, keys, rel=1e-5):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in keys:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=1e-6), (key, x['step'])


def assert_same_weights(a, b, tolerance=0.0):
    a, b = (load_file(os.path.join(folder, 'model.safetensors')) for folder in (a, b))
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


def assert_same_sft(a, b):
    assert_close(log_of(a, 'loss'), log_of(b, 'loss'), ['loss', 'grad_norm', 'lr'])
    assert_close(log_of(a, 'val_loss'), log_of(b, 'val_loss'), ['val_loss', 'val_maj1'])
    assert_same_weights(a / 'last', b / 'last', 1e-5)


def assert_same_ppo(a, b, keys):
    one, other = log_of(a, 'share_correct'), log_of(b, 'share_correct')
    assert all(row['grad_norm'] > 0 for row in one)
    assert_close(one, other, PPO_KEYS + keys)
    samples = [[json.loads(line)['text'] for line in open(run / 'samples.jsonl')] for run in (a, b)]
    assert samples[0] == samples[1] and len(samples[0]) == 60
    assert_same_weights(a / 'last', b / 'last', 2e-4)


# Rollouts from one place are dealt to all processes: together they are what one process draws.
DRAW = """
import json
import sys
from model import Transformer, rank, setup
from sample import Sampler, answer, load_tokenizer
setup('cpu')
sampler = Sampler(Transformer.from_pretrained(sys.argv[1]), load_tokenizer(sys.argv[1]))
drawn = [s.ids for s in answer(sampler, [[5, 6, 7]] * 6 + [[8]], 2, 10, 1.0)]
if rank() == 0:
    json.dump(drawn, open(sys.argv[2], 'w'))
"""
# What a process of two holds of a model whose rows do not divide evenly; loading, gathering and writing it back change nothing.
PART = """
import sys
import torch
import torch.distributed as dist
from model import PATIENCE, Transformer, autocast, setup
device, _ = setup('cpu')
assert dist.group.WORLD._get_backend(device).options._timeout == PATIENCE  # no longer that of starting
for name in ('tied', 'untied'):
    whole = Transformer.from_pretrained(f'{sys.argv[1]}/{name}')
    part = Transformer.from_pretrained(f'{sys.argv[1]}/{name}', shard='fsdp', lora_rank=2)
    held = sum(p.to_local().numel() for p in part.parameters())
    assert 0.4 < held / sum(p.numel() for p in part.parameters()) < 0.6
    copy = part.for_sampling(torch.float32)
    weights = dict(whole.named_parameters())
    for key, p in copy.named_parameters():
        assert 'fixed_' in key or torch.equal(p, weights[key]), key
    ids = torch.arange(12)[None]
    torch.testing.assert_close(part.run(lambda model, ids: model(ids), ids), whole(ids))
    part.save_pretrained(f'{sys.argv[1]}/{name}_again')
    with torch.no_grad():  # adapters that have learned something are in the copy
        for key, p in part.named_parameters():
            if key.endswith('lora_b'):
                p.to_local().fill_(0.1)
    learned = part.run(lambda model, ids: model(ids), ids)
    assert (learned - whole(ids)).abs().max() > 0.01
    torch.testing.assert_close(part.for_sampling(torch.float32)(ids), learned)
    found = []  # the angles of rotary positions and the scalar head stay fp32 where products are bf16
    half = Transformer.from_pretrained(f'{sys.argv[1]}/{name}', shard='fsdp', product_dtype=torch.bfloat16)
    half.blocks[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[1][0].dtype))
    half.value_head.register_forward_pre_hook(lambda head, inputs: found.extend([inputs[0].dtype, head.weight.dtype]))
    with torch.no_grad(), autocast(device, torch.bfloat16):
        half.run(lambda model, ids: model.values(model.trunk(ids)), ids)
    assert found == [torch.float32] * 3, found
"""


@pytest.fixture(scope='module')
def work(coin, bpe, tmp_path_factory):
    """A folder with one/, what one process did, and two/, what two did."""
    folder = tmp_path_factory.mktemp('processes')
    torch.manual_seed(0)
    for tied in (True, False):
        whole = Transformer(tiny_config(bpe.vocab_size, tied=tied)).init_weights().add_value_head()
        whole.save_pretrained(str(folder / ('tied' if tied else 'untied')), bpe)
    (folder / 'draw.py').write_text(DRAW)
    (folder / 'part.py').write_text(PART)
    one = {'sft': ['sft.py', *SFT], 'torn': ['sft.py', *SFT, '--save_interval=1', '--max_steps=3', '--keep_states=2'], 'ppo': ['ppo.py', *PPO, '--value_warmup=1'],
           'group': ['ppo.py', *PPO, *GROUP]}
    two = {f'{name} {shard}': [*one[name], f'--shard={shard}'] for name, shard in (('sft', 'ddp'), ('sft', 'fsdp'), ('ppo', 'ddp'), ('ppo', 'fsdp'),
                                                                                 ('group', 'fsdp'))}
    for shard in ('ddp', 'fsdp'):  # the type that GPUs compute in
        two |= {f'bf16 {shard}': ['sft.py', *SFT, '--dtype=bfloat16', f'--shard={shard}'],
                f'bf16 lora {shard}': ['sft.py', *SFT, '--dtype=bfloat16', f'--shard={shard}', '--lora_rank=4']}
    commands = {n: [command(coin, folder / n / name, *job) for name, job in jobs.items()] for n, jobs in (('one', one), ('two', two))}
    for n in ('one', 'two'):
        commands[n] += [[f'{folder}/draw.py', f'{folder}/tied', f'{folder}/{n}/drawn.json']]
    run_all(1, commands['one'])
    (folder / 'one' / 'torn' / 'state' / '00000003' / 'sha256.json').write_text('{"state')
    commands['two'] += [[*command(coin, folder / 'one' / 'torn', *one['torn']), '--init_from=resume'], [f'{folder}/part.py', str(folder)]]
    (folder / 'two' / 'said').write_text(json.dumps(run_all(2, commands['two'])))
    return folder


def test_sft_is_the_same_on_two_processes(work):
    for shard in ('ddp', 'fsdp'):
        assert_same_sft(work / 'one' / 'sft', work / 'two' / f'sft {shard}')


def test_ppo_is_the_same_on_two_processes(work):
    for name, keys in (('ppo ddp', ['value_loss', 'explained_variance']), ('ppo fsdp', ['value_loss', 'explained_variance']), ('group fsdp', [])):
        assert_same_ppo(work / 'one' / name.split()[0], work / 'two' / name, keys)


def test_bf16_under_fsdp_is_bf16_under_ddp(work):
    """Within its rounding, with and without adapters."""
    for name in ('bf16', 'bf16 lora'):
        ddp, fsdp = ([row['loss'] for row in log_of(work / 'two' / f'{name} {shard}', 'loss')] for shard in ('ddp', 'fsdp'))
        assert ddp == pytest.approx(fsdp, rel=0.03, abs=5e-3)


def test_equal_prompts_in_different_processes_get_different_samples(work):
    one, two = (json.loads((work / n / 'drawn.json').read_text()) for n in ('one', 'two'))
    assert one == two and len({tuple(ids) for ids in one}) == 14


def test_one_process_speaks_and_what_it_finds_is_known_to_all(work):
    """A state whose list of checksums is torn: process 0 alone reads it, and all take the state before."""
    first, second = json.loads((work / 'two' / 'said').read_text())
    assert first.count('best checkpoint') == 7 and 'best checkpoint' not in second
    assert first.count('00000003 is broken') == 1
    assert [row['step'] for row in log_of(work / 'one' / 'torn', 'loss')] == [1, 2, 3, 3]


def test_fsdp_holds_a_part_and_gives_back_the_whole(work):
    for name in ('tied', 'untied'):  # see PART, which has run
        assert_same_weights(work / name, work / f'{name}_again')
        assert (work / name / 'value_head.safetensors').read_bytes() == (work / f'{name}_again' / 'value_head.safetensors').read_bytes()


@pytest.mark.slow
def test_three_processes_do_what_one_does(work, coin, tmp_path):
    """Every script; and a state of three processes, which two go on from, and then one."""
    EI = [f'--base={coin}/policy', '--k=3', '--max_steps=3', '--batch_size=8', '--lr=1e-3']
    jobs = {'separate': ['ppo.py', *PPO, '--critic=separate', '--replay=0.2'],
            'ei': ['ei.py', *EI, '--n_questions=21', '--n_worked=7', '--n_rounds=2'],
            'rcrl': ['rcrl.py', *EI, '--n_questions=9', '--n_worked=5', '--rollouts=3', '--right_share=0', '--shard=auto'],
            'prm': ['rewards.py', '--kind=prm', '--n_questions=9', '--k=3', '--rollouts=2', '--heldout=6', '--batch_size=8', '--lr=1e-3', '--epochs=2']}
    parts = ['sft.py', *SFT, '--save_interval=1']

    def commands(n):
        shard = [] if n == 1 else ['--shard=fsdp']
        runs = [command(coin, tmp_path / str(n) / name, *job, *shard) for name, job in jobs.items()]
        evaluate = ['eval.py', *TINY[:2], '--max_rows=16', f'--task={coin}/task', f'--init_from={coin}/policy', '--split=val', '--n_problems=23', '--k=3']
        return [*runs, [*evaluate, f'--out_dir={tmp_path}/{n}/ei'], [f'{work}/draw.py', f'{work}/tied', f'{tmp_path}/{n}/drawn.json'],
                command(coin, tmp_path / f'parts{n}', *parts, '--max_steps=3', *shard)]
    said = run_all(1, [*commands(1), *(command(coin, tmp_path / 'parts1', *parts, '--init_from=resume', f'--max_steps={last}') for last in (4, 5))])
    assert 'resumed with other settings' in said[0]
    said = run_all(3, [*commands(3), command(coin, tmp_path / '3' / 'sft', 'sft.py', *SFT, '--shard=fsdp', '--grad_checkpointing', '--micro_tokens=64')])
    assert [text.count('| run |') for text in said] == [1, 0, 0]
    assert_same_sft(work / 'one' / 'sft', tmp_path / '3' / 'sft')
    assert_same_ppo(tmp_path / '1' / 'separate', tmp_path / '3' / 'separate', ['value_loss', 'explained_variance'])
    for file in ('ei/samples_round1.jsonl', 'ei/eval_task.jsonl', 'rcrl/samples.jsonl', 'rcrl/labels.jsonl', 'prm/samples_train.jsonl',
                 'prm/labels_train.jsonl', 'prm/labels_val.jsonl', 'drawn.json'):
        assert (tmp_path / '1' / file).read_text() == (tmp_path / '3' / file).read_text() != '', file
    for folder in ('ei/round1', 'rcrl/best', 'prm/best'):
        assert_same_weights(tmp_path / '1' / folder, tmp_path / '3' / folder, 1e-5)
    assert len((tmp_path / '1' / 'ei' / 'eval_task.jsonl').read_text().splitlines()) == 1 + 23
    one, three = (log_of(tmp_path / n / 'prm', 'heldout_auroc')[-1] for n in '13')
    assert one['calibration_error'] == pytest.approx(three['calibration_error'], rel=1e-4)
    # the state of three
    state = tmp_path / 'parts3' / 'state' / '00000003'
    assert sum(name.endswith('.safetensors') for name in os.listdir(state)) == 3
    for n, last in ((2, 4), (1, 5)):
        run_all(n, [command(coin, tmp_path / 'parts3', *parts, '--init_from=resume', f'--max_steps={last}', *(['--shard=fsdp'] if n > 1 else []))])
    assert [row['step'] for row in log_of(tmp_path / 'parts3', 'loss')] == [1, 2, 3, 4, 5]
    assert_same_weights(tmp_path / 'parts1' / 'last', tmp_path / 'parts3' / 'last', 1e-5)


# -----------------------------------------------------------------------------
# starts and restarts

def meeting(store, numbers, n):
    """What model.meet gives to these of n processes, here threads: {number: a name or an error}."""
    found = {}

    def enter(number):
        try:
            found[number] = meet(store, number, n)
        except UserError as error:
            found[number] = error
    threads = [threading.Thread(target=enter, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # some read before the others have written
    for thread in threads:
        thread.join()
    return found


def test_a_start_has_one_name_and_no_other_start_has_it(monkeypatch):
    """Whatever is left in the store: all of an earlier start, parts of one that was killed while it met, a start of another size."""
    store, names = dist.HashStore(), []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = meeting(store, order, 3)
        assert len(set(found.values())) == 1 and sorted(found) == [0, 1, 2]
        names.append(found[0])
        with monkeypatch.context() as m:
            m.setattr(model, 'START_PATIENCE', timedelta(seconds=0.2))
            meeting(store, [0, 2], 3), meeting(store, [1], 3)
    names.append(meeting(store, range(4), 4)[1])
    assert len(set(names)) == 4


def test_a_start_waits_minutes_and_says_for_whom(monkeypatch):
    assert timedelta(minutes=1) < model.START_PATIENCE < timedelta(minutes=30) < timedelta(hours=1) < model.PATIENCE
    store = dist.HashStore()
    for numbers, seconds in (([0], 0), ([1, 3], 1)):  # process 0 was there before, process 2 never
        monkeypatch.setattr(model, 'START_PATIENCE', timedelta(seconds=seconds))
        found = meeting(store, numbers, 4)
    for number in (1, 3):
        assert str(found[number]) == f'process {number} of 4 waited 0:00:01 for those that did not come: 0, 2'
    with socket.socket() as nobody:  # a port where nobody answers
        nobody.bind(('127.0.0.1', 0))
        for name, value in {'RANK': 1, 'WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': nobody.getsockname()[1]}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match='waited 0:00:01 for the others'):
            model.join_job(torch.device('cpu'))


def two_agents(folder, moments, *command):
    """Runs the command under two agents of torchrun with a process each, of which process 1 is killed once at each of the moments."""
    agent = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3', '--rdzv_backend=c10d',
             f'--rdzv_endpoint=127.0.0.1:{free_port()}', '--rdzv_id=x', '--local_addr=127.0.0.1', 'tests/dies_once.py', str(folder), moments, *command]
    agents = [subprocess.Popen(agent, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    try:
        said = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:  # which ends its process
            agent.terminate()
            agent.wait(60)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert all(os.path.exists(os.path.join(folder, moment)) for moment in moments.split(','))  # it was killed there
    return said


@pytest.mark.slow
def test_killed_while_it_validates_a_run_on_two_hosts_goes_on(work, coin, tmp_path):
    """The other process hears of it from its agent, which counts no failure."""
    two_agents(tmp_path, 'validation', *command(coin, tmp_path / 'run', 'sft.py', *SFT))
    assert_same_run(work / 'two' / 'sft ddp', tmp_path / 'run', 2)


@pytest.mark.slow
def test_killed_at_several_moments_a_run_on_two_hosts_ends_the_same(work, coin, tmp_path):
    said = two_agents(tmp_path, 'step,state,validation', *command(coin, tmp_path / 'run', 'ppo.py', *PPO, '--value_warmup=1', '--save_interval=1'))
    assert ''.join(said).count('exitcode: -9') == 3
    assert_same_run(work / 'two' / 'ppo ddp', tmp_path / 'run', 3)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_a_signal_saves(coin, tmp_path):
    for name, number in (('killed', signal.SIGKILL), ('stopped', signal.SIGTERM)):
        run = tmp_path / name
        job = subprocess.Popen([*torchrun(2), *command(coin, run, 'ppo.py', *PPO, '--n_iterations=1000', '--save_interval=1000')], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: (run / 'log.jsonl').exists() and (run / 'log.jsonl').read_text().count('share_correct') >= 2, job)
            workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
            assert len(workers) == 2
            os.kill(int(workers[1]) if name == 'killed' else job.pid, number)
            said = job.communicate(timeout=120)[1]
        finally:
            job.terminate()
            job.wait(60)
        assert job.returncode != 0
        if name == 'killed':
            assert 'Signal 9 (SIGKILL)' in said and not (run / 'state').exists()
        else:
            assert 'stopped after iteration' in said and 'torchrun --nproc_per_node=2' in said, said
            assert len(os.listdir(run / 'state')) == 1


@pytest.mark.slow
def test_what_torchrun_starts_refuses(work, coin, tmp_path):
    """One mistake is said once; and a restart does not take another run, of a job whose rendezvous has the same name, for its own."""
    shutil.copytree(work / 'one' / 'sft', tmp_path / 'other')
    config = json.loads((tmp_path / 'other' / 'config.json').read_text()) | {'_job': 'x'}
    (tmp_path / 'other' / 'config.json').write_text(json.dumps(config))
    named = [*torchrun(1)[:3], '--nproc_per_node=1', '--max-restarts=1', '--rdzv_backend=c10d', '--rdzv_endpoint=127.0.0.1:0', '--rdzv_id=x']
    for launcher, flags, line, times in ((torchrun(2), [f'--out_dir={tmp_path}/run', '--task=nowhere'], 'error.*nowhere', 1),
                                         (named, [f'--out_dir={tmp_path}/other', '--seed=5'], 'error: .*holds another run', 2)):
        done = subprocess.run([*launcher, *command(coin, tmp_path / 'run', 'sft.py', *SFT, *flags)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and len(re.findall(f'^{line}', done.stderr, re.M)) == times, done.stderr
    assert not (tmp_path / 'run').exists() and json.loads((tmp_path / 'other' / 'config.json').read_text()) == config
