"""PPO: its formulas against goldens, closed forms and enumeration; then the script, on a coin to load."""
import copy
import functools
import itertools
import math
import random
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Killed, coin_logprobs, dies_after, run_script
from test_ei import weights
from test_rewards import POLICY, log_of, rows_of, run

import data
import ppo
import rewards
from model import Transformer
from sample import Example, Sampler, response_logprobs, response_tables, token_logprobs
from sft import solution_examples

def batch(seed=0, rows=5, longest=9):
    """Random (rewards, values, mask) of solutions of different lengths, the longest among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    return [torch.randn(rows, longest, generator=generator, dtype=torch.float64) for _ in range(2)] + [mask]

# ---- formulas ----
R, OLD = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.5, 0.8, 1.2])
V, RETURNS = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([1.0, 2.0, 1.0])

@pytest.mark.parametrize('found, expected', [
    (ppo.gae(R, R, torch.ones(4), 0.9, 0.95)[1], [0.6579, 0.7695, 0.9, 1.0]),
    *((ppo.ppo_loss(OLD + change, OLD, torch.ones(3), torch.ones(3), 0.2), loss)
      for change, loss in ((1, -1.2), (-1, -math.exp(-1)), (0.1, -1.1052))),
    # |V - R|: 0 clipped to 0.8; 1 clipped to 1.8; unclipped 0.9. The larger one counts, squared and halved.
    (ppo.value_loss(V, 0 * V, RETURNS, clip=0.2), (0.8 ** 2 + 1.8 ** 2 + 0.9 ** 2) / 6),
    (ppo.value_loss(V, 0 * V, RETURNS, clip=0.0), (0 + 1 + 0.9 ** 2) / 6),
    (ppo.importance_weights(V - 2, 2 * V - 3, 3.0), [1, 1, math.exp(0.9)]),
    (ppo.importance_weights(R, R - 1, 2.0), [2] * 4),
    *((ppo.adapted(0.1, kl, 6.0, 1000, 10000), 0.1 * factor)  # the error is clipped at 0.2
      for kl, factor in ((6.0, 1), (6.6, 1.01), (60.0, 1.02), (0.0, 0.98))),
    *((ppo.explained_variance(values, R, R >= 0), share)
      for values, share in ((R, 1), (R + 3, 1), (0 * R + 3, 0), (-R, -3)))])
def test_goldens(found, expected):
    assert torch.as_tensor(found).tolist() == pytest.approx(expected, abs=5e-5)

@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.0), (0.8, 0.7)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma, lam):
    r, v, mask = batch()
    advantages, returns = ppo.gae(r, v, mask, gamma, lam)
    for row, n in enumerate(mask.sum(1).tolist()):
        following = v[row, 1:n].tolist() + [0.0]  # the value after the last token is 0
        delta = [r[row, t] + gamma * following[t] - v[row, t] for t in range(n)]
        expected = [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, n)) for t in range(n)]
        assert torch.allclose(advantages[row, :n], torch.stack(expected))
    assert torch.allclose(returns, (advantages + v).masked_fill(~mask, 0))

@pytest.mark.parametrize('garbage', [1e30, math.nan, math.inf])
def test_what_stands_in_the_padding_is_never_read(garbage):
    r, v, mask = batch(2)
    tables, scalars = [], []
    for a, b in ((r, v), [x.masked_fill(~mask, garbage) for x in (r, v)]):
        group = ppo.group_advantages(a[:4], mask[:4], 2)
        tables.append(torch.cat([*ppo.gae(a, b, mask, 0.9, 0.8), ppo.whiten(a, mask), group]))
        scalars.append([ppo.ppo_loss(a / 9, b / 9, a, mask), ppo.value_loss(a, b, b + 1, mask),
                        ppo.explained_variance(a, b, mask)])
    assert torch.equal(*tables) and scalars[0] == scalars[1]
    assert not tables[0][~torch.cat([mask, mask, mask, mask[:4]])].any()

def test_whiten():
    x, _, mask = batch(4, rows=40)
    real = 3 + 5 * x[mask]
    for shift in (True, False):
        y = ppo.whiten(3 + 5 * x, mask, shift)
        assert torch.allclose(y[mask], (real - real.mean() * shift) / real.std(unbiased=False))
        assert not ppo.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3), shift).any()  # no nan

def test_group_advantages_are_leave_one_out():
    r, _, mask = batch(5, rows=6)
    total = r.masked_fill(~mask, 0).sum(1).view(2, 3)
    expected = total - (total.sum(1, keepdim=True) - total) / 2
    assert torch.allclose(ppo.group_advantages(r, mask, 3), expected.view(6, 1) * mask)
    # exactly 0 where samples tie: parts that are no binary fractions, in different orders
    tied = torch.tensor([random.Random(i).sample([0.1, 0.2, 0.3, 0.4, 0.7], 5) for i in range(8)])
    assert not ppo.group_advantages(tied, tied > 0, 8).any()

@pytest.mark.parametrize('sign, learned', [(1, [1, 1, 1, 0]), (-1, [0, 1, 1, 1])])
def test_only_the_clipped_side_has_no_gradient(sign, learned):
    ratio = torch.tensor([0.7, 0.9, 1.1, 1.3])
    logprobs = ratio.log().requires_grad_()
    ppo.ppo_loss(logprobs, torch.zeros(4), sign * torch.ones(4), clip=0.2, n_tokens=1).backward()
    assert torch.allclose(logprobs.grad, -sign * ratio * torch.tensor(learned))

@pytest.mark.parametrize('loss', [ppo.ppo_loss, ppo.value_loss])
def test_parts_divided_by_the_whole_add_up_to_the_whole(loss):
    a, b, mask = batch(7)
    c, n = torch.randn(mask.shape, dtype=torch.float64), int(mask.sum())
    whole = loss(a, b, c, mask)
    parts = [loss(a[rows], b[rows], c[rows], mask[rows], n_tokens=n) for rows in ([3, 0], [4], [1, 2])]
    assert torch.allclose(sum(parts), whole) and torch.allclose(loss(a[mask], b[mask], c[mask]), whole)
    assert loss(a, b, c, torch.zeros_like(mask)).item() == 0

def test_k3_is_the_kl_by_enumeration():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    assert torch.allclose((p * ppo.k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())  # not KL(q || p)
    assert (ppo.k3(p.log(), q.log()) >= 0).all() and not ppo.k3(p.log(), p.log()).any()

def test_one_epoch_unclipped_without_values_is_reinforce(model, bpe):
    """The gradient of the whole chain, sampler to loss, against that of -sum(return-to-go * log p)."""
    samples = Sampler(model, bpe).generate(['ab', 'c'], k=3, max_new_tokens=12, temperature=0.7, seed=3)
    rows = [Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for s in samples]
    old, values, _ = response_tables(model, rows, 0.7, torch.float32, 1000)
    mask = torch.arange(old.shape[1]) < torch.tensor([len(s.ids) for s in samples])[:, None]
    reward = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, 0)
    advantages, _ = ppo.gae(reward, values, mask, 1.0, 1.0)
    logprobs, _, _ = response_logprobs(model, rows, 0.7)
    loss, expected = ppo.ppo_loss(logprobs, old[mask], advantages[mask], clip=1e9), 0.0
    for s, r in zip(samples, reward):
        logits = model(torch.tensor([s.prompt_ids + s.ids]))[0, len(s.prompt_ids) - 1:-1]
        for t, logp in enumerate(token_logprobs(logits, torch.tensor(s.ids), 0.7)):
            expected = expected - r[t:].sum() * logp / mask.sum()
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, b.abs().max().item()))

def test_which_questions_come_next():
    drawn = [q for start in range(0, 30, 4) for q in ppo.next_questions(10, start, 4, 7)][:30]
    assert [sorted(drawn[i:i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3  # each once
    assert drawn[:10] != drawn[10:20] and drawn[:10] != ppo.next_questions(10, 0, 10, 8)
    priority, seen = np.array([0.5, 0.9, 9.0, 0.1]), np.array([3, 1, -1, 4])
    by_rank, by_age = np.array([1 / 4, 1, 0, 1 / 9]), np.array([2, 4, 0, 1])  # ranks 2, 1, never seen, 3
    found = ppo.replay_probabilities(priority, seen, 5, 0.5, 0.3)
    assert found == pytest.approx(0.7 * by_rank / by_rank.sum() + 0.3 * by_age / 7)

def test_a_prefix_is_steps_of_the_solution_and_never_its_answer():
    for solution, prefixes in (('#### 4', ['']), ('a 1+1=2\nb 2+2=4\nc\n#### 4', [
            'a 1+1=2\n', 'a 1+1=2\nb 2+2=4\n', 'a 1+1=2\nb 2+2=4\nc\n'])):
        problem = data.Problem('q', solution, '4')
        assert {data.random_prefix(problem, random.Random(i)) for i in range(50)} == set(prefixes)

# ---- the script ----
# Eight small updates move the coin's log-odds by 1, give or take 0.1 from seed to seed.
RUN = ('--max_new_tokens=40 --n_rollouts=64 --minibatch=32 --epochs=1 --n_iterations=4 --lr=3e-4 --show=1 '
       '--device=cpu --temperature=1 --eval_problems=16 --eval_interval=2 --micro_tokens=2048').split()

def run_ppo(coin, out, *flags, code=0):
    places = f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={out}'
    return run_script('ppo.py', *places, *RUN, *flags, code=code)

def iterations(folder):
    return log_of(folder, 'share_correct')

def log_odds(folder):
    """ln P(right) - ln P(wrong) of the coin, by enumeration of its two sides."""
    right, wrong = coin_logprobs(folder, lambda p, tokenizer: solution_examples([p], tokenizer)[0])
    return right - wrong

def test_the_coin_is_loaded_and_the_log_says_how(coin, tmp_path):
    printed = run_ppo(coin, tmp_path).stdout
    rows, samples = iterations(tmp_path), rows_of(tmp_path / 'samples.jsonl')
    assert log_odds(tmp_path / 'last') > log_odds(coin / 'policy') + 0.5  # 0.97 to 1.16 over seeds
    assert len(rows) == 4 and 0.25 < rows[0]['share_correct'] < 0.75  # of 64 samples: 4 standard errors
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5) and rows[-1]['kl_k3'] > 0
    assert rows[0]['mean_value'] == 0 != rows[-1]['mean_value']  # the value head starts at zero
    for row in rows:
        assert all(math.isfinite(x) for key, x in row.items() if key != 'explained_variance')
        mine = [s for s in samples if s['iteration'] == row['iteration']]
        questions = {s['question'] for s in mine}
        right = [sum(s['correct'] for s in mine if s['question'] == q) for q in questions]
        assert (row['all_right'], row['all_wrong']) == (right.count(4) / 16, right.count(0) / 16)
        assert row['reward_outcome'] == row['share_correct'] == sum(right) / 64
        assert row['mean_return'] == pytest.approx(row['reward_outcome'] + row['reward_kl'], abs=1e-5)
        assert row['advantage_std'] > 0 and 0.5 < row['mean_ratio'] <= min(2, row['largest_ratio'])
    for s in samples:
        assert s['correct'] == (s['finished'] and data.is_correct(s['text'], s['answer']))
        assert [r for _, r in s['steps']] == [0.0] * (len(s['steps']) - 1) + [float(s['correct'])]
    assert printed.count('  Q: What is number') == 4 and '+1.000  #### 2' in printed

@pytest.mark.parametrize('flags, least, most', [  # by how much the log-odds rise
    ('--reward_right=-1', -2, -0.4), ('--advantage=group', 0.4, 2),  # 0.7 to 1.4 over seeds, as those below
    ('--advantage=group --kl_coef=0 --n_iterations=6', 1.1, 3),  # 1.86 +- 0.14
    ('--advantage=group --kl_coef=5 --n_iterations=6', -1, 1.1),  # 0.48 +- 0.12: held by the reference
    ('--critic=separate --critic_lr=3e-3 --value_warmup=1 --n_iterations=5', 0.4, 2),
    ('--entropy_coef=0.01 --target_kl=0.05 --kl_target=1.0', 0.4, 2),
    ('--target_kl=1e-5 --epochs=3 --n_iterations=2', -1, 1),
    ('--replay=0.5 --n_questions=40 --backtrack=0.5', 0.4, 2)])
def test_every_way_of_learning_loads_the_coin(coin, tmp_path, flags, least, most):
    run_ppo(coin, tmp_path, *flags.split())
    assert least < log_odds(tmp_path / 'last') - log_odds(coin / 'policy') < most
    rows = iterations(tmp_path)
    if 'group --kl_coef=0' in flags:  # samples that tie learn nothing, not even by whitening
        assert all(row['learning_rows'] == 1 - row['all_right'] - row['all_wrong'] for row in rows)
    if 'value_warmup' in flags:  # at first only the critic learned, and the policy stayed
        assert [row['kl_k3'] < 1e-6 for row in rows[:3]] == [True, True, False]
        assert rows[0]['explained_variance'] == pytest.approx(0, abs=1e-5) != rows[1]['explained_variance']
    if 'kl_target' in flags:  # far below its target, the KL's coefficient falls at the largest rate there is
        assert [row['kl_coef'] for row in rows[:2]] == [0.05, ppo.adapted(0.05, 0.0, 1.0, 64, 10000)]
        assert all(row['entropy_loss'] < 0 for row in rows)
    if 'target_kl=1e-5' in flags:  # the first minibatch moves it so far that no other one is learned
        assert [(row['updates'], row['step']) for row in rows] == [(1, 1), (1, 2)]
    if 'backtrack' in flags:
        given = [s for s in rows_of(tmp_path / 'samples.jsonl') if s['prefix'] and s['correct']]
        assert given and all(s['prefix'] == '1+1=<<1+1=2>>2\n' and s['text'].count('<<') == 0 for s in given)
        assert rows[0]['backtracked'] > 0 and rows[-1]['backtracked'] == 0

def test_a_setting_that_was_changed_counts_and_not_the_state(coin, tmp_path, monkeypatch):
    flags = ['--kl_target=1', '--kl_horizon=100', '--save_interval=1', '--n_iterations=1']
    run_ppo(coin, tmp_path / 'kl', *flags)
    flags[-1:] = ['--n_iterations=2', '--init_from=resume']
    run_ppo(coin, tmp_path / 'kl', *flags)
    adapted = iterations(tmp_path / 'kl')[-1]['kl_coef']
    said = run_ppo(coin, tmp_path / 'kl', *flags, '--n_iterations=3', '--kl_coef=0.5').stdout
    assert 'kl_coef 0.05 -> 0.5' in said and iterations(tmp_path / 'kl')[-1]['kl_coef'] == 0.5
    assert adapted == ppo.adapted(0.05, 0.0, 1.0, 64, 100)
    # so for eta: what a quantile found is in the state
    run(coin, f'rewards.py {POLICY} --kind=prm --n_questions=8 --k=4 --rollouts=1 --heldout=4 '
        '--batch_size=8 --epochs=1', tmp_path / 'prm')
    flags = f'--reward=prm --reward_model={tmp_path}/prm --refine=clip --save_interval=1 --alpha=0.5'.split()
    paying = Mock(side_effect=rewards.prm_rewards)
    monkeypatch.setattr(rewards, 'prm_rewards', paying)
    for n, changes in enumerate(('--eta_quantile=0.5', '--eta_quantile=0.5 --eta=0.9', '--eta=0.95')):
        changes = [*changes.split(), f'--n_iterations={n + 1}'] + ['--init_from=resume'] * (n > 0)
        run_ppo(coin, tmp_path / 'eta', *flags, *changes)
    found, again, changed = [call.args[-1] for call in paying.call_args_list]
    assert found == again and changed == 0.95
    row, paid = iterations(tmp_path / 'eta')[-1], sum(rewards.prm_rewards(*paying.call_args.args))
    assert row['reward_prm'] == pytest.approx(0.5 * paid.sum().item() / 64, rel=1e-3)

@pytest.mark.parametrize('bonus', [0.0, 0.1])
def test_rows_without_an_advantage_are_left_out_where_nothing_else_needs_them(coin, tmp_path, bonus):
    """Every sample earns the same: only a bonus on entropy still moves the policy."""
    equal = [f'--reward_{outcome}=0.35' for outcome in ('right', 'wrong', 'truncated')]
    run_ppo(coin, tmp_path, '--advantage=group', '--kl_coef=0', '--n_iterations=2',
            f'--entropy_coef={bonus}', *equal)
    assert torch.equal(weights(coin / 'policy'), weights(tmp_path / 'last')) == (bonus == 0)
    found = [(row['learning_rows'], row['updates']) for row in iterations(tmp_path)]
    assert found == [(1, 2) if bonus else (0, 0)] * 2

def test_the_samplers_gap_is_watched_in_every_iteration(coin, tmp_path, monkeypatch):
    """The policy that draws the last iteration's samples is another one than the policy that learns."""
    right, losses = Transformer.for_sampling, []

    def wrong_later(self, dtype):
        policy = copy.deepcopy(right(self, dtype))
        with torch.no_grad():  # the first call is for validation
            policy.norm.weight.mul_(1.2 if next(calls) == 2 else 1)
        return policy
    monkeypatch.setattr(Transformer, 'for_sampling', wrong_later)
    for cap in (0, 2):
        calls, out = itertools.count(), tmp_path / str(cap)
        printed = run_ppo(coin, out, '--n_iterations=2', f'--importance_cap={cap}').stdout
        assert printed.count('warning: the log-probs of sampler and trainer differ by') == 1
        assert printed.count(' room: pass@1 ') == 1  # the whole diagnosis, once
        assert [row['sampler_gap'] > 1e-3 for row in iterations(out)] == [False, True]
        losses.append([row['policy_loss'] for row in iterations(out)])
    plain, capped = losses
    assert plain[0] == pytest.approx(capped[0], rel=1e-4) and plain[1] != pytest.approx(capped[1], rel=1e-2)

