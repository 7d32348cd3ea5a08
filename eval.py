"""
How good is a policy, and how far does it explore? The paper's measures (Havrilla et al. 2024, section 3):

maj@1    the one greedy sample is right
maj@K    a plain vote over K samples at temperature 0.7 is right
rerank@K the sample that a reward model scores highest is right      (with --scorer)
weighted@K  a vote in which each sample counts by its score is right  (with --scorer)
pass@K   any of K samples is right

and beside them what RL's exploration comes to: unique equation sequences a problem, the share of problems that no sample solves,
and (--compare) how many of a run's equation sequences were among another's samples already.

The metrics are pure functions of records, one a problem, which are written as they come: an evaluation that was stopped
goes on where it was. A sample that did not finish within its budget counts as wrong, here and in training.

$ python eval.py --init_from=out/demo_ei --task=arithmetic --k=16
$ python eval.py --init_from=out/gsm8k_ei --task=gsm8k            # maj@96 and pass@96, on one GPU
$ torchrun --nproc_per_node=8 eval.py --init_from=out/gsm8k_ei --task=gsm8k    # on eight, each with a share of the problems
$ python eval.py --init_from=out/demo_ei --scorer=out/demo_orm    # and rerank@K, by an outcome reward model
$ python eval.py --init_from=out/demo_rcrl --condition=bad        # a return-conditioned policy that is told [BAD]
$ python eval.py --compare out/demo_sft out/demo_ei               # one table, and where the two differ
"""
import json
import os
import sys
from math import comb

import numpy as np

import rewards
from config import UserError, bar, iterate_rows, leave, listen_for_stop, override, write_rows
from model import Transformer, asked_to_stop, find_checkpoint, from_main, rank, setup, world_size
from sample import Example, Sampler, answer, first_numbers, load_tokenizer, refuse_too_long

# -----------------------------------------------------------------------------
# settings
init_from = ''        # the policy: a run's folder (its best/), a Hugging Face folder or a hub name
task = 'arithmetic'   # data/<task>/, or a folder with test.jsonl
split = 'test'        # 'test', 'val' or 'train'
n_problems = 0        # the first ones of the split; 0: all
k = 96                # samples a problem, beside the greedy one; 0: greedy alone
temperature = 0.7     # of the K samples; paper: 0.7 (as recalled)
top_k = 0             # 0: all
top_p = 1.0           # 1: all
scorer = ''           # a reward model (python rewards.py config/demo_orm.py): adds rerank@K and weighted@K
few_shot = 0          # worked examples before the question, the first of the validation slice: for a base model, 2
condition = 'good'    # what a return-conditioned policy (rcrl.py) is told before its lines: 'good', 'bad' or 'none'
max_new_tokens = 256  # budget of every sample; the labels within a return-conditioned policy's solution count
max_rows = 256        # samples decoded at a time
micro_tokens = 16384  # tokens that the scorer reads at a time, padding included
out_dir = ''          # where eval_<task>.json goes; empty: init_from, if that is a folder
overwrite = False     # drop the records of an evaluation with other settings
seed = 0
device = 'auto'       # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'        # of the matrix products: 'auto', 'float32', 'bfloat16'
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# metrics of one problem

def pass_at_k(n, c, k):
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones: 1 - C(n-c, k) / C(n, k),
    the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374); for n = k plainly whether c > 0."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f'pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}')
    return 1.0 - comb(n - c, k) / comb(n, k)


def maj_at_k(answers, correct):
    """Whether the answer most samples gave is right: 1.0 or 0.0. answers: strings in normal form, or None for a sample
    without one, which has no vote. correct: whether each sample is right, or the right answer itself: an answer is right if any
    sample that gave it is. Of answers with equal votes the one given first wins."""
    return weighted_at_k(answers, [1] * len(answers), correct)


def rerank_at_k(scores, correct):
    """Whether the sample with the highest score is right: 1.0 or 0.0. Of equal scores the first wins."""
    return float(correct[max(range(len(scores)), key=lambda i: scores[i])])


def weighted_at_k(answers, scores, correct):
    """Whether the answer with the largest sum of scores is right: 1.0 or 0.0. Ties and unanswered samples as in maj_at_k."""
    total = {}
    for a, s in zip(answers, scores):
        if a is not None:
            total[a] = total.get(a, 0.0) + s
    right = {correct} if isinstance(correct, str) else {a for a, c in zip(answers, correct) if c}
    return float(max(total, key=total.get) in right) if total else 0.0  # max takes the first among equals


