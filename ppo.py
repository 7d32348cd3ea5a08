"""
Proximal Policy Optimisation (Schulman et al. 2017, arXiv 1707.06347) as Havrilla et al. 2024 use it, section 3. An episode is
one solution: the question and the tokens so far are the state, the next token is the action. In each iteration the policy
draws some solutions of some questions; rewards are put on their tokens, less a penalty for drifting away from the initial
policy; a value head has guessed the reward still to come at every token, and a token's advantage is how much better than
guessed it went on from there; then, over a few epochs, tokens with a positive advantage are made likelier and the others less
likely, until the ratio of new to old probability reaches a clip. Where Expert Iteration copies what went right, PPO also learns
from what went wrong, token by token, and always from its own latest samples.

lora_rank = 128 is what the paper used (as recalled): adapters learn, and the reference is the same weights without them. By default
all weights learn. What differs from the paper: advantage = 'group' does
without the value head: what was to be expected is the mean of the question's other samples, as in RLOO and GRPO.

$ python ppo.py config/demo_ppo.py                     # CPU, after config/demo_sft.py
$ python ppo.py config/demo_ppo.py --init_from=resume  # goes on after the last validation of a stopped run
$ python ppo.py config/gsm8k_smollm2_ppo_sparse.py     # one GPU
$ torchrun --nproc_per_node=8 ppo.py config/gsm8k_llama2_7b_ppo_sparse.py    # eight

Under torchrun each process draws the samples of its share of the questions; then all of them hold all samples, rewards, log-probs
and advantages, which are small, and share the passes through models. So nothing below from 3 to 6 knows how many there are.
"""
import json
import math
import os
import random
import time

import numpy as np
import torch

import eval as evaluation
import rewards
from config import Log, UserError, bar, leave, listen_for_stop, override, read_rows, read_run, resuming, start_run, write_rows
from model import (Checkpoints, Transformer, asked_to_stop, autocast, backward, disk_needed, enough_memory, finish_gradients, from_all, from_main,
                   learning_rate, make_optimizer, memory_needed, rank, setup, sum_over_processes)
from sample import (Example, Sampler, action_logprobs, answer, check_room, check_same_tokenizer, collate, load_tokenizer,
                    my_micro_batches, real_cells)

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # rows of train to practise on, the first ones; 0: all
# policy
init_from = 'out/sft'     # the policy to improve, or 'resume'
few_shot = 0              # worked examples before every question, from the validation slice: for a base model without SFT, 2 (paper)
ref = ''                  # the policy that the KL penalty holds on to; '': init_from
# rollouts
n_iterations = 250        # 250 * 16 updates = 4,000 gradient steps, the paper's (as recalled)
n_rollouts = 1024         # an iteration; paper: 1,024 (as recalled)
n_per_question = 4        # paper: 4 (as recalled)
temperature = 0.7         # of sampler, policy, old policy and reference alike; paper: 0.7 (as recalled)
max_new_tokens = 256      # budget of a solution
max_rows = 256            # samples decoded at a time
# reward
reward = 'sparse'         # 'sparse', or beside it 'dense', 'orm', 'orm_dense', 'prm', weighted by alpha
reward_model = ''         # the trained ORM or PRM: python rewards.py config/demo_orm.py
alpha = 1.0               # weight of what stands beside the sparse reward
reward_right = 1.0        # the sparse reward of the right answer; 0: learn from the reward model alone
reward_wrong = 0.0        # of a wrong one, or none
reward_truncated = 0.0    # of a solution that the budget cut short
refine = 'none'           # of 'prm' and 'orm_dense': 'none', 'clip', 'delta' or 'clip_delta' (Gao et al. 2024)
eta = 0.5                 # Clip's threshold on the scores
eta_quantile = 0.0        # above 0: eta is this quantile of the scores of the policy's steps on the validation slice, before it learns
kl_coef = 0.05            # paper: 0.05
kl_target = 0.0           # nats a solution; above 0 the coefficient adapts until the KL is there (Ziegler et al. 2019)
kl_horizon = 10000        # rollouts over which it adapts
# advantages
advantage = 'gae'         # 'gae', or 'group': return minus the mean of the question's other samples, without a critic
gamma = 1.0
lam = 0.95
critic = 'shared'         # 'shared': a scalar head on the policy's trunk; 'separate': a transformer of its own
critic_from = ''          # the weights of a separate critic, e.g. an ORM, which knows what leads where; '': the policy's
value_warmup = 0          # iterations at the start in which the value function alone learns
# exploration aids
backtrack = 0.0           # share of questions that start after a random part of the reference solution ...
backtrack_until = 0.5     # ... falling to 0 over this share of the run
replay = 0.0              # share of questions drawn again by |advantage| and staleness (Jiang et al. 2021, arXiv 2010.03934)
replay_beta = 0.3         # rank r is drawn in proportion to r ** (-1 / beta)
replay_staleness = 0.1    # weight of staleness against rank
# update
epochs = 4                # passes over the rollouts; paper: 4 (as recalled)
minibatch = 256           # rollouts an update; paper: 256 (as recalled)
micro_tokens = 16384      # tokens a micro-batch, padding included: what memory allows; the result does not depend on it
grad_checkpointing = False  # compute activations again in backward: about a third more time, and memory for one block's alone
shard = 'auto'            # over processes: 'ddp' (each has all weights), 'fsdp' (each has a part), or 'auto', by what fits
lora_rank = 0             # above 0: adapters of that rank learn and all else is frozen; paper: 128 (as recalled)
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
clip = 0.2                # of the probability ratio
value_clip = 0.2          # of the value's change; 0: none
value_coef = 0.1          # weight of the value loss
entropy_coef = 0.0        # bonus on the policy's entropy
target_kl = 0.0           # above 0: an iteration's epochs stop where the policy is this far (nats a token) from the old one
importance_cap = 0.0      # above 0, e.g. 2: tokens weigh min(p_old / p_sampled, cap), for a sampler less precise than the trainer; 0: off
lr = 1e-6
min_lr = 1e-7
critic_lr = 1e-5          # of the value head, and of all of a separate critic
warmup = 0.03             # share of the updates over which the rate rises from 0
weight_decay = 0.0
grad_clip = 1.0           # on the global norm; 0: none
# evaluation
eval_interval = 10        # iterations between validations
save_interval = 10        # iterations between states that a stopped run goes on from
eval_problems = 256       # problems of the validation slice for maj@1
show = 2                  # samples printed in an iteration, with their steps' rewards
# run
keep_states = 1           # states that stay when the run has finished, e.g. to go on with more iterations; 0: none
out_dir = 'out/ppo'
overwrite = False         # replace the run that out_dir holds
seed = 0
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'            # of the matrix products: 'auto', 'float32', 'bfloat16'; weights are fp32
compile = 'auto'          # 'on', 'off', or 'auto': on CUDA only
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# the algorithm's formulas. Tensors are (B, T) over responses of different lengths; mask is True at real tokens.

