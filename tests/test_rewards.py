"""Rewards on tokens, and the reward models that are learned."""
import json
import math
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import loud, run_script, tiny_config

import rewards
from config import UserError
from data import Problem
from eval import judge, load_reward_model, score, step_lines
from model import Transformer
from sample import Example, Sample, bpe_tokenizer

REFERENCE = Problem('q', 'a <<1+2=3>>\nb <<3*4=12>>\nc <<12-2=10>>\n#### 10', '10')

def solution(bpe, text, problem=REFERENCE, finished=True, prefix=''):
    return judge(problem, Sample([1], bpe.encode(text) + [bpe.eos] * finished, [], finished), bpe, prefix)

def at_ends(s, row):
    """What the last tokens of its steps earn; no other token earns anything."""
    assert row.count_nonzero() == row[s.ends].count_nonzero()
    return pytest.approx(row[s.ends].tolist(), abs=1e-6)

def returns(x):
    return x.flip(0).cumsum(0).flip(0)

# ---- rewards on tokens ----
def test_a_step_ends_with_its_line_and_the_last_one_with_the_ids(bpe):
    for text, lines in ((' a\nb\n#### 2', 'a b #### 2'), ('\n\na\n \n\nb', 'a b'), ('a\n\n', 'a')):
        for ids in (bpe.encode(text) + [bpe.eos], bpe.encode(text)):
            found = step_lines(ids, bpe)
            assert ' '.join(line for _, line in found) == lines and found[-1][0] == len(ids) - 1
            assert all(bpe.decode(ids[:end + 1]).endswith(line + '\n') for end, line in found[:-1])
    two_breaks = bpe_tokenizer([bytes([b]) for b in range(256)] + [b'\n\n', b'.\n'])  # in a token
    assert step_lines([*b'ab', 257, *b'cd', 256, *b'e'], two_breaks) == [(2, 'ab.'), (5, 'cd'), (6, 'e')]

def test_the_outcome_stands_on_the_last_token(bpe):
    some = [solution(bpe, ' a\n#### 10'), solution(bpe, ' b'), solution(bpe, ' #### 10', finished=False)]
    found = rewards.sparse_rewards(some, 1.0, -0.5, -2.0)
    by_orm = rewards.orm_rewards(some, [torch.arange(len(s.ids)) + 1 for s in some])
    assert found.shape == by_orm.shape == (3, len(some[0].ids)) and some[0].ids[-1] == bpe.eos
    for row, scored, s, outcome in zip(found, by_orm, some, (1.0, -0.5, -2.0)):
        assert row.nonzero().tolist() == [[len(s.ids) - 1]] and row.sum() == outcome
        assert scored.sum() == scored[len(s.ids) - 1] == len(s.ids) * s.finished

def test_dense_heuristic(bpe):
    for text, thirds in (
            (' b <<3*4=12>>\na <<1+2=3>>\nb <<3*4=12>>', [1, 0, 0]),  # not what was passed, nor what repeats
            (' x <<7+7=14>>\na <<2+1=3.0>>\n\n#### 10', [0, 1, 0]),   # off the way; another way to 3
            (' <<1+2=3>> and <<3*4=12>>\n#### 10', [2, 0]), (' 1 + 2 = 3\nthen 3 x 4 = 12', [1, 1])):
        s = solution(bpe, text)
        assert at_ends(s, rewards.dense_rewards([s])[0]) == [x / 3 for x in thirds], text

    def total(text, *wanted, **more):
        problem = Problem('q', ''.join(f'<<0={x}>>\n' for x in wanted) + '#### 10', '10')
        return pytest.approx(rewards.dense_rewards([solution(bpe, text, problem, **more)]).sum().item())
    assert total('<<1+2=3>>\n <<3*4=12>>', 3, 12, 10, prefix='a <<1+2=3>>\n') == 1 / 3  # 3 was given
    assert total(' <<1=x>>\n#### 10', 'x', 10) == total(' <<1+2=3>>\n#### 10') == 0  # no number; no equation
    assert total(' 1 + 2 = 3\n 1 + 11 = 12', 3, 12, finished=False) == 1 / 2  # or 125
    rng = random.Random(0)
    for _ in range(100):
        wanted, taken = rng.choices('1234', k=rng.randint(1, 4)), rng.choices('12345', k=rng.randint(1, 12))
        text, met, ahead = ''.join(f' <<0={x}>>' + rng.choice(['', '\n']) for x in taken), 0, list(wanted)
        for x in taken:
            if x in ahead:
                met, ahead = met + 1, ahead[ahead.index(x) + 1:]
        assert total(text, *wanted) == met / len(wanted)

