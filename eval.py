"""
How good is a policy, and how far does it explore? The paper's measures (Havrilla et al. 2024, section 3):

maj@1       the greedy solution is right     (lenient_maj@1: or, where it has no answer, its last number is)
maj@K       a plain vote over K samples at temperature 0.7 is right
rerank@K    the sample that a reward model scores highest is right    (with --scorer)
weighted@K  a vote in which a sample counts by its score is right     (with --scorer)
pass@K      any of K samples is right

Beside them: unique equation sequences a problem, the share of problems that no sample solves, and with
--compare --all how much of a run's samples another run had found. A solution that did not finish within its
budget is wrong, here and in training. A stopped evaluation goes on where it was.

$ python eval.py --init_from=out/demo_ei --task=arithmetic --k=16
$ python eval.py --init_from=out/gsm8k_ei --task=gsm8k            # maj@96 and pass@96, on one GPU
$ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_ei --task=gsm8k   # eight share the problems
$ python eval.py --init_from=out/demo_ei --scorer=out/demo_orm    # and rerank@K, by a reward model
$ python eval.py --init_from=out/demo_rcrl --condition=bad        # a return-conditioned policy, told [BAD]
$ python eval.py --compare out/demo_sft out/demo_ei               # a table of paired differences
$ python eval.py --compare --seeds=0,1,2 out/demo_sft out/demo_ei # also of out/demo_sft_s1 and so on
$ python eval.py --doctor --init_from=out/demo_sft --k=16         # before RL: what may keep it from learning?
"""
import glob
import json
import os
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import comb

import numpy as np
import torch

from config import UserError, override
from config.run import (asked_to_stop, bar, from_all, from_main, iterate_rows, leave, listen_for_stop, rank,
                        read_json, read_rows, setup, world_size, write_json, write_rows)
from data import (GOES_ON, NEXT_QUESTION, Problem, answered, equations, extract_answer, lenient_answer,
                  load_problems, same_answer)
from model import Transformer, autocast, find_checkpoint
from sample import (Example, Sampler, check_same_tokenizer, collate, draw_samples, first_numbers,
                    load_tokenizer, my_micro_batches, refuse_too_long, response_tables, values_at)

# -----------------------------------------------------------------------------
init_from = ''        # the policy: a run's folder (its best/), a Hugging Face folder or a hub name
task = 'arithmetic'   # data/<task>/, or a folder with test.jsonl
split = 'test'        # 'test' | 'val' | 'train'
n_problems = 0        # the first ones of the split; 0: all (at least 0)
k = 96                # samples a problem, beside the greedy one; 0: only that (at least 0)
n_sampled = 0         # problems that get these k samples, the first ones; 0: all (at least 0)
temperature = 0.7     # of the K samples; paper: 0.7 (as recalled) (at least 0)
top_k = 0             # 0: all (at least 0)
top_p = 1.0           # 1: all (above 0, at most 1)
scorer = ''           # a reward model (rewards.py): adds rerank@K and weighted@K
prompt_form = 'auto'  # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
system = ''           # first message of chat prompts; '': the checkpoint's, or the template's own
few_shot = 0          # worked examples in the prompt, from the validation slice; a base model: 2 (at least 0)
condition = 'good'    # 'good' | 'bad' | 'none'; what a return-conditioned policy (rcrl.py) is told
max_new_tokens = 256  # budget of a solution, labels of a return-conditioned policy included (at least 1)
max_rows = 256        # samples decoded at a time (at least 1)
micro_tokens = 16384  # tokens that the scorer reads at a time, padding included (at least 1)
doctor = False        # only say what may keep RL from learning, by the validation slice; writes nothing
out_dir = ''          # where eval_<task>.json goes; empty: init_from, if that is a folder
overwrite = False     # drop the records of an evaluation with other settings
seed = 0
device = 'auto'       # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'        # 'auto' | 'float32' | 'bfloat16'; of the matrix products
# -----------------------------------------------------------------------------