def masked_mean(x, mask):
    """The mean over real tokens; 0 where there is none."""
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """x (..., T) with mean 0 (unless shift_mean is False: then its own) and variance 1 over all real tokens; 0 elsewhere, and 0 where
    x does not vary."""
    mask = mask.bool()
    x = x.masked_fill(~mask, 0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    if variance.sqrt() <= 1e-6 * x.abs().max().clamp(min=1):  # rounding, of which Adam would make a whole step
        return torch.zeros_like(x)
    return ((x - mean if shift_mean else x) * (variance + 1e-8).rsqrt()).masked_fill(~mask, 0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) -> (advantages, returns), (..., T):

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    The value after the last real token is 0. What stands where mask is False is never read, and comes out as 0."""
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
    """Leave-one-out baseline (RLOO, Ahmadian et al. 2024, arXiv 2402.14740): a row's return minus the mean return of the n - 1
    other samples of its question, which stand beside it; the same for all of the row's tokens. Exactly 0 where all n returns are
    equal but for rounding: what is left would be noise, which whitening and Adam make a whole step of. (B, T) -> (B, T)."""
    total = rewards.masked_fill(~mask, 0).double().sum(-1).view(-1, n)
    others = (total.sum(-1, keepdim=True) - total) / (n - 1)
    spread, size = total.amax(-1) - total.amin(-1), total.abs().amax(-1)
    advantage = (total - others).masked_fill((spread <= 1e-6 * size.clamp(min=1))[:, None], 0).to(rewards.dtype)
    return advantage.view(-1, 1).expand(mask.shape).masked_fill(~mask, 0)


def importance_weights(logprobs, sampled, cap):
    """min(p / p_sampled, cap) for tokens that were drawn with log-probs `sampled` and have logprobs in the trainer: what tokens weigh where
    the two differ, truncated so that its variance stays bounded (Espeholt et al. 2018, arXiv 1802.01561, section 4.1)."""
    return (logprobs - sampled).exp().clamp(max=cap)


def ppo_loss(logprobs, old_logprobs, advantages, mask=None, clip=0.2, n_tokens=None):
    """The clipped surrogate (Schulman et al. 2017, eq. 7), as a loss: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), summed over
    real tokens (mask; None: all) and divided by n_tokens, by default their number. Tensors of one shape; 0 for no tokens."""
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    mask = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.bool()
    return loss.masked_fill(~mask, 0).sum() / (n_tokens or mask.sum().clamp(min=1))


def value_loss(values, old_values, returns, mask=None, clip=0.2, n_tokens=None):
    """1/2 max((V - R)^2, (V_clipped - R)^2), V_clipped within clip of the old value (0: unclipped); reduced as in ppo_loss."""
    loss = (values - returns) ** 2
    if clip:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    mask = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.bool()
    return 0.5 * loss.masked_fill(~mask, 0).sum() / (n_tokens or mask.sum().clamp(min=1))


def k3(logprobs, ref_logprobs):
    """A low-variance estimate of KL(policy || ref) at tokens of the policy, never negative (Schulman 2020): r - 1 - log r with
    r = ref / policy."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def adapted(kl_coef, kl, target, n, horizon):
    """The KL coefficient after n more rollouts whose KL was kl (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns): 1 for a perfect value function, 0 for a constant; nan where nothing varies."""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask).item()
    return 1 - variance(returns - values) / variance(returns) if variance(returns) > 0 else math.nan


