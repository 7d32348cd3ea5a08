"""Several processes: gloo on the CPU runs the path that GPUs run with NCCL. One process is the oracle."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, free_port, run_all, script_command, tiny_config, until
from safetensors.torch import load_file
from test_faults import assert_same_run

from config import UserError, run
from model import Transformer

SFT = ['sft.py', '--batch_size=7', '--max_steps=5', '--eval_interval=3', '--lr=1e-3', '--n_worked=20']
# A small rate: Adam divides a gradient by its own size, so rounding errors grow with every step.
PPO = ['ppo.py', '--n_rollouts=20', '--minibatch=20', '--epochs=1', '--n_iterations=3', '--lr=1e-4',
       '--show=0', '--critic_lr=1e-3', '--temperature=1.0', '--eval_interval=3', '--n_questions=40']
VALUES, GROUP = [*PPO, '--value_warmup=1'], [*PPO, '--advantage=group', '--lora_rank=4', '--epochs=2']
EI = ['--max_steps=3', '--k=3', '--batch_size=8', '--lr=1e-3']
PRM = ['rewards.py', '--kind=prm', '--n_questions=9', '--k=3', '--rollouts=2', '--heldout=6',
       '--batch_size=8', '--lr=1e-3', '--epochs=2']

def command(coin, out, script, *flags):
    return script_command(script, coin, out, '--micro_tokens=512', *flags)

def torchrun(n, *flags):
    start = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={n}']
    return start + list(flags or ['--standalone'])

def column(folder, *keys):
    """These keys of the rows of a run's log that have the first of them."""
    rows = map(json.loads, open(f'{folder}/log.jsonl'))
    found = [[row[key] for key in keys] for row in rows if keys[0] in row]
    assert found, f'{folder}: no {keys[0]}'
    return found

def steps(folder):
    return [step for _, step in column(folder, 'loss', 'step')]

def assert_close(a, b, *keys):
    for x, y in zip(column(a, *keys), column(b, *keys), strict=True):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-6), keys

def assert_same_weights(a, b, tolerance=0.0):
    a, b = (load_file(f'{folder}/model.safetensors') for folder in (a, b))
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name

def assert_same_sft(a, b):
    assert_close(a, b, 'loss', 'grad_norm', 'lr')
    assert_close(a, b, 'val_loss', 'val_maj1')
    assert_same_weights(a / 'last', b / 'last', 1e-5)

def assert_same_ppo(a, b, *keys):
    assert all(norm > 0 for _, norm in column(a, 'share_correct', 'grad_norm'))
    assert_close(a, b, 'policy_loss', 'grad_norm', 'share_correct', 'kl_k3', 'entropy', 'approx_kl',
                 'reward_kl', 'response_tokens', *keys)
    found, expected = ([json.loads(line)['text'] for line in open(f / 'samples.jsonl')] for f in (a, b))
    assert found == expected and len(found) == 60
    assert_same_weights(a / 'last', b / 'last', 2e-4)