def test_clip_and_delta(bpe):
    s = solution(bpe, ' a\nb\nc\n#### 10')
    scores = torch.full((len(s.ids),), 9.0)
    scores[s.ends] = torch.tensor([0.9, 0.2, 0.7, 0.4])
    for refine, by_hand in (('none', [0.9, 0.2, 0.7, 0.4]), ('clip', [0, -0.3, 0, -0.1]),
                            ('delta', [0.7, -0.5, 0.7, 0]), ('clip_delta', [0.3, -0.3, 0, 0])):
        assert at_ends(s, rewards.prm_rewards([s], [scores], refine, 0.5)[0]) == by_hand, refine
    for K in (1, 2, 3, 7):  # with gamma = 1 the return from step k is its own score, and 0 at the answer
        r = torch.rand(K, generator=torch.Generator().manual_seed(K))
        torch.testing.assert_close(returns(rewards.delta_rewards(r)), torch.cat([r[:-1], torch.zeros(1)]))

PAID = {'dense': lambda solutions, scores, eta: rewards.dense_rewards(solutions),
        'orm': lambda solutions, scores, eta: rewards.orm_rewards(solutions, scores)}
PAID |= {refine: lambda solutions, scores, eta, r=refine: rewards.prm_rewards(solutions, scores, r, eta)
         for refine in rewards.REFINEMENTS}

def test_running_to_the_budget_never_pays(bpe):
    """What the budget cut off returns, from each step on, at most what it would, finished wrong, however its
    end is scored; and no step of it earns more than 0 from a learned model."""
    generator, rng, less = torch.Generator().manual_seed(0), random.Random(0), set()
    for _ in range(60):
        lines = rng.choices(['a <<1+2=3>>', 'b <<3*4=12>>', 'so', '<<12-2=10>>'], k=rng.randint(1, 6))
        pair = [solution(bpe, ' ' + '\n'.join(lines), finished=finished) for finished in (False, True)]
        p, eta = torch.rand(len(pair[0].ids), generator=generator), rng.random()
        for last in (0.0, 1.0, rng.random()):  # what the model says once it has read the end token
            scores = [p, torch.cat([p, torch.tensor([last])])]
            outcome = rewards.sparse_rewards(pair, 1.0, *rng.choice([(0.0, 0.0), (-0.5, -0.5), (0.0, -1.0)]))
            for kind, paid in PAID.items():
                found = paid(pair, scores, eta)
                cut, wrong = (returns((outcome + 0.7 * found)[row][s.ends]) for row, s in enumerate(pair))
                assert (cut <= wrong + 1e-6).all() and (kind == 'dense' or (found[0] <= 0).all()), kind
                less |= {kind} if found[0].sum() < found[1].sum() - 0.1 else set()
    assert less == set(PAID)  # and it is not that nothing is ever paid

@pytest.mark.parametrize('needless, n_steps', [('a <<1+2=3>>\n', 1), ('\n \n', 0), ('so\n', 1)])
@pytest.mark.parametrize('kind', PAID)
def test_needless_steps_raise_the_raw_sum_and_no_other_return(bpe, kind, needless, n_steps):
    counts = torch.tensor([0, 1, 5, 20])
    some = [solution(bpe, f' a <<1+2=3>>\n{needless * n}b <<3*4=12>>\n#### 10') for n in counts]
    scores = [torch.full((len(s.ids),), 0.9) for s in some]  # from a model that likes every step
    for eta in (0.5, 0.95):
        total = PAID[kind](some, scores, eta).sum(1)
        more = 0.9 * counts * n_steps if kind == 'none' else 0
        assert (total <= total[0] + more + 1e-5).all()
        assert kind != 'none' or torch.allclose(total, 2.7 + more)