# -----------------------------------------------------------------------------
# models on responses

def evaluate_actions(model, critic, examples, temperature, dtype, with_entropy=False, trunk=None):
    """One pass over padded rows -> (log-probs, values, entropies) of their actions, each (N,) fp32, row after row. values is None
    without a critic; where the critic is the model itself, its head reads the same hidden states."""
    ids, actions = collate(examples, model.embed.weight.device, model.config.block_size + 1)
    at = actions[:, 1:]                                                       # position t predicts the action at t + 1
    cells = real_cells([len(e.ids) - 1 for e in examples], at.shape[1], ids.device)
    with autocast(ids.device, dtype):
        hidden = (trunk or model.trunk)(ids[:, :-1], cells=cells)[at]         # (N, C)
        logprobs, entropy = action_logprobs(model, hidden, ids[:, 1:][at], temperature, with_entropy)
        values = None
        if critic is not None:
            values = critic.values(hidden) if critic is model else critic.run(rewards.values_at, ids[:, :-1], at, cells)
    return logprobs, values, entropy


@torch.no_grad()
def evaluate_batch(model, critic, examples, temperature, dtype, max_tokens, with_entropy=False):
    """evaluate_actions for any number of rows, in micro-batches of similar length that processes share; (B, T) each, 0 after a row's
    end."""
    n_actions = [len(e.ids) - e.n_prompt for e in examples]
    device = model.embed.weight.device
    outs = [torch.zeros(len(examples), max(n_actions), device=device) for _ in range(3)]
    for rows, weight in my_micro_batches(range(len(examples)), max_tokens, lambda i: len(examples[i].ids)):
        found = model.run(evaluate_actions, critic, [examples[i] for i in rows], temperature, dtype, with_entropy)
        for out, flat in zip(outs, found):
            if flat is not None and weight:
                for i, part in zip(rows, flat.split([n_actions[i] for i in rows])):
                    out[i, :n_actions[i]] = part
    return [sum_over_processes(out) for out in outs]  # each row was computed by one of them, and is 0 in the others


# -----------------------------------------------------------------------------
# which questions, and where they start