# Prompts are dealt to processes, which together draw what one does. Each holds half of a model; loading,
# gathering and writing change nothing.
PART = """
import sys
import torch
from config.run import setup
from model import Transformer, autocast
from sample import Sampler, draw_samples, load_tokenizer
device, _ = setup('cpu')
def logits(model, ids):
    return model(ids)
for folder in sys.argv[1:]:
    ids, found, prompts = torch.arange(12)[None], [], [[5, 6, 7]] * 6 + [[8]]
    whole = Transformer.from_pretrained(folder)
    sampler = Sampler(whole, load_tokenizer(folder))
    drawn = [s.ids for s in draw_samples(sampler, prompts, 2, 10, 1.0)]
    assert drawn == [s.ids for s in sampler.generate(prompts, 2, 10, 1.0)]
    assert len(set(map(tuple, drawn))) == 14
    part = Transformer.from_pretrained(folder, shard='fsdp', lora_rank=2)
    held = sum(p.to_local().numel() for p in part.parameters())
    assert 0.4 < held / sum(p.numel() for p in part.parameters()) < 0.6
    weights = dict(whole.named_parameters())
    for key, p in part.for_sampling(torch.float32).named_parameters():
        assert 'fixed_' in key or torch.equal(p, weights[key]), key
    torch.testing.assert_close(part.run(logits, ids), whole(ids))
    part.save_pretrained(folder + '_again')
    with torch.no_grad():  # adapters that have learned something are in the copy
        for key, p in part.named_parameters():
            if key.endswith('lora_b'):
                p.to_local().fill_(0.1)
    learned = part.run(logits, ids)
    assert (learned - whole(ids)).abs().max() > 0.01
    torch.testing.assert_close(part.for_sampling(torch.float32)(ids), learned)
    # the angles of rotary positions and the scalar head stay fp32 where products are bf16
    half = Transformer.from_pretrained(folder, shard='fsdp', product_dtype=torch.bfloat16)
    half.blocks[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[1][0].dtype))
    half.value_head.register_forward_pre_hook(
        lambda head, inputs: found.extend([inputs[0].dtype, head.weight.dtype]))
    with torch.no_grad(), autocast(device, torch.bfloat16):
        half.run(lambda model, ids: model.values(model.trunk(ids)), ids)
    assert found == [torch.float32] * 3, found
"""

@pytest.fixture(scope='module')
def work(coin, bpe, tmp_path_factory):
    """A folder with one/, what one process did, and two/, what two did."""
    folder = tmp_path_factory.mktemp('processes')
    torch.manual_seed(0)
    for name in ('tied', 'untied'):
        whole = Transformer(tiny_config(bpe.vocab_size, tied=name == 'tied')).init_weights().add_value_head()
        whole.save_pretrained(str(folder / name), bpe)
    (folder / 'part.py').write_text(PART)
    torn, states = folder / 'one' / 'torn', [*SFT, '--save_interval=1', '--max_steps=3', '--keep_states=2']
    bf16 = [*SFT, '--dtype=bfloat16']  # the type that GPUs compute in
    jobs = {'sft': SFT, 'ppo': VALUES, 'bf16': bf16, 'bf16 lora': [*bf16, '--lora_rank=4']}
    one = {'sft': SFT, 'torn': states, 'ppo': VALUES, 'group': GROUP}
    two = {'group fsdp': [*GROUP, '--shard=fsdp']}
    for shard in ('ddp', 'fsdp'):
        two |= {f'{name} {shard}': [*job, f'--shard={shard}'] for name, job in jobs.items()}

    def commands(n, jobs):
        return [command(coin, folder / n / name, *job) for name, job in jobs.items()]
    run_all(1, commands('one', one))
    (torn / 'state' / '00000003' / 'sha256.json').write_text('{"state')
    said = run_all(2, [*commands('two', two), command(coin, torn, *states, '--init_from=resume'),
                       [f'{folder}/part.py', f'{folder}/tied', f'{folder}/untied']])
    (folder / 'two' / 'said').write_text(json.dumps(said))
    return folder

def test_two_processes_do_what_one_does(work):
    one, two = work / 'one', work / 'two'
    for shard in ('ddp', 'fsdp'):
        assert_same_sft(one / 'sft', two / f'sft {shard}')
        assert_same_ppo(one / 'ppo', two / f'ppo {shard}', 'value_loss', 'explained_variance')
    assert_same_ppo(one / 'group', two / 'group fsdp')
    for name in ('bf16', 'bf16 lora'):  # within its rounding
        for ddp, fsdp in zip(column(two / f'{name} ddp', 'loss'), column(two / f'{name} fsdp', 'loss')):
            assert ddp == pytest.approx(fsdp, rel=0.03, abs=5e-3)

def test_one_process_speaks_and_what_it_finds_is_known_to_all(work):
    """A state whose list of checksums is torn: process 0 alone reads it, and all take the state before."""
    first, second = json.loads((work / 'two' / 'said').read_text())
    assert first.count('best checkpoint') == 7 and 'best checkpoint' not in second
    assert first.count('00000003 is broken') == 1
    assert steps(work / 'one' / 'torn') == [1, 2, 3, 3]