def unique_equations(samples):
    """Number of different equation sequences among a problem's samples: the paper's measure of diversity."""
    return len({rewards.equations(s['text']) for s in samples})


# -----------------------------------------------------------------------------
# records

def judge(sample, problem, tokenizer, stop=()):
    """A sample's record: its text, its answer, whether that is right. One that did not finish has no answer and is wrong,
    whatever it says: the budget may have ended within a number."""
    text = tokenizer.decode(sample.ids)
    for s in stop:
        text = text.split(s)[0]
    return {'text': text, 'answer': rewards.extract_answer(text) if sample.finished else None,
            'correct': sample.finished and rewards.is_correct(text, problem.answer),
            'tokens': len(sample.ids), 'finished': sample.finished}


def overlap(before, after):
    """(n, m): of the m different equation sequences among samples `after` of a problem, n are among the samples `before`."""
    old, new = ({rewards.equations(s['text']) for s in samples} for samples in (before, after))
    return len(old & new), len(new)


def answered_example(problem, text, tokenizer):
    """What a base model wrote after worked examples, as a row to learn from or to score: without the examples, up to the line with
    the answer and an EOS."""
    text = rewards.completion(rewards.answered(text).strip())
    prompt, ids = tokenizer.encode_pair(rewards.prompt(problem.question), text)
    return Example(prompt + ids + [tokenizer.eos], len(prompt))