def test_clips_threshold_leaves_the_last_steps_out(bpe):
    some = [solution(bpe, text, finished='#' in text) for text in (' #### 10', ' a\nb\n#### 10', ' a\nb')]
    scores = [torch.full((len(s.ids),), 0.99) for s in some]  # of the last steps, and within steps
    for s, p in zip(some, scores):
        p[s.ends[:-1]] = torch.tensor([0.1, 0.5])[:len(s.ends) - 1]
    empty = judge(REFERENCE, Sample([1], [], [], False), bpe)  # whose question left no room for it
    for q, eta in ((1.0, 0.5), (0.0, 0.1), (0.5, 0.1)):  # of .1, .5, .1
        assert rewards.score_quantile(some + [empty], scores + [torch.zeros(0)], q) == pytest.approx(eta)
    with pytest.raises(UserError, match='set eta'):
        rewards.score_quantile(some[:1], scores[:1], 0.5)

# ---- labels and reward models ----
def test_scores_and_loss_are_of_the_heads_probability_after_each_token(model, bpe):
    scorer = loud(Transformer(model.config).add_value_head(), 3)
    texts = ((' a <<1+2=3>>\n#### 3', 5), (' #### 17', 2))
    rows = [Example([3] * n + bpe.encode(text) + [bpe.eos], n) for text, n in texts]
    long, *empty = Example([3] * 97, 94), Example([3] * 200, 200), Example([3] * 5, 5)  # for a context of 96
    for max_tokens in (10, 1000):  # in whatever batches, a row's scores are its own
        *found, of_long, a, b = score(scorer, [*rows, long, *empty], max_tokens)
        assert of_long.tolist() == [0] * 3 and not len(a) and not len(b)
        for e, p in zip(rows, found):
            hidden = scorer.trunk(torch.tensor([e.ids]))[0, e.n_prompt:]
            torch.testing.assert_close(p, scorer.value_head(hidden).sigmoid(), atol=1e-5, rtol=0)
    labels = [[(0.0, 1.0, 0.3, math.nan)[i % 4] for i in range(len(p))] for p in found]
    loss = -sum(y * math.log(x) + (1 - y) * math.log(1 - x)
                for p, row in zip(found, labels) for x, y in zip(p.tolist(), row) if y == y)
    labelled = [e._replace(labels=row) for e, row in zip(rows, labels)]
    assert rewards.binary_cross_entropy(scorer, labelled).item() == pytest.approx(loss, rel=1e-4)

def test_a_checkpoint_says_what_its_scalar_head_is(bpe, tmp_path):
    for kind, block_size, match in (('value', 96, 'no reward model of kind orm'), ('', 96, 'unknown'),
                                    ('orm', 95, "95 tokens, shorter than the policy's 96")):
        scorer = Transformer(tiny_config(bpe.vocab_size, block_size=block_size)).add_value_head()
        assert scorer.head_kind == 'value'  # a critic's
        scorer.head_kind = kind
        scorer.save_pretrained(str(tmp_path), bpe)
        with pytest.raises(UserError, match=match):
            load_reward_model(str(tmp_path), tiny_config(bpe.vocab_size), bpe, 'cpu', kinds=('orm',))

def test_labels_and_balance_of_outcomes(bpe):
    s = solution(bpe, ' a\nb\n#### 10')
    assert rewards.with_labels(s, [1.0] * 99, 'token').labels == [1.0] * len(s.ids)
    labels = rewards.with_labels(s, [3.0, 4.0, 5.0]).labels
    assert {i: x for i, x in enumerate(labels) if x == x} == dict(zip(s.ends, (3, 4, 5), strict=True))
    right, wrong = ([solution(bpe, f' {i}\n#### {answer}') for i in range(4)] for answer in (10, 11))
    for groups in ([right[:3] + wrong[:1] + right[:1]], [right[:2], right[2:], wrong[:3]]):
        assert sorted(s.correct for s in rewards.balanced(groups, random.Random(0))) == [False, True]
    assert rewards.balanced([right, [], [right[0]]], random.Random(0)) == []