def test_fsdp_holds_a_part_and_gives_back_the_whole(work):
    for name in ('tied', 'untied'):  # see PART, which has run
        assert_same_weights(work / name, work / f'{name}_again')
        head, again = (work / folder / 'value_head.safetensors' for folder in (name, f'{name}_again'))
        assert head.read_bytes() == again.read_bytes()

@pytest.mark.slow
def test_three_processes_do_what_one_does(work, coin, tmp_path):
    """Every script; and a state of three processes, which two go on from, and then one."""
    few = ['--n_questions=9', '--n_worked=5', '--rollouts=3']
    jobs = {'separate': [*PPO, '--critic=separate', '--replay=0.2'], 'prm': PRM,
            'ei': ['ei.py', *EI, '--n_questions=21', '--n_worked=7', '--n_rounds=2'],
            'rcrl': ['rcrl.py', *EI, *few, '--right_share=0', '--shard=auto']}
    shard, one, three = ['--shard=fsdp'], tmp_path / '1', tmp_path / '3'

    def parts(out, last, *flags):
        return command(coin, out / 'parts', *SFT, '--save_interval=1', f'--max_steps={last}', *flags)

    def commands(out, *flags):
        return [*(command(coin, out / name, *job, *flags) for name, job in jobs.items()),
                command(coin, out / 'ei', 'eval.py', '--split=val', '--n_problems=23', '--k=3'),
                parts(out, 3, *flags)]
    resumed = [parts(one, last, '--init_from=resume') for last in (4, 5)]
    assert 'resumed with other settings' in run_all(1, [*commands(one), *resumed])[0]
    checkpointing = [*SFT, *shard, '--grad_checkpointing', '--micro_tokens=64']
    said = run_all(3, [*commands(three, *shard), command(coin, three / 'sft', *checkpointing)])
    assert [text.count('| run ') for text in said] == [1, 0, 0]
    assert_same_sft(work / 'one' / 'sft', three / 'sft')
    assert_same_ppo(one / 'separate', three / 'separate', 'value_loss', 'explained_variance')
    for file in ('ei/samples_round1.jsonl', 'ei/eval_task.jsonl', 'rcrl/samples.jsonl', 'rcrl/labels.jsonl',
                 'prm/samples_train.jsonl', 'prm/labels_train.jsonl', 'prm/labels_val.jsonl'):
        assert (one / file).read_text() == (three / file).read_text() != '', file
    assert len((one / 'ei' / 'eval_task.jsonl').read_text().splitlines()) == 23
    for folder in ('ei/round1', 'rcrl/best', 'prm/best'):
        assert_same_weights(one / folder, three / folder, 1e-5)
    found, expected = (column(out / 'prm', 'heldout_auroc', 'calibration_error')[-1] for out in (one, three))
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(list((three / 'parts' / 'state' / '00000003').glob('*.safetensors'))) == 3
    run_all(2, [parts(three, 4, '--init_from=resume', *shard)])
    run_all(1, [parts(three, 5, '--init_from=resume')])
    assert steps(three / 'parts') == [1, 2, 3, 4, 5]
    assert_same_weights(one / 'parts' / 'last', three / 'parts' / 'last', 1e-5)

def meeting(store, numbers, n):
    """What run.meet gives to these of n processes, here threads: {number: a name or an error}."""
    def enter(number):
        time.sleep(0.02 * numbers.index(number))  # some read before the others have written
        try:
            return run.meet(store, number, n)
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor(n) as threads:
        return dict(zip(numbers, threads.map(enter, numbers)))

