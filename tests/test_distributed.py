"""Several processes: torchrun on the CPU with gloo runs the path that GPUs run with NCCL. One process is the oracle."""
import json
import os
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
from conftest import ROOT, tiny_config
from model import Transformer, meet

ONE = [sys.executable]
TINY = ['--max_new_tokens=40', '--eval_problems=10', '--device=cpu', '--micro_tokens=512', '--max_rows=16']


def several(n):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']


def start(launcher, script, *flags):
    done = subprocess.run([*launcher, script, *TINY, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f'{script} {flags} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}'
    return done


def log_of(folder, key):
    return [row for row in map(json.loads, open(os.path.join(folder, 'log.jsonl'))) if key in row]


def assert_close(a, b, keys, rel=1e-5):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for key in keys:
            assert x[key] == pytest.approx(y[key], rel=rel, abs=1e-6), (key, x['step'])


def assert_same_weights(a, b, tolerance=0.0):
    a, b = (load_file(os.path.join(folder, 'model.safetensors')) for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


SFT = ['--batch_size=7', '--max_steps=5', '--eval_interval=3', '--lr=1e-3', '--n_worked=20']  # 7: no multiple of the processes


@pytest.fixture(scope='module')
def sft(coin, tmp_path_factory):
    """Five updates in one process."""
    out = tmp_path_factory.mktemp('sft') / 'one'
    start(ONE, 'sft.py', f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={out}')
    return out


@pytest.mark.parametrize('n, flags', [(2, ['--shard=ddp']), (2, ['--shard=fsdp']), (3, ['--shard=fsdp', '--grad_checkpointing', '--micro_tokens=64'])])
def test_sft_is_the_same_on_several_processes(sft, coin, tmp_path, n, flags):
    done = start(several(n), 'sft.py', f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={tmp_path}/run', *flags)
    assert_close(log_of(sft, 'loss'), log_of(tmp_path / 'run', 'loss'), ['loss', 'grad_norm', 'lr'])
    assert_close(log_of(sft, 'val_loss'), log_of(tmp_path / 'run', 'val_loss'), ['val_loss', 'val_maj1'])
    assert_same_weights(sft / 'last', tmp_path / 'run' / 'last', 1e-5)
    assert done.stdout.count('best checkpoint') == 1  # one process speaks


def test_any_number_of_processes_goes_on_from_a_state(sft, coin, tmp_path):
    flags = [f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={tmp_path}/run']
    start(several(3), 'sft.py', *flags, '--shard=fsdp', '--max_steps=3')
    states = sorted(os.listdir(tmp_path / 'run' / 'state'))
    assert states == ['00000003'] and sum(name.endswith('.safetensors') for name in os.listdir(tmp_path / 'run' / 'state' / states[0])) == 3
    for n, last in ((2, 4), (1, 5)):
        start(several(n) if n > 1 else ONE, 'sft.py', *flags, '--init_from=resume', f'--max_steps={last}', '--shard=fsdp')
    rows = {row['step']: row for row in log_of(tmp_path / 'run', 'loss')}
    # the rate depends on max_steps, so that the losses agree up to the update after the first stop
    assert [rows[step]['loss'] for step in (1, 2)] == pytest.approx([row['loss'] for row in log_of(sft, 'loss')[:2]], rel=1e-5)
    assert sorted(rows) == [1, 2, 3, 4, 5]
    whole = start(ONE, 'sft.py', *flags[:-1], f'--out_dir={tmp_path}/parts', '--max_steps=3')
    for last in (4, 5):
        whole = start(ONE, 'sft.py', *flags[:-1], f'--out_dir={tmp_path}/parts', '--init_from=resume', f'--max_steps={last}')
    assert 'resumed with other settings' in whole.stdout
    assert_same_weights(tmp_path / 'parts' / 'last', tmp_path / 'run' / 'last', 1e-5)


# A small rate: Adam divides a gradient by its own size, so that at a large one the rounding errors of small gradients grow with each step.
PPO = ['--n_rollouts=20', '--minibatch=20', '--epochs=1', '--n_iterations=5', '--lr=1e-4', '--critic_lr=1e-3', '--temperature=1.0', '--show=0',
       '--eval_interval=5', '--n_questions=40']
PPO_KEYS = ['policy_loss', 'grad_norm', 'share_correct', 'kl_k3', 'entropy', 'approx_kl', 'reward_kl', 'response_tokens']


@pytest.mark.parametrize('flags, shards', [(['--value_warmup=1'], ['ddp', 'fsdp']), (['--critic=separate', '--replay=0.2'], ['fsdp']),
                                           (['--advantage=group', '--lora_rank=4', '--epochs=2'], ['ddp', 'fsdp'])],
                         ids=['shared critic', 'separate critic', 'LoRA'])
def test_ppo_is_the_same_on_several_processes(coin, tmp_path, flags, shards):
    common = [f'--task={coin}/task', f'--init_from={coin}/policy', *PPO, *flags]
    start(ONE, 'ppo.py', *common, f'--out_dir={tmp_path}/one')
    one = log_of(tmp_path / 'one', 'share_correct')
    assert all(row['grad_norm'] > 0 for row in one)
    for shard in shards:
        start(several(2), 'ppo.py', *common, f'--out_dir={tmp_path}/{shard}', f'--shard={shard}')
        keys = PPO_KEYS + (['value_loss', 'explained_variance'] if 'lora' not in str(flags) else [])
        assert_close(one, log_of(tmp_path / shard, 'share_correct'), keys)
        samples = [[{k: v for k, v in json.loads(line).items() if k != 'kl'} for line in open(tmp_path / run / 'samples.jsonl')] for run in ('one', shard)]
        assert [s['text'] for s in samples[0]] == [s['text'] for s in samples[1]] and len(samples[0]) == 100
        assert_same_weights(tmp_path / 'one' / 'last', tmp_path / shard / 'last', 2e-4)


def test_ei_and_eval_give_the_same_records_on_several_processes(coin, tmp_path):
    ei = [f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={coin}/policy', '--n_questions=21', '--n_worked=7', '--k=3', '--n_rounds=2',
          '--max_steps=3', '--batch_size=8', '--lr=1e-3']
    evaluate = ['eval.py', f'--task={coin}/task', f'--init_from={coin}/policy', '--split=val', '--n_problems=23', '--k=3', '--max_new_tokens=40', '--max_rows=16',
                '--device=cpu']

    def records(folder):
        return (folder / 'samples_round1.jsonl').read_text(), (folder / 'eval_task.jsonl').read_text()
    for n in (1, 2, 3):
        launcher = several(n) if n > 1 else ONE
        start(launcher, 'ei.py', *ei, f'--out_dir={tmp_path}/{n}')
        done = subprocess.run([*launcher, *evaluate, f'--out_dir={tmp_path}/{n}'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count('| run |') == 1, done.stderr
        assert records(tmp_path / str(n)) == records(tmp_path / '1')
        assert_same_weights(tmp_path / str(n) / 'round1', tmp_path / '1' / 'round1', 1e-5)
    greedy = [json.loads(line)['greedy'] for line in records(tmp_path / '1')[1].splitlines()[1:]]
    assert len(greedy) == 23


def test_rcrl_and_reward_models_on_two_processes(coin, tmp_path):
    rcrl = [f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={coin}/policy', '--n_questions=9', '--n_worked=5', '--k=3', '--rollouts=3',
            '--max_steps=4', '--batch_size=8', '--lr=1e-3', '--right_share=0']
    prm = [f'--task={coin}/task', f'--init_from={coin}/policy', '--kind=prm', '--n_questions=9', '--k=3', '--rollouts=2', '--heldout=6', '--batch_size=8',
           '--lr=1e-3', '--epochs=2']
    for launcher, name in ((ONE, 'one'), (several(2), 'two')):
        start(launcher, 'rcrl.py', *rcrl, f'--out_dir={tmp_path}/rcrl_{name}', '--shard=fsdp')
        flags = [flag for flag in TINY if 'eval_problems' not in flag]
        done = subprocess.run([*launcher, 'rewards.py', *flags, *prm, f'--out_dir={tmp_path}/prm_{name}', '--shard=fsdp'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for kind, files in (('rcrl', ['samples.jsonl', 'labels.jsonl']), ('prm', ['samples_train.jsonl', 'labels_train.jsonl', 'labels_val.jsonl'])):
        for file in files:
            assert (tmp_path / f'{kind}_one' / file).read_text() == (tmp_path / f'{kind}_two' / file).read_text(), file
        assert_same_weights(tmp_path / f'{kind}_one' / 'best', tmp_path / f'{kind}_two' / 'best', 1e-5)
    one, two = (log_of(tmp_path / f'prm_{n}', 'heldout_auroc')[-1] for n in ('one', 'two'))
    assert one['calibration_error'] == pytest.approx(two['calibration_error'], rel=1e-4)


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


def test_a_process_that_dies_ends_the_job(coin, tmp_path):
    command = [*several(2), 'ppo.py', *TINY, f'--task={coin}/task', f'--init_from={coin}/policy', *PPO, '--n_iterations=1000', f'--out_dir={tmp_path}/run']
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / 'run' / 'log.jsonl', time.time() + 120
    while not (log.exists() and log.read_text().count('share_correct') >= 2) and time.time() < deadline:
        time.sleep(0.1)
    workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    killed = time.time()
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0 and time.time() - killed < 60
    assert 'Signal 9 (SIGKILL)' in said


def test_torchrun_restarts_a_job_from_its_last_state(coin, tmp_path):
    flags = [*TINY, f'--task={coin}/task', f'--init_from={coin}/policy', *PPO, '--save_interval=1']
    start(ONE, 'ppo.py', *flags[len(TINY):], f'--out_dir={tmp_path}/whole')
    command = [*several(2), '--max-restarts=1', 'ppo.py', *flags, f'--out_dir={tmp_path}/run']
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 120
    while not (tmp_path / 'run' / 'state' / '00000002').exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(int(subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()[0]), signal.SIGKILL)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0, said
    rows = {row['iteration']: row for row in log_of(tmp_path / 'run', 'share_correct')}
    assert_close(log_of(tmp_path / 'whole', 'share_correct'), [rows[i] for i in sorted(rows)], ['policy_loss', 'share_correct'], rel=2e-4)


def test_equal_prompts_in_different_processes_get_different_samples(tmp_path, bpe):
    """Rollouts from one place are dealt to all processes: together they are what one process draws."""
    torch.manual_seed(0)
    Transformer(tiny_config(bpe.vocab_size)).init_weights().save_pretrained(str(tmp_path / 'model'), bpe)
    worker = tmp_path / 'worker.py'
    worker.write_text(f"""
import json
from model import Transformer, rank, setup
from sample import Sampler, answer, load_tokenizer
setup('cpu')
sampler = Sampler(Transformer.from_pretrained('{tmp_path}/model'), load_tokenizer('{tmp_path}/model'))
drawn = [s.ids for s in answer(sampler, [[5, 6, 7]] * 6 + [[8]], 2, 10, 1.0)]
if rank() == 0:
    print(json.dumps(drawn))
""")
    drawn = []
    for launcher in (ONE, several(2), several(3)):
        done = subprocess.run([*launcher, str(worker)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': ROOT})
        assert done.returncode == 0, done.stderr
        drawn.append(json.loads(done.stdout.splitlines()[-1]))
    assert drawn[0] == drawn[1] == drawn[2] and len({tuple(ids) for ids in drawn[0]}) == 14


def test_bf16_under_fsdp_is_bf16_under_ddp(coin, tmp_path):
    """The type that GPUs compute in: agreement within its rounding, with and without adapters."""
    for extra in ([], ['--lora_rank=4']):
        losses = []
        for shard in ('ddp', 'fsdp'):
            out = tmp_path / f'{shard}{len(extra)}'
            start(several(2), 'sft.py', f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={out}', f'--shard={shard}', '--dtype=bfloat16', *extra)
            losses.append([row['loss'] for row in log_of(out, 'loss')])
        assert losses[0] == pytest.approx(losses[1], rel=0.03, abs=5e-3)


def test_what_goes_wrong_in_process_0_is_known_to_all(coin, tmp_path):
    """A state whose list of checksums is torn: process 0 alone reads it, and all take the state before."""
    flags = [f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={tmp_path}/run', '--save_interval=1', '--max_steps=3', '--keep_states=2']
    start(ONE, 'sft.py', *flags)
    (tmp_path / 'run' / 'state' / '00000003' / 'sha256.json').write_text('{"state')
    done = start(several(2), 'sft.py', *flags, '--init_from=resume')
    assert '00000003 is broken' in done.stdout
    assert [row['step'] for row in log_of(tmp_path / 'run', 'loss')] == [1, 2, 3, 3]


def test_processes_that_would_learn_on_their_own_are_refused(coin, tmp_path):
    flags = [f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={tmp_path}/run', '--shard=none']
    done = subprocess.run([*several(2), 'sft.py', *TINY, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "shard = 'none' is for one process" in done.stderr


def test_a_restart_does_not_take_another_run_for_its_own(sft, coin, tmp_path):
    import shutil
    shutil.copytree(sft, tmp_path / 'run')
    before = (tmp_path / 'run' / 'config.json').read_text()
    flags = [f'--task={coin}/task', f'--init_from={coin}/policy', *SFT, f'--out_dir={tmp_path}/run', '--seed=5']
    done = subprocess.run([*several(2), '--max-restarts=1', 'sft.py', *TINY, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count('holds another run') == 2 and (tmp_path / 'run' / 'config.json').read_text() == before


def test_a_signal_to_torchrun_saves(coin, tmp_path):
    command = [*several(2), 'ppo.py', *TINY, f'--task={coin}/task', f'--init_from={coin}/policy', *PPO, '--n_iterations=1000', f'--out_dir={tmp_path}/run',
               '--save_interval=1000']
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / 'run' / 'log.jsonl', time.time() + 120
    while not (log.exists() and log.read_text().count('share_correct') >= 2) and time.time() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert 'stopped after iteration' in said and 'torchrun --nproc_per_node=2' in said, said
    assert len(os.listdir(tmp_path / 'run' / 'state')) == 1


def test_a_mistake_is_said_once(coin, tmp_path):
    done = subprocess.run([*several(2), 'sft.py', *TINY, '--task=nowhere', f'--out_dir={tmp_path}/run'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and sum(line.startswith('error') for line in done.stderr.splitlines()) == 1, done.stderr


def test_fsdp_holds_a_part_and_gives_back_the_whole(tmp_path, bpe):
    """What a process of two holds of a model whose rows do not divide evenly; loading, gathering and writing it back change nothing."""
    torch.manual_seed(0)
    for family in ('tied', 'untied'):
        model = Transformer(tiny_config(bpe.vocab_size, tied=family == 'tied')).init_weights()
        model.add_value_head().save_pretrained(str(tmp_path / family), bpe)
    worker = tmp_path / 'worker.py'
    worker.write_text('''
import sys
import torch
from model import Transformer, autocast, rank, setup
device, _ = setup('cpu')
for name in ('tied', 'untied'):
    whole = Transformer.from_pretrained(f'{sys.argv[1]}/{name}')
    part = Transformer.from_pretrained(f'{sys.argv[1]}/{name}', shard='fsdp', lora_rank=2)
    held = sum(p.to_local().numel() for p in part.parameters())
    assert 0.4 < held / sum(p.numel() for p in part.parameters()) < 0.6
    copy = part.for_sampling(torch.float32)
    weights = dict(whole.named_parameters())
    for key, p in copy.named_parameters():
        assert torch.equal(p, weights[key]), key
    ids = torch.arange(12)[None]
    torch.testing.assert_close(part.run(lambda model, ids: model(ids), ids), whole(ids))
    part.save_pretrained(f'{sys.argv[1]}/{name}_again')
    rope = []  # the angles of rotary positions stay fp32 where products are bf16
    half = Transformer.from_pretrained(f'{sys.argv[1]}/{name}', shard='fsdp', product_dtype=torch.bfloat16)
    half.blocks[0].register_forward_pre_hook(lambda block, inputs: rope.append(inputs[1][0].dtype))
    with torch.no_grad(), autocast(device, torch.bfloat16):
        half.run(lambda model, ids: model(ids), ids)
    assert rope == [torch.float32], rope
''')
    done = subprocess.run([*several(2), str(worker), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': ROOT})
    assert done.returncode == 0, done.stderr
    for family in ('tied', 'untied'):
        assert_same_weights(tmp_path / family, tmp_path / f'{family}_again')
        assert (tmp_path / family / 'value_head.safetensors').read_bytes() == (tmp_path / f'{family}_again' / 'value_head.safetensors').read_bytes()
