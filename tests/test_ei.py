"""Expert Iteration: the filter, de-duplication, accumulation, the reset, and an exploration that was stopped."""
import json
import os
import shutil
import tracemalloc

import pytest
import torch
from conftest import loud, tiny_config
from test_sft import problem

import rewards
from config import UserError
from ei import select, solution_key, with_returns
from eval import explore, samples_of
from model import Checkpoints, Transformer, make_optimizer
from sample import Sampler, load_tokenizer


def record(text, correct=True, **more):
    return {'text': text, 'correct': correct, 'return': float(correct), 'finished': True, 'answer': '3', 'tokens': 3, 'ids': [1, 2, 3]} | more


A, A2, B, C = '<<1+2=3>> so 3', 'it is <<1+2=3>>3', '<<2+1=3>>3', '<<4-1=3>>3'


def test_only_right_solutions_pass():
    assert select([record(A, False), record(B)], set(), 0, 0) == [record(B)]
    assert select([record(A, False)], set(), 0, 0) == []


def test_the_first_of_each_equation_sequence_stays():
    seen = set()
    assert [r['text'] for r in select([record(A), record(A2), record(B), record(A)], seen, 0, 0)] == [A, B]
    assert [r['text'] for r in select([record(A2), record(C)], seen, 2, 0)] == [C]  # a later round brings what is new
    assert select([record(C)], seen, 3, 0) == []


def test_a_wrong_solution_does_not_hide_a_right_one():
    assert select([record(A, False), record(A)], set(), 0, 0) == [record(A)]


def test_the_cap_counts_earlier_rounds():
    assert [r['text'] for r in select([record(A), record(B), record(C)], set(), 0, 2)] == [A, B]
    assert [r['text'] for r in select([record(A), record(B), record(C)], set(), 1, 2)] == [A]
    assert select([record(A)], set(), 2, 2) == []


def test_solutions_without_equations_are_compared_as_text():
    assert solution_key(' no equations #### 3') != solution_key(' none here #### 3')
    assert solution_key(A) == solution_key(A2) != solution_key(B)


