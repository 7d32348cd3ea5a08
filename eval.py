"""
How good is a policy, and how far does it explore? The paper's measures (Havrilla et al. 2024, section 3):

maj@1       the greedy solution is right
maj@K       a plain vote over K samples at temperature 0.7 is right
rerank@K    the sample that a reward model scores highest is right    (with --scorer)
weighted@K  a vote in which a sample counts by its score is right     (with --scorer)
pass@K      any of K samples is right

Beside them: unique equation sequences a problem, the share of problems that no sample solves, and with
--compare how much of a run's samples another run had found. A solution that did not finish within its budget
is wrong, here and in training. A stopped evaluation goes on where it was.

$ python eval.py --init_from=out/demo_ei --task=arithmetic --k=16
$ python eval.py --init_from=out/gsm8k_ei --task=gsm8k            # maj@96 and pass@96, on one GPU
$ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_ei --task=gsm8k   # eight share the problems
$ python eval.py --init_from=out/demo_ei --scorer=out/demo_orm    # and rerank@K, by a reward model
$ python eval.py --init_from=out/demo_rcrl --condition=bad        # a return-conditioned policy, told [BAD]
$ python eval.py --compare out/demo_sft out/demo_ei               # one table, and where the two differ
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
from data import (NEXT_QUESTION, Problem, answered, completion, equations, extract_answer, load_problems,
                  prompt, same_answer)
from model import Transformer, autocast, find_checkpoint
from sample import (Example, Sampler, check_same_tokenizer, collate, draw_samples, first_numbers,
                    load_tokenizer, my_micro_batches, refuse_too_long, values_at)

# -----------------------------------------------------------------------------
init_from = ''        # the policy: a run's folder (its best/), a Hugging Face folder or a hub name
task = 'arithmetic'   # data/<task>/, or a folder with test.jsonl
split = 'test'        # 'test' | 'val' | 'train'
n_problems = 0        # the first ones of the split; 0: all (at least 0)
k = 96                # samples a problem, beside the greedy one; 0: only that (at least 0)
temperature = 0.7     # of the K samples; paper: 0.7 (as recalled) (at least 0)
top_k = 0             # 0: all (at least 0)
top_p = 1.0           # 1: all (above 0, at most 1)
scorer = ''           # a reward model (rewards.py): adds rerank@K and weighted@K
few_shot = 0          # worked examples in the prompt, from the validation slice; a base model: 2 (at least 0)
condition = 'good'    # 'good' | 'bad' | 'none'; what a return-conditioned policy (rcrl.py) is told
max_new_tokens = 256  # budget of a solution, labels of a return-conditioned policy included (at least 1)
max_rows = 256        # samples decoded at a time (at least 1)
micro_tokens = 16384  # tokens that the scorer reads at a time, padding included (at least 1)
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
    return [tokenizer.encode_prompt(prompt(p.question, shown)) for p in problems]

def draw_solutions(sampler, problems, k, max_new_tokens, temperature, shown=(), prompts=None, **arguments):
    """k judged samples of each problem, problem after problem. shown: worked examples before each question.
    prompts: encode_prompts, where that is done. Further arguments as in Sampler.generate."""
    prompts = prompts or encode_prompts(problems, sampler.tokenizer, shown)
    stop = (NEXT_QUESTION,) if shown else ()
    samples = draw_samples(sampler, prompts, k, max_new_tokens, temperature, stop=stop, **arguments)
    return [judge(problems[i // k], s, sampler.tokenizer, stop=stop) for i, s in enumerate(samples)]

def greedy_accuracy(sampler, problems, max_new_tokens, shown=()):
    """(maj@1, its standard error): the share of problems whose greedy solution is right. UserError where no
    prompt leaves room for the budget."""
    prompts = encode_prompts(problems, sampler.tokenizer, shown)
    refuse_too_long(sampler, prompts, max_new_tokens)
    found = draw_solutions(sampler, problems, 1, max_new_tokens, 0, shown, prompts, desc='maj@1')
    return mean_and_error([s.correct for s in found])

def warn_truncated(share, max_new_tokens):
    if share > 0.2:
        print(f'warning: {share:.0%} of the samples did not finish within max_new_tokens = {max_new_tokens}')

def without_examples(solution):
    """What a base model wrote after worked examples, as a solution to learn from or to score: without them,
    up to the line with the answer, and with an EOS."""
    tokenizer, text = solution.tokenizer, completion(answered(solution.text).strip())
    prompt_ids, ids = tokenizer.encode_pair(prompt(solution.problem.question), text)
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
        prompt_ids = tokenizer.encode_prompt(prompt(p.question))
        yield [Solution(p, prompt_ids, tokenizer=tokenizer, **sample) for sample in row['samples']]


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
        why = 'without a scalar head' if model.value_head is None else f'of kind {model.head_kind or "unknown"}'
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
    """{metric: (mean, its standard error)} over an evaluation's lines, with equally many samples each."""
    values = {'maj@1': [float(r['greedy']['correct']) for r in rows]}
    groups = [r['samples'] for r in rows]
    K = len(groups[0])
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
    every = groups if K else [[r['greedy']] for r in rows]
    values['tokens'] = [np.mean([s['tokens'] for s in group]) for group in every]
    values['truncated'] = [np.mean([not s['finished'] for s in group]) for group in every]
    return {name: mean_and_error(v) for name, v in values.items()}

