"""
Every kind of reward, and the training of the learned ones.

A reward is a tensor (B, T): a number for each token of each of B solutions. The outcome is sparse, on the
last token. Beside it stand the heuristic dense reward and the scores of an outcome reward model (ORM,
Havrilla et al. 2024) or a process reward model (PRM, Gao et al. 2024), raw or refined by Clip and Delta.

As a script this file trains reward models, transformers with a scalar head whose logistic function is a
probability. The ORM learns which of a policy's solutions end in the right answer, the PRM for each step how
often the policy still gets there, counted over fresh samples (Wang et al. 2023, Math-Shepherd).

$ python rewards.py --task=gsm8k                        # counts a task; does the check accept its answers?
$ python rewards.py config/demo_orm.py                  # CPU: the demo's ORM, after config/demo_sft.py
$ python rewards.py config/demo_prm.py --init_from=resume    # goes on where a stopped run was
"""
import json
import math
import random
import shutil
from itertools import chain, repeat

import torch
import torch.nn.functional as F

from config import UserError, override
from config.run import Checkpoints, from_main, origin, rank, read_rows, setup, start_run, world_size
from data import (ANNOTATION, annotation_is_right, completion, equations, extract_answer,  # noqa: F401
                  first_rows, is_correct, load_problems, prompt, results, steps,  # some for notebooks
                  without_equation)
from eval import check_context, encode_prompts, explore, judge, resumable, score
from model import Transformer
from sample import (Sampler, check_room, collate, disk_needed, draw_samples, load_tokenizer, memory_needed,
                    values_at)
from sft import base_config, finetune, fitting, load_learner, training

# -----------------------------------------------------------------------------
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
# what to train
kind = ''                 # '' | 'orm' | 'prm'; '': only count the task's problems
init_from = 'out/sft'     # the policy whose solutions are judged, or 'resume'
base = ''                 # the weights that the reward model starts from; '': the policy's
prompt_form = 'auto'      # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
# samples and labels
n_questions = 0           # rows of train to sample, the first ones; 0: all
k = 8                     # solutions a question (at least 1)
samples = ''              # a file with these questions' k solutions, such as ei.py's samples_round1.jsonl
temperature = 1.0         # of the solutions, and of the rollouts that judge their steps (above 0)
max_new_tokens = 256      # budget of a solution (at least 1)
max_rows = 256            # samples decoded at a time (at least 1)
balance = True            # ORM: as many right as wrong solutions, of each question where it has both
label_at = 'token'        # 'token' | 'step'; ORM: what carries the label: every token, or each step's end
rollouts = 8              # PRM: samples from the end of each step (at least 1)
step_label = 'share'      # 'share' | 'any'; PRM: the share of them that is right, or whether any is
heldout = 256             # questions of the validation slice that judge the model (at least 1)
# optimisation, as in sft.py
epochs = 2.0              # (above 0)
batch_size = 64           # solutions an update (at least 1)
micro_tokens = 16384      # (at least 1)
grad_checkpointing = False
shard = 'auto'            # 'auto' | 'none' | 'ddp' | 'fsdp'
lora_rank = 0
lora_alpha = 32.0
lr = 1e-5
min_lr = 1e-6
warmup = 0.03
weight_decay = 0.0
grad_clip = 1.0
# run
save_interval = 200       # updates between states to resume from; 0: once an epoch (at least 0)
keep_states = 1           # states that stay when the run has finished, e.g. for more epochs (at least 0)
out_dir = 'out/orm'
overwrite = False         # replace the run that out_dir holds
seed = 0
tracker = 'none'          # 'none' | 'tensorboard' | 'trackio' | 'wandb'; where the log also goes
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16'; of the matrix products
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# rewards: a list of B Solutions -> (B, T); scores: a learned model's, for each solution (n,), one a token

def at_positions(solutions, positions, values):
    """(B, T) zeros, T the longest solution, with values[i] at the token or tokens positions[i] of row i."""
    rewards = torch.zeros(len(solutions), max(len(s.ids) for s in solutions))
    for row, where, what in zip(rewards, positions, values):
        row[torch.as_tensor(where)] = torch.as_tensor(what, dtype=torch.float32)
    return rewards

def sparse_rewards(solutions, right=1.0, wrong=0.0, truncated=0.0):
    """The outcome, on the last token: right, wrong, or truncated where the budget cut the solution off."""
    outcomes = [truncated if not s.finished else right if s.correct else wrong for s in solutions]
    return at_positions(solutions, [len(s.ids) - 1 for s in solutions], outcomes)

