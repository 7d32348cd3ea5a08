"""PPO: its formulas against goldens, closed forms and exact enumeration; then the script, on a coin that it has to load."""
import copy
import functools
import itertools
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import Killed, coin_logprobs, dies_after, loud, run_process, run_script, tiny_config

import ppo
import rewards
from model import Transformer
from sample import Example, Sampler, token_logprobs
from sft import solution_examples


def batch(seed=0, rows=5, longest=9):
    """Random (rewards, values, mask) of responses of different lengths, the longest among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    return [torch.randn(rows, longest, generator=generator, dtype=torch.float64) for _ in range(2)] + [mask]


# -----------------------------------------------------------------------------
# advantages

def test_gae_golden():
    x = torch.tensor([0.0, 0.0, 0.0, 1.0])
    _, returns = ppo.gae(x, x, torch.ones(4), 0.9, 0.95)
    assert returns.tolist() == pytest.approx([0.6579, 0.7695, 0.9, 1.0], abs=5e-5)


def test_gae_is_the_discounted_sum_of_td_errors():
    r, v, mask = batch()
    for gamma, lam in ((1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.8, 0.7)):
        advantages, returns = ppo.gae(r, v, mask, gamma, lam)
        for row, n in enumerate(mask.sum(1).tolist()):
            following = v[row, 1:n].tolist() + [0.0]  # the value after the last token is 0
            delta = [r[row, t] + gamma * following[t] - v[row, t] for t in range(n)]
            expected = [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, n)) for t in range(n)]
            assert torch.allclose(advantages[row, :n], torch.stack(expected))
        assert torch.allclose(returns, (advantages + v).masked_fill(~mask, 0))
        if gamma == lam == 1:  # the sum of all rewards to come
            assert torch.allclose(returns, r.masked_fill(~mask, 0).flip(1).cumsum(1).flip(1).masked_fill(~mask, 0))


def test_what_stands_in_the_padding_is_never_read():
    r, v, mask = batch(2)
    for garbage in (1e30, math.nan, math.inf):
        dirty = [x.masked_fill(~mask, garbage) for x in (r, v)]
        for clean, other in zip(ppo.gae(r, v, mask, 0.9, 0.8), ppo.gae(*dirty, mask, 0.9, 0.8)):
            assert torch.equal(clean, other) and not other[~mask].any()
        assert torch.equal(ppo.whiten(r, mask), ppo.whiten(dirty[0], mask))
        assert torch.equal(ppo.group_advantages(r[:4], mask[:4], 2), ppo.group_advantages(dirty[0][:4], mask[:4], 2))
        loss = ppo.ppo_loss(r / 9, v / 9, r, mask), ppo.value_loss(r, v, v + 1, mask)
        assert loss == (ppo.ppo_loss(dirty[0] / 9, dirty[1] / 9, dirty[0], mask), ppo.value_loss(*dirty, dirty[1] + 1, mask))
        assert ppo.explained_variance(r, v, mask) == ppo.explained_variance(dirty[0], dirty[1], mask)


def test_gae_reads_rows_padded_on_either_side():
    r, v, mask = batch(3, rows=1)
    expected = ppo.gae(r, v, mask, 0.9, 0.8)[0]
    pad = torch.full((1, 3), float('nan'), dtype=torch.float64)
    off = torch.zeros(1, 3, dtype=torch.bool)
    for order in (0, 1):
        r2, v2, m2 = (torch.cat([a, b] if order else [b, a], 1) for a, b in ((r, pad), (v, pad), (mask, off)))
        assert torch.allclose(ppo.gae(r2, v2, m2, 0.9, 0.8)[0][m2], expected[mask])


def test_whiten():
    x, _, mask = batch(4, rows=40)
    y = ppo.whiten(3 + 5 * x, mask)
    assert y[mask].mean().item() == pytest.approx(0, abs=1e-6) and y[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert not y[~mask].any()
    assert torch.allclose(y, ppo.whiten(x, mask), atol=1e-4)
    z = ppo.whiten(x, mask, shift_mean=False)  # scaled, and where it was 0 still 0
    assert z[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-4) and torch.allclose(z[mask] * x[mask].std(unbiased=False), x[mask])
    assert not ppo.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3)).any()  # nothing varies: nothing, and no nan


def test_group_advantages_are_leave_one_out():
    r, _, mask = batch(5, rows=6)
    a = ppo.group_advantages(r, mask, 3)
    total = r.masked_fill(~mask, 0).sum(1)
    for row in range(6):
        others = [total[i] for i in range(row // 3 * 3, row // 3 * 3 + 3) if i != row]
        assert torch.allclose(a[row][mask[row]], total[row] - sum(others) / 2)
    assert torch.allclose(a[:, 0].view(2, 3).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-9)


def test_samples_that_tie_have_no_advantage_and_move_nothing():
    mask = torch.ones(8, 5, dtype=torch.bool)
    rewards = torch.zeros(8, 5)
    rewards[torch.arange(8), torch.arange(8) % 5] = 0.35  # no binary fraction, at different places
    assert not ppo.group_advantages(rewards, mask, 8).any()
    for step in range(3):  # the same steps in another order
        rewards[:, step] = 1 / 3
    parts = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.7])
    shuffled = torch.stack([parts[torch.randperm(5, generator=torch.Generator().manual_seed(i))] for i in range(8)])
    assert not ppo.group_advantages(shuffled, mask, 8).any()
    noise = 1e-8 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))  # of a KL that is 0 but for rounding
    assert not ppo.group_advantages(shuffled + noise, mask, 8).any()
    for tiny in (noise, 10 * noise):  # all wrong
        assert not ppo.group_advantages(tiny, mask, 8).any() and not ppo.whiten(tiny, mask).any()
    shuffled[3, 2] += 1e-3  # and what does not tie has one
    assert ppo.group_advantages(shuffled, mask, 8).all()
    for shift_mean in (True, False):
        assert not ppo.whiten(torch.full((8, 5), 0.35) + noise, mask, shift_mean).any()
    assert ppo.whiten(shuffled, mask).any()


def test_importance_weights():
    new, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -3.0, -1.0])
    assert ppo.importance_weights(new, sampled, 2.0).tolist() == pytest.approx([1, 2, math.exp(-2)])
    # with them the mean over what q drew is the mean under p, as long as nothing reaches the cap
    p, q, f = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2]), torch.tensor([1.0, 5.0, -2.0])
    assert (q * ppo.importance_weights(p.log(), q.log(), 2.0) * f).sum().item() == pytest.approx((p * f).sum().item())


# -----------------------------------------------------------------------------
# losses

def test_ppo_loss_goldens():
    old = torch.tensor([0.5, 0.8, 1.2])
    for change, expected in ((1.0, -1.2), (-1.0, -math.exp(-1)), (0.1, -1.1052)):
        assert ppo.ppo_loss(old + change, old, torch.ones(3), torch.ones(3), 0.2).item() == pytest.approx(expected, abs=5e-5)


def test_only_the_clipped_side_has_no_gradient():
    for advantage, ratio, clipped in ((1, 1.3, True), (-1, 0.7, True), (1, 0.7, False), (-1, 1.3, False), (1, 1.1, False), (-1, 0.9, False)):
        logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
        ppo.ppo_loss(logprobs, torch.zeros(1), torch.tensor([float(advantage)]), clip=0.2).backward()
        assert logprobs.grad.item() == (0 if clipped else pytest.approx(-advantage * ratio))


def test_at_ratio_1_the_loss_is_the_mean_advantage_and_the_gradient_reinforces():
    _, a, mask = batch(6)
    logprobs = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    loss = ppo.ppo_loss(logprobs, logprobs.detach(), a, mask)
    loss.backward()
    assert loss.item() == pytest.approx(-a[mask].mean().item())
    assert torch.allclose(logprobs.grad, (-a / mask.sum()).masked_fill(~mask, 0))


def test_value_loss():
    values, old, returns = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 1.0])
    # |V - R|: 0 clipped to 0.8; 1 clipped to 1.8; unclipped 0.9. The larger one counts, halved.
    assert ppo.value_loss(values, old, returns, clip=0.2).item() == pytest.approx((0.8 ** 2 + 1.8 ** 2 + 0.9 ** 2) / 6)
    assert ppo.value_loss(values, old, returns, clip=0.0).item() == pytest.approx((0 + 1 + 0.9 ** 2) / 6)


def test_parts_divided_by_the_whole_add_up_to_the_whole():
    a, b, mask = batch(7)
    c = torch.randn(mask.shape, dtype=torch.float64)
    n = int(mask.sum())
    for loss in (ppo.ppo_loss, ppo.value_loss):
        whole = loss(a, b, c, mask)
        parts = sum(loss(a[rows], b[rows], c[rows], mask[rows], n_tokens=n) for rows in ([3, 0], [4], [1, 2]))
        flat = loss(a[mask], b[mask], c[mask])
        assert torch.allclose(parts, whole) and torch.allclose(flat, whole)
        assert loss(a, b, c, torch.zeros_like(mask)).item() == 0


def test_kl_estimators_against_the_exact_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    exact = (p * (p / q).log()).sum()
    assert not torch.isclose(exact, (q * (q / p).log()).sum(), rtol=0.05)  # the pair tells the directions apart
    assert torch.allclose((p * (p.log() - q.log())).sum(), exact)
    assert torch.allclose((p * ppo.k3(p.log(), q.log())).sum(), exact)
    assert (ppo.k3(p.log(), q.log()) >= 0).all() and not ppo.k3(p.log(), p.log()).any()


def test_adaptive_kl_coefficient():
    assert ppo.adapted(0.1, 6.0, 6.0, 1000, 10000) == 0.1
    assert ppo.adapted(0.1, 6.6, 6.0, 1000, 10000) == pytest.approx(0.1 * 1.01)
    assert ppo.adapted(0.1, 60.0, 6.0, 1000, 10000) == pytest.approx(0.1 * 1.02)  # the error is clipped at 0.2
    assert ppo.adapted(0.1, 0.0, 6.0, 1000, 10000) == pytest.approx(0.1 * 0.98)


def test_explained_variance():
    _, r, mask = batch(8)
    assert ppo.explained_variance(r, r, mask) == pytest.approx(1) and ppo.explained_variance(r * 0 + 3, r, mask) == pytest.approx(0)
    assert ppo.explained_variance(r + 3, r, mask) == pytest.approx(1) and math.isnan(ppo.explained_variance(r, r * 0, mask))


# -----------------------------------------------------------------------------
# models on responses

def examples(model, n=5):
    generator = torch.Generator().manual_seed(1)
    return [Example(torch.randint(model.config.vocab_size, (int(length),), generator=generator).tolist(), int(n_prompt))
            for n_prompt, length in zip((3, 1, 7, 2, 5), (20, 4, 9, 30, 6))][:n]


def test_actions_against_a_plain_forward(model):
    critic = loud(Transformer(model.config).add_value_head(), 5)
    for e in examples(model):
        logprobs, values, entropy = ppo.evaluate_actions(model, critic, [e], 0.7, torch.float32, True)
        expected = (model(torch.tensor([e.ids]))[0] / 0.7).log_softmax(-1)           # (T, V)
        states = range(e.n_prompt - 1, len(e.ids) - 1)                                # the state of an action ends before it
        assert logprobs.tolist() == pytest.approx([expected[t, e.ids[t + 1]].item() for t in states], abs=1e-5)
        assert entropy.tolist() == pytest.approx([torch.distributions.Categorical(logits=expected[t]).entropy().item() for t in states], abs=1e-5)
        hidden = critic.trunk(torch.tensor([e.ids]))[0]
        assert values.tolist() == pytest.approx([critic.value_head(hidden[t]).item() for t in states], abs=1e-5)


def test_batches_do_not_depend_on_the_split(model):
    rows = examples(model)
    whole = ppo.evaluate_batch(model, None, rows, 0.7, torch.float32, 10_000, True)
    split = ppo.evaluate_batch(model, None, rows, 0.7, torch.float32, 40, True)
    order = [4, 2, 0, 3, 1]
    turned = ppo.evaluate_batch(model, None, [rows[i] for i in order], 0.7, torch.float32, 70, True)
    for a, b, c in zip(whole, split, turned):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a[order], c, atol=1e-5)
    for row, e in zip(whole[0], rows):
        n = len(e.ids) - e.n_prompt
        assert row[:n].all() and not row[n:].any()


def test_a_fresh_value_head_is_zero_and_leaves_the_policy_alone(model):
    before = ppo.evaluate_batch(model, None, examples(model), 1.0, torch.float32, 1000)[0]
    with_head = Transformer(model.config)
    with_head.load_state_dict(model.state_dict())
    with_head.add_value_head()
    after, values, _ = ppo.evaluate_batch(with_head, with_head, examples(model), 1.0, torch.float32, 1000)
    assert torch.equal(before, after) and not values.any()


def test_one_epoch_unclipped_without_values_is_reinforce(model, bpe):
    """The gradient of the whole chain, sampler to loss, against that of -sum(return-to-go * log p), written out here."""
    samples = Sampler(model, bpe).generate(['ab', 'c'], k=3, max_new_tokens=12, temperature=0.7, seed=3)
    rows = [Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for s in samples]
    lengths = torch.tensor([len(s.ids) for s in samples])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    reward = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, 0)
    old, values, _ = ppo.evaluate_batch(model, None, rows, 0.7, torch.float32, 1000)
    sampled = torch.cat([torch.tensor(s.logprobs) for s in samples])
    assert torch.allclose(old[mask], sampled, atol=1e-5)  # sampler and trainer are one policy
    advantages, _ = ppo.gae(reward, values, mask, 1.0, 1.0)
    logprobs, _, _ = ppo.evaluate_actions(model, None, rows, 0.7, torch.float32)
    assert (logprobs - old[mask]).exp().sub(1).abs().max() < 1e-5
    parameters = list(model.parameters())
    found = torch.autograd.grad(ppo.ppo_loss(logprobs, old[mask], advantages[mask], clip=1e9), parameters)
    total = 0.0
    for s, r in zip(samples, reward):
        logits = model(torch.tensor([s.prompt_ids + s.ids]))[0, len(s.prompt_ids) - 1:-1]
        for t, logp in enumerate(token_logprobs(logits, torch.tensor(s.ids), 0.7)):
            total = total - r[t:].sum() * logp
    expected = torch.autograd.grad(total / mask.sum(), parameters)
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-5 * max(1.0, b.abs().max().item()))


# -----------------------------------------------------------------------------
# which questions, and where they start

def test_questions_come_in_permutations_without_loss_or_repetition():
    drawn = [q for start in range(0, 30, 4) for q in ppo.next_questions(10, start, 4, 7)][:30]
    assert [sorted(drawn[i:i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn[:10] != drawn[10:20] and drawn[:10] != ppo.next_questions(10, 0, 10, 8)
    assert len(ppo.next_questions(3, 5, 20, 0)) == 20


def test_replay_probabilities():
    priority, seen = np.array([0.5, 0.9, 9.0, 0.1]), np.array([3, 1, -1, 4])
    by_rank = ppo.replay_probabilities(priority, seen, 5, 0.5, 0.0)
    weights = np.array([1 / 4, 1, 0, 1 / 9])  # ranks 2, 1, never seen, 3, to the power of -1 / 0.5
    assert by_rank == pytest.approx(weights / weights.sum())
    assert ppo.replay_probabilities(priority, seen, 5, 0.5, 1.0) == pytest.approx(np.array([2, 4, 0, 1]) / 7)
    assert ppo.replay_probabilities(priority, seen, 5, 0.5, 0.3).sum() == pytest.approx(1)


def test_a_prefix_is_steps_of_the_solution_and_never_its_answer():
    problem = rewards.Problem('q', 'a 1+1=2\nb 2+2=4\nc\n#### 4', '4')
    found = {ppo.random_prefix(problem, random.Random(i)) for i in range(50)}
    assert found == {'a 1+1=2\n', 'a 1+1=2\nb 2+2=4\n', 'a 1+1=2\nb 2+2=4\nc\n'}
    assert ppo.random_prefix(rewards.Problem('q', '#### 4', '4'), random.Random(0)) == ''


# -----------------------------------------------------------------------------
# the script

# Eight small updates: the coin's log-odds move by 1, give or take 0.1 from seed to seed, and nothing is chaotic yet.
RUN = ['--max_new_tokens=40', '--n_rollouts=64', '--minibatch=32', '--epochs=1', '--n_iterations=4', '--lr=3e-4', '--temperature=1.0',
       '--eval_problems=16', '--eval_interval=2', '--device=cpu', '--show=1', '--micro_tokens=2048']


def run_ppo(script, coin, out, *flags, code=0):
    return script('ppo.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={out}', *RUN, *flags, code=code)


def iterations(folder):
    return [row for row in map(json.loads, open(os.path.join(folder, 'log.jsonl'))) if 'share_correct' in row]


def samples_of(folder):
    return list(map(json.loads, open(os.path.join(folder, 'samples.jsonl'))))


def log_odds(folder):
    """ln P(right) - ln P(wrong) of the coin, by enumeration of its two sides."""
    right, wrong = coin_logprobs(folder, lambda problem, tokenizer: solution_examples([problem], tokenizer)[0])
    return right - wrong


def test_the_coin_is_loaded_and_the_log_says_how(script, coin, tmp_path):
    start = log_odds(coin / 'policy')
    assert abs(start) < 0.5
    printed = run_ppo(script, coin, tmp_path / 'run').stdout
    rows, samples = iterations(tmp_path / 'run'), samples_of(tmp_path / 'run')
    assert log_odds(tmp_path / 'run' / 'last') > start + 0.5  # 0.97 to 1.16 over seeds
    assert len(rows) == 4 and 0.25 < rows[0]['share_correct'] < 0.75  # of 64 samples: 4 standard errors
    assert rows[0]['kl'] == pytest.approx(0, abs=1e-5) and rows[-1]['kl_k3'] > 0 and rows[-1]['samples_drawn'] == 256
    for key in ('share_truncated', 'reward_outcome', 'reward_shaped', 'reward_kl', 'kl_k3', 'approx_kl', 'clip_share', 'entropy',
                'explained_variance', 'value_loss', 'grad_norm', 'response_tokens', 'unique_equations', 'rollout_tokens_per_second',
                'update_tokens_per_second'):
        assert math.isfinite(rows[-1][key]), key
    assert rows[-1]['reward_outcome'] == rows[-1]['share_correct']
    for row in rows:
        assert row['mean_return'] == pytest.approx(row['share_correct'] + row['reward_kl'], abs=1e-5)
        assert row['kl_solution'] == pytest.approx(row['kl'] * row['response_tokens'], rel=1e-3, abs=1e-5)
        of_a_question = [sum(s['correct'] for s in samples if s['iteration'] == row['iteration'] and s['question'] == q)
                         for q in {s['question'] for s in samples if s['iteration'] == row['iteration']}]
        assert row['all_right'] == of_a_question.count(4) / 16 and row['all_wrong'] == of_a_question.count(0) / 16
        assert row['advantage_std'] > 0 and 0.5 < row['mean_ratio'] < 2 and row['largest_ratio'] >= row['mean_ratio']
    assert rows[0]['mean_value'] == 0 != rows[-1]['mean_value']  # the value head starts at zero
    val = [row for row in map(json.loads, open(tmp_path / 'run' / 'log.jsonl')) if 'val_maj1' in row][-1]
    n = 16  # problems of the validation
    assert val['val_maj1_error'] == pytest.approx((val['val_maj1'] * (1 - val['val_maj1']) / (n - 1)) ** 0.5)
    assert len(samples) == 256 and [s['iteration'] for s in samples] == sorted(s['iteration'] for s in samples)
    questions = [s['question'] for s in samples]  # 64 questions, 16 of them an iteration: all of them once before any again
    assert len(set(questions)) == 64 and all(questions.count(q) == 4 for q in set(questions))
    for s in samples:
        assert s['correct'] == (s['finished'] and rewards.is_correct(s['text'], s['answer']))
        assert sum(r for _, r in s['steps']) == pytest.approx(float(s['correct'])) and s['steps'][-1][1] == float(s['correct'])
    assert printed.count('  Q: What is number') == 4 and '+1.000  #### 2' in printed and 'val_maj1' in printed
    best = Transformer.from_pretrained(str(tmp_path / 'run'))
    assert best.config == Transformer.from_pretrained(str(coin / 'policy')).config


def test_a_large_kl_coefficient_holds_on_to_the_reference(script, coin, tmp_path):
    moved = {}
    for kl_coef in (0.0, 5.0):
        run_ppo(script, coin, tmp_path / str(kl_coef), f'--kl_coef={kl_coef}', '--advantage=group', '--n_iterations=6')
        moved[kl_coef] = log_odds(tmp_path / str(kl_coef) / 'last') - log_odds(coin / 'policy')
    assert moved[5.0] < 1.1 < moved[0.0]  # 0.48 +- 0.12 and 1.86 +- 0.14 over seeds


def test_every_way_of_learning_loads_the_coin(script, coin, tmp_path):
    """What is paid becomes likelier, by 0.7 to 1.4 nats over seeds."""
    for name, sign, flags in (('negated', -1, ['--reward_right=-1']), ('group', 1, ['--advantage=group']),
                              ('critic', 1, ['--critic=separate', '--critic_lr=3e-3', '--value_warmup=1', '--n_iterations=5']),
                              ('bonus', 1, ['--entropy_coef=0.01', '--target_kl=0.05', '--kl_target=1.0']),
                              ('replay', 1, ['--replay=0.5', '--n_questions=40', '--backtrack=0.5'])):
        run_ppo(script, coin, tmp_path / name, *flags)
        assert sign * (log_odds(tmp_path / name / 'last') - log_odds(coin / 'policy')) > 0.4
    rows = {name: iterations(tmp_path / name) for name in ('critic', 'bonus', 'replay')}
    # the value function alone learned, and the policy stayed
    assert [row['kl_k3'] < 1e-6 for row in rows['critic'][:3]] == [True, True, False]
    assert rows['critic'][0]['explained_variance'] == pytest.approx(0, abs=1e-5) and rows['critic'][1]['explained_variance'] != 0
    # far below its target, the KL's coefficient falls at the largest rate there is
    assert [row['kl_coef'] for row in rows['bonus'][:2]] == [0.05, ppo.adapted(0.05, 0.0, 1.0, 64, 10000)]
    given = [s for s in samples_of(tmp_path / 'replay') if s['prefix']]
    given = [s for s in given if s['correct']]
    assert given and all(s['prefix'] == '1+1=<<1+1=2>>2\n' and s['text'].count('<<') == 0 for s in given)
    assert rows['replay'][0]['backtracked'] > 0 and rows['replay'][-1]['backtracked'] == 0


def test_a_setting_that_was_changed_counts_and_not_the_state(script, coin, tmp_path, monkeypatch):
    flags = ['--kl_target=1', '--kl_horizon=100', '--save_interval=1']
    run_ppo(script, coin, tmp_path / 'run', *flags, '--n_iterations=1')
    shutil.copytree(tmp_path / 'run', tmp_path / 'changed')
    run_ppo(script, coin, tmp_path / 'run', *flags, '--n_iterations=2', '--init_from=resume')
    printed = run_ppo(script, coin, tmp_path / 'changed', *flags, '--n_iterations=2', '--init_from=resume', '--kl_coef=0.5').stdout
    assert 'kl_coef 0.05 -> 0.5' in printed
    assert iterations(tmp_path / 'run')[-1]['kl_coef'] == ppo.adapted(0.05, 0.0, 1.0, 64, 100)  # as it had adapted
    assert iterations(tmp_path / 'changed')[-1]['kl_coef'] == 0.5
    # eta: what a quantile found is in the state, and a given one that has changed is not
    run_script('rewards.py', f'--task={coin}/task', f'--init_from={coin}/policy', '--kind=prm', f'--out_dir={tmp_path}/prm', '--n_questions=8',
               '--k=4', '--rollouts=1', '--heldout=4', '--batch_size=8', '--epochs=1', '--max_new_tokens=40', '--device=cpu')
    flags = ['--reward=prm', f'--reward_model={tmp_path}/prm', '--refine=clip', '--save_interval=1', f'--out_dir={tmp_path}/eta']
    etas, found = [], []

    def noting(responses, scores, refine, eta):
        etas.append(eta)
        return prm_rewards(responses, scores, refine, eta)
    prm_rewards = rewards.prm_rewards
    monkeypatch.setattr(rewards, 'prm_rewards', noting)
    for n, changes in enumerate((['--eta_quantile=0.5'], ['--eta_quantile=0.5', '--eta=0.9'], ['--eta=0.25'], ['--eta=0.75'], ['--eta_quantile=1.0'])):
        resume = ['--init_from=resume'] * (n > 0)
        found.append('eta = ' in run_ppo(script, coin, tmp_path / 'eta', *flags, f'--n_iterations={n + 1}', *changes, *resume).stdout)
    assert found == [True, False, False, False, True] and etas[0] == etas[1] and etas[2:4] == [0.25, 0.75] and etas[4] > etas[0]


def test_rows_without_an_advantage_are_left_out_where_nothing_else_needs_them(script, coin, tmp_path):
    """Every sample earns the same: a bonus on entropy still moves the policy, and without one nothing moves it."""
    flags = ['--advantage=group', '--kl_coef=0', '--reward_right=0.35', '--reward_wrong=0.35', '--reward_truncated=0.35', '--n_iterations=2']
    for name, bonus, moves in (('tied', 0.0, False), ('bonus', 0.1, True)):
        run_ppo(script, coin, tmp_path / name, *flags, f'--entropy_coef={bonus}')
        weights = [Transformer.from_pretrained(str(folder)).embed.weight for folder in (coin / 'policy', tmp_path / name / 'last')]
        assert torch.equal(*weights) == (not moves)
        assert [row['learning_rows'] for row in iterations(tmp_path / name)] == [float(moves)] * 2


def test_the_samplers_gap_is_watched_in_every_iteration(script, coin, tmp_path, monkeypatch):
    """The policy that draws one iteration's samples is another one than the policy that learns."""
    right = Transformer.for_sampling

    def wrong_later(self, dtype):
        policy = copy.deepcopy(right(self, dtype))
        if next(calls) == wrong:  # after one for validation, before the first iteration
            with torch.no_grad():
                policy.norm.weight.mul_(1.2)
        return policy
    monkeypatch.setattr(Transformer, 'for_sampling', wrong_later)
    losses = {}
    for cap, wrong in ((0, 2), (2, 2), (2, 1)):
        calls, out = itertools.count(), tmp_path / f'{cap} {wrong}'
        printed = run_ppo(script, coin, out, '--n_iterations=2', f'--importance_cap={cap}').stdout
        assert printed.count('warning: the log-probs of sampler and trainer differ by') == 1
        assert [row['sampler_gap'] > 1e-3 for row in iterations(out)] == [wrong == 1, wrong == 2]
        losses[cap, wrong] = [row['policy_loss'] for row in iterations(out)]
    first, second = zip(losses[0, 2], losses[2, 2])
    assert first[0] == pytest.approx(first[1], rel=1e-4) and second[0] != pytest.approx(second[1], rel=1e-2)