@dataclass
class Solution:
    """A judged sample. After a prefix (backtracking) the solution is prefix + text; only ids were sampled."""
    problem: Problem
    prompt_ids: list
    ids: list       # what was sampled, the end token included
    finished: bool  # by an end token or a stop string, not by the budget
    text: str       # of ids, without end token and stop string
    answer: str | None  # an unfinished sample has none, as it may end within a number
    correct: bool
    logprobs: list = ()
    prefix: str = ''
    tokenizer: object = field(default=None, repr=False)

    @cached_property
    def lines(self):
        """[(index of the last token in ids, text)] of its steps; the last takes a stop string's tokens."""
        *lines, (last, line) = step_lines(self.ids, self.tokenizer)
        if lines and self.tokenizer.decode(self.ids[:lines[-1][0] + 1]).startswith(self.text):
            line = lines.pop()[1]
        return lines + [(last, line)]

    @property
    def ends(self):
        """The index of each step's last token in ids."""
        return [end for end, _ in self.lines]

    @property
    def example(self):
        return Example(self.prompt_ids + self.ids, len(self.prompt_ids))

    @property
    def lenient(self):
        """Whether it is right, or has no answer and its last number is right."""
        answer = lenient_answer(self.prefix + self.text, self.problem.task)
        return self.finished and same_answer(answer, self.problem.answer, self.problem.task)

    def row(self, **more):
        """Its part of a line on disk."""
        return {name: getattr(self, name) for name in ('text', 'answer', 'correct', 'finished')} | more

def step_lines(ids, tokenizer):
    """Ids (at least one) -> [(index of the last token, text)] of the lines that are not blank. The last line
    takes what follows it, so that its reward falls on the last action."""
    lines, start = [], 0
    for end, token in enumerate(ids):
        if token in tokenizer.newline_ids or end == len(ids) - 1:
            line = tokenizer.decode(ids[start:end + 1]).strip()
            lines += [(end, line)] if line else []
            start = end + 1
    return lines[:-1] + [(len(ids) - 1, lines[-1][1] if lines else '')]

def judge(problem, sample, tokenizer, prefix='', stop=()):
    """A sample (sample.Sample) as a Solution: the one place where correctness is decided."""
    text = tokenizer.decode(sample.ids)
    for s in stop:
        text = text.split(s)[0]
    answer = extract_answer(prefix + text, problem.task) if sample.finished else None
    correct = same_answer(answer, problem.answer, problem.task)
    return Solution(problem, sample.prompt_ids, sample.ids, sample.finished, text, answer, correct,
                    sample.logprobs, prefix, tokenizer)

def encode_prompts(problems, tokenizer, shown=()):
    return [tokenizer.encode_question(p.question, shown)[0] for p in problems]