def dense_rewards(solutions):
    """The heuristic of Havrilla et al. 2024: a step earns 1 / (number of results of the reference solution),
    on its last token, if its result is one of those still ahead. It meets the first such result; those before
    it count as passed. So a solution earns 1 at most, and a step that repeats another, leads elsewhere or is
    cut off by the budget earns nothing."""
    values = [[0.0] * len(s.lines) for s in solutions]
    for s, earned in zip(solutions, values):
        wanted = results(s.problem.solution)
        ahead = wanted[len(results(s.prefix)):]
        for step, (_, line) in enumerate(s.lines if s.finished else s.lines[:-1]):
            for result in results(line):
                if result is not None and result in ahead:
                    ahead = ahead[ahead.index(result) + 1:]
                    earned[step] += 1 / len(wanted)
    return at_positions(solutions, [s.ends for s in solutions], values)

def step_scores(solution, scores):
    """(K,) the scores of its K steps, 0 for one that the budget cut off. scores: (n,)."""
    found = scores[solution.ends]
    if not solution.finished:
        found[-1] = 0.0
    return found

def orm_rewards(solutions, scores):
    """The ORM's score of the whole solution, on the last token; 0 for one that the budget cut off."""
    values = [step_scores(s, p)[-1] for s, p in zip(solutions, scores)]
    return at_positions(solutions, [len(s.ids) - 1 for s in solutions], values)

def clip_rewards(r, eta):
    """Clip of Gao et al. 2024: min(r - eta, 0), so that no step is worth adding. r: (K,) scores of steps."""
    return (r - eta).clamp(max=0)

def delta_rewards(r):
    """Delta of Gao et al. 2024: r_k - r_{k+1} for k < K - 1, r_{K-1} at k = K - 1, and 0 at the last step K,
    which has the outcome's reward. r: (K,). From step k on they sum to r_k, whatever follows."""
    r = F.pad(r[:-1], (0, 1))
    return r - F.pad(r[1:], (0, 1))

REFINEMENTS = {'none': lambda r, eta: r, 'clip': clip_rewards, 'delta': lambda r, eta: delta_rewards(r),
               'clip_delta': lambda r, eta: delta_rewards(clip_rewards(r, eta))}

def prm_rewards(solutions, scores, refine='none', eta=0.0):
    """The PRM's score of each step, or the ORM's of the solution so far, on the step's last token: raw
    (unbounded: repeating good steps pays), or refined by 'clip', 'delta' or 'clip_delta'.

    No step of a solution that the budget cut off earns more than 0 (ours), so that each step, and the return
    from it on, earns at most what it would in the same solution, finished."""
    values = [REFINEMENTS[refine](step_scores(s, p), eta) for s, p in zip(solutions, scores)]
    values = [v if s.finished else v.clamp(max=0) for s, v in zip(solutions, values)]
    return at_positions(solutions, [s.ends for s in solutions], values)

def score_quantile(solutions, scores, q):
    """The q-quantile of the scores of steps that do not end their solution, as Clip's eta: Delta pays nothing
    for the last step. UserError where there is no such step."""
    found = torch.cat([torch.zeros(0)] + [p[s.ends[:-1]] for s, p in zip(solutions, scores)])
    if not len(found):
        raise UserError('eta_quantile: no sampled solution has a step before its last; set eta')
    return found.quantile(q).item()


# -----------------------------------------------------------------------------
# labels

def with_labels(solution, values, label_at='step'):
    """A solution as an Example that learns values, one a step (on its last token) or one a token."""
    ends = solution.ends if label_at == 'step' else range(len(solution.ids))
    known = dict(zip(ends, values))
    return solution.example._replace(labels=[known.get(i, math.nan) for i in range(len(solution.ids))])

def balanced(groups, rng):
    """groups: each question's solutions. -> as many right as wrong ones of each question, each text once; of
    the questions with one kind only, one solution each, as many right ones as wrong ones."""
    chosen, only_right, only_wrong = [], [], []
    for group in groups:
        distinct = {tuple(s.ids): s for s in group}.values()
        right, wrong = [s for s in distinct if s.correct], [s for s in distinct if not s.correct]
        n = min(len(right), len(wrong))
        chosen += rng.sample(right, n) + rng.sample(wrong, n)
        if n == 0:
            only_right += right[:1]
            only_wrong += wrong[:1]
    n = min(len(only_right), len(only_wrong))
    return chosen + only_right[:n] + only_wrong[:n]