def test_a_start_has_a_name_of_its_own_or_says_who_did_not_come(monkeypatch):
    """Whatever is left in the store: an earlier start, parts of a killed one, a start of another size."""
    store, names = dist.HashStore(), set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = meeting(store, order, 3)
        assert len(set(found.values())) == 1 and found[0] not in names
        names.add(found[0])
        with monkeypatch.context() as patch:
            patch.setattr(run, 'START_PATIENCE', timedelta(seconds=0.2))
            meeting(store, [0, 2], 3), meeting(store, [1], 3)
    assert meeting(store, [0, 1, 2, 3], 4)[1] not in names
    for numbers, seconds in (([0], 0), ([1, 3], 1)):  # process 0 was there before, process 2 never
        monkeypatch.setattr(run, 'START_PATIENCE', timedelta(seconds=seconds))
        found = meeting(store, numbers, 5)
    assert found == {n: f'process {n} of 5 waited 0:00:01 for processes 0, 2, 4' for n in (1, 3)}
    # nobody answers
    place = {'RANK': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port()}
    monkeypatch.setattr(os, 'environ', os.environ | place)
    with pytest.raises(UserError, match='waited 0:00:01 for the others'):
        run.join_job(torch.device('cpu'))

@pytest.mark.slow
@pytest.mark.parametrize('moments, name, job', [
    ('validation', 'sft ddp', SFT),  # the other process hears of it from its agent, which counts no failure
    ('step,state,validation', 'ppo ddp', [*VALUES, '--save_interval=1'])])
def test_killed_at_some_moments_a_run_on_two_hosts_ends_the_same(work, coin, tmp_path, moments, name, job):
    """Two agents of torchrun with a process each; process 1 is killed once at each of the moments."""
    place = ['--nnodes=2', '--max-restarts=3', '--rdzv_backend=c10d', '--rdzv_id=x', '--local_addr=127.0.0.1',
             f'--rdzv_endpoint=127.0.0.1:{free_port()}']
    start = [*torchrun(1, *place), 'tests/dies_once.py', str(tmp_path), moments,
             *command(coin, tmp_path / 'run', *job)]
    agents = [subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
              for _ in range(2)]
    try:
        said = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:  # which ends its process
            agent.terminate()
            agent.wait(60)
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert ''.join(said).count('exitcode: -9') == len(moments.split(','))
    assert_same_run(work / 'two' / name, tmp_path / 'run', 2)

@pytest.mark.slow
@pytest.mark.parametrize('number, expected', [
    (signal.SIGKILL, 'Signal 9 (SIGKILL)'), (signal.SIGTERM, 'stopped after iteration')])
def test_a_process_that_dies_ends_the_job_and_a_signal_saves(coin, tmp_path, number, expected):
    long = [*PPO, '--n_iterations=1000', '--save_interval=1000']
    job = subprocess.Popen([*torchrun(2), *command(coin, tmp_path, *long)], cwd=ROOT, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / 'log.jsonl'
    try:
        until(lambda: log.exists() and log.read_text().count('share_correct') >= 2, job)
        workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[1]) if number == signal.SIGKILL else job.pid, number)
        stderr = job.communicate(timeout=120)[1]
    finally:
        job.terminate()
        job.wait(60)
    assert job.returncode != 0 and expected in stderr, stderr
    saved = (tmp_path / 'state').exists()
    assert ('torchrun --nproc_per_node=2' in stderr) == saved == (number == signal.SIGTERM)

@pytest.mark.slow
def test_what_torchrun_starts_refuses(work, coin, tmp_path):
    """A mistake is said once; and a job whose rendezvous has another name resumes none of a job's runs."""
    shutil.copytree(work / 'one' / 'sft', tmp_path / 'other')
    config = tmp_path / 'other' / 'config.json'
    before = config.read_text().replace('"_job": ""', '"_job": "x"')
    config.write_text(before)
    named = torchrun(1, '--max-restarts=1', '--rdzv_backend=c10d', '--rdzv_id=x',
                     '--rdzv_endpoint=127.0.0.1:0')
    for launcher, name, flag, line, times in ((torchrun(2), 'run', '--task=nowhere', 'error.*nowhere', 1),
                                              (named, 'other', '--seed=5', 'error: .*holds a run', 2)):
        done = subprocess.run([*launcher, *command(coin, tmp_path / name, *SFT, flag)], cwd=ROOT,
                              text=True, capture_output=True)
        assert done.returncode != 0 and len(re.findall(f'^{line}', done.stderr, re.M)) == times, done.stderr
    assert not (tmp_path / 'run').exists() and config.read_text() == before