def draw_solutions(sampler, problems, k, max_new_tokens, temperature, shown=(), prompts=None, prefixes=None,
                   **arguments):
    """k judged samples of each problem, problem after problem. shown: worked examples before each question.
    prompts: encode_prompts, where that is done. prefixes: of the solutions, at the prompts' ends. Further
    arguments as in Sampler.generate."""
    prompts = prompts or encode_prompts(problems, sampler.tokenizer, shown)
    stop = (NEXT_QUESTION,) if shown and sampler.tokenizer.form == 'plain' else ()
    samples = draw_samples(sampler, prompts, k, max_new_tokens, temperature, stop=stop, **arguments)
    return [judge(problems[i // k], s, sampler.tokenizer, prefixes[i // k] if prefixes else '', stop)
            for i, s in enumerate(samples)]

def greedy_accuracy(sampler, problems, max_new_tokens, shown=()):
    """(maj@1, its standard error): the share of problems whose greedy solution is right. UserError where no
    prompt leaves room for the budget."""
    prompts = encode_prompts(problems, sampler.tokenizer, shown)
    refuse_too_long(sampler, prompts, max_new_tokens)
    found = draw_solutions(sampler, problems, 1, max_new_tokens, 0, shown, prompts, desc='maj@1')
    return mean_and_error([s.correct for s in found])

def without_examples(solution):
    """What a base model wrote after worked examples, as a solution to learn from or to score: without them,
    up to the line with the answer, and with an EOS."""
    tokenizer, text = solution.tokenizer, answered(solution.text).strip()
    prompt_ids, ids = tokenizer.encode_question(solution.problem.question, solution=text)
    return replace(solution, prompt_ids=prompt_ids, ids=ids + [tokenizer.eos])

def resumable(path, n, chunk, work, desc, resume='--init_from=resume'):
    """Completes a file of n JSON lines, of which work(i, j) makes i .. j. A stop that is asked for ends the
    script here, and a later call makes the rest. resume: as in leave."""
    done = from_main(lambda: sum(1 for _ in iterate_rows(path)))
    file = path if rank() == 0 else os.devnull
    with open(file, 'a', encoding='utf-8') as f, bar(desc=desc, total=n) as progress:
        progress.update(done)
        for i in range(done, n, chunk):
            j = min(i + chunk, n)
            f.writelines(json.dumps(row) + '\n' for row in work(i, j))
            f.flush()
            progress.update(j - i)
            if asked_to_stop() and j < n:
                leave(f' after {j:,} of {n:,} questions ({desc})', resume)

def explore(sampler, problems, path, k, max_new_tokens, temperature, seed, desc, shown=()):
    """Draws k samples of each problem into the file `path` and yields them as solutions_of does, without the
    shown examples. They depend only on seed and question, not on pieces or processes."""
    tokenizer = sampler.tokenizer
    counts = [len(found) for found in solutions_of(path, problems, tokenizer)]
    if len(counts) < len(problems) and set(counts) - {k}:
        raise UserError(f'{path} has {counts[0]} samples a question, not k = {k}; take that, or --overwrite')
    prompts = encode_prompts(problems, tokenizer, shown)
    refuse_too_long(sampler, prompts, max_new_tokens)
    first = first_numbers(prompts, k)

    def draw(i, j):
        found = draw_solutions(sampler, problems[i:j], k, max_new_tokens, temperature, shown, prompts[i:j],
                               first=first[i:j], seed=seed)
        found = [without_examples(s) if shown else s for s in found]
        for n, p in enumerate(problems[i:j]):
            rows = [s.row(ids=s.ids) for s in found[n * k:(n + 1) * k]]
            yield {'index': i + n, 'question': p.question, 'samples': rows}

    chunk = world_size() * max(1, 4 * sampler.max_rows // k)  # enough rows to fill some batches
    resumable(path, len(problems), chunk, draw, desc)
    return solutions_of(path, problems, tokenizer)

def solutions_of(path, problems, tokenizer):
    """Yields a list of Solutions a problem from a file of explore: all at once would take gigabytes. Every
    process has to take each list. UserError if they are of other questions."""
    rows = iterate_rows(path)  # process 0 reads for all
    for i, p in enumerate(problems):
        row = from_main(lambda: next(rows, None))
        if row is None:
            return
        if (row.get('index'), row.get('question')) != (i, p.question):  # an earlier commit's has no index
            raise UserError(f'{path} holds samples of other questions; start with --overwrite')
        prompt_ids, _ = tokenizer.encode_question(p.question)
        yield [Solution(p, prompt_ids, tokenizer=tokenizer, **sample) for sample in row['samples']]


# -----------------------------------------------------------------------------
# the doctor: what keeps RL from learning

CUT_OFF = '{:.0%} of the samples are cut off by max_new_tokens = {}'

def sampler_gap(solutions, logprobs, dtype):
    """|log p of sampler - logprobs (B, T), the trainer's| of drawn tokens: mean, maximum, healthy mean."""
    sampled = torch.tensor([x for s in solutions for x in s.logprobs], device=logprobs.device)
    off = (torch.cat([row[:len(s.ids)] for row, s in zip(logprobs, solutions)]) - sampled).abs()
    exact = off.device.type == 'cpu' and dtype == torch.float32  # without bf16 and TF32
    return off.mean().item(), off.max().item(), 1e-3 if exact else 0.05

def diagnose(solutions, k, max_new_tokens, questions, maj1=None, gap=None):
    """-> five lines on k solutions a question, with what is healthy and what to turn where it is not; last a
    verdict, 'healthy: ...' or 'warning: ...'. maj1: of greedy solutions; gap: of sampler_gap, if known."""
    n, done = len(solutions), [s for s in solutions if s.finished]
    right = [sum(s.correct for s in solutions[i:i + k]) for i in range(0, n, k)]
    correct, cut, formless = sum(right) / n, 1 - len(done) / n, sum(s.answer is None for s in done) / n
    lenient = sum(s.lenient for s in solutions) / n
    went_on = sum(not s.finished and GOES_ON.search(s.text) is not None for s in solutions) / n
    unsolved, mastered = right.count(0) / len(right), right.count(k) / len(right)
    tied, solved, (mean, largest, most) = unsolved + mastered, 1 - unsolved, gap or (0, 0, 0.001)
    name, one = ('pass@1', correct) if maj1 is None else ('maj@1', maj1)
    signal = 'harder questions' if mastered > unsolved else 'easier questions, more samples, or SFT first'
    teach = 'SFT first, or few_shot = 2'
    checks = [  # the gravest last: name, what was found, whether that is wrong, what is healthy, what to turn
        ('room', f'{name} {one:.1%}, pass@{k} {solved:.1%} of {len(right):,} {questions}',
         k > 1 and solved - one < 0.05, '5 points apart, as RL only makes likely what samples hold',
         'more samples, or a higher temperature'),
        ('contrast', f'{tied:.0%} of the questions give no signal ({unsolved:.0%} all wrong, {mastered:.0%} '
         'all right)', tied > 0.8 and (k > 1 or correct in (0, 1)), 'at most 80%', signal),
        ('form', f'{formless:.0%} of the samples end without an answer ({correct:.1%} are right, by the last '
         f'number {lenient:.1%})', formless > 0.2, 'at most 20%', teach),
        ('budget', f'{CUT_OFF.format(cut, max_new_tokens)} ({went_on:.0%} after an answer)', cut > 0.2,
         'at most 20%', 'raise max_new_tokens' if went_on < cut / 2 else 'no end token comes, ' + teach),
        ('sampler', f'the log-probs of sampler and trainer differ by {mean:.2g} nats a token, at most '
         f'{largest:.2g}' if gap else 'not measured, without log-probs', mean > most, f'a mean up to {most}',
         'importance_cap = 2, or dtype = float32')]
    lines = [f'!! {name}: {found}; healthy: {healthy}; turn: {turn}' if wrong else
             f'ok {name}: {found}; healthy: {healthy}' for name, found, wrong, healthy, turn in checks]
    warnings = [f'warning: {found}: {turn}' for _, found, wrong, _, turn in checks if wrong]
    return lines + (warnings[-1:] or [f'healthy: {1 - tied:.0%} of the questions give a signal'])

def print_diagnosis(lines, whole):
    """All lines, or later in training only a warning."""
    print(''.join(line + '\n' for line in lines if whole or line.startswith('warning')), end='')

def examine(sampler, problems, shown):
    """diagnose on fresh samples, by the script's settings."""
    maj1, _ = greedy_accuracy(sampler, problems, max_new_tokens, shown)
    drawn = draw_solutions(sampler, problems, k, max_new_tokens, temperature, shown, top_k=top_k, top_p=top_p,
                           seed=seed, desc=f'pass@{k}')
    written = [s for s in drawn if s.ids]
    gap = None if sampler.label else sampler_gap(written, response_tables(  # labels are not among the ids
        sampler.model, [s.example for s in written], temperature or 1.0, dtype, micro_tokens)[0], dtype)
    return diagnose(drawn, k, max_new_tokens, 'validation questions', maj1, gap)


# -----------------------------------------------------------------------------
# reward models

def check_context(config, policy, name):
    """UserError if a model reads fewer tokens than the policy writes. config, policy: their ModelConfigs."""
    if config.block_size < policy.block_size:
        sizes = f"{config.block_size} tokens, shorter than the policy's {policy.block_size}"
        raise UserError(f'{name} has a context of {sizes}')

def load_reward_model(path, policy, tokenizer, device, dtype=torch.float32, shard='none',
                      kinds=('orm', 'prm')):
    """A trained reward model, without gradients. UserError if it is of none of the kinds, or has another
    tokenizer or a shorter context than the policy (its ModelConfig)."""
    check_same_tokenizer(load_tokenizer(path), tokenizer, f'the reward model {path} and the policy')
    model = Transformer.from_pretrained(path, device, dtype, shard=shard, product_dtype=dtype)
    if model.value_head is None or model.head_kind not in kinds:
        kind = f'of kind {model.head_kind or "unknown"}'
        why = 'without a scalar head' if model.value_head is None else kind
        raise UserError(f'{path} is no reward model of kind {" or ".join(kinds)} (rewards.py): it is {why}')
    check_context(model.config, policy, f'the reward model {path}')
    return model.requires_grad_(False)

@torch.no_grad()
def score(model, examples, max_tokens, dtype=torch.float32):
    """The reward model's probability for every prefix of each completion: an fp32 tensor an example, on the
    CPU, whose entry t has read id t of its ids after the prompt. Zeros where the row exceeds the context."""
    scores = {}
    fits = [i for i, e in enumerate(examples) if len(e.ids) <= model.config.block_size]
    for micro, _ in my_micro_batches(fits, max_tokens, lambda i: len(examples[i].ids)):
        rows = [examples[i]._replace(labels=None) for i in micro]  # scored at every id, learned or not
        ids, labels = collate(rows, model.embed.weight.device, model.config.block_size)
        with autocast(ids.device, dtype):
            p = model.run(values_at, ids, ~labels.isnan()).sigmoid().cpu()
        scores |= zip(micro, p.split([len(e.ids) - e.n_prompt for e in rows]))
    scores = {i: s for part in from_all(scores) for i, s in part.items()}
    return [scores.get(i, torch.zeros(len(e.ids) - e.n_prompt)) for i, e in enumerate(examples)]

def final_scores(model, solutions, max_tokens, dtype=torch.float32):
    """The reward model's score of each whole solution; 0 without an answer, so that it never wins."""
    found = score(model, [s.example for s in solutions], max_tokens, dtype)
    return [p[-1].item() if s.answer is not None and len(p) else 0.0 for s, p in zip(solutions, found)]


# -----------------------------------------------------------------------------
# metrics and tables

def pass_at_k(n, c, k):
    """Probability that k of n samples, c of which are right, hold a right one: 1 - C(n-c, k) / C(n, k), the
    unbiased estimator of Chen et al. 2021 (arXiv 2107.03374)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f'pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}')
    return 1.0 - comb(n - c, k) / comb(n, k)

def maj_at_k(answers, correct):
    """Whether the answer that most samples gave is right: 1.0 or 0.0. answers: strings, None without a vote.
    correct: whether each sample is right, or the right answer. Among equal votes the first answer wins."""
    return weighted_at_k(answers, [1] * len(answers), correct)

def rerank_at_k(scores, correct):
    """Whether the sample with the highest score is right: 1.0 or 0.0. Among equal scores the first wins."""
    return float(correct[max(range(len(scores)), key=lambda i: scores[i])])

def weighted_at_k(answers, scores, correct):
    """maj_at_k where a sample's vote counts by its score."""
    total = {}
    for a, s in zip(answers, scores):
        if a is not None:
            total[a] = total.get(a, 0.0) + s
    right = {correct} if isinstance(correct, str) else {a for a, c in zip(answers, correct) if c}
    return float(bool(total) and max(total, key=total.get) in right)  # max takes the first among equals

def first_spellings(answers, task=''):
    """Each answer as the first of the list that its task calls the same, by which votes are counted."""
    if not task:
        return answers  # a number has one spelling
    found = []
    for a in answers:
        found.append(next((b for b in found if same_answer(a, b, task)), a))
    return found

def unique_equations(texts):
    """Number of different equation sequences: the paper's measure of diversity."""
    return len({equations(text) for text in texts})

def mean_and_error(x):
    """(mean, its standard error); (mean, None) of a single number."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None

def summarize(rows):
    """{metric: (mean, its standard error)} over an evaluation's lines, with equally many samples or none."""
    values = {'maj@1': [float(r['greedy']['correct']) for r in rows]}
    groups = [r['samples'] for r in rows if r['samples']]
    K = len(groups[0]) if groups else 0
    if K:
        correct, answers = ([[s[key] for s in group] for group in groups] for key in ('correct', 'answer'))
        if K > 1:  # maj@1 is the greedy solution's
            values[f'maj@{K}'] = [maj_at_k(a, c) for a, c in zip(answers, correct)]
        if all('score' in s for group in groups for s in group):
            scores = [[s['score'] for s in group] for group in groups]
            values[f'rerank@{K}'] = [rerank_at_k(s, c) for s, c in zip(scores, correct)]
            values[f'weighted@{K}'] = [weighted_at_k(a, s, c) for a, s, c in zip(answers, scores, correct)]
        for k in sorted({2 ** i for i in range(K.bit_length())} | {K}):
            values[f'pass@{k}'] = [pass_at_k(K, sum(c), k) for c in correct]
        values['unsolved'] = [float(not any(c)) for c in correct]
        values['unique_equations'] = [unique_equations(s['text'] for s in group) for group in groups]
    values['lenient_maj@1'] = [float(r['greedy']['lenient']) for r in rows]
    every = groups if K else [[r['greedy']] for r in rows]
    values['tokens'] = [np.mean([s['tokens'] for s in group]) for group in every]
    values['truncated'] = [np.mean([not s['finished'] for s in group]) for group in every]
    return {name: mean_and_error(v) for name, v in values.items()}

def paired_difference(before, after):
    """(mean of after - before, half of its 95% interval) for two runs' scores of the same problems, at least
    two: 1.96 standard errors of the mean of the differences, problem by problem."""
    difference = np.subtract(after, before, dtype=float)
    return difference.mean(), 1.96 * difference.std(ddof=1) / len(difference) ** 0.5

def mcnemar_p(before, after):
    """Two-sided p of McNemar's exact test for two runs' results on the same problems, right or wrong: if they
    are equally good, a problem that only one of them solves is the throw of a fair coin."""
    gained, lost = (sum(bool(b) > bool(a) for a, b in zip(*x)) for x in ((before, after), (after, before)))
    tail = sum(comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))

def table_row(run, summary, metrics, every=True):
    """{column: text}, shares in percent. summary: an eval_<task>.json. metrics: one for each seed. every: all
    metrics, with the 95% interval of one seed, or the standard deviation over several."""
    told = f' [{summary["condition"].upper()}]' if summary['condition'] else ''  # a return-conditioned policy
    row = {'run': run + told, 'maj@1': '', 'difference': '', 'p': ''}
    few = ('maj@', 'rerank@', 'weighted@', f'pass@{summary["k"]}')
    for name in [name for name in metrics[0] if every or name.startswith(few)]:
        means, errors = zip(*[m.get(name, (float('nan'), None)) for m in metrics])
        scale = 1 if name in ('tokens', 'unique_equations') else 100
        row[name] = f'{scale * np.mean(means):.1f}'
        if len(means) > 1 and (every or name == 'maj@1'):
            row[name] += f' ({scale * np.std(means, ddof=1):.1f})'
        elif every and errors[0] is not None:
            row[name] += f' ± {1.96 * scale * errors[0]:.1f}'
    return row

def markdown_table(rows):
    """An aligned Markdown table of table_row's rows, without the columns that are empty."""
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if any(row.get(c) for row in rows)]
    first, *widths = [max(len(row.get(c, '')) for row in [{c: c}, *rows]) for c in columns]
    lines = [columns, ['-' * first, *('-' * width for width in widths)]]
    lines += [[row.get(c, '') for c in columns] for row in rows]
    return '\n'.join(f'| {name:{first}} | {" | ".join(map(str.rjust, x, widths))} |' for name, *x in lines)

def read_evaluation(folder, name):
    """The finished evaluation folder/name, its lines by problem as 'rows'. UserError where there is none."""
    path = os.path.join(folder, name)
    summary = read_json(path) if os.path.exists(path) else {}
    if not {'settings', 'metrics'} <= set(summary):
        raise UserError(f'{folder}: no finished {name} (made by eval.py --init_from={folder})')
    return summary | {'rows': {(r['index'], r['question'], r['answer']): r for r in read_rows(path + 'l')}}

def compare(folders, seeds=(0,), every=False):
    """Prints a table a task of the folders' evaluations. With seeds a folder NAME stands for NAME (seed 0),
    NAME_s1 and so on. every: as in table_row. UserError for a folder without an evaluation."""
    runs = {}
    for folder in dict.fromkeys(folder.rstrip('/') for folder in folders):
        seeded = [f'{folder}_s{seed}' if seed else folder for seed in seeds]
        for name in sorted(glob.glob('eval_*.json', root_dir=seeded[0])) or ['eval_<task>.json']:
            evaluations = [read_evaluation(f, name) for f in seeded]
            runs.setdefault(evaluations[0]['task'], []).append((folder, evaluations))
    for task in runs:
        compare_on(task, runs[task], every)

def compare_on(task, runs, every):
    """Prints a task's table with the paired differences in maj@1 to its first run, and two problems that the
    last run solves and the first does not. runs: [(folder, its evaluations, one a seed)]."""
    (first, before), *others = runs
    table, notes = [], []
    for folder, after in runs:
        keys = [key for key in before[0]['rows'] if all(key in e['rows'] for e in before + after)]
        pairs = [[(a['rows'][key], b['rows'][key]) for key in keys] for a, b in zip(before, after)]
        metrics = [e['metrics'] | (known(rows) if every else {}) for e, rows in zip(after, pairs)]
        table.append(row := table_row(folder, after[0], metrics, every))
        if any(len(e['rows']) > len(keys) for e in before + after):
            notes.append(f'{folder} and {first} were evaluated on different problems: {len(keys):,} in both')
        if len(keys) > 1 and after is not before:
            solved = [[[r['greedy']['correct'] for r in run] for run in zip(*rows)] for rows in pairs]
            mean, half = paired_difference(*np.mean(solved, 0))  # of (seeds, 2, problems): means over seeds
            row['difference'] = f'{100 * mean:+.1f} ± {100 * half:.1f}'
            row['p'] = f'{max(mcnemar_p(*x) for x in solved):.2g}'
    over = f', means (standard deviations) and largest p over {len(before)} seeds' if len(before) > 1 else ''
    print(f'{task}, {before[0]["problems"]:,} problems, in percent{over}\n\n{markdown_table(table)}')
    if others:
        print(f"\ndifference in maj@1 to {first}, 95% interval; p of McNemar's exact test", *notes, sep='\n')
        gained = [(a, b) for a, b in pairs[0] if b['greedy']['correct'] > a['greedy']['correct']]
        lost = sum(b['greedy']['correct'] < a['greedy']['correct'] for a, b in pairs[0])
        print(f'{folder} solves {len(gained)} problems that {first} does not, and fails {lost} that it does.')
        for a, b in gained[:2]:
            print(f'\nQ: {a["question"]}\n   (answer {a["answer"]})')
            print(f'--- {first}\n{a["greedy"]["text"].strip()}\n--- {folder}\n{b["greedy"]["text"].strip()}')

def known(pairs):
    """{metric: (share, None)}: what the first run's samples held of a run's equation sequences, of its right
    ones, and of the problems that its samples solve. pairs: [(row of the first, row of the run)]."""
    counts = np.zeros(6, int)
    for a, b in pairs:
        old, new = ({equations(s['text']) for s in row['samples']} for row in (a, b))
        right = {equations(s['text']) for s in b['samples'] if s['correct']}
        solved = [any(s['correct'] for s in row['samples']) for row in (a, b)]
        counts += [len(new & old), len(new), len(right & old), len(right), all(solved), solved[1]]
    names = ('known_sequences', 'known_right', 'known_solved')
    return {name: (held / n, None) for name, held, n in zip(names, counts[::2], counts[1::2]) if n}

def evaluated(sampler, reward_model, problems, prompts, first, n, shown, start):
    """Draws, judges and scores by the script's settings, k samples of the first n problems: yields a line a
    problem, from index `start` on."""
    greedy, drawn = draw_solutions(sampler, problems, 1, max_new_tokens, 0, shown, prompts), []
    if k and n > 0:
        drawn = draw_solutions(sampler, problems[:n], k, max_new_tokens, temperature, shown, prompts[:n],
                               first=first[:n], top_k=top_k, top_p=top_p, seed=seed)
    rows = [s.row(tokens=len(s.ids)) for s in drawn]
    if reward_model:  # it learned to read solutions without worked examples before them
        read = [without_examples(s) if shown else s for s in drawn]
        for row, x in zip(rows, final_scores(reward_model, read, micro_tokens, dtype)):
            row['score'] = x
    for i, (p, s) in enumerate(zip(problems, greedy)):
        mine = rows[i * k:(i + 1) * k]
        for row, answer in zip(mine, first_spellings([row['answer'] for row in mine], p.task)):
            row['answer'] = answer
        yield {'index': start + i, 'question': p.question, 'answer': p.answer,
               'greedy': s.row(tokens=len(s.ids), lenient=s.lenient), 'samples': mine}


if __name__ == '__main__':
    if '--compare' in sys.argv[1:]:
        options = dict(compare=True, all=False, seeds=(0,))
        folders = [a for a in sys.argv[1:] if not a.startswith('--')]
        override(options, [a for a in sys.argv[1:] if a.startswith('--')])
        if not folders or not options['seeds']:
            raise UserError('use: python eval.py --compare [--seeds=0,1,2] [--all] out/a out/b ...')
        compare(folders, options['seeds'], options['all'])
        sys.exit()

    # 1. the policy, its problems, and what it is shown and told
    settings = override(globals())
    if not init_from:
        raise UserError('which policy? --init_from=out/demo_sft')
    device, dtype = setup(device, dtype, seed)
    split = 'val' if doctor else split
    shown = load_problems(task, 'val')[:few_shot] if few_shot else []
    start = len(shown) if split == 'val' else 0
    problems = load_problems(task, split)[start:][:n_problems or None]
    folder = find_checkpoint(init_from)
    tok = load_tokenizer(folder).in_form(prompt_form, system)
    if tok.labels and few_shot:
        raise UserError('a return-conditioned policy learned to answer: it takes no few_shot examples')
    if not tok.labels and condition != 'good':
        raise UserError(f'condition = {condition!r}: {init_from} is no return-conditioned policy (rcrl.py)')
    condition = condition if tok.labels else ''
    if doctor:
        sampler = Sampler(Transformer.from_pretrained(folder, device, dtype), tok, max_rows, dtype,
                          condition or 'none')
        print_diagnosis(examine(sampler, problems, shown), True)
        sys.exit()
    out_dir = out_dir or (init_from if os.path.isdir(init_from) else '')
    if not out_dir:
        raise UserError('--out_dir=... is needed where init_from is no folder')

    # 2. what the records depend on: an evaluation goes on only with the same
    task_name = os.path.basename(os.path.normpath(task))
    name = f'eval_{task_name}' + (f'_{condition}' if condition in ('bad', 'none') else '')
    summary_file, records_file = (os.path.join(out_dir, name + ending) for ending in ('.json', '.jsonl'))
    keys = ('init_from task split n_problems k n_sampled temperature top_k top_p scorer few_shot '
            'prompt_form system max_new_tokens seed')
    asked = {key: settings[key] for key in keys.split()}
    for key, path in (('weights', folder), ('scorer_weights', scorer)):  # a model may be trained anew
        if path:
            asked[key] = os.path.getmtime(os.path.join(find_checkpoint(path), 'config.json'))
    exists = from_main(lambda: os.path.exists(summary_file) or os.path.exists(records_file))
    before = from_main(lambda: read_json(summary_file) if os.path.exists(summary_file) else {})
    changed = [key for key in asked if exists and before.get('settings', {}).get(key) != asked[key]]
    if changed and not overwrite:
        which = f'other settings ({", ".join(changed)})'
        raise UserError(f'{records_file} holds an evaluation with {which}; --overwrite replaces it')
    model = Transformer.from_pretrained(folder, device, dtype)
    sampler = Sampler(model, tok, max_rows, dtype, condition or 'none')
    reward_model = load_reward_model(scorer, model.config, tok, device, dtype) if scorer else None
    prompts = encode_prompts(problems, tok, shown)
    refuse_too_long(sampler, prompts, max_new_tokens)
    first = first_numbers(prompts, k)
    os.makedirs(out_dir, exist_ok=True)
    summary = dict(task=task_name, problems=len(problems), k=k, condition=condition, settings=asked)
    if changed or not exists:
        from_main(lambda: write_rows(records_file, []))
        from_main(lambda: write_json(summary_file, summary))
    listen_for_stop()

    # 3. draw, judge, score
    def work(i, j):
        return evaluated(sampler, reward_model, problems[i:j], prompts[i:j], first[i:j],
                         (n_sampled or len(problems)) - i, shown, start + i)

    chunk = world_size() * max(1, 4 * max_rows // max(1, k))  # enough rows to fill some batches
    resumable(records_file, len(problems), chunk, work, f'{out_dir} on {task_name}', resume='')

    # 4. the metrics
    summary['metrics'] = from_main(lambda: summarize(read_rows(records_file)))
    from_main(lambda: write_json(summary_file, summary))
    if summary['metrics']['truncated'][0] > 0.2:
        print('warning: ' + CUT_OFF.format(summary['metrics']['truncated'][0], max_new_tokens))
    print(markdown_table([table_row(out_dir, summary, [summary['metrics']])]))