def step_prefixes(solution):
    """Where rollouts that judge its steps but the last start: (prompt ids, ids up to the step's end, the
    right answer)."""
    prompt_ids, ids, answer = tuple(solution.prompt_ids), tuple(solution.ids), solution.problem.answer
    return [(prompt_ids, ids[:end + 1], answer) for end in solution.ends[:-1]]

def rollouts_from(sampler, starts, max_new_tokens, temperature, seed):
    """Samples from starts (step_prefixes) within what each leaves of a solution's budget. starts: {start:
    (problem, number of samples)}. -> {start: [whether a sample reaches the right answer]}"""
    each = [start for start, (_, count) in starts.items() for _ in range(count)]
    prompts = [prompt_ids + ids for prompt_ids, ids, _ in each]
    budgets = [max(1, max_new_tokens - len(ids)) for _, ids, _ in each]
    outcomes = {start: [] for start in starts}
    for start, sample in zip(each, draw_samples(sampler, prompts, 1, budgets, temperature, seed=seed)):
        (problem, _), ids = starts[start], start[1]
        s = judge(problem, sample, sampler.tokenizer, prefix=sampler.tokenizer.decode(ids))
        outcomes[start].append(s.correct and len(ids) < max_new_tokens)
    return outcomes

def step_success(sampler, groups, rollouts, max_new_tokens, temperature, seed):
    """groups: lists of solutions -> lists of a list a solution: for each step the share of `rollouts` samples
    from its end that reach the right answer, for the last one whether the solution did."""
    starts = {start: (s.problem, rollouts) for s in chain(*groups) for start in step_prefixes(s)}
    outcomes = rollouts_from(sampler, starts, max_new_tokens, temperature, seed)
    return [[[sum(outcomes[start]) / rollouts for start in step_prefixes(s)] + [float(s.correct)]
             for s in group] for group in groups]

def labelled(sampler, problems, name):
    """The problems' solutions as labelled Examples, drawn and judged into files, with which a stopped run
    goes on."""
    samples_path, path = f'{out_dir}/samples_{name}.jsonl', f'{out_dir}/labels_{name}.jsonl'
    groups = [[s for s in group if s.ids] for group in explore(
        sampler, problems, samples_path, k, max_new_tokens, temperature, seed, f'{name}: sample')]
    if kind == 'orm':
        chosen = balanced(groups, random.Random(seed)) if balance else chain(*groups)
        return [with_labels(s, repeat(float(s.correct)), label_at) for s in chosen]
    chunk = world_size() * max(1, 4 * max_rows // (3 * k * rollouts))  # enough rows to fill some batches
    resumable(path, len(problems), chunk, lambda i, j: step_success(
        sampler, groups[i:j], rollouts, max_new_tokens, temperature, seed + 1), f'{name}: label')
    shares = chain(*from_main(lambda: read_rows(path)))  # of each solution, one a step
    if step_label == 'any':
        shares = [[float(share > 0) for share in row] for row in shares]
    return [with_labels(s, row) for s, row in zip(chain(*groups), shares)]


# -----------------------------------------------------------------------------
# reward models

def binary_cross_entropy(model, examples, trunk=None):
    """Summed over the examples' labels, which are probabilities: a scalar. For sft.finetune."""
    ids, labels = collate(examples, model.embed.weight.device, model.config.block_size)
    mask = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(values_at(model, ids, mask), labels[mask], reduction='sum')

def auroc(scores, labels):
    """The probability that a right one scores above a wrong one, ties counting half; nan of one kind only."""
    s, y = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.bool)
    right, wrong = s[y], s[~y].sort().values
    below, up_to = torch.searchsorted(wrong, right), torch.searchsorted(wrong, right, right=True)
    return ((below + up_to).double().mean() / 2 / len(wrong)).item()

def calibration_error(scores, labels, bins=10):
    """Expected calibration error: |mean score - mean label| in equal bins of the score, weighted by size."""
    s, y = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.float64)
    bin_of = (s * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, s - y)
    return (gap.abs().sum() / len(s)).item()

def quality(model, examples, kind, max_tokens, dtype):
    """Metrics of a reward model: on the ORM's score of each labelled solution, or the PRM's of each step."""
    pairs = []
    for e, p in zip(examples, score(model, examples, max_tokens, dtype)):
        known = [(x, label) for x, label in zip(p.tolist(), e.labels) if not math.isnan(label)]
        pairs += known[-1:] if kind == 'orm' else known
    scores, labels = zip(*pairs)
    right, n = [label >= 0.5 for label in labels], len(pairs)
    return {'heldout': n, 'heldout_accuracy': sum((s >= 0.5) == y for s, y in zip(scores, right)) / n,
            'heldout_auroc': auroc(scores, right), 'calibration_error': calibration_error(scores, labels),
            'mean_score': sum(scores) / n, 'mean_label': sum(labels) / n}