def next_questions(n_all, start, count, seed):
    """Numbers start .. start + count of an endless sequence of permutations of range(n_all)."""
    order = {epoch: random.Random(f'{seed}:{epoch}').sample(range(n_all), n_all)
             for epoch in range(start // n_all, (start + count - 1) // n_all + 1)}
    return [order[i // n_all][i % n_all] for i in range(start, start + count)]


def replay_probabilities(priority, last_seen, iteration, beta, staleness):
    """Prioritised level replay (Jiang et al. 2021, section 3): (1 - staleness) P_rank + staleness P_stale over the questions
    seen so far. priority, last_seen: (n,) arrays, the mean |advantage| and the iteration of a question's last visit (-1: never)."""
    seen = last_seen >= 0
    rank = np.empty(len(priority))
    rank[np.argsort(-np.where(seen, priority, -np.inf), kind='stable')] = np.arange(1, len(priority) + 1)
    by_rank = np.where(seen, rank ** (-1 / beta), 0)
    age = np.where(seen, iteration - last_seen, 0)
    return (1 - staleness) * by_rank / by_rank.sum() + staleness * age / max(1, age.sum())


def random_prefix(problem, rng):
    """The first steps of the reference solution, at least one, and the line break after them ('' where it has no steps)."""
    lines = rewards.steps(problem.solution)
    return ''.join(line + '\n' for line in lines[:rng.randint(1, len(lines))]) if lines else ''


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume = from_main(lambda: resuming(init_from, out_dir))

    # everything that can be wrong with the input, before anything is written
    for name, allowed in (('reward', ('sparse', 'dense', 'orm', 'orm_dense', 'prm')), ('refine', tuple(rewards.REFINEMENTS)),
                          ('advantage', ('gae', 'group')), ('critic', ('shared', 'separate'))):
        if settings[name] not in allowed:
            raise UserError(f'{name} is one of {allowed}, not {settings[name]!r}')
    if min(n_iterations, n_rollouts, n_per_question, epochs, minibatch, micro_tokens, eval_interval, save_interval, eval_problems) < 1:
        raise UserError('n_iterations, n_rollouts, n_per_question, epochs, minibatch, micro_tokens, eval_interval, save_interval and '
                        'eval_problems must be at least 1')
    if keep_states < 0 or 0 != importance_cap < 1:
        raise UserError('keep_states is 0 or more, importance_cap 0 (off) or at least 1')
    if temperature <= 0:
        raise UserError('temperature must be above 0: the greedy policy has no probability ratio')
    if n_rollouts % minibatch or n_rollouts % n_per_question:
        raise UserError(f'n_rollouts = {n_rollouts} must be a multiple of minibatch = {minibatch} and of n_per_question = {n_per_question}')
    learned = reward in ('orm', 'orm_dense', 'prm')
    if few_shot and learned:
        raise UserError("few_shot goes with reward = 'sparse' or 'dense': a reward model reads solutions without worked examples before them")
    if advantage == 'group' and n_per_question < 2:
        raise UserError("advantage = 'group' compares a question's samples: n_per_question must be at least 2")
    if learned != bool(reward_model):
        raise UserError(f'reward = {reward!r} needs a reward_model' if learned else f'reward = {reward!r} has no use for reward_model')
    if reward not in ('prm', 'orm_dense') and (refine != 'none' or eta_quantile):
        raise UserError("refine and eta_quantile are for reward = 'prm' or 'orm_dense'")
    if reward_truncated > reward_wrong or alpha < 0:
        raise UserError(f'reward_truncated = {reward_truncated} must not be above reward_wrong = {reward_wrong}, nor alpha '
                        'below 0: else running to the budget would pay')
    if not (0 <= backtrack <= 1 and 0 <= replay < 1 and 0 <= eta_quantile <= 1 and 0 < replay_beta and 0 <= replay_staleness <= 1):
        raise UserError('backtrack, eta_quantile and replay_staleness are from 0 to 1, replay from 0 to below 1, replay_beta above 0')
    policy_from = read_run(out_dir)['init_from'] if resume else init_from
    tok = load_tokenizer(policy_from, conditioned=False)
    learning = dict(lora_rank=lora_rank, lora_alpha=lora_alpha, shard=shard, product_dtype=dtype)
    policy = Transformer.from_pretrained(policy_from, device, dtype if lora_rank else torch.float32,
                                         value_head=advantage == 'gae' and critic == 'shared', **learning)
    reference = None  # the policy's own weights without the adapter
    if ref or not lora_rank:
        reference = Transformer.from_pretrained(ref or policy_from, device, dtype, shard=policy.shard, product_dtype=dtype, merge=not ref)
        reference.requires_grad_(False)
    if ref:
        check_same_tokenizer(load_tokenizer(ref, conditioned=False), tok, f'ref = {ref} and {policy_from}')
        rewards.check_context(reference.config, policy.config, f'ref = {ref}')
    if critic_from:
        check_same_tokenizer(load_tokenizer(critic_from, conditioned=False), tok, f'critic_from = {critic_from} and {policy_from}')
    scorer = None
    if learned:
        kinds = ('prm',) if reward == 'prm' else ('orm',)
        scorer = rewards.load_reward_model(reward_model, policy.config, tok, device, dtype, policy.shard, kinds)
    problems = rewards.load_problems(task, 'train')
    if not 0 <= n_questions <= len(problems):
        raise UserError(f'n_questions is from 0 (all) to {len(problems)}, the rows of {task} to train on')
    problems, val_problems = problems[:n_questions or None], rewards.load_problems(task, 'val')
    if not 0 <= few_shot < len(val_problems):
        raise UserError(f'few_shot is from 0 to {len(val_problems) - 1}: the examples are the first rows of the validation slice')
    demonstrations, val_problems = val_problems[:few_shot], val_problems[few_shot:][:eval_problems]
    stop = (rewards.NEXT_QUESTION,) if few_shot else ()
    room = policy.config.block_size - max_new_tokens
    fits = [p for p in problems if len(tok.encode_prompt(rewards.prompt(p.question, demonstrations))) <= room]
    if not fits:
        raise UserError(f'max_new_tokens = {max_new_tokens} leaves room for {room} tokens, and no question has so few')
    if len(fits) < len(problems):
        print(f'left out: {len(problems) - len(fits)} of {len(problems)} questions, with a prompt longer than {room} tokens')
    check_room([tok.encode_prompt(rewards.prompt(p.question, demonstrations)) for p in val_problems], max_new_tokens, policy.config.block_size)
    problems, longest = fits, max(len(tok.encode_prompt(rewards.prompt(p.question, demonstrations))) for p in fits)
    if reward == 'dense':
        print(f'{rewards.without_equation(problems):,} of {len(problems):,} references have no equation: their steps earn nothing')

    # the value function: a head that starts at zero on the policy's trunk, or a transformer that starts as the policy
    value_model = policy
    if advantage == 'group':
        value_model = None
    elif critic == 'separate':
        value_model = Transformer.from_pretrained(critic_from or policy_from, device, dtype if lora_rank else torch.float32, value_head=True,
                                                  **learning | {'shard': policy.shard})
        rewards.check_context(value_model.config, policy.config, f'critic_from = {critic_from}')
    if value_model is not None:
        value_model.head_kind = 'value'
        for p in value_model.value_head.parameters():  # whatever it was trained for before
            p.detach().zero_()
    separate = value_model not in (None, policy)
    for learner in (policy, value_model):
        if learner is not None:
            learner.grad_checkpointing = grad_checkpointing
    head = None if separate or value_model is None else policy.value_head
    policy.value_head = None  # for a moment: the head on the policy's trunk has a rate of its own
    optimizer = make_optimizer(policy, lr, weight_decay)
    policy.value_head = head
    policy_parameters = [p for group in optimizer.param_groups for p in group['params']]
    for group in make_optimizer(head or value_model, critic_lr, weight_decay).param_groups if value_model is not None else []:
        optimizer.add_param_group(group)
    peak_lr = [group['lr'] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    state = {'iteration': 0, 'position': 0, 'updates': 0, 'best': None, 'kl_coef': kl_coef, 'eta': None if eta_quantile else eta,
             'given': {'kl_coef': kl_coef, 'eta': ['quantile', eta_quantile] if eta_quantile else eta},
             'priority': [0.0] * len(problems), 'last_seen': [-1] * len(problems)}
    models = {'policy': policy, 'critic': value_model if separate else None, 'reference': reference, 'scorer': scorer}
    models, checkpoints = {name: model for name, model in models.items() if model is not None}, Checkpoints(out_dir)
    if resume:
        saved = checkpoints.load(models, optimizer) or state
        # of what adapts as the run goes on, a setting that has been changed since counts and not the state
        changed = [key for key, given in state['given'].items() if saved.get('given', {}).get(key) != given]
        state |= {key: value for key, value in saved.items() if key not in changed + ['given']}
        if len(state['priority']) != len(problems):
            raise UserError(f'{out_dir} practised on {len(state["priority"])} questions, not {len(problems)}: n_questions must stay')
    start_run(settings, resume, overwrite)
    listen_for_stop()
    log = Log(out_dir, resume)
    samples_file = os.path.join(out_dir, 'samples.jsonl')
    # what follows the state is drawn again
    from_main(lambda: write_rows(samples_file, [row for row in read_rows(samples_file) if row['iteration'] <= state['iteration']]))

    n_picked, n_minibatches = n_rollouts // n_per_question, n_rollouts // minibatch
    n_updates = n_iterations * epochs * n_minibatches
    print(f'{n_iterations} iterations * {n_picked} questions * {n_per_question} samples = {n_iterations * n_rollouts:,} samples; '
          f'{n_iterations} * {epochs} epochs * {n_minibatches} minibatches = {n_updates:,} updates')
    print(memory_needed(list(models.values()), dtype, micro_tokens, longest + max_new_tokens, max_rows, longest, max_new_tokens))
    print(disk_needed(policy.config, 2, keep_states, lora_rank, 2 if separate else 1))
    exact = device.type == 'cpu' and dtype == torch.float32  # no bf16 and no TF32: two ways to one number agree
    trunk = None
    if policy.shard != 'fsdp' and (compile == 'on' or compile == 'auto' and device.type == 'cuda'):
        trunk = torch.compile(policy.trunk, dynamic=True)

    def sampler():
        """Samples from the policy as it is now: from its own weights, or where these are not whole, or not of dtype, from a copy."""
        return Sampler(policy.for_sampling(dtype), tok, max_rows, dtype)

    def reference_logprobs(examples):
        if reference is not None:
            return evaluate_batch(reference, None, examples, temperature, dtype, micro_tokens)[0]
        with policy.without_adapter():
            return evaluate_batch(policy, None, examples, temperature, dtype, micro_tokens)[0]

    def validate():
        """maj@1; keeps the best policy so far. Ties go to the later policy."""
        maj1, error = evaluation.greedy_accuracy(sampler(), val_problems, max_new_tokens, demonstrations)
        log(state['updates'], iteration=state['iteration'], samples_drawn=state['iteration'] * n_rollouts, val_maj1=maj1, val_maj1_error=error)
        if state['best'] is None or maj1 >= state['best']:
            state['best'] = maj1
            policy.save_pretrained(os.path.join(out_dir, 'best'), tok)

    if state['eta'] is None:  # the scores of steps that the policy takes now, on questions that it will not learn from
        found = answer(sampler(), [rewards.prompt(p.question) for p in val_problems], n_per_question, max_new_tokens, temperature,
                       seed=seed)
        scores = rewards.score(scorer, [Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for s in found], micro_tokens, dtype)
        lines = [rewards.step_lines(s.ids, tok) for s in found]
        state['eta'] = rewards.score_quantile(lines, scores, eta_quantile)
        print(f'eta = {state["eta"]:.4f}, the {eta_quantile} quantile of the scores of steps before the last')
    if not state['iteration']:
        validate()

    for iteration in range(state['iteration'] + 1, n_iterations + 1):
        started, rng = time.time(), random.Random(f'{seed}:iteration {iteration}')
        # 1. questions: the next ones, some of them replaced by those that are drawn again
        n_again = min(round(replay * n_picked), sum(seen >= 0 for seen in state['last_seen']))
        picked = next_questions(len(problems), state['position'], n_picked - n_again, seed)
        state['position'] += n_picked - n_again
        if n_again:
            p = replay_probabilities(np.array(state['priority']), np.array(state['last_seen']), iteration, replay_beta, replay_staleness)
            picked += np.random.default_rng(rng.getrandbits(64)).choice(len(problems), n_again, replace=False, p=p).tolist()
        share = backtrack * max(0.0, 1 - (iteration - 1) / max(1.0, backtrack_until * n_iterations))
        prefixes = [random_prefix(problems[q], rng) if rng.random() < share else '' for q in picked]
        prompts = []
        for j, q in enumerate(picked):
            question = rewards.prompt(problems[q].question, demonstrations)
            head, given = tok.encode_pair(question, rewards.completion(prefixes[j]))
            if not prefixes[j] or len(head + given) > room:
                prefixes[j], given = '', []
                head = tok.encode_prompt(question)
            prompts.append(head + given)

        # 2. rollouts: n_per_question solutions of each, by temperature alone (no top-k, no top-p)
        samples = answer(sampler(), prompts, n_per_question, max_new_tokens, temperature, stop=stop, seed=seed * 1_000_000 + iteration,
                         desc=f'iteration {iteration}: rollouts')
        rollout_seconds = time.time() - started

        # 3. rewards on tokens
        responses = [rewards.respond(problems[picked[i // n_per_question]], s, tok, prefixes[i // n_per_question], stop)
                     for i, s in enumerate(samples)]
        examples = [Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for s in samples]
        outcome = rewards.sparse_rewards(responses, reward_right, reward_wrong, reward_truncated)
        scores = rewards.score(scorer, examples, micro_tokens, dtype) if learned else None
        shaped = {'sparse': lambda: torch.zeros_like(outcome),
                  'dense': lambda: rewards.dense_rewards(responses),
                  'orm': lambda: rewards.orm_rewards(responses, scores),
                  'orm_dense': lambda: rewards.orm_dense_rewards(responses, scores, refine, state['eta']),
                  'prm': lambda: rewards.prm_rewards(responses, scores, refine, state['eta'])}[reward]()
        task_reward = (outcome + alpha * shaped).to(device)                                    # (B, T)

        # 4. the policy that sampled, its value function and the reference on the same tokens
        lengths = torch.tensor([len(s.ids) for s in samples], device=device)
        mask = torch.arange(outcome.shape[1], device=device) < lengths[:, None]                # (B, T), from lengths
        old_logprobs, old_values, entropy = evaluate_batch(policy, value_model, examples, temperature, dtype, micro_tokens, True)
        ref_logprobs = reference_logprobs(examples)
        sampled = torch.zeros_like(old_logprobs)
        sampled[mask] = torch.tensor([x for s in samples for x in s.logprobs], device=device)
        sampler_gap = masked_mean((sampled - old_logprobs).abs(), mask)
        tolerance = 1e-3 if exact else 0.05
        if sampler_gap > tolerance:
            print(f'warning: the log-probs of sampler and trainer differ by {sampler_gap:.2g} nats a token (healthy: below {tolerance}); '
                  f'importance_cap = 2 allows for it')
        if iteration == 1:  # sampler and trainer are one policy, and nothing has moved yet; else the ratios below mean nothing
            assert importance_cap or sampler_gap < tolerance, 'the log-probs of sampler and trainer differ'
            assert ref or masked_mean((old_logprobs - ref_logprobs).abs(), mask) < tolerance, 'the reference is not the initial policy'

        # 5. a KL penalty on every token: -beta (log p - log p_ref), whose mean over samples is -beta KL
        k1 = (old_logprobs - ref_logprobs).masked_fill(~mask, 0)
        token_rewards = task_reward - state['kl_coef'] * k1
        used_kl_coef = state['kl_coef']
        if kl_target:
            state['kl_coef'] = adapted(state['kl_coef'], k1.sum(-1).mean().item(), kl_target, n_rollouts, kl_horizon)

        # 6. advantages, fixed from here on through all epochs
        if advantage == 'gae':
            advantages, returns = gae(token_rewards, old_values, mask, gamma, lam)
        else:
            advantages, returns = group_advantages(token_rewards, mask, n_per_question), torch.zeros_like(old_values)
        size = (advantages.abs().sum(-1) / lengths).view(n_picked, n_per_question).mean(-1).tolist()
        for q, a in zip(picked, size):
            state['priority'][q], state['last_seen'][q] = a, iteration
        # The group's are 0 on average for each question. Shifted, they would say that a sample like its mates were better or worse.
        advantage_std = masked_mean((advantages - masked_mean(advantages, mask)) ** 2, mask).sqrt()
        advantages = whiten(advantages, mask, shift_mean=advantage == 'gae')
        if importance_cap:
            advantages = advantages * importance_weights(old_logprobs, sampled, importance_cap)
        # Without an advantage a row has no policy loss; the losses of value and entropy need it all the same.
        learns = [True] * n_rollouts if value_model is not None or entropy_coef else advantages.any(-1).tolist()

        # 7. update: a few epochs of minibatches, each divided by its own tokens before memory splits it
        updating = time.time()
        warming = iteration <= value_warmup and value_model is not None
        totals, largest_ratio, n_done, n_trained, stopped = np.zeros(6), 1.0, 0, 0, False
        for epoch in range(epochs):
            order = rng.sample(range(n_rollouts), n_rollouts)
            for first in bar(range(0, n_rollouts, minibatch), desc=f'iteration {iteration}: epoch {epoch + 1}'):
                rows = order[first:first + minibatch]
                n_tokens = int(lengths[rows].sum())
                rows = [i for i in rows if learns[i]]  # the others, whose advantages are all 0, would add 0 to the gradient
                if not rows:
                    continue
                n_learned = int(lengths[rows].sum())
                n_trained += n_learned
                sums = np.zeros(7)  # policy loss, value loss, approx_kl, clip share, mean ratio; largest |ratio - 1|, largest ratio
                for micro, weight in my_micro_batches(rows, micro_tokens, lambda i: len(examples[i].ids)):
                    real = mask[micro]
                    old, adv = old_logprobs[micro][real], advantages[micro][real]              # (N,)
                    with enough_memory(f'iteration {iteration}, an update, a micro-batch of {len(micro)} rows',
                                       f'lower micro_tokens = {micro_tokens}, or set grad_checkpointing'):
                        logprobs, values, bonus = policy.run(evaluate_actions, value_model, [examples[i] for i in micro], temperature, dtype,
                                                             entropy_coef > 0, trunk)
                        loss = policy_part = ppo_loss(logprobs, old, adv, clip=clip, n_tokens=n_tokens)
                        if values is not None:
                            value_part = value_loss(values, old_values[micro][real], returns[micro][real], clip=value_clip, n_tokens=n_tokens)
                            loss = loss + value_coef * value_part
                            sums[1] += weight * value_part.item()
                        if entropy_coef:
                            loss = loss - entropy_coef * bonus.sum() / n_tokens
                        backward(weight * loss, policy)
                    with torch.no_grad():
                        ratio = (logprobs - old).exp()
                        sums[0] += weight * policy_part.item()
                        sums[2] += weight * k3(old, logprobs).sum().item() / n_learned
                        sums[3] += weight * ((ratio - 1).abs() > clip).sum().item() / n_learned
                        sums[4] += weight * ratio.sum().item() / n_learned
                        sums[5:] = np.maximum(sums[5:], [(ratio - 1).abs().max().item(), ratio.max().item()])
                largest = np.max(from_all(sums[5:].tolist()), axis=0)
                sums = np.append(sum_over_processes(torch.from_numpy(sums[:5])).numpy(), largest)
                if warming:  # the value function learns alone
                    for p in policy_parameters:
                        p.grad = None
                norm = finish_gradients(parameters, policy.shard, grad_clip)
                if not (math.isfinite(norm) and np.isfinite(sums).all()):
                    raise UserError(f'iteration {iteration}: loss {sums[0]:.4g}, value loss {sums[1]:.4g}, gradient norm {norm}; stopped '
                                    f'(a lower lr helps most often). {checkpoints.keep_batch(state["updates"] + 1, [examples[i] for i in rows])}')
                if n_done == 0:  # nothing has moved since the old log-probs
                    assert abs(sums[4] - 1) < 0.05 and (sums[5] < 1e-3 or not exact), f'ratios before an update: off 1 by {sums[5]}'
                stopped = target_kl > 0 and sums[2] > target_kl
                if stopped:
                    optimizer.zero_grad(set_to_none=True)
                    break
                for group, peak in zip(optimizer.param_groups, peak_lr):
                    group['lr'] = learning_rate(((iteration - 1) * epochs + epoch) * n_minibatches + first // minibatch, n_updates,
                                                peak, min_lr * peak / lr, warmup)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                totals, largest_ratio, n_done = totals + np.append(sums[:5], norm), max(largest_ratio, sums[6]), n_done + 1
            if stopped:
                break
        state['iteration'], state['updates'] = iteration, state['updates'] + n_done

        # 8. what happened
        n_tokens = int(lengths.sum())
        means = dict(zip(('policy_loss', 'value_loss', 'approx_kl', 'clip_share', 'mean_ratio', 'grad_norm'), totals / max(1, n_done)))
        means['mean_ratio'] = means['mean_ratio'] if n_done else 1.0
        if value_model is not None:  # the mean value is that of the first token, where all of the return is still to come
            means |= {'explained_variance': explained_variance(old_values, returns, mask), 'mean_value': old_values[:, 0].mean()}
        right = torch.tensor([r.correct for r in responses]).view(n_picked, n_per_question)
        texts = [tok.decode(r.ids) for r in responses]
        unique = [{rewards.equations(t) for t in texts[i:i + n_per_question]} for i in range(0, n_rollouts, n_per_question)]
        truncated = sum(not r.finished for r in responses) / n_rollouts
        log(state['updates'], iteration=iteration, samples_drawn=iteration * n_rollouts,
            # the reward by kind, a solution
            share_correct=sum(r.correct for r in responses) / n_rollouts, share_truncated=truncated,
            reward_outcome=outcome.sum(-1).mean(), reward_shaped=shaped.sum(-1).mean(), reward_kl=-used_kl_coef * k1.sum(-1).mean(),
            mean_return=token_rewards.sum(-1).mean(), advantage_std=advantage_std,
            # questions without contrast, from which a group learns nothing
            all_right=right.all(-1).float().mean(), all_wrong=(~right).all(-1).float().mean(),
            # how far from the reference, a token, and a solution (the unit of kl_target)
            kl_coef=used_kl_coef, kl=masked_mean(k1, mask), kl_k3=masked_mean(k3(old_logprobs, ref_logprobs), mask),
            kl_solution=k1.sum(-1).mean(),
            entropy=masked_mean(entropy, mask),
            # mean |log p of the sampler - log p of the trainer|: rounding alone
            sampler_gap=sampler_gap,
            # the update
            **means, largest_ratio=largest_ratio, updates=n_done, learning_rows=sum(learns) / n_rollouts, lr=optimizer.param_groups[0]['lr'],
            # the solutions
            response_tokens=n_tokens / n_rollouts, response_steps=sum(len(r.lines) for r in responses) / n_rollouts,
            unique_equations=sum(map(len, unique)) / n_picked, backtracked=sum(p != '' for p in prefixes) / n_picked,
            # speed
            rollout_tokens_per_second=n_tokens / rollout_seconds,
            update_tokens_per_second=n_trained / (time.time() - updating))
        if truncated > 0.2:
            print(f'warning: {100 * truncated:.0f}% of the samples did not finish within max_new_tokens = {max_new_tokens}')
        shown = 0
        with open(samples_file if rank() == 0 else os.devnull, 'a', encoding='utf-8') as f:
            for r, text, rewarded, kl_row in zip(responses, texts, task_reward.cpu(), k1.sum(-1).tolist()):
                ends = [0] + [end + 1 for end, _ in r.lines]
                steps = [[line, round(rewarded[a:b].sum().item(), 4)] for (_, line), a, b in zip(r.lines, ends, ends[1:])]
                f.write(json.dumps({'iteration': iteration, 'question': r.problem.question, 'answer': r.problem.answer, 'prefix': r.prefix,
                                    'text': text, 'correct': r.correct, 'finished': r.finished, 'steps': steps, 'kl': kl_row}) + '\n')
                if shown < show:
                    shown += 1
                    print(f'  Q: {r.problem.question} (answer {r.problem.answer})')
                    for given in r.prefix.splitlines():
                        print(f'      given  {given}')
                    for line, reward_of_step in steps:
                        print(f'    {reward_of_step:+7.3f}  {line}')

        # 9. how good is it?
        if iteration % eval_interval == 0 or iteration == n_iterations:
            validate()
        stops = asked_to_stop() and iteration < n_iterations
        if stops or iteration % save_interval == 0 or iteration == n_iterations:
            checkpoints.save(iteration, models, optimizer, state)
        if stops:
            leave(f' after iteration {iteration} of {n_iterations}')
    policy.save_pretrained(os.path.join(out_dir, 'last'), tok)
    checkpoints.keep(keep_states)
    print(f'best policy by validation maj@1 ({state["best"]:.3f}): {out_dir}/best')