class Known:
    """A policy of known success: of four samples from a prefix as many are right as its last digit says."""
    model, label = SimpleNamespace(config=SimpleNamespace(block_size=1000)), []

    def __init__(self, tokenizer):
        self.tokenizer, self.asked, self.budgets = tokenizer, Counter(), []

    def generate(self, prompts, k, max_new_tokens, temperature, seed, first=None):
        self.budgets += max_new_tokens
        samples = []
        for p in prompts:
            given = self.tokenizer.decode(p[1:])
            text = f'#### {10 if self.asked[given] % 4 < int(given.split()[-1]) else 9}'
            self.asked[given] += 1
            samples.append(Sample(p, self.tokenizer.encode(text) + [self.tokenizer.eos], [], True))
        return samples

def test_step_labels_against_a_policy_of_known_success(bpe):
    sampler, texts = Known(bpe), (' 1\n2\n#### 10', ' 1\n0\n#### 9', ' #### 10', ' 1\n2\n#### 9')
    *some, other = [solution(bpe, text) for text in texts]
    labels = rewards.step_success(sampler, [[], some, [other]], 8, 20, 1.0, 0)
    assert labels == [[], [[0.25, 0.5, 1.0], [0.25, 0.0, 0.0], [1.0]], [[0.25, 0.5, 0.0]]]
    assert sampler.asked == {' 1\n': 8, ' 1\n2\n': 8, ' 1\n0\n': 8}  # each start once

def test_auroc_against_all_pairs_and_calibration():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(60, generator=generator) * 10).round() / 10  # with ties
    labels = torch.rand(60, generator=generator) < scores
    pairs = [float(s > t) + float(s == t) / 2 for s in scores[labels] for t in scores[~labels]]
    assert rewards.auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert rewards.auroc([0.1, 0.9], [False, True]) == 1 and math.isnan(rewards.auroc([0.1], [True]))
    gap = rewards.calibration_error([0.05, 0.05, 0.95, 0.95, 0.95], [1, 0, 1, 1, 1])  # two bins
    assert gap == pytest.approx((abs(0.1 - 1) + abs(2.85 - 3)) / 5)

# ---- the scripts ----
POLICY = '--init_from={coin}/policy '
MODELS = (f'rewards.py {POLICY} --k=6 --n_questions=40 --heldout=16 --batch_size=16 --lr=3e-3 --rollouts=4 '
          '--epochs=9 ')
PPO = f'ppo.py {POLICY} --lr=1e-3 --epochs=1 --temperature=1 --advantage=group --eval_problems=16 --show=0 '
BRIEF = PPO + '--n_rollouts=8 --minibatch=8 --n_iterations=1 '

def run(coin, command, out, match='', task='{coin}/task', **names):
    """What a script says on the coin's task. With match it is refused in one line that says so."""
    command = f'{command} --task={task} --out_dir={out} --max_new_tokens=40 --device=cpu'
    done = run_script(*command.format(coin=coin, **names).split(), code=2 if match else 0)
    assert match in done.stderr and (not match or done.stderr.strip().count('\n') == 0), done.stderr
    return done.stdout

def rows_of(path):
    return [json.loads(line) for line in open(path)]

def log_of(folder, key=''):
    """The log's rows, those that have a key, without what differs from run to run."""
    measured = ('time', 'tokens_per_second', 'mfu', 'memory')
    return [{k: v for k, v in row.items() if k not in measured}
            for row in rows_of(folder / 'log.jsonl') if not key or key in row]

@pytest.fixture(scope='module')
def scorers(coin, tmp_path_factory):
    """An ORM and a PRM that know right from wrong: on 90 scores, at two seeds, AUROC .96 to .99, accuracy
    .82 to .97, standard errors up to .04."""
    folder = tmp_path_factory.mktemp('scorers')
    for kind in ('orm', 'prm'):
        run(coin, MODELS + f'--kind={kind}', folder / kind)
        row, = log_of(folder / kind, 'heldout')
        assert row['heldout_auroc'] > 0.8 and row['heldout_accuracy'] > 0.6
        assert row['calibration_error'] < 0.3
    return folder