def print_counts():
    for split in ('train', 'val', 'test'):
        problems = load_problems(task, split)
        right = sum(is_correct(completion(p.solution), p.answer, p.task) for p in problems)
        n_steps = sum(len(steps(p.solution)) for p in problems)
        annotations = [ANNOTATION.findall(p.solution) for p in problems]
        good = [annotation_is_right(e) for e in chain(*annotations)]
        print(f'{split}: {len(problems):,} problems, {right:,} of their own answers earn reward 1; '
              f'{n_steps / len(problems):.2f} steps a solution; annotations: {sum(good):,} right, '
              f'{len(good) - sum(good):,} wrong, {annotations.count([]):,} solutions without; '
              f'{without_equation(problems):,} references without an equation')


if __name__ == '__main__':
    settings = override(globals())
    if not kind:
        print_counts()
        raise SystemExit

    # 0. everything that can be wrong with the input, before anything is written
    device, dtype = setup(device, dtype, seed)
    resume, policy_from = origin(init_from, out_dir, 'best')
    problems = first_rows(load_problems(task, 'train'), n_questions, 'n_questions')
    val_problems = load_problems(task, 'val')[:heldout]
    tok = load_tokenizer(policy_from, conditioned=False).in_form(prompt_form)
    policy = Transformer.from_pretrained(policy_from, device, dtype).requires_grad_(False)
    sampler = Sampler(policy, tok, max_rows, dtype)
    learner = base_config(base, tok, policy_from) if base else policy.config  # the reward model's shape
    check_context(learner, policy.config, f'base = {base}')
    prompts = encode_prompts(problems, tok)
    check_room(prompts, max_new_tokens, learner.block_size)
    check_room(encode_prompts(val_problems, tok), max_new_tokens, learner.block_size)
    try:
        with open(samples, encoding='utf-8') as f:  # its last line may be torn
            counts = {len(json.loads(line)['samples']) for line in f if line.endswith('\n')}
    except (OSError, ValueError, KeyError, TypeError):
        counts = set()
    if samples and counts != {k}:
        raise UserError(f'samples = {samples!r} is no file with k = {k} solutions of each question')
    log = start_run(settings, resume)
    print(memory_needed([policy], dtype, 0, 0, max_rows, max(map(len, prompts)), max_new_tokens))
    print(disk_needed(learner, 1, keep_states, lora_rank))
    if samples and not resume and rank() == 0:
        shutil.copy(samples, f'{out_dir}/samples_train.jsonl')

    # 1. samples and their labels
    examples = fitting(labelled(sampler, problems, 'train'), learner.block_size, 'solutions', 0)
    val_examples = labelled(sampler, val_problems, 'val')
    labels = [label for e in examples for label in e.labels if not math.isnan(label)]
    if len(examples) < batch_size or not val_examples or len(set(labels)) < 2:
        raise UserError(f'{len(examples)} solutions to learn from, {len(val_examples)} held out, '
                        f'{len(set(labels))} different labels: too few; raise n_questions and k, or take a '
                        'policy that is sometimes right and sometimes wrong')
    n_updates = math.ceil(epochs * len(examples) / batch_size)
    print(f'{len(examples):,} solutions of {len(problems):,} questions with {len(labels):,} labels, mean '
          f'{sum(labels) / len(labels):.3f}; {n_updates} updates * {batch_size} = '
          f'{n_updates * batch_size:,} solutions; {len(val_examples):,} held out')

    # 2. learn to tell them
    del policy, sampler  # their memory is needed now
    model = load_learner(base or policy_from, settings, device, dtype, value_head=True)
    model.head_kind = kind
    print(memory_needed([model], dtype, micro_tokens, max(len(e.ids) for e in examples)))
    finetune(model, examples, loss=binary_cross_entropy, **training(settings, device, dtype), log=log,
             resume=resume, desc='reward model')

    # 3. how well, on solutions of questions that it has not seen
    log(n_updates, **quality(model, val_examples, kind, micro_tokens, dtype))
    model.save_pretrained(f'{out_dir}/best', tok)
    Checkpoints(out_dir).keep(keep_states)
    print(f'reward model: {out_dir}/best')