def markdown_table(summaries):
    """[(folder, its eval_<task>.json)] -> a Markdown table, shares in percent, with standard errors."""
    columns = dict.fromkeys(m for _, summary in summaries for m in summary['metrics']
                            if not m.startswith('pass@') or m == f'pass@{summary["k"]}')
    lines = ['| run | task | problems | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 3) + '|']
    told = {'': '', 'good': ' [GOOD]', 'bad': ' [BAD]', 'none': ' (no label)'}  # a return-conditioned policy
    for folder, summary in summaries:
        cells = [folder + told[summary['condition']], summary['task'], str(summary['problems'])]
        for metric in columns:
            mean, error = summary['metrics'].get(metric, (None, None))
            is_share = '@' in metric or metric in ('truncated', 'unsolved')
            cell = '' if mean is None else f'{100 * mean:.1f}' if is_share else f'{mean:.1f}'
            cells.append(cell + (f' ± {100 * error:.1f}' if is_share and error is not None else ''))
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)

def compare(folders):
    """Prints one table of the folders' evaluations, how much of each run's samples the first run had found,
    and two problems that the last run solved and the first did not. UserError for a folder without any."""
    first, *others = dict.fromkeys(folders)
    summaries, records = [], {}
    for folder in (first, *others):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), 'eval_*.json')))
        finished = [(p, found) for p in paths if {'settings', 'metrics'} <= set(found := read_json(p))]
        if not finished:
            raise UserError(f'{folder}: no finished eval_<task>.json (made by eval.py --init_from={folder})')
        for path, summary in finished:
            summaries.append((folder, summary))
            if summary['condition'] in ('', 'good'):
                rows = {(r['index'], r['question'], r['answer']): r for r in read_rows(path + 'l')}
                records[folder, summary['task']] = rows
    print(markdown_table(summaries))
    for task in sorted({task for _, task in records}):
        for folder in others:
            before, after = records.get((first, task), {}), records.get((folder, task), {})
            pairs = [(before[key], after[key]) for key in after if key in before]
            if pairs and all(r['samples'] for pair in pairs for r in pair):
                print(f'\n{task}, {folder}: ' + explored(first, pairs))
            if pairs and folder == others[-1]:
                print_gained(task, first, folder, pairs)

def explored(first, pairs):
    """How much of a run's samples the run `first` had found. pairs: [(row of first, row of the run)]."""
    shares = []
    for only_right in (False, True):
        found = n = 0
        for a, b in pairs:
            new = {equations(s['text']) for s in b['samples'] if s['correct'] or not only_right}
            found, n = found + len(new & {equations(s['text']) for s in a['samples']}), n + len(new)
        shares.append(f'{found / max(1, n):.0%} of {n:,}')
    solved = [[any(s['correct'] for s in row['samples']) for row in pair] for pair in pairs]
    before = [a for a, b in solved if b]
    return (f'of its different equation sequences {shares[0]}, and of the right ones {shares[1]} are among '
            f'those of {first}; of the {len(before)} problems that its samples solve, '
            f'{sum(before) / max(1, len(before)):.0%} are solved by {first}')