def test_a_killed_run_goes_on_to_the_same_weights(coin, tmp_path, monkeypatch):
    flags = ['--n_iterations=5', '--save_interval=2', '--critic=separate', '--replay=0.3', '--kl_target=2.0']
    run_ppo(coin, tmp_path / 'whole', *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # in the fourth: the third is done again
        patch.setattr('rewards.sparse_rewards', dies_after(3, rewards.sparse_rewards))
        run_ppo(coin, tmp_path / 'parts', *flags)
    assert len(iterations(tmp_path / 'parts')) == 3
    run_ppo(coin, tmp_path / 'parts', *flags, '--init_from=resume')
    for file in ('best/model.safetensors', 'last/model.safetensors', 'samples.jsonl'):
        assert (tmp_path / 'whole' / file).read_bytes() == (tmp_path / 'parts' / file).read_bytes(), file

def test_a_loss_that_is_not_finite_stops_the_run(coin, tmp_path):
    error = run_ppo(coin, tmp_path, '--lr=1e36', '--warmup=0', '--grad_clip=0', code=2).stderr
    assert 'bad_batch.json' in error and error.strip().count('\n') == 0
    assert weights(tmp_path / 'best').isfinite().all() and rows_of(tmp_path / 'bad_batch.json')[0]['ids']

def test_nothing_is_compiled_twice(coin, tmp_path, monkeypatch):
    """Iterations of samples, passes without gradients and updates, whose shapes vary."""
    import torch._dynamo as dynamo
    dynamo.reset()
    dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))  # no C++
    with dynamo.config.patch(error_on_recompile=True):
        run_ppo(coin, tmp_path, '--compile=on')
    assert dynamo.utils.counters['stats']['unique_graphs'] > 0

@pytest.mark.cuda
@pytest.mark.parametrize('flags', [
    '', '--critic=separate --critic_lr=3e-3', '--compile=off --dtype=float32'])
def test_the_coin_is_loaded_on_a_gpu(coin, tmp_path, flags):
    """In bf16 too, where the start-up checks compare the sampler's bf16 copy with the trainer's autocast."""
    run_ppo(coin, tmp_path, '--device=cuda', *flags.split())
    assert log_odds(tmp_path / 'last') > log_odds(coin / 'policy') + 0.5
