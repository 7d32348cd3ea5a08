"""
Proximal Policy Optimisation (Schulman et al. 2017, arXiv 1707.06347) as in Havrilla et al. 2024, section 3. A
solution is an episode: the state is the question and the tokens so far, the action the next token. Each
iteration draws solutions. Rewards fall on their tokens, less a penalty for drift from the initial policy. A
value head guesses the reward still to come; the advantage is how much better it went. Over a few epochs
tokens with a positive advantage become likelier, the others less likely, until the ratio of new to old
probability reaches a clip. Unlike Expert Iteration, PPO also learns from mistakes.

With lora_rank only adapters learn, and the reference is the policy without them. Not in the paper: advantage
= 'group' needs no value head, but compares a return with the mean of the question's other samples (RLOO,
GRPO).

$ python ppo.py config/demo_ppo.py                     # CPU, after config/demo_sft.py
$ python ppo.py config/demo_ppo.py --init_from=resume  # goes on after the last state of a stopped run
$ python ppo.py config/gsm8k_smollm2_ppo_sparse.py     # one GPU
$ torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_sparse.py    # eight

Processes share the drawing of samples and the passes through models; all hold all samples and tables.
"""
import json
import math
import os
import random
import time
from collections import Counter
from typing import Callable, NamedTuple

import numpy as np
import torch

from config import UserError, override
from config.run import (Checkpoints, asked_to_stop, bar, enough_memory, from_all, from_main, leave, origin,
                        rank, read_rows, setup, start_run, sum_over_processes, write_rows)
from data import first_rows, load_problems, random_prefix, validation_rows, without_equation
from eval import (check_context, diagnose, draw_solutions, encode_prompts, greedy_accuracy, load_reward_model,
                  print_diagnosis, sampler_gap, score as prefix_scores, unique_equations)
from model import Transformer, autocast, backward, finish_gradients, learning_rate, make_optimizer
from rewards import dense_rewards, orm_rewards, prm_rewards, score_quantile, sparse_rewards
from sample import (Sampler, check_room, check_same_tokenizer, disk_needed, load_tokenizer, memory_needed,
                    my_micro_batches, response_logprobs, response_tables)
from sft import compiles, load_learner