def test_the_result_does_not_depend_on_the_micro_batches(script, coin, tmp_path):
    for name, flag in (('a', '--micro_tokens=128'), ('b', '--micro_tokens=100000')):
        run_ppo(script, coin, tmp_path / name, '--n_iterations=1', flag)
    a, b = (iterations(tmp_path / name)[0] for name in 'ab')
    for key in ('policy_loss', 'value_loss', 'grad_norm', 'approx_kl', 'entropy', 'kl_k3'):
        assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key


def test_a_killed_run_goes_on_to_the_same_weights(script, coin, tmp_path, monkeypatch):
    flags = ['--n_iterations=5', '--save_interval=2', '--critic=separate', '--replay=0.3', '--kl_target=2.0']
    run_ppo(script, coin, tmp_path / 'whole', *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # in the fourth iteration, so that the third is done again
        patch.setattr('rewards.sparse_rewards', dies_after(3, rewards.sparse_rewards))
        run_ppo(script, coin, tmp_path / 'parts', *flags)
    assert len(iterations(tmp_path / 'parts')) == 3
    run_ppo(script, coin, tmp_path / 'parts', *flags, '--init_from=resume')
    for file in ('best/model.safetensors', 'last/model.safetensors', 'samples.jsonl'):
        assert (tmp_path / 'whole' / file).read_bytes() == (tmp_path / 'parts' / file).read_bytes(), file


def test_bad_input_is_one_line(script, coin, bpe, tmp_path):
    def refused(*flags, match, script=script):
        done = run_ppo(script, coin, tmp_path / 'run', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr

    other = Transformer(tiny_config(bpe.vocab_size)).add_value_head()
    other.save_pretrained(str(tmp_path / 'other'), bpe)
    refused('--reward=prm', match='needs a reward_model')
    refused(f'--reward_model={tmp_path}/other', match='no use for reward_model')
    refused('--reward=orm', f'--reward_model={tmp_path}/other', match='different tokenizers')
    refused('--reward=orm', f'--reward_model={coin}/policy', match='no reward model')
    refused(f'--ref={tmp_path}/other', match='different tokenizers')
    refused('--reward=nice', match="not 'nice'")
    refused('--minibatch=48', match='multiple')
    refused('--refine=clip', match="for reward = 'prm'")
    refused('--temperature=0', match='temperature')
    refused('--advantage=group', '--n_per_question=1', match='at least 2')
    refused('--max_new_tokens=126', match='leaves room for 2 tokens')
    refused('--epochs=0', match='epochs')
    refused('--epochs=0', match='epochs', script=run_process)  # so that the hook of exceptions and the exit code are a process's own
    refused('--backtrack=2', match='backtrack')
    refused('--importance_cap=0.5', match='importance_cap 0 (off) or at least 1')
    assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint_kept(script, coin, tmp_path):
    done = run_ppo(script, coin, tmp_path / 'run', '--lr=1e36', '--warmup=0', '--grad_clip=0', code=2)
    assert 'stopped' in done.stderr and done.stderr.strip().count('\n') == 0
    assert all(p.isfinite().all() for p in Transformer.from_pretrained(str(tmp_path / 'run' / 'best')).parameters())
    assert 'bad_batch.json' in done.stderr and json.loads((tmp_path / 'run' / 'bad_batch.json').read_text())['ids']


def test_nothing_is_compiled_twice(script, coin, tmp_path, monkeypatch):
    """Iterations of samples, passes without gradients and updates, whose shapes vary. By dynamo alone, without the C++ it would make."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run_ppo(script, coin, tmp_path / 'run', '--compile=on')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0 and len(iterations(tmp_path / 'run')) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('flags', [[], ['--critic=separate', '--critic_lr=3e-3'], ['--compile=off', '--dtype=float32']], ids=str)
def test_the_coin_is_loaded_on_a_gpu(script, coin, tmp_path, flags):
    """In bf16 too, where the start-up checks compare the sampler's bf16 copy with the trainer's autocast."""
    run_ppo(script, coin, tmp_path / 'run', '--device=cuda', *flags)
    assert log_odds(tmp_path / 'run' / 'last') > log_odds(coin / 'policy') + 0.5