def print_gained(task, first, last, pairs):
    """Two problems that the run `last` solves and the run `first` does not, with both greedy solutions."""
    gained = [(a, b) for a, b in pairs if b['greedy']['correct'] > a['greedy']['correct']]
    lost = sum(b['greedy']['correct'] < a['greedy']['correct'] for a, b in pairs)
    print(f'\n{task}: of {len(pairs)} problems {last} solves {len(gained)} that {first} does not, and fails '
          f'{lost} that it does.')
    for a, b in gained[:2]:
        print(f'\nQ: {a["question"]}\n   (answer {a["answer"]})')
        print(f'--- {first}\n{a["greedy"]["text"].strip()}\n--- {last}\n{b["greedy"]["text"].strip()}')

def evaluated(sampler, reward_model, problems, prompts, first, shown, start):
    """Draws, judges and scores by the script's settings: yields a line a problem, from index `start` on."""
    greedy, drawn = draw_solutions(sampler, problems, 1, max_new_tokens, 0, shown, prompts), []
    if k:
        drawn = draw_solutions(sampler, problems, k, max_new_tokens, temperature, shown, prompts, first=first,
                               top_k=top_k, top_p=top_p, seed=seed)
    rows = [s.row(tokens=len(s.ids)) for s in drawn]
    if reward_model:  # it learned to read solutions without worked examples before them
        read = [without_examples(s) if shown else s for s in drawn]
        for row, x in zip(rows, final_scores(reward_model, read, micro_tokens, dtype)):
            row['score'] = x
    for n, (p, s) in enumerate(zip(problems, greedy)):
        mine = rows[n * k:(n + 1) * k]
        for row, answer in zip(mine, first_spellings([row['answer'] for row in mine], p.task)):
            row['answer'] = answer
        yield {'index': start + n, 'question': p.question, 'answer': p.answer,
               'greedy': s.row(tokens=len(s.ids)), 'samples': mine}


if __name__ == '__main__':
    if '--compare' in sys.argv[1:]:
        override(globals(), [])  # for its one-line errors; the other arguments are folders
        folders = [a for a in sys.argv[1:] if a != '--compare']
        if not folders or any(f.startswith('--') for f in folders):
            raise UserError('use: python eval.py --compare out/a out/b ...')
        compare(folders)
        sys.exit()

    # 1. the policy, its problems, and what it is shown and told
    settings = override(globals())
    if not init_from:
        raise UserError('which policy? --init_from=out/demo_sft')
    device, dtype = setup(device, dtype, seed)
    shown = load_problems(task, 'val')[:few_shot] if few_shot else []
    start = len(shown) if split == 'val' else 0
    problems = load_problems(task, split)[start:][:n_problems or None]
    folder = find_checkpoint(init_from)
    tok = load_tokenizer(folder)
    if tok.labels and few_shot:
        raise UserError('a return-conditioned policy learned to answer: it takes no few_shot examples')
    if not tok.labels and condition != 'good':
        raise UserError(f'condition = {condition!r}: {init_from} is no return-conditioned policy (rcrl.py)')
    condition = condition if tok.labels else ''
    out_dir = out_dir or (init_from if os.path.isdir(init_from) else '')
    if not out_dir:
        raise UserError('--out_dir=... is needed where init_from is no folder')

    # 2. what the records depend on: an evaluation goes on only with the same
    task_name = os.path.basename(os.path.normpath(task))
    name = f'eval_{task_name}' + (f'_{condition}' if condition in ('bad', 'none') else '')
    summary_file, records_file = (os.path.join(out_dir, name + ending) for ending in ('.json', '.jsonl'))
    keys = 'init_from task split n_problems k temperature top_k top_p scorer few_shot max_new_tokens seed'
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
        return evaluated(sampler, reward_model, problems[i:j], prompts[i:j], first[i:j], shown, start + i)

    chunk = world_size() * max(1, 4 * max_rows // max(1, k))  # enough rows to fill some batches
    resumable(records_file, len(problems), chunk, work, f'{out_dir} on {task_name}', resume='')

    # 4. the metrics
    summary['metrics'] = from_main(lambda: summarize(read_rows(records_file)))
    from_main(lambda: write_json(summary_file, summary))
    warn_truncated(summary['metrics']['truncated'][0], max_new_tokens)
    print(markdown_table([(out_dir, summary)]))
