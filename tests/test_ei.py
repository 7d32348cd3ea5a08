"""Expert Iteration: filter, de-duplication, accumulation, reset; and what holds for all scripts."""
import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import coin_problem, loud, run_script, tiny_config
from test_rewards import log_of, rows_of

from config import UserError
from config.run import write_rows
from ei import filtered, returns_of, select, solution_key
from eval import Solution, explore, score
from model import Transformer
from sample import Sampler, load_tokenizer

A, A2, B, C = '<<1+2=3>> so 3', 'it is <<1+2=3>>3', '<<2+1=3>>3', '<<4-1=3>>3'

def solution(text, correct=True, ids=(1, 2, 3), answer='3'):
    return Solution(coin_problem(0), [1], list(ids), True, text, answer, correct)

@pytest.mark.parametrize('texts, wrong, seen, n_kept, cap, kept', [
    ([A, B], [0], [], 0, 0, [1]),               # only right ones pass
    ([A, A], [0], [], 0, 0, [1]),               # and a wrong one hides no right one
    ([A, A2, B, A], [], [], 0, 0, [0, 2]),      # the first of each sequence of equations
    ([A2, C], [], [A, B], 2, 0, [1]),           # of which earlier rounds have brought some
    ([A, B, C], [], [], 0, 2, [0, 1]),          # at most two
    ([A, B, C], [], [], 1, 2, [0]),             # with those of earlier rounds
    ([' none #### 3', ' no #### 3', ' no #### 3 '], [], [], 0, 0, [0, 1])])  # without equations: their texts
def test_what_joins_the_data_set(texts, wrong, seen, n_kept, cap, kept):
    found = [solution(text, i not in wrong) for i, text in enumerate(texts)]
    keys = {solution_key(text) for text in seen}
    passed = [s for s, value in zip(found, returns_of(found, None, 1000, torch.float32)) if value]
    assert select(passed, keys, n_kept, cap) == [found[i] for i in kept]
    assert {solution_key(found[i].text) for i in kept} <= keys

def test_the_random_control_keeps_as_many_whatever_is_right(monkeypatch):
    def kept(seed, max_rows=256):
        monkeypatch.setattr('ei.max_rows', max_rows)
        groups = [[replace(s, problem=coin_problem(i)) for s in found] for i in range(3)]
        return filtered(iter(groups), None, [set(), {solution_key(A)}, set()], [0, 0, 1], 50, seed)[0]
    for name, value in {'ei.reward': 'random', 'ei.max_per_question': 2}.items():
        monkeypatch.setattr(name, value)
    texts, drawn = (A, B, A2, C, B, 'wrong', 'cut'), Counter()
    found = [solution(text, text in (A, A2, C)) for text in texts]
    found[-1].finished = False
    for seed in range(400):  # the right ones would bring A and C; C; and one of them, as one was kept before
        joined = kept(seed)
        assert Counter(s.problem.question[-2] for s in joined) == {'0': 2, '1': 1, '2': 1}
        assert len({solution_key(s.text) for s in joined[:2]}) == 2
        drawn.update(s.text for s in joined[:2])
    assert set(drawn) == {A, B, C, 'wrong'} and all(150 < n < 250 for n in drawn.values())  # deviation: 10
    assert kept(7) == kept(7, max_rows=1)  # in pieces

def test_with_a_reward_model_its_score_of_the_whole_solution_is_the_return(bpe):
    scorer = loud(Transformer(tiny_config(bpe.vocab_size)).add_value_head())
    found = [solution(A, True, bpe.encode(f' {n}') + [bpe.eos], '3' if n != 3 else None) for n in range(7)]
    expected = [score(scorer, [s.example], 1000)[0][-1].item() for s in found]
    assert len({round(x, 3) for x in expected}) > 5
    expected[3] = 0.0  # without an answer
    for max_tokens in (1, 1000):
        assert returns_of(found, scorer, max_tokens, torch.float32) == pytest.approx(expected, abs=1e-5)