# -----------------------------------------------------------------------------
# The paper's values are given as recalled.
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # first rows of train to practise on; 0: all
# policy
init_from = 'out/sft'     # the policy to improve, or 'resume'
prompt_form = 'auto'      # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
system = ''               # first message of chat prompts; '': the checkpoint's, or the template's own
few_shot = 0              # worked examples before a question; for a base model, 2
ref = ''                  # the KL penalty's reference; '': init_from
# rollouts
n_iterations = 250        # 250 * 16 updates = 4,000, the paper's (at least 1)
n_rollouts = 1024         # an iteration; paper: 1,024 (at least 1)
n_per_question = 4        # paper: 4 (at least 1)
temperature = 0.7         # of sampler, policy and reference; paper: 0.7 (above 0)
max_new_tokens = 256      # budget of a solution (at least 1)
max_rows = 256            # samples decoded at a time (at least 1)
# reward
reward = 'sparse'         # 'sparse' | 'dense' | 'orm' | 'orm_dense' | 'prm'; beside the sparse one
reward_model = ''         # the trained ORM or PRM: python rewards.py config/demo_orm.py
alpha = 1.0               # its weight (at least 0)
reward_right = 1.0        # of the right answer; 0: learn from the reward model only
reward_wrong = 0.0        # of a wrong one, or none
reward_truncated = 0.0    # of a solution that the budget cut
refine = 'none'           # 'none' | 'clip' | 'delta' | 'clip_delta'; of 'prm', 'orm_dense' (Gao et al. 2024)
eta = 0.5                 # Clip's threshold on the scores
eta_quantile = 0.0        # above 0: eta is this quantile of the first policy's step scores (0 to 1)
kl_coef = 0.05            # paper: 0.05
kl_target = 0.0           # above 0: kl_coef adapts towards so many nats a solution
kl_horizon = 10000        # rollouts over which it adapts (at least 1)
# advantages
advantage = 'gae'         # 'gae' | 'group'
gamma = 1.0
lam = 0.95
critic = 'shared'         # 'shared' | 'separate'; a head on the policy, or a transformer of its own
critic_from = ''          # a separate critic's weights, e.g. an ORM; '': the policy's
value_warmup = 0          # first iterations, in which only the critic learns
# exploration aids
backtrack = 0.0           # share of questions that start within the reference solution ... (0 to 1)
backtrack_until = 0.5     # ... falling to 0 over this share of the run
replay = 0.0              # share of questions drawn again by |advantage| and age (at least 0, below 1)
replay_beta = 0.3         # rank r is drawn in proportion to r ** (-1 / beta) (above 0)
replay_staleness = 0.1    # weight of age against rank (0 to 1)
# update
epochs = 4                # passes over the rollouts; paper: 4 (at least 1)
minibatch = 256           # rollouts an update; paper: 256 (at least 1)
micro_tokens = 16384      # a micro-batch, padding included: what memory allows (at least 1)
grad_checkpointing = False  # a third more time, activations of one block only
shard = 'auto'            # 'auto' | 'none' | 'ddp' | 'fsdp'; each process holds all weights (ddp) or a part
lora_rank = 0             # above 0: only adapters of that rank learn; paper: 128
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
clip = 0.2                # of the probability ratio
value_clip = 0.2          # of the value's change; 0: none
value_coef = 0.1          # weight of the value loss
entropy_coef = 0.0        # bonus on the policy's entropy (at least 0)
target_kl = 0.0           # above 0: an update ends so many nats a token from the old policy
importance_cap = 0.0      # e.g. 2: tokens weigh min(p / p_sampled, cap), for an imprecise sampler; 0: off
lr = 1e-6                 # (above 0)
min_lr = 1e-7
critic_lr = 1e-5          # of the value head, and of all of a separate critic
warmup = 0.03             # share of the updates in which the rate rises
weight_decay = 0.0
grad_clip = 1.0           # on the global norm; 0: none
# evaluation
eval_interval = 10        # iterations between validations (at least 1)
save_interval = 10        # iterations between states to resume from (at least 1)
eval_problems = 256       # of the validation slice, for maj@1 (at least 1)
show = 2                  # samples printed an iteration
# run
keep_states = 1           # states left by a finished run, to go on from (at least 0)
out_dir = 'out/ppo'
overwrite = False         # replace the run in out_dir
seed = 0
tracker = 'none'          # 'none' | 'tensorboard' | 'trackio' | 'wandb'; where the log also goes
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16'; of products; weights are fp32
compile = 'auto'          # 'auto' | 'on' | 'off'; 'auto': on CUDA
# -----------------------------------------------------------------------------
# formulas. Tensors are (B, T) over solutions of distinct lengths; mask is True at real tokens.

def masked_mean(x, mask):
    """0 where there is no real token."""
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)

def masked_variance(x, mask):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

def whiten(x, mask, shift_mean=True):
    """x (..., T) with variance 1 over real tokens, mean 0 if shift_mean; 0 elsewhere, or if all are equal."""
    mask = mask.bool()
    x = x.masked_fill(~mask, 0)
    variance = masked_variance(x, mask)
    if variance.sqrt() <= 1e-6 * x.abs().max().clamp(min=1):  # rounding, which Adam would amplify
        return torch.zeros_like(x)
    shifted = x - masked_mean(x, mask) if shift_mean else x
    return (shifted * (variance + 1e-8).rsqrt()).masked_fill(~mask, 0)

def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) -> (advantages, returns):

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    (..., T) each. The value after the last real token is 0. Elsewhere nothing is read, and 0 comes out."""
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        real = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[..., t], next_value)
        advantages[..., t] = next_advantage.masked_fill(~real, 0)
    return advantages, advantages + values

def group_advantages(rewards, mask, n):
    """Leave-one-out (RLOO, Ahmadian et al. 2024, arXiv 2402.14740): at each token the row's return minus the
    mean of its question's n - 1 other rows, its neighbours; 0 where all n are equal but for rounding."""
    total = rewards.masked_fill(~mask, 0).double().sum(-1).view(-1, n)
    others = (total.sum(-1, keepdim=True) - total) / (n - 1)
    spread, size = total.amax(-1, True) - total.amin(-1, True), total.abs().amax(-1, True)
    row = (total - others).masked_fill(spread <= 1e-6 * size.clamp(min=1), 0).to(rewards.dtype)
    return row.view(-1, 1).expand(mask.shape).masked_fill(~mask, 0)