@pytest.mark.slow
@pytest.mark.parametrize('reward, gain, flags', [  # raw sums can grow by more steps, not better ones
    ('outcome', 0.15, ''), ('orm', 0.15, ''), ('prm', 0.15, '--refine=clip_delta --eta_quantile=0.8'),
    ('dense', -1, ''), ('orm_dense', -1, ''), ('prm', -1, '')])
def test_every_reward_moves_itself_up(coin, scorers, tmp_path, reward, gain, flags):
    """Without the sparse one beside it. A mean of 128 samples has a standard error of .045 at most."""
    if reward != 'outcome':
        model = '' if reward == 'dense' else f'{scorers}/{reward[:3]}'
        flags += f' --reward={reward} --reward_right=0 --reward_model={model}'
    run(coin, PPO + '--n_rollouts=128 --minibatch=32 --n_iterations=12 ' + flags, tmp_path)
    rows = log_of(tmp_path, 'share_correct')
    for name, least in ((f'reward_{reward}', 0.1), ('share_correct', gain)):
        assert sum(row[name] for row in rows[-3:]) / 3 > rows[0][name] + least

def test_rerank_and_the_orm_as_a_filter(coin, scorers, tmp_path):
    """Reranking solves what a coin's vote does not, and EI can filter by the ORM, which errs seldom: 2 of 16
    problems are left to it. A coin of .6 wins 16 votes of six with p < .01."""
    ask = f'eval.py {POLICY} --k=6 --temperature=1 --scorer={scorers}/orm'
    assert 'weighted@6' in run(coin, ask, tmp_path)
    os.utime(scorers / 'orm' / 'best' / 'config.json')  # as if it had been trained anew
    run(coin, ask, tmp_path, 'other settings (scorer_weights)')
    found = json.loads((tmp_path / 'eval_task.json').read_text())['metrics']
    passed, reranked, weighted, voted = (found[f'{m}@6'][0] for m in ('pass', 'rerank', 'weighted', 'maj'))
    assert passed >= reranked >= passed - 0.13 and reranked > voted and weighted >= voted
    run(coin, f'ei.py {POLICY} --base={coin}/policy --n_rounds=1 --k=4 --n_questions=20 --max_steps=1 '
        f'--lr=1e-9 --include_sft=False --eval_problems=8 --reward=orm --tau=0.5 '
        f'--reward_model={scorers}/orm', tmp_path / 'ei')
    row = log_of(tmp_path / 'ei', 'new_right')[0]
    assert row['new_right'] > row['share_correct'] + 0.2 and row['new_solutions'] >= 10

def test_eval_and_ppo_use_scores_and_too_long_questions_end_no_run(coin, scorers, tmp_path):
    """With a scorer, and where eta is looked for."""
    rows = (coin / 'task' / 'train.jsonl').read_text().splitlines(keepends=True)
    long = [row.replace('What', 'What is ' * 90) for row in rows[:2]]
    (tmp_path / 'test.jsonl').write_text(''.join(rows[:4] + long))
    (tmp_path / 'train.jsonl').write_text(''.join(rows[:8] + long + rows[8:262]))  # in the validation slice
    run(coin, f'eval.py {POLICY} --k=2 --scorer={scorers}/orm', tmp_path / 'eval', task=tmp_path)
    records = rows_of(next((tmp_path / 'eval').glob('eval_*.jsonl')))
    assert not any(s['score'] > 0 or s['correct'] for row in records[4:] for s in row['samples'])
    flags = f'--refine=clip_delta --eta_quantile=0.5 --reward=orm_dense --reward_model={scorers}/orm'
    said = run(coin, BRIEF + flags, tmp_path / 'ppo', task=tmp_path)
    assert 'eta = ' in said and 'the 0.5 quantile of step scores' in said
    assert log_of(tmp_path / 'ppo', 'share_correct')[0]['reward_orm_dense'] <= 0  # clipped scores
    assert '0 of 64 references have no equation' in run(coin, BRIEF + '--reward=dense', tmp_path / 'dense')