def explore(sampler, problems, path, k, max_new_tokens, temperature, seed, desc, examples=()):
    """Draws k samples of each problem and yields them as [record], a list a problem (samples_of); a record is judge's plus 'ids', a
    completion to learn from. Where a base model was shown worked examples these end with the answer's line and an EOS, whatever came then.

    Each problem is a line of the file `path`, written as it comes. What is there already is not drawn again; since a
    sample depends on seed and question alone, an exploration in pieces, or spread over processes, equals one in a single go."""
    stop, tok = (rewards.NEXT_QUESTION,) if examples else (), sampler.tokenizer
    counts = [len(records) for records in samples_of(path, problems)]
    n_rows = len(counts)
    if n_rows < len(problems) and set(counts) - {k}:  # what is there already would not be what was asked for
        raise UserError(f'{path} holds {counts[0]} samples a question, not k = {k}; go on with that k, or start with --overwrite')
    prompts = [tok.encode_prompt(rewards.prompt(p.question, examples)) for p in problems]
    refuse_too_long(sampler, prompts, max_new_tokens)
    first = first_numbers(prompts, k)
    with open(path if rank() == 0 else os.devnull, 'a', encoding='utf-8') as f:
        chunk = world_size() * max(1, 4 * sampler.max_rows // k)  # problems a time: enough to fill some batches
        progress = bar(desc=desc, total=len(problems))
        progress.update(n_rows)
        for i in range(n_rows, len(problems), chunk):
            todo = problems[i:i + chunk]
            samples = answer(sampler, prompts[i:i + chunk], k, max_new_tokens, temperature, first[i:i + chunk], stop=stop, seed=seed)
            for j, p in enumerate(todo):
                records = [judge(s, p, tok, stop) | {'ids': s.ids} for s in samples[j * k:(j + 1) * k]]
                if examples:
                    for record in records:
                        row = answered_example(p, record['text'], tok)
                        record['ids'] = row.ids[row.n_prompt:]
                f.write(json.dumps({'question': p.question, 'samples': records}) + '\n')
            f.flush()
            progress.update(len(todo))
            if asked_to_stop():
                progress.close()
                leave(f' after the samples of {i + len(todo):,} of {len(problems):,} questions')
        progress.close()
    return samples_of(path, problems)


def samples_of(path, problems):
    """Yields what `path` holds of the problems, a list of records for each: from the disk, a question at a time, since those of all
    questions take gigabytes in every process. Every process has to take each of them. UserError if they are of other questions."""
    rows = iterate_rows(path)  # read by process 0 alone, for all
    for p in problems:
        row = from_main(lambda: next(rows, None))
        if row is None:
            return
        if row['question'] != p.question:
            raise UserError(f'{path} holds samples of other questions; start with --overwrite')
        yield row['samples']


def with_scores(records, scores):
    """Adds each sample's score to its record: the reward model's of its last token; 0 where the sample has no say, since it did
    not finish or has no answer, so that it never wins."""
    return [record | {'score': s[-1].item() if record['finished'] and record['answer'] is not None and len(s) else 0.0}
            for record, s in zip(records, scores)]


def greedy_accuracy(sampler, problems, max_new_tokens, examples=()):
    """maj@1: the share of problems whose greedy solution is right, and its standard error."""
    stop = (rewards.NEXT_QUESTION,) if examples else ()
    prompts = [sampler.tokenizer.encode_prompt(rewards.prompt(p.question, examples)) for p in problems]
    refuse_too_long(sampler, prompts, max_new_tokens)
    samples = answer(sampler, prompts, 1, max_new_tokens, 0, stop=stop, desc='maj@1')
    return mean_and_error([judge(s, p, sampler.tokenizer, stop)['correct'] for s, p in zip(samples, problems)])


def mean_and_error(x):
    """(mean, its standard error); (mean, None) of a single number."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None


def summarize(records):
    """{metric: (mean, standard error over problems)} of a list of records with equally many samples each: maj@1, maj@K,
    pass@k for k = 1, 2, 4 .. K, rerank@K and weighted@K where every sample has a score, and how long and how varied the samples are."""
    values = {'maj@1': [float(r['greedy']['correct']) for r in records]}
    K = len(records[0]['samples'])
    if K:
        correct = [[s['correct'] for s in r['samples']] for r in records]
        # of unfinished samples, older records have answers
        answers = [[s['answer'] if s['finished'] else None for s in r['samples']] for r in records]
        if K > 1:  # maj@1 is the greedy sample's
            values[f'maj@{K}'] = [maj_at_k(a, c) for a, c in zip(answers, correct)]
        if all('score' in s for r in records for s in r['samples']):
            scores = [[s['score'] for s in r['samples']] for r in records]
            values[f'rerank@{K}'] = [rerank_at_k(s, c) for s, c in zip(scores, correct)]
            values[f'weighted@{K}'] = [weighted_at_k(a, w, c) for a, w, c in zip(answers, scores, correct)]
        for k in sorted({2 ** i for i in range(K.bit_length()) if 2 ** i <= K} | {K}):
            values[f'pass@{k}'] = [pass_at_k(K, sum(c), k) for c in correct]
        values['unsolved'] = [float(not any(c)) for c in correct]
        values['unique_equations'] = [unique_equations(r['samples']) for r in records]
    every = [r['samples'] or [r['greedy']] for r in records]
    values['tokens'] = [np.mean([s['tokens'] for s in samples]) for samples in every]
    values['truncated'] = [np.mean([not s['finished'] for s in samples]) for samples in every]
    return {name: mean_and_error(v) for name, v in values.items()}


def read_records(path):
    """(settings, records) of a records file; ({}, []) if there is none. A torn last line, from a run that was killed, is
    dropped."""
    if not os.path.exists(path):
        return {}, []
    rows = []
    with open(path, encoding='utf-8') as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return (rows[0], rows[1:]) if rows else ({}, [])


# -----------------------------------------------------------------------------
# tables

def markdown_table(summaries):
    """{run: its eval_<task>.json} -> a Markdown table, in percent with standard errors where that is the unit."""
    columns = []
    for summary in summaries.values():
        largest = f'pass@{summary["k"]}'
        columns += [m for m in summary['metrics'] if m not in columns and (not m.startswith('pass@') or m == largest)]
    lines = ['| run | task | problems | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 3) + '|']
    for run, summary in summaries.items():
        cells = []
        for metric in columns:
            mean, error = summary['metrics'].get(metric, (None, None))
            if mean is None:
                cells.append('')
            elif '@' in metric or metric in ('truncated', 'unsolved'):
                cells.append(f'{100 * mean:.1f}' + (f' ± {100 * error:.1f}' if error is not None else ''))
            else:
                cells.append(f'{mean:.1f}')
        lines.append(f'| {run} | {summary["task"]} | {summary["problems"]} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def compare(folders):
    """Prints one table of every evaluation found in the folders, and two problems that the last run solved and the first
    did not, with both greedy solutions."""
    summaries, records = {}, {}
    for folder in folders:
        names = sorted(n for n in (os.listdir(folder) if os.path.isdir(folder) else []) if n.startswith('eval_') and n.endswith('.json'))
        if not names:
            raise UserError(f'{folder}: no eval_<task>.json there (python eval.py --init_from={folder} makes one)')
        for name in names:
            with open(os.path.join(folder, name), encoding='utf-8') as f:
                summary = json.load(f)
            several = len({n.removesuffix('_bad.json').removesuffix('_none.json').removesuffix('.json') for n in names}) > 1
            summaries[run_name(folder, summary) + (f' ({summary["task"]})' if several else '')] = summary
            if summary.get('condition', '') in ('', 'good'):
                records[folder, summary['task']] = read_records(os.path.join(folder, name + 'l'))[1]
    print(markdown_table(summaries))
    first, last = folders[0], folders[-1]
    for t in sorted({t for _, t in records}):
        def problem(r):  # two problems may have one question
            return r.get('index'), r['question'], r['answer']
        before = {problem(r): r for r in records.get((first, t), [])}
        both = {f: [(before[problem(r)], r) for r in records.get((f, t), []) if problem(r) in before]
                for f in folders[1:]}
        for folder, pairs in both.items():
            if pairs and all(r['samples'] for pair in pairs for r in pair):
                print(f'\n{t}, {folder}: ' + explored(first, pairs))
        pairs = both.get(last, [])
        gained = [(a, b) for a, b in pairs if b['greedy']['correct'] and not a['greedy']['correct']]
        lost = sum(a['greedy']['correct'] and not b['greedy']['correct'] for a, b in pairs)
        if first != last and pairs:
            print(f'\n{t}: of {len(pairs)} problems {last} solves {len(gained)} that {first} does not, and fails {lost} that it does. '
                  f'The first {min(2, len(gained))} of those gained:')
        for a, b in gained[:2]:
            print(f'\nQ: {a["question"]}\n   (answer {a["answer"]})')
            print(f'--- {first}\n{a["greedy"]["text"].strip()}\n--- {last}\n{b["greedy"]["text"].strip()}')


def run_name(folder, summary):
    """A row's title: the folder, and what a return-conditioned policy was told there."""
    return folder + {'': '', 'good': ' [GOOD]', 'bad': ' [BAD]', 'none': ' (no label)'}[summary.get('condition', '')]


def explored(first, pairs):
    """A sentence on how much of what one run's samples hold was among those of the run `first`. pairs: [(its record, the other's)]"""
    def share(selected):
        counts = [overlap(a['samples'], selected(b)) for a, b in pairs]
        there, of = (sum(column) for column in zip(*counts))
        return f'{100 * there / max(1, of):.0f}% of {of:,}'

    solved = [any(s['correct'] for s in a['samples']) for a, b in pairs if any(s['correct'] for s in b['samples'])]
    return (f'of its different equation sequences {share(lambda r: r["samples"])}, and of the right ones '
            f'{share(lambda r: [s for s in r["samples"] if s["correct"]])} are among the samples of {first}; of the {len(solved)} problems '
            f'that one of its samples solves, {100 * sum(solved) / max(1, len(solved)):.0f}% are solved by one of {first}')


if __name__ == '__main__':
    if '--compare' in sys.argv[1:]:
        override(globals(), [])  # for its one-line errors; the rest of the line are folders
        folders = [a for a in sys.argv[1:] if a != '--compare']
        if not folders or any(f.startswith('--') for f in folders):
            raise UserError('use: python eval.py --compare out/a out/b ...')
        compare(folders)
        sys.exit()

    settings = override(globals())
    if not init_from:
        raise UserError('which policy? --init_from=out/demo_sft')
    if k < 0:
        raise UserError('k must be 0 (greedy alone) or more')
    device, dtype = setup(device, dtype, seed)
    if condition not in ('good', 'bad', 'none') or few_shot < 0:
        raise UserError(f"condition is 'good', 'bad' or 'none', not {condition!r}, and few_shot 0 or more")
    examples = rewards.load_problems(task, 'val')[:few_shot] if few_shot else []
    n_before = len(examples) if split == 'val' else 0
    problems = rewards.load_problems(task, split)[n_before:][:n_problems or None]
    stop = (rewards.NEXT_QUESTION,) if few_shot else ()
    folder = find_checkpoint(init_from)
    tok = load_tokenizer(folder)
    if tok.labels is None:
        if condition != 'good':
            raise UserError(f'condition = {condition!r} is for return-conditioned policies (rcrl.py), and {init_from} is none')
        condition = ''
    elif few_shot:
        raise UserError('a return-conditioned policy learned to answer: it takes no few_shot examples')
    out_dir = out_dir or (init_from if os.path.isdir(init_from) else '')
    if not out_dir:
        raise UserError('--out_dir=... is needed where init_from is no folder')

    # What the records depend on. With the same of it an evaluation goes on; with another it is refused, not mixed.
    task_name = os.path.basename(os.path.normpath(task))
    name = f'eval_{task_name}' + (f'_{condition}' if condition in ('bad', 'none') else '')
    records_file = os.path.join(out_dir, f'{name}.jsonl')
    keys = ('init_from', 'task', 'split', 'n_problems', 'k', 'temperature', 'top_k', 'top_p', 'scorer', 'few_shot', 'max_new_tokens',
            'seed')
    written = {name: os.path.getmtime(os.path.join(find_checkpoint(path), 'config.json'))  # trained anew, a model has other samples or scores
               for name, path in (('weights', folder), ('scorer_weights', scorer)) if path}
    identity = {key: settings[key] for key in keys} | written
    before, records = from_main(lambda: read_records(records_file))
    if before and before != identity:
        changed = [key for key in identity if before.get(key) != identity[key]]
        if not overwrite:
            raise UserError(f'{records_file} holds an evaluation with other settings ({", ".join(changed)}); --overwrite replaces it')
        records = []
    sampler = Sampler(Transformer.from_pretrained(folder, device, dtype), tok, max_rows, dtype, condition or 'none')
    reward_model = rewards.load_reward_model(scorer, sampler.model.config, tok, device, dtype) if scorer else None
    every_prompt = [tok.encode_prompt(rewards.prompt(p.question, examples)) for p in problems]
    refuse_too_long(sampler, every_prompt, max_new_tokens)
    os.makedirs(out_dir, exist_ok=True)
    listen_for_stop()
    first = first_numbers(every_prompt, k)
    from_main(lambda: write_rows(records_file, [identity] + records))
    with open(records_file if rank() == 0 else os.devnull, 'a', encoding='utf-8') as f:
        chunk = world_size() * max(1, 4 * max_rows // max(1, k))  # problems a time: enough rows to fill some batches
        progress = bar(desc=f'{out_dir} on {task_name}', total=len(problems))
        progress.update(len(records))
        for i in range(len(records), len(problems), chunk):
            todo = problems[i:i + chunk]
            prompts = every_prompt[i:i + chunk]
            greedy = answer(sampler, prompts, 1, max_new_tokens, 0, stop=stop)
            drawn = []
            if k:
                drawn = answer(sampler, prompts, k, max_new_tokens, temperature, first[i:i + chunk], top_k=top_k, top_p=top_p, stop=stop, seed=seed)
            judged = [judge(s, todo[j // k], tok, stop) for j, s in enumerate(drawn)]
            if scorer:  # the reward model reads a solution as it was trained to, without the few-shot examples
                rows = [answered_example(todo[j // k], record['text'], tok) if few_shot else
                        Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for j, (s, record) in enumerate(zip(drawn, judged))]
                judged = with_scores(judged, rewards.score(reward_model, rows, micro_tokens, dtype))
            for j, p in enumerate(todo):
                record = {'index': n_before + i + j, 'question': p.question, 'answer': p.answer,
                          'greedy': judge(greedy[j], p, tok, stop), 'samples': judged[j * k:(j + 1) * k]}
                f.write(json.dumps(record) + '\n')
                records.append(record)
            f.flush()
            progress.update(len(todo))
            if asked_to_stop() and len(records) < len(problems):
                progress.close()
                leave(f' after {len(records)} of {len(problems)} problems', resume='')
        progress.close()

    summary = {'task': task_name, 'split': split, 'problems': len(records), 'k': k, 'temperature': temperature, 'condition': condition,
               'init_from': init_from, 'metrics': summarize(records)}
    with open(os.path.join(out_dir, f'{name}.json') if rank() == 0 else os.devnull, 'w') as f:
        json.dump(summary, f, indent=2)
    truncated = summary['metrics']['truncated'][0]
    if truncated > 0.2:
        print(f'warning: {100 * truncated:.0f}% of the samples did not finish within max_new_tokens = {max_new_tokens}')
    print(markdown_table({run_name(out_dir, summary): summary}))