def test_exploration_in_pieces_equals_one_in_a_single_go(bpe, tmp_path, monkeypatch):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe, max_rows=2)
    problems, drawn, generate = [coin_problem(i % 28) for i in range(29)], [], sampler.generate
    arguments = dict(k=2, max_new_tokens=8, temperature=1.0, seed=4, desc='')
    found = explore(sampler, problems, str(tmp_path / 'whole'), **arguments)
    whole = [next(found), *found]  # read from the disk a question at a time
    lines = (tmp_path / 'whole').read_text()
    assert [len(group) for group in whole] == [2] * 29 and lines.count('\n') == 29
    assert [s.ids for s in whole[0]] != [s.ids for s in whole[28]]  # a question that is asked again
    (tmp_path / 'torn').write_text(lines[:len(lines) // 2])  # killed while it wrote a line
    monkeypatch.setattr(sampler, 'generate',
                        lambda prompts, *a, **k: drawn.extend(prompts) or generate(prompts, *a, **k))
    for asked, changes, said in ((problems, {'k': 3}, 'samples a question, not k'),
                                 (problems[1:], {}, 'other questions')):
        with pytest.raises(UserError, match=said):  # before anything is drawn
            explore(sampler, asked, str(tmp_path / 'torn'), **arguments | changes)
    assert not drawn
    assert list(explore(sampler, problems, str(tmp_path / 'torn'), **arguments)) == whole
    assert (tmp_path / 'torn').read_text() == lines and 10 < len(drawn) < 20  # what was there stays

# ---- the script, with a policy that answers right every second time, and a base that knows nothing ----
@pytest.fixture(scope='module')
def bases(coin, tmp_path_factory):
    """Untrained models: base/, and with shorter contexts middle/ (100) and short/ (32)."""
    torch.manual_seed(1)
    folder, tokenizer = tmp_path_factory.mktemp('base'), load_tokenizer(str(coin / 'policy'))
    for name, size in (('base', 128), ('middle', 100), ('short', 32)):
        model = Transformer(tiny_config(tokenizer.vocab_size, block_size=size)).init_weights()
        model.save_pretrained(str(folder / name), tokenizer)
    return folder

OWN = {'sft': '--batch_size=8 --max_steps=2 --eval_problems=4 --n_worked=8 --eval_interval=1',
       'ei': '--batch_size=8 --k=4 --max_steps=4 --eval_problems=4 --n_questions=12 --n_worked=6 --lr=1e-3 '
             '--n_rounds=1 --base=BASE',
       'ppo': '--n_rollouts=8 --minibatch=8 --epochs=1 --n_iterations=2 --eval_problems=4 --save_interval=1',
       'rcrl': '--batch_size=8 --n_questions=4 --n_worked=4 --k=4 --rollouts=2 --max_steps=2 --base=BASE '
               '--eval_problems=4 --right_share=0 --eval_interval=1',
       'rewards': '--batch_size=8 --kind=orm --balance=False --n_questions=8 --k=2 --heldout=4 --epochs=1'}

@pytest.fixture
def run(coin, bases, tmp_path):
    """run('ei', flags ..., out='ei', code=0) runs a script into tmp_path/out."""
    def run(name, *flags, out='', code=0):
        own = OWN[name].replace('BASE', f'{bases}/base').split()
        return run_script(f'{name}.py', f'--task={coin}/task', f'--init_from={coin}/policy',
                          f'--out_dir={tmp_path}/{out or name}', '--max_new_tokens=40', '--device=cpu',
                          *own, *flags, code=code)
    return run

def weights(path):
    return torch.cat([p.flatten() for p in Transformer.from_pretrained(str(path)).parameters()])

def test_rounds_accumulate_and_reset_to_the_base(coin, bases, run, tmp_path):
    said, ei = run('ei', '--n_rounds=2').stdout, tmp_path / 'ei'
    assert 'memory of a process' in said and 'disk at most about' in said
    rounds = log_of(ei, 'dataset')
    assert [row['samples_drawn'] for row in rounds] == [48, 96]
    # the log is what can be counted in the samples, all of them at once
    seen = [{solution_key('1+1=<<1+1=2>>2')} if i < 6 else set() for i in range(12)]
    for number, row in enumerate(rounds, 1):
        found, before = rows_of(ei / f'samples_round{number}.jsonl'), sum(map(len, seen))
        correct = [[s['correct'] for s in line['samples']] for line in found]
        for line, keys in zip(found, seen):
            keys |= {solution_key(s['text']) for s in line['samples'] if s['correct']}
        assert row['share_correct'] == sum(map(sum, correct)) / 48
        cut = sum(not s['finished'] for line in found for s in line['samples'])
        assert row['share_truncated'] == cut / 48
        assert row['solved'] == sum(map(any, correct)) / 12
        assert (row['new_solutions'], row['dataset']) == (sum(map(len, seen)) - before, sum(map(len, seen)))
    assert rounds[0]['new_solutions'] > 0  # none of 24 samples is right once in 2 ** 24

    # four steps of Adam walk at most 4 * lr a weight from where the round began: the base, not the policy
    start, policy = weights(bases / 'base'), weights(coin / 'policy')
    reach = 4 * 1.1e-3 * len(start) ** 0.5
    assert (weights(ei / 'round2') - start).norm() < reach < (start - policy).norm() / 3
    run('ei', '--reset=previous', '--include_sft=False', out='previous')
    assert (weights(tmp_path / 'previous' / 'round1') - policy).norm() < reach
    row, = log_of(tmp_path / 'previous', 'dataset')
    assert row['dataset'] == row['new_solutions']

    # resumed after a kill within the second round's exploration, it ends in the same weights
    expected, samples = weights(ei / 'round2'), (ei / 'samples_round2.jsonl').read_text()
    shutil.rmtree(ei / 'round2')
    (ei / 'samples_round2.jsonl').write_text(samples[:len(samples) // 3])
    run('ei', '--n_rounds=2', '--init_from=resume')
    assert (ei / 'samples_round2.jsonl').read_text() == samples
    assert torch.equal(weights(ei / 'round2'), expected)

# {script: flags: what its one line says | ...}
BAD = {
    'sft': '--task=nowhere: nowhere | --init_from=no/where: no/where | --n_worked=10000: n_worked | '
           '--init_from=resume: no run to resume | --init_from=scratch --n_embd=17: n_embd | '
           '--init_from=scratch --block_size=5: fits the context of 5 tokens',
    'ei': "--base=: needs the checkpoint | --n_questions=1000: n_questions | "
          '--init_from=TMP/nothing: nothing | --base=TMP/other: different tokenizers | '
          '--reward=orm: with a reward_model | --reward=orm --reward_model=x --tau=1: keeps nothing | '
          '--base=BASES/short: exceed the context of 32 | '
          '--reward=orm --tau=0.5 --reward_model=COIN/policy: no reward model of kind orm | '
          '--base=BASES/middle --task=TMP/wordy: exceed the context of 100',
    'ppo': '--reward=prm: needs a reward_model | --reward_model=TMP/other: no use for reward_model | '
           '--reward=orm --reward_model=TMP/other: different tokenizers | '
           '--ref=TMP/other: different tokenizers | --critic_from=TMP/other: different tokenizers | '
           "--ref=BASES/short: 32 tokens, shorter than the policy's 128 | "
           "--critic_from=BASES/short --critic=separate: 32 tokens, shorter than the policy's 128 | "
           "--minibatch=48: multiple | --refine=clip: for reward = 'prm' | "
           '--reward_truncated=0.1: reward_truncated = 0.1 above reward_wrong = 0.0 | '
           '--advantage=group --n_per_question=1: at least 2 | '
           '--importance_cap=0.5: importance_cap is 0 (off) or at least 1',
    'rewards': '--n_questions=1000: n_questions | --samples=none: no file with k = 2 solutions | '
               '--samples=COIN/task/train.jsonl: no file with k = 2 solutions | '
               "--base=BASES/short: 32 tokens, shorter than the policy's 128",
    'rcrl': '--base=: --base=out/demo_base | --n_questions=10000: n_questions | '
            '--granularity=solution --good_share=0.5 --right_share=0.5: right_share sets the mix | '
            "--lora_rank=2: take label_tokens = 'text' | --base=BASES/short: exceed the context of 32"}

def lengthen(coin, folder, which, n):
    """Writes the coin's train.jsonl into a folder, some questions n words longer."""
    rows = rows_of(coin / 'task' / 'train.jsonl')
    for row in rows[which]:
        row['question'] += ' and so on' * n
    folder.mkdir()
    write_rows(str(folder / 'train.jsonl'), rows)

def test_bad_input_is_one_line(coin, bases, run, tmp_path, bpe):
    def refused(name, flags, said):
        error = run(name, *flags, out='run', code=2).stderr
        assert said in error and error.strip().count('\n') == 0, (name, flags, error)
    other = Transformer(tiny_config(bpe.vocab_size)).add_value_head()
    other.save_pretrained(str(tmp_path / 'other'), bpe)
    lengthen(coin, tmp_path / 'wordy', slice(64), 5)  # questions that fit the policy, but not that base
    lengthen(coin, tmp_path / 'long', slice(-256, None), 30)
    folders = {'TMP': str(tmp_path), 'BASES': str(bases), 'COIN': str(coin)}
    for name in OWN:
        entries = BAD[name] + ' | --max_new_tokens=127: tokens = 127 | --task=TMP/long: the context of 128'
        for entry in re.sub('TMP|BASES|COIN', lambda found: folders[found[0]], entries).split(' | '):
            flags, said = entry.split(': ')
            refused(name, flags.split(), said)
    assert not (tmp_path / 'run').exists()
    # what is found on the way
    flags = [f'--init_from={bases}/base', '--include_sft=False', '--max_new_tokens=3']
    refused('ei', flags, 'none of 48 samples is right')
    refused('rewards', ['--overwrite', '--n_questions=2', '--k=1'], 'too few')

def test_a_full_disk_where_the_best_round_is_kept_is_one_line(run, tmp_path, monkeypatch):
    """The round itself is whole, and the run goes on from it."""
    with monkeypatch.context() as patch:
        full = shutil.Error([('a', 'b', '[Errno 28] No space left on device')])
        patch.setattr(shutil, 'copytree', Mock(side_effect=full))
        error = run('ei', code=2).stderr
    assert 'best: not written' in error and error.strip().count('\n') == 0
    run('ei', '--init_from=resume')
    assert torch.equal(weights(tmp_path / 'ei' / 'best'), weights(tmp_path / 'ei' / 'round1'))

# ---- all scripts: what a single row, a context or a finished run may not break ----
def test_rows_longer_than_the_context_are_left_out(coin, run, tmp_path):
    rows = rows_of(coin / 'task' / 'train.jsonl')
    rows[0]['question'] += ' and so on' * 200
    rows[1]['answer'] = 'and so on ' * 200 + '\n' + rows[1]['answer']
    rows[-4:] = [rows[0], rows[1], *rows[-2:]]  # in the validation slice as well
    (tmp_path / 'task').mkdir()
    write_rows(f'{tmp_path}/task/train.jsonl', rows)
    task = f'--task={tmp_path}/task'
    for name in OWN:
        said = run(name, task).stdout
        assert 'disk at most about' in said and 'memory of a process' in said
        assert name == 'rewards' or said.count('\nleft out: ') == 1, said
        assert (tmp_path / name / 'best' / 'model.safetensors').exists()
    for samples in ('ei/samples_round1.jsonl', 'rewards/samples_train.jsonl'):
        rows = rows_of(tmp_path / samples)  # the policy had room for them, and what is fine-tuned has not
        for s in [s for row in rows for s in row['samples'] if s['correct']][:3]:
            s['ids'] *= 20
        write_rows(f'{tmp_path}/{samples}', rows)
    shutil.rmtree(tmp_path / 'ei' / 'round1')
    assert 'left out: 3 of 48 samples' in run('ei', task, '--init_from=resume').stdout
    said = run('rewards', task, f'--samples={tmp_path}/rewards/samples_train.jsonl', out='orm').stdout
    assert 'left out: 3 of 14 solutions' in said

@pytest.mark.parametrize('name, more', [('sft', '--max_steps=3'), ('ppo', '--n_iterations=3'),
                                        ('rcrl', '--max_steps=3'), ('rewards', '--epochs=2')])
def test_a_finished_run_keeps_what_was_asked_for(run, tmp_path, name, more):
    states, best = tmp_path / name / 'state', tmp_path / name / 'best' / 'model.safetensors'
    run(name)
    assert len(os.listdir(states)) == 1
    run(name, more, '--init_from=resume', '--keep_states=0')  # it goes on from there
    before = best.read_bytes()
    error = run(name, more, '--init_from=resume', code=2).stderr
    assert 'kept no state to go on from' in error and error.count('\n') == 1
    assert not os.listdir(states) and best.read_bytes() == before