def test_exploration_in_pieces_equals_one_in_a_single_go(bpe, tmp_path):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe, max_rows=2)
    problems = [problem(a, 2) for a in range(1, 30)]
    arguments = dict(k=2, max_new_tokens=8, temperature=1.0, seed=4, desc='')
    whole = list(explore(sampler, problems, str(tmp_path / 'whole'), **arguments))
    lines = (tmp_path / 'whole').read_text()
    assert len(whole) == 29 and all(len(records) == 2 for records in whole) and lines.count('\n') == 29
    (tmp_path / 'torn').write_text(lines[:len(lines) // 2])  # killed while it wrote a line
    with pytest.raises(UserError, match='samples a question, not k'):  # which would not be what was asked for
        explore(sampler, problems, str(tmp_path / 'torn'), **arguments | {'k': arguments['k'] + 1})
    drawn = []
    generate = sampler.generate
    sampler.generate = lambda prompts, *a, **k: drawn.extend(prompts) or generate(prompts, *a, **k)
    assert list(explore(sampler, problems, str(tmp_path / 'torn'), **arguments)) == whole
    assert (tmp_path / 'torn').read_text() == lines
    assert 10 < len(drawn) < 20  # what was there is not drawn again
    drawn.clear()
    with pytest.raises(UserError, match='other questions'):  # before anything is drawn
        explore(sampler, problems[1:], str(tmp_path / 'whole'), **arguments)
    assert not drawn


def test_samples_are_read_from_the_disk_a_question_at_a_time(tmp_path):
    """Those of all questions together are 4 MB here; no more than a chunk of them is in memory, whoever reads them."""
    problems, text = [problem(a, 2) for a in range(200)], 'x' * 10_000
    with open(tmp_path / 'f', 'w') as f:
        f.writelines(json.dumps({'question': p.question, 'samples': [record(text), record(text)]}) + '\n' for p in problems)
    found = with_returns(samples_of(str(tmp_path / 'f'), problems), [[1]] * 200, chunk=5)
    tracemalloc.start()
    try:
        assert sum(len(records) for records in found) == 400
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_scores_do_not_depend_on_how_many_questions_are_scored_at_a_time(bpe):
    scorer = loud(Transformer(tiny_config(bpe.vocab_size)).add_value_head())
    ids = [bpe.encode_prompt(f'Question: {n}') for n in range(7)]
    found = [[record(A, n % 2 == 0, ids=bpe.encode(f' {n + m}') + [bpe.eos]) for m in range(n % 3 + 1)] for n in range(7)]

    def returns(chunk, scorer):
        copies = (json.loads(json.dumps(records)) for records in found)
        return [[r['return'] for r in records] for records in with_returns(copies, ids, chunk, scorer)]
    expected = [[rewards.score(scorer, [rewards.Labelled(i + r['ids'], len(i), [])], 1000)[0][-1].item() for r in records] for i, records in zip(ids, found)]
    assert len({round(x, 3) for row in expected for x in row}) > 5
    for chunk in (1, 2, 100):
        for got, wanted in zip(returns(chunk, scorer), expected, strict=True):
            assert got == pytest.approx(wanted, abs=1e-5)
        assert returns(chunk, None) == [[float(r['correct']) for r in records] for records in found]


# -----------------------------------------------------------------------------
# the script, with a policy that answers right every second time, and a base that knows nothing

EI = ['--k=4', '--max_new_tokens=40', '--batch_size=8', '--max_steps=4', '--eval_problems=4', '--n_questions=12', '--n_worked=6', '--lr=1e-3',
      '--device=cpu']


@pytest.fixture(scope='module')
def base(coin, tmp_path_factory):
    torch.manual_seed(1)
    folder, tokenizer = tmp_path_factory.mktemp('base'), load_tokenizer(str(coin / 'policy'))
    for name, block_size in (('base', 128), ('middle', 100), ('short', 32)):
        Transformer(tiny_config(tokenizer.vocab_size, block_size=block_size)).init_weights().save_pretrained(str(folder / name), tokenizer)
    return folder / 'base'


def log_of(folder):
    return [json.loads(line) for line in open(folder / 'log.jsonl')]


def test_rounds_accumulate_and_reset_to_the_base(coin, base, script, tmp_path):
    flags = [f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={base}', *EI]
    said = script('ei.py', *flags, '--n_rounds=2', f'--out_dir={tmp_path}/ei').stdout
    assert 'memory of a process at most about' in said and 'disk at most about' in said
    rounds = [row for row in log_of(tmp_path / 'ei') if 'dataset' in row]
    assert [row['samples_drawn'] for row in rounds] == [48, 96]
    # the log is what can be counted in the samples, all of them at once
    dataset, seen = 6, [{solution_key('1+1=<<1+1=2>>2')} if i < 6 else set() for i in range(12)]
    for number, row in enumerate(rounds, 1):
        found = [json.loads(line)['samples'] for line in open(tmp_path / 'ei' / f'samples_round{number}.jsonl')]
        flat = [r for records in found for r in records]
        new = [r for records, keys in zip(found, seen) for r in select([r | {'return': float(r['correct'])} for r in records], keys, 0, 0)]
        dataset += len(new)
        assert (row['share_correct'], row['share_truncated']) == tuple(sum(x) / 48 for x in ((r['correct'] for r in flat), (not r['finished'] for r in flat)))
        assert row['solved'] == sum(any(r['correct'] for r in records) for records in found) / 12
        assert (row['new_solutions'], row['dataset']) == (len(new), dataset)
    assert rounds[0]['new_solutions'] > 0  # of 6 questions without a worked solution; none of 24 samples is right once in 2 ** 24
    assert sorted(name for name in os.listdir(tmp_path / 'ei') if name.startswith('round')) == ['round1', 'round2']  # no states

    def distance(a, b):
        a, b = (Transformer.from_pretrained(str(path)) for path in (a, b))
        return sum((x - y).square().sum() for x, y in zip(a.parameters(), b.parameters())).sqrt().item()

    # four steps of Adam walk at most 4 * lr a weight from where the round started: the base, not the policy that drew the samples
    reach = 4 * 1.1e-3 * sum(p.numel() for p in Transformer.from_pretrained(str(base)).parameters()) ** 0.5
    assert distance(tmp_path / 'ei' / 'round2', base) < reach < distance(base, coin / 'policy') / 3
    script('ei.py', *flags, '--reset=previous', '--n_rounds=1', f'--out_dir={tmp_path}/previous')
    assert distance(tmp_path / 'previous' / 'round1', coin / 'policy') < reach
    script('ei.py', *flags, '--include_sft=False', '--n_rounds=1', f'--out_dir={tmp_path}/without')
    row, = (row for row in log_of(tmp_path / 'without') if 'dataset' in row)
    assert row['dataset'] == row['new_solutions']

    # resumed after a kill within the second round's exploration, it ends in the same weights
    expected = (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes()
    samples = (tmp_path / 'ei' / 'samples_round2.jsonl').read_text()
    shutil.rmtree(tmp_path / 'ei' / 'round2')
    (tmp_path / 'ei' / 'samples_round2.jsonl').write_text(samples[:len(samples) // 3])
    script('ei.py', *flags, '--n_rounds=2', '--init_from=resume', f'--out_dir={tmp_path}/ei')
    assert (tmp_path / 'ei' / 'samples_round2.jsonl').read_text() == samples
    assert (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes() == expected


def test_bad_input(coin, base, script, tmp_path, bpe):
    def refused(*flags, match):
        done = script('ei.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={base}', *EI, f'--out_dir={tmp_path}/ei', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr

    Transformer(tiny_config(bpe.vocab_size)).init_weights().save_pretrained(str(tmp_path / 'm'), bpe)
    refused('--k=0', match='k, n_rounds and')
    refused('--temperature=0', match='temperature must be above 0')
    refused('--base=', match='needs the checkpoint')
    refused('--reset=never', match="not 'never'")
    refused('--n_questions=1000', match='n_questions')
    refused('--init_from=' + str(tmp_path / 'nothing'), match='nothing')
    refused(f'--base={tmp_path}/m', match='different tokenizers')
    for tau in (1.0, 1.5):  # the default, and above
        refused('--reward=orm', '--reward_model=x', f'--tau={tau}', match='keeps nothing')
    refused('--max_new_tokens=127', match='exceed the context of 128')
    refused(f'--base={base.parent}/short', match='exceed the context of 32')  # which would draw the second round's samples
    assert not (tmp_path / 'ei').exists()
    # a policy that never answers: say why, and name the share that was cut off
    refused(f'--init_from={base}', '--include_sft=False', '--max_new_tokens=3', match='none of 48 samples is right')


# -----------------------------------------------------------------------------
# one row never ends a run, and what cannot fit is refused before any work; a run that has finished keeps one state

def command(name, coin, base, out, *flags):
    common = [f'{name}.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={out}', '--max_new_tokens=40', '--device=cpu', '--batch_size=8']
    return {'sft': [*common, '--max_steps=2', '--eval_problems=4', '--n_worked=8', '--eval_interval=1'],
            'ei': [*common, *EI, f'--base={base}', '--n_rounds=1'],
            'ppo': [*common[:-1], '--n_rollouts=16', '--minibatch=16', '--epochs=1', '--n_iterations=2', '--eval_problems=4', '--save_interval=1', '--show=0'],
            'rcrl': [*common, f'--base={base}', '--n_questions=4', '--n_worked=4', '--k=4', '--rollouts=2', '--max_steps=2', '--eval_problems=4',
                     '--right_share=0', '--eval_interval=1'],
            'rewards': [*common, '--kind=orm', '--balance=False', '--n_questions=8', '--k=2', '--heldout=4', '--epochs=1']}[name] + list(flags)


@pytest.fixture(scope='module')
def long_rows(coin, tmp_path_factory):
    """The coin's task with a question that is longer than the context, and one with such a solution."""
    folder = tmp_path_factory.mktemp('long')
    rows = [json.loads(line) for line in open(coin / 'task' / 'train.jsonl')]
    rows[0]['question'] += ' and so on' * 200
    rows[1]['answer'] = 'and so on ' * 200 + '\n' + rows[1]['answer']
    rows[-4:] = [rows[0], rows[1], *rows[-2:]]  # in the validation slice as well
    (folder / 'task').mkdir()
    (folder / 'task' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    os.symlink(coin / 'policy', folder / 'policy')
    return folder


def states_of(out):
    return os.listdir(out / 'state') if (out / 'state').exists() else []


def test_rows_longer_than_the_context_are_left_out(long_rows, base, script, tmp_path):
    for name in ('sft', 'ei', 'ppo', 'rcrl', 'rewards'):
        out = tmp_path / name
        said = script(*command(name, long_rows, base, out)).stdout
        assert 'disk at most about' in said and 'memory of a process' in said
        assert name == 'rewards' or sum(line.startswith('left out: ') for line in said.splitlines()) == 1, said
        assert (out / 'best' / 'model.safetensors').exists()
        assert len(states_of(out)) == (0 if name == 'ei' else 1)
    # samples that the policy had room for, and what is fine-tuned has not
    path = tmp_path / 'ei' / 'samples_round1.jsonl'
    rows = [json.loads(line) for line in open(path)]
    right = [r for row in rows for r in row['samples'] if r['correct']]
    for r in right[:3]:
        r['ids'] *= 20
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    shutil.rmtree(tmp_path / 'ei' / 'round1')
    said = script(*command('ei', long_rows, base, tmp_path / 'ei', '--init_from=resume')).stdout
    assert f'left out: {min(3, len(right))} of 48 samples' in said and (tmp_path / 'ei' / 'round1' / 'model.safetensors').exists()
    rows = [json.loads(line) for line in open(tmp_path / 'rewards' / 'samples_train.jsonl')]
    rows[2]['samples'][0]['ids'] *= 20  # samples of a policy with a longer context
    (tmp_path / 'given').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert 'left out: 1 of 14 solutions' in script(*command('rewards', long_rows, base, tmp_path / 'run', f'--samples={tmp_path}/given')).stdout


def test_a_finished_run_keeps_what_was_asked_for(coin, base, script, tmp_path):
    more = {'sft': '--max_steps=3', 'ppo': '--n_iterations=3', 'rcrl': '--max_steps=3', 'rewards': '--epochs=2'}
    for name in more:
        out = tmp_path / name
        script(*command(name, coin, base, out))
        first, = states_of(out)
        script(*command(name, coin, base, out, more[name], '--init_from=resume', '--keep_states=0'))  # it goes on from there
        assert not states_of(out) and log_of(out)[-1]['step'] > int(first) * (1 if name != 'ppo' else 0)
        before = (out / 'best' / 'model.safetensors').read_bytes()
        done = script(*command(name, coin, base, out, more[name], '--init_from=resume'), code=2)
        assert 'kept no state to go on from' in done.stderr and done.stderr.count('\n') == 1
        assert (out / 'best' / 'model.safetensors').read_bytes() == before
        assert 'keep_states' in script(*command(name, coin, base, tmp_path / 'x', '--keep_states=-1'), code=2).stderr


def test_a_full_disk_where_the_best_round_is_kept_is_one_line(coin, base, script, tmp_path, monkeypatch):
    """The round itself is whole, and the run goes on from it."""
    def full(source, target):
        raise shutil.Error([(source, target, '[Errno 28] No space left on device')])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'copytree', full)
        done = script(*command('ei', coin, base, tmp_path / 'run'), code=2)
    assert 'best: not written' in done.stderr and done.stderr.strip().count('\n') == 0
    script(*command('ei', coin, base, tmp_path / 'run', '--init_from=resume'))
    for name in os.listdir(tmp_path / 'run' / 'round1'):
        assert (tmp_path / 'run' / 'best' / name).read_bytes() == (tmp_path / 'run' / 'round1' / name).read_bytes()


def test_the_newest_states_are_kept(bpe, tmp_path):
    model = Transformer(tiny_config(bpe.vocab_size))
    optimizer, checkpoints = make_optimizer(model, 1e-2, 0.1), Checkpoints(str(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(step, {'model': model}, optimizer, {'step': step})
        assert checkpoints.steps() == [f'{n:08d}' for n in range(max(1, step - 1), step + 1)]  # while it runs two
    for n, left in ((2, ['00000002', '00000003']), (1, ['00000003']), (1, ['00000003']), (0, [])):
        checkpoints.keep(n)
        assert checkpoints.steps() == left


def test_what_cannot_fit_is_refused_before_any_work(coin, base, script, tmp_path):
    for name in ('sft', 'ei', 'ppo', 'rcrl', 'rewards'):
        done = script(*command(name, coin, base, tmp_path / name, '--max_new_tokens=127'), code=2)
        assert done.stderr.count('\n') == 1 and ('max_new_tokens = 127' in done.stderr) and not (tmp_path / name).exists(), done.stderr
    # questions that fit, and a validation slice in which none does
    rows = [json.loads(line) for line in open(coin / 'task' / 'train.jsonl')]
    for row in rows[-256:]:
        row['question'] += ' and so on' * 30
    (tmp_path / 'task').mkdir()
    (tmp_path / 'task' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    for name in ('sft', 'ei', 'ppo', 'rcrl', 'rewards'):
        done = script(*command(name, coin, base, tmp_path / name, f'--task={tmp_path}/task'), code=2)
        assert 'the context of 128' in done.stderr and not (tmp_path / name).exists(), done.stderr
    # questions that fit the policy, but not the base, which would draw the second round's samples
    rows = [row | {'question': f'What is number {i}?' + ' and so on' * 5 * (i < 64)} for i, row in enumerate(rows)]
    (tmp_path / 'task' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    done = script(*command('ei', coin, f'{base}/../middle', tmp_path / 'run', f'--task={tmp_path}/task'), code=2)
    assert 'exceed the context of 100' in done.stderr and not (tmp_path / 'run').exists(), done.stderr
    # labels take room, too, and a reward model has to read what the policy writes
    done = script(*command('rcrl', coin, f'{base}/../short', tmp_path / 'run'), code=2)
    assert 'exceed the context of 32' in done.stderr
    done = script(*command('rewards', coin, base, tmp_path / 'run', f'--base={base}/../short'), code=2)
    assert 'has a context of 32 tokens, shorter than the policy' in done.stderr and not (tmp_path / 'run').exists()


def test_the_defaults_of_sft_work_from_scratch(coin, script, tmp_path):
    """The shape aside, which is small."""
    flags = [f'--task={coin}/task', '--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=16', '--n_merges=40', '--max_steps=1', '--n_worked=8',
             '--batch_size=4', '--eval_problems=2', '--device=cpu', f'--out_dir={tmp_path}/run']
    script('sft.py', *flags)
    assert (tmp_path / 'run' / 'last').exists()
    done = script('sft.py', *flags, '--overwrite', '--block_size=256', code=2)
    assert 'max_new_tokens = 256 exceed the context of 256' in done.stderr and (tmp_path / 'run' / 'last').exists()