class Advantage(NamedTuple):
    estimate: Callable  # (token rewards, old values, mask) -> (advantages, returns)
    needs_critic: bool
    centred: bool       # by whitening; to centre again would bias groups whose samples tie

ADVANTAGES = {
    'gae': Advantage(lambda rewards, values, mask: gae(rewards, values, mask, gamma, lam), True, True),
    'group': Advantage(lambda rewards, values, mask: (
        group_advantages(rewards, mask, n_per_question), values), False, False)}

def importance_weights(logprobs, sampled, cap):
    """min(p / p_sampled, cap), of trainer and sampler (Espeholt et al. 2018, arXiv 1802.01561)."""
    return (logprobs - sampled).exp().clamp(max=cap)

def reduce(loss, mask, n_tokens):
    """The sum over real tokens (mask; None: all), divided by n_tokens (None: their number)."""
    mask = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.bool()
    return loss.masked_fill(~mask, 0).sum() / (n_tokens or mask.sum().clamp(min=1))

def ppo_loss(logprobs, old_logprobs, advantages, mask=None, clip=0.2, n_tokens=None):
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), reduced (Schulman et al. 2017, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return reduce(loss, mask, n_tokens)

def value_loss(values, old_values, returns, mask=None, clip=0.2, n_tokens=None):
    """1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip of the old V (0: unclipped), reduced."""
    loss = (values - returns) ** 2
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * reduce(loss, mask, n_tokens)

def k3(logprobs, ref_logprobs):
    """KL(policy || ref) at tokens of the policy: r - 1 - log r with r = ref / policy (Schulman 2020)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio

def adapted(kl_coef, kl, target, n, horizon):
    """The KL coefficient after n rollouts whose KL was kl (Ziegler et al. 2019, arXiv 1909.08593)."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)

def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 if perfect, 0 for a constant; nan where nothing varies."""
    whole = masked_variance(returns, mask).item() or math.nan
    return 1 - masked_variance(returns - values, mask).item() / whole

def next_questions(n_all, start, count, seed):
    """Numbers start .. start + count of an endless sequence of permutations of range(n_all)."""
    order = {epoch: random.Random(f'{seed}:{epoch}').sample(range(n_all), n_all)
             for epoch in range(start // n_all, (start + count - 1) // n_all + 1)}
    return [order[i // n_all][i % n_all] for i in range(start, start + count)]

def replay_probabilities(priority, last_seen, iteration, beta, staleness):
    """(1 - staleness) P_rank + staleness P_stale over questions seen (Jiang et al. 2021, arXiv 2010.03934).
    priority, last_seen: (n,) arrays, the mean |advantage| and the iteration of the last visit (-1: never)."""
    seen, place = last_seen >= 0, np.empty(len(priority))
    place[np.argsort(-np.where(seen, priority, -np.inf), kind='stable')] = np.arange(1, len(priority) + 1)
    by_rank = np.where(seen, place ** (-1 / beta), 0)
    age = np.where(seen, iteration - last_seen, 0)
    return (1 - staleness) * by_rank / by_rank.sum() + staleness * age / max(1, age.sum())


# -----------------------------------------------------------------------------
# the stages of an iteration, which read the settings above

def pick_prompts(problems, state, iteration, shown, tok, room, rng):
    """The next questions, some replaced by old ones, some with a prefix of the reference solution where there
    is room -> (indices of problems, prompts as ids, prefixes, mostly '')."""
    priority, last_seen = np.array(state['priority']), np.array(state['last_seen'])
    n_picked = n_rollouts // n_per_question
    n_again = min(round(replay * n_picked), int((last_seen >= 0).sum()))
    picked, starts = next_questions(len(problems), state['position'], n_picked - n_again, seed), []
    state['position'] += n_picked - n_again
    if n_again:
        p = replay_probabilities(priority, last_seen, iteration, replay_beta, replay_staleness)
        generator = np.random.default_rng(rng.getrandbits(64))
        picked += generator.choice(len(problems), n_again, replace=False, p=p).tolist()
    share = backtrack * max(0.0, 1 - (iteration - 1) / max(1.0, backtrack_until * n_iterations))
    for q in picked:
        prefix = random_prefix(problems[q], rng) if rng.random() < share else ''
        ids, given = tok.encode_question(problems[q].question, shown, prefix)
        fits = prefix and len(ids + given) <= room
        starts.append((q, ids + given, prefix) if fits else (q, ids, ''))
    return zip(*starts)

def score(solutions, scorer, eta):
    """The task's rewards, {name: (B, T), weighted}: summed, and logged one by one."""
    parts = {'outcome': sparse_rewards(solutions, reward_right, reward_wrong, reward_truncated)}
    if reward == 'dense':
        parts['dense'] = alpha * dense_rewards(solutions)
    if scorer:
        scores = prefix_scores(scorer, [s.example for s in solutions], micro_tokens, dtype)
        parts[reward] = alpha * (orm_rewards(solutions, scores) if reward == 'orm'
                                 else prm_rewards(solutions, scores, refine, eta))
    return {name: part.to(device) for name, part in parts.items()}

def evaluate(solutions, policy, value_model, reference):
    """What the models say of the sampled tokens, (B, T) by name; with examples and lengths."""
    examples = [s.example for s in solutions]
    given = examples, temperature, dtype, micro_tokens
    logprobs, values, entropy = response_tables(policy, *given, critic=value_model, with_entropy=True)
    with policy.without_adapter():  # a reference that is the policy itself
        ref_logprobs = response_tables(reference, *given)[0]
    lengths = torch.tensor([len(s.ids) for s in solutions], device=device)
    mask = torch.arange(logprobs.shape[1], device=device) < lengths[:, None]  # from lengths, never from ids
    sampled = torch.zeros_like(logprobs)
    sampled[mask] = torch.tensor([x for s in solutions for x in s.logprobs], device=device)
    return {'examples': examples, 'lengths': lengths, 'mask': mask, 'logprobs': logprobs, 'values': values,
            'entropy': entropy, 'ref_logprobs': ref_logprobs, 'sampled': sampled}

def check_agreement(solutions, batch, iteration):
    """sampler_gap: only rounding, or ratios mean nothing."""
    gap, _, tolerance = found = sampler_gap(solutions, batch['logprobs'], dtype)
    if iteration == 1:  # the reference is the policy, too
        drift = masked_mean((batch['logprobs'] - batch['ref_logprobs']).abs(), batch['mask'])
        assert importance_cap or gap < tolerance, 'the log-probs of sampler and trainer differ'
        assert ref or drift < tolerance, 'the reference is not the initial policy'
    return found

def add_gradients(policy, value_model, batch, rows, n_tokens, trunk, iteration):
    """Backward through a minibatch, in micro-batches -> ({its losses over n_tokens, the policy's change},
    [largest |ratio - 1|, largest ratio])."""
    n_learned, sums, largest = int(batch['lengths'][rows].sum()), Counter(), [0.0, 0.0]
    for micro, weight in my_micro_batches(rows, micro_tokens, lambda i: len(batch['examples'][i].ids)):
        mask = batch['mask'][micro]
        old, advantages, old_values, returns = (
            batch[name][micro][mask] for name in ('logprobs', 'advantages', 'values', 'returns'))  # (N,) each
        with enough_memory(f'iteration {iteration}, a micro-batch of {len(micro)} rows',
                           f'lower {micro_tokens = }, or set grad_checkpointing'):
            with autocast(device, dtype):
                logprobs, values, entropy = policy.run(
                    response_logprobs, [batch['examples'][i] for i in micro], temperature, critic=value_model,
                    with_entropy=entropy_coef > 0, trunk=trunk)
            # {name: (coefficient, loss)}: summed for the gradient, logged one by one. (A term without the
            # advantage needs all rows: see `needed` in update.)
            losses = {'policy_loss': (1, ppo_loss(logprobs, old, advantages, None, clip, n_tokens))}
            if value_model:
                loss = value_loss(values, old_values, returns, None, value_clip, n_tokens)
                losses['value_loss'] = value_coef, loss
            if entropy_coef:
                losses['entropy_loss'] = entropy_coef, -entropy.sum() / n_tokens
            backward(weight * sum(coef * loss for coef, loss in losses.values()), policy)
        logprobs = logprobs.detach()
        ratio = (logprobs - old).exp()
        moved = {'approx_kl': k3(old, logprobs), 'clip_share': (ratio - 1).abs() > clip, 'mean_ratio': ratio}
        largest = list(map(max, largest, ((ratio - 1).abs().max().item(), ratio.max().item())))
        sums.update({name: weight * loss.item() for name, (_, loss) in losses.items()})
        sums.update({name: weight * x.sum().item() / n_learned for name, x in moved.items()})
    total = sum_over_processes(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
    return dict(zip(sums, total)), torch.tensor(from_all(largest)).amax(0).tolist()

def update(policy, value_model, optimizer, batch, iteration, rng, trunk, checkpoints):
    """A few epochs of minibatches, each divided by its tokens before it is split -> mean metrics."""
    n_minibatches, started, groups = n_rollouts // minibatch, time.time(), optimizer.param_groups
    needed = value_model or entropy_coef > 0  # otherwise rows without advantage add nothing
    learns = [True] * n_rollouts if needed else batch['advantages'].any(-1).tolist()
    first_step, n_steps = (i * epochs * n_minibatches for i in (iteration - 1, n_iterations))
    totals, largest_ratio, n_done, n_trained = Counter(), 1.0, 0, 0
    for number in bar(range(epochs * n_minibatches), desc=f'iteration {iteration}: update'):
        start = number % n_minibatches * minibatch
        if start == 0:
            order = rng.sample(range(n_rollouts), n_rollouts)
        rows = order[start:start + minibatch]
        n_tokens, rows = int(batch['lengths'][rows].sum()), [i for i in rows if learns[i]]
        if not rows:
            continue
        n_trained += int(batch['lengths'][rows].sum())
        found, (off, ratio) = add_gradients(policy, value_model, batch, rows, n_tokens, trunk, iteration)
        if value_model and iteration <= value_warmup:  # only the critic learns
            for p in [p for group in groups if group['of'] == 'policy' for p in group['params']]:
                p.grad = None
        weights = [p for group in groups for p in group['params']]
        found['grad_norm'] = finish_gradients(weights, policy.shard, grad_clip)
        if not all(map(math.isfinite, found.values())):
            said = ', '.join(f'{name} {x:.4g}' for name, x in found.items())
            kept = checkpoints.keep_batch(iteration, [batch['examples'][i] for i in rows])
            raise UserError(f'iteration {iteration}: {said}; stopped (try a lower lr). {kept}')
        if n_done == 0:  # nothing has moved since the old log-probs
            exact = device.type == 'cpu' and dtype == torch.float32
            mean_off = abs(found['mean_ratio'] - 1)
            assert mean_off < 0.05 and (off < 1e-3 or not exact), f'first ratios off by {off}'
        if 0 < target_kl < found['approx_kl']:
            optimizer.zero_grad(set_to_none=True)
            break
        for group in groups:
            peak = lr if group['of'] == 'policy' else critic_lr
            group['lr'] = learning_rate(first_step + number, n_steps, peak, min_lr * peak / lr, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        totals.update(found)
        largest_ratio, n_done = max(largest_ratio, ratio), n_done + 1
    idle = dict.fromkeys(('policy_loss', 'value_loss', 'approx_kl', 'clip_share', 'grad_norm'), 0.0)
    return {**idle, 'mean_ratio': 1.0, **{name: total / n_done for name, total in totals.items()},
            'largest_ratio': largest_ratio, 'updates': n_done, 'learning_rows': sum(learns) / n_rollouts,
            'lr': groups[0]['lr'], 'update_tokens_per_second': n_trained / (time.time() - started)}

def measure(solutions, batch, rewards, kl_coef):
    """The metrics of an iteration's rollouts. A new metric is a new key."""
    mask, log_ratio = batch['mask'], batch['logprobs'] - batch['ref_logprobs']  # both 0 after a row's end
    groups = [solutions[i:i + n_per_question] for i in range(0, n_rollouts, n_per_question)]
    right = torch.tensor([s.correct for s in solutions]).view(-1, n_per_question)
    metrics = {
        'share_correct': right.float().mean(),
        'share_truncated': sum(not s.finished for s in solutions) / n_rollouts,
        # rewards by name, a solution
        **{f'reward_{name}': part.sum(-1).mean() for name, part in rewards.items()},
        'mean_return': sum(rewards.values()).sum(-1).mean(),
        # questions without contrast, from which a group learns nothing
        'all_right': right.all(-1).float().mean(), 'all_wrong': (~right).all(-1).float().mean(),
        # how far from the reference: a token, and a solution (the unit of kl_target)
        'kl_coef': kl_coef, 'kl': masked_mean(log_ratio, mask), 'kl_solution': log_ratio.sum(-1).mean(),
        'kl_k3': masked_mean(k3(batch['logprobs'], batch['ref_logprobs']), mask),
        'entropy': masked_mean(batch['entropy'], mask),
        # the solutions
        'response_tokens': batch['lengths'].float().mean(),
        'response_steps': sum(len(s.lines) for s in solutions) / n_rollouts,
        'unique_equations': sum(unique_equations(s.text for s in group) for group in groups) / len(groups),
        'backtracked': sum(s.prefix != '' for s in solutions) / n_rollouts}
    if ADVANTAGES[advantage].needs_critic:
        metrics['explained_variance'] = explained_variance(batch['values'], batch['returns'], mask)
        metrics['mean_value'] = batch['values'][:, 0].mean()  # where all of the return is still to come
    return metrics

def show_samples(path, iteration, solutions, task_reward, kl):
    """Appends the solutions with their steps' rewards to samples.jsonl, and prints the first ones."""
    with open(path if rank() == 0 else os.devnull, 'a', encoding='utf-8') as f:
        for i, (s, earned, kl_row) in enumerate(zip(solutions, task_reward.cpu(), kl.tolist())):
            question, answer, starts = s.problem.question, s.problem.answer, [0] + [end + 1 for end in s.ends]
            steps = [[line, round(earned[start:end + 1].sum().item(), 4)]
                     for start, (end, line) in zip(starts, s.lines)]
            row = {'iteration': iteration, 'question': question, 'answer': answer, 'prefix': s.prefix,
                   'text': s.text, 'correct': s.correct, 'finished': s.finished, 'steps': steps, 'kl': kl_row}
            f.write(json.dumps(row) + '\n')
            if i < show:
                print(f'  Q: {question} (answer {answer})')
                print(''.join(f'      given  {line}\n' for line in s.prefix.splitlines()), end='')
                print('\n'.join(f'    {value:+7.3f}  {line}' for line, value in steps))


# -----------------------------------------------------------------------------
# set-up

def check_settings():
    """UserError for settings that don't go together."""
    learned = reward in ('orm', 'orm_dense', 'prm')
    wrong = {
        'importance_cap is 0 (off) or at least 1': 0 != importance_cap < 1,
        f'{n_rollouts = } must be a multiple of {minibatch = } and {n_per_question = }':
            n_rollouts % minibatch or n_rollouts % n_per_question,
        "few_shot goes with reward = 'sparse' or 'dense': reward models see none": few_shot and learned,
        "advantage = 'group': n_per_question must be at least 2": advantage == 'group' and n_per_question < 2,
        f'{reward = } needs a reward_model': learned and not reward_model,
        f'{reward = } has no use for reward_model': reward_model and not learned,
        "refine and eta_quantile are for reward = 'prm' or 'orm_dense'":
            reward not in ('prm', 'orm_dense') and (refine != 'none' or eta_quantile),
        f'{reward_truncated = } above {reward_wrong = }: running to the budget would pay':
            reward_truncated > reward_wrong}
    for message in filter(wrong.get, wrong):
        raise UserError(message)

def load_models(policy_from, settings, tok):
    """(policy, critic, reference, scorer), None where not needed. A shared critic is the policy, with a head;
    with lora_rank the reference is the policy, used without its adapter."""
    needs_critic, scorer, value_model = ADVANTAGES[advantage].needs_critic, None, None
    shared = needs_critic and critic == 'shared'
    policy = reference = load_learner(policy_from, settings, device, dtype, value_head=shared)
    for path in filter(None, (ref, critic_from)):
        check_same_tokenizer(load_tokenizer(path, conditioned=False), tok, f'{path} and {policy_from}')
    if ref or not lora_rank:
        reference = Transformer.from_pretrained(ref or policy_from, device, dtype, shard=policy.shard,
                                                product_dtype=dtype, merge=not ref).requires_grad_(False)
        check_context(reference.config, policy.config, f'ref = {ref}')
    if reward_model:
        kinds = ('prm' if reward == 'prm' else 'orm',)
        scorer = load_reward_model(reward_model, policy.config, tok, device, dtype, policy.shard, kinds)
    if needs_critic:
        value_model = policy if shared else load_learner(
            critic_from or policy_from, settings, device, dtype, value_head=True, shard=policy.shard)
        check_context(value_model.config, policy.config, f'critic_from = {critic_from}')
        value_model.head_kind = 'value'
        for p in value_model.value_head.parameters():  # it may have been trained for something else
            p.detach().zero_()
    return policy, value_model, reference, scorer

def make_optimizers(policy, value_model):
    """One AdamW, whose groups say whose they are: a critic, or head on the policy's trunk, has its own lr."""
    body = torch.nn.ModuleList(m for name, m in policy.named_children() if name != 'value_head')
    optimizer = make_optimizer(body, lr, weight_decay)
    for group in optimizer.param_groups:
        group['of'] = 'policy'
    if value_model:
        learner = policy.value_head if value_model is policy else value_model
        for group in make_optimizer(learner, critic_lr, weight_decay).param_groups:
            optimizer.add_param_group(group | {'of': 'critic'})
    return optimizer

def load_state(state, models, optimizer, checkpoints):
    """Fills them from the newest whole state, but for kl_coef and eta where the setting was changed."""
    saved = checkpoints.load(models, optimizer) or state
    n_before, n_now = len(saved['priority']), len(state['priority'])
    if n_before != n_now:
        raise UserError(f'{out_dir} practised on {n_before} questions, not {n_now}: n_questions must stay')
    changed = [key for key, given in state['given'].items() if saved['given'].get(key) != given]
    state |= {key: value for key, value in saved.items() if key not in changed + ['given']}


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume, policy_from = origin(init_from, out_dir)

    # everything that can be wrong with the input, before anything is written
    check_settings()
    problems = first_rows(load_problems(task, 'train'), n_questions, 'n_questions')
    shown, val_problems = validation_rows(task, few_shot, eval_problems)
    tok = load_tokenizer(policy_from, conditioned=False).in_form(prompt_form, system)
    policy, value_model, reference, scorer = load_models(policy_from, settings, tok)
    models = {'policy': policy, 'critic': value_model, 'reference': reference, 'scorer': scorer}
    models = {name: m for name, m in models.items() if name == 'policy' or m not in (None, policy)}
    room, n_all = policy.config.block_size - max_new_tokens, len(problems)
    prompts = encode_prompts(problems, tok, shown)
    check_room(prompts, max_new_tokens, policy.config.block_size)
    check_room(encode_prompts(val_problems, tok, shown), max_new_tokens, policy.config.block_size)
    problems, prompts = zip(*[(p, ids) for p, ids in zip(problems, prompts) if len(ids) <= room])
    if len(problems) < n_all:
        print(f'left out: {n_all - len(problems)} of {n_all} questions, longer than {room} tokens')
    if reward == 'dense':
        print(f'{without_equation(problems):,} of {len(problems):,} references have no equation')
    optimizer, checkpoints = make_optimizers(policy, value_model), Checkpoints(out_dir)
    state = {'iteration': 0, 'position': 0, 'updates': 0, 'best': None, 'kl_coef': kl_coef,
             'eta': None if eta_quantile else eta,
             'given': {'kl_coef': kl_coef, 'eta': ['quantile', eta_quantile] if eta_quantile else eta},
             'priority': [0.0] * len(problems), 'last_seen': [-1] * len(problems)}
    if resume:
        load_state(state, models, optimizer, checkpoints)
    log, samples_file = start_run(settings, resume), f'{out_dir}/samples.jsonl'
    from_main(lambda: write_rows(samples_file, [  # later ones are drawn again
        row for row in read_rows(samples_file) if row['iteration'] <= state['iteration']]))
    n_picked, n_minibatches = n_rollouts // n_per_question, n_rollouts // minibatch
    n_samples, n_updates = n_iterations * n_rollouts, n_iterations * epochs * n_minibatches
    print(f'{n_iterations} iterations * {n_picked} questions * {n_per_question} = {n_samples:,} samples; '
          f'{n_iterations} * {epochs} epochs * {n_minibatches} minibatches = {n_updates:,} updates')
    longest = max(map(len, prompts))
    rows = longest + max_new_tokens, max_rows, longest, max_new_tokens
    print(memory_needed([*models.values()], dtype, micro_tokens, *rows))
    print(disk_needed(policy.config, 2, keep_states, lora_rank, 1 + ('critic' in models)))
    compiled = compiles(compile, device) and policy.shard != 'fsdp'
    trunk = torch.compile(policy.trunk, dynamic=True) if compiled else None

    def sampler():  # of the policy as it is now
        return Sampler(policy.for_sampling(dtype), tok, max_rows, dtype)

    def validate():
        """maj@1; keeps the best policy so far. Ties go to the later policy."""
        maj1, error = greedy_accuracy(sampler(), val_problems, max_new_tokens, shown)
        log(state['updates'], iteration=state['iteration'], samples_drawn=state['iteration'] * n_rollouts,
            val_maj1=maj1, val_maj1_error=error)
        if state['best'] is None or maj1 >= state['best']:
            state['best'] = maj1
            policy.save_pretrained(f'{out_dir}/best', tok)

    if state['eta'] is None:  # of the initial policy, on questions that it will not learn from
        drawn = draw_solutions(sampler(), val_problems, n_per_question, max_new_tokens, temperature,
                               seed=seed)
        scores = prefix_scores(scorer, [s.example for s in drawn], micro_tokens, dtype)
        state['eta'] = score_quantile(drawn, scores, eta_quantile)
        print(f'eta = {state["eta"]:.4f}, the {eta_quantile} quantile of step scores')
    if not state['iteration']:
        validate()

    for iteration in range(state['iteration'] + 1, n_iterations + 1):
        started, rng = time.time(), random.Random(f'{seed}:iteration {iteration}')
        # 1. questions, and where their solutions start
        picked, prompts, prefixes = pick_prompts(problems, state, iteration, shown, tok, room, rng)
        # 2. rollouts, judged; by temperature only (no top-k, no top-p)
        solutions = draw_solutions(
            sampler(), [problems[q] for q in picked], n_per_question, max_new_tokens, temperature, shown,
            prompts, prefixes, seed=seed * 1_000_000 + iteration, desc=f'iteration {iteration}: rollouts')
        rollout_seconds = time.time() - started
        # 3. rewards on tokens, by name
        rewards = score(solutions, scorer, state['eta'])
        task_reward = sum(rewards.values())  # (B, T)
        # 4. the policy that sampled, its critic and the reference on the same tokens
        batch = evaluate(solutions, policy, value_model, reference)
        gap, mask = check_agreement(solutions, batch, iteration), batch['mask']
        # 5. a KL penalty on every token, whose mean over samples is -beta KL
        log_ratio = batch['logprobs'] - batch['ref_logprobs']
        rewards['kl'] = -state['kl_coef'] * log_ratio
        # 6. advantages, fixed from here on through all epochs
        kind = ADVANTAGES[advantage]
        advantages, batch['returns'] = kind.estimate(sum(rewards.values()), batch['values'], mask)
        size = (advantages.abs().sum(-1) / batch['lengths']).view(-1, n_per_question).mean(-1)
        for q, a in zip(picked, size.tolist()):
            state['priority'][q], state['last_seen'][q] = a, iteration
        batch['advantages'] = whiten(advantages, mask, kind.centred)
        if importance_cap:
            batch['advantages'] *= importance_weights(batch['logprobs'], batch['sampled'], importance_cap)
        # 7. a few epochs of minibatches
        updated = update(policy, value_model, optimizer, batch, iteration, rng, trunk, checkpoints)
        state['iteration'], state['updates'] = iteration, state['updates'] + updated['updates']
        # 8. what happened
        metrics = measure(solutions, batch, rewards, state['kl_coef'])
        log(state['updates'], iteration=iteration, samples_drawn=iteration * n_rollouts, **metrics, **updated,
            advantage_std=masked_variance(advantages, mask).sqrt(), sampler_gap=gap[0],
            rollout_tokens_per_second=batch['lengths'].sum() / rollout_seconds)
        of = f'train questions, best maj@1 {state["best"]:.1%} on the validation slice'
        print_diagnosis(diagnose(solutions, n_per_question, max_new_tokens, of, gap=gap), iteration == 1)
        show_samples(samples_file, iteration, solutions, task_reward, log_ratio.sum(-1))
        if kl_target:
            kl = metrics['kl_solution'].item()
            state['kl_coef'] = adapted(state['kl_coef'], kl, kl_target, n_rollouts, kl_horizon)
        # 9. how good is it?
        last = iteration == n_iterations
        if iteration % eval_interval == 0 or last:
            validate()
        stops = asked_to_stop() and not last
        if stops or iteration % save_interval == 0 or last:
            checkpoints.save(iteration, models, optimizer, state)
        if stops:
            leave(f' after iteration {iteration} of {n_iterations}')
    policy.save_pretrained(f'{out_dir}/last', tok)
    checkpoints.keep(keep_states)
    print(f'best policy by validation maj@1 ({state["best"]:.3f}): {out_dir}/best')
