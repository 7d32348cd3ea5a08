"""
Problems, the check of their answers, and every kind of reward. A task is a folder with train.jsonl and test.jsonl, rows
{"question", "answer"} in GSM8K's form: one step a line with <<a+b=c>> annotations, then "#### n". Whoever trains, samples or
evaluates takes the problem, the prompt and the answer check from here, so that they can't disagree on what is right.

As a script it trains the learned rewards. An outcome reward model (ORM, Havrilla et al. 2024) reads a policy's solutions and
learns which of them end in the right answer. A process reward model (PRM, Gao et al. 2024) learns for each step how often
the policy still gets there from it, counted over fresh samples (Wang et al. 2023, Math-Shepherd). Both are the transformer
with a scalar head, whose logistic function is a probability.

$ python data/gsm8k/prepare.py && python rewards.py --task=gsm8k    # counts of a task; does the check accept its own answers?
$ python rewards.py config/demo_orm.py                              # CPU: the demo's ORM, after config/demo_sft.py
$ python rewards.py config/demo_prm.py --init_from=resume           # goes on where a stopped run was
"""
import ast
import json
import math
import operator
import os
import random
import re
import shutil
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F

from config import Log, UserError, bar, leave, listen_for_stop, override, read_rows, read_run, resuming, start_run
from model import (Checkpoints, Transformer, asked_to_stop, autocast, backward, config_from_hf, disk_needed, enough_memory, find_checkpoint,
                   finish_gradients, from_all, from_main, learning_rate, make_optimizer, memory_needed, rank, read_json, setup,
                   sum_over_processes, world_size)
from sample import Sampler, answer, check_room, check_same_tokenizer, collate, epoch_order, load_tokenizer, my_micro_batches, real_cells

# -----------------------------------------------------------------------------
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
# what to train
kind = ''                 # 'orm' or 'prm'; '': only count the task's problems
init_from = 'out/sft'     # the policy whose solutions are judged, or 'resume'
base = ''                 # the weights that the reward model starts from; '': the policy's
# samples and labels
n_questions = 0           # rows of train to sample, the first ones; 0: all
k = 8                     # solutions a question
samples = ''              # a file with the policy's k solutions of these questions, so that none are drawn: ei.py's samples_round1.jsonl
temperature = 1.0         # of the solutions, and of the rollouts that judge their steps
max_new_tokens = 256      # budget of a solution
max_rows = 256            # samples decoded at a time
balance = True            # ORM: as many right as wrong solutions, of each question where it has both
label_at = 'token'        # ORM: every 'token' of a solution carries its label, or every 'step' end
rollouts = 8              # PRM: samples from the end of each step
step_label = 'share'      # PRM: the 'share' of them that reach the right answer, or whether 'any' does
heldout = 256             # questions of the validation slice on whose solutions the reward model is judged
# optimisation, as in sft.py
epochs = 2.0
batch_size = 64
micro_tokens = 16384
grad_checkpointing = False  # compute activations again in backward: about a third more time, and memory for one block's alone
shard = 'auto'            # over processes: 'ddp' (each has all weights), 'fsdp' (each has a part), or 'auto', by what fits
lora_rank = 0             # above 0: adapters of that rank learn and all else is frozen; the export has them merged, and beside
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
lr = 1e-5
min_lr = 1e-6
warmup = 0.03
weight_decay = 0.0
grad_clip = 1.0
# run
save_interval = 200       # updates between states that a stopped run goes on from; 0: none
keep_states = 1           # states that stay when the run has finished, e.g. to go on with more epochs; 0: none
out_dir = 'out/orm'
overwrite = False         # replace the run that out_dir holds
seed = 0
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'            # of the matrix products: 'auto', 'float32', 'bfloat16'
# -----------------------------------------------------------------------------

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
VALIDATION_ROWS = 256     # the last rows of train.jsonl: what is chosen is chosen on them, never on test
MAX_NUMBER = 64           # characters of a number; a longer one is a model that lost its way
MAX_BOXED = 256           # characters within \boxed{}


# ---- Problems and prompts ----

class Problem(NamedTuple):
    """question; solution: the whole worked text, "#### n" included; answer: the final answer as extract_answer gives it."""
    question: str
    solution: str
    answer: str


def read_problems(path):
    """A .jsonl file -> list[Problem]. The first malformed row is a UserError "file:line: reason"."""
    problems = []
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                problems.append(_problem(line))
            except ValueError as e:
                raise UserError(f'{path}:{number}: {e}') from None
    return problems


def _problem(line):
    try:
        row = json.loads(line.decode('utf-8'))
    except (ValueError, RecursionError) as e:  # RecursionError: json's answer to '[[[[...'
        raise ValueError(f'not JSON: {e}') from None
    if not isinstance(row, dict):
        raise ValueError(f'a row is an object {{"question": ..., "answer": ...}}, not a {type(row).__name__}')
    for key in ('question', 'answer'):
        if not isinstance(row.get(key), str):
            raise ValueError(f'"{key}" is missing' if key not in row else f'"{key}" is not a string')
        if not row[key].strip():
            raise ValueError(f'"{key}" is empty')
        row[key].encode('utf-8')  # half a surrogate pair passes JSON, and would fail in the tokenizer, far from its line
    answer = extract_answer(row['answer'])
    if answer is None:
        raise ValueError('"answer" has no final answer: it must end in "#### <number>" (or hold a \\boxed{...})')
    return Problem(row['question'], row['answer'], answer)


def load_problems(task, split):
    """
    -> list[Problem], in the file's order. task: a name, for data/<task>/, or a folder's path. split: 'train' (train.jsonl
    but for its last 256 rows), 'val' (those 256) or 'test'. UserError where there is no such file or a row is malformed.
    """
    if split not in ('train', 'val', 'test'):
        raise UserError(f"unknown split {split!r}: it is 'train', 'val' or 'test'")
    known = sorted(d for d in os.listdir(DATA) if os.path.exists(os.path.join(DATA, d, 'prepare.py')))
    folder = os.path.join(DATA, task) if task in known else task
    path = os.path.join(folder, 'test.jsonl' if split == 'test' else 'train.jsonl')
    if not os.path.isfile(path):
        mend = f'run `python data/{task}/prepare.py`' if task in known else f'{task!r} is no folder with it, nor one of {known}'
        raise UserError(f'no {path}: {mend}')
    problems = read_problems(path)
    if len(problems) <= (0 if split == 'test' else VALIDATION_ROWS):
        raise UserError(f'{path} has too few rows, {len(problems)}: the last {VALIDATION_ROWS} of train are for validation')
    return {'train': problems[:-VALIDATION_ROWS], 'val': problems[-VALIDATION_ROWS:], 'test': problems}[split]


NEXT_QUESTION = '\nQuestion:'  # where a base model that was shown examples goes on to a question of its own


def prompt(question, examples=()):
    """What the model reads: worked examples (Problems) for a base model that has never seen the form, then the question. No space
    at the end, since tokenizers join the space to the word after it."""
    shown = ''.join(f'{prompt(p.question)}{completion(p.solution)}\n\n' for p in examples)
    return f'{shown}Question: {question}\nAnswer:'


def completion(solution):
    """What follows the prompt, up to the EOS."""
    return ' ' + solution


# ---- Answer check ----

NUMBER = re.compile(r'([-+$£€\s]*)([.,]?[0-9][0-9.,]*)(?: ?/ ?([0-9][0-9.,]*))?'
                    # there the number ends: 1e5, 1/2/3, 9^2, 9{.}5, 3\ 4, 2 \sqrt{3} are none; 18\text{ kg} is 18
                    r'(?![0-9.,]*(?:(?:(?:[eE]| ?/ ?)[-+]?)?[0-9]|\^| ?_?\{|[½⅓⅔¼¾]|[\'_][0-9]| ?(?:\\[!,;: ]|~)(?:\\[!,;: ]|[~ ])*[0-9]|'
                    r' ?\\(?!(?:text|mathrm)[a-z]*\{[^{}0-9]*\}(?![0-9])|boxed|end|q?quad)[A-Za-z]))(?: ?%)?')
DIGITS = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
MINUS = str.maketrans('\u2212\u2013', '--')  # the minus sign and the en dash
# LaTeX: 1{,}800 and 1,\!800; 12\,000; \frac{a}{b}, also after a whole number, but with no other digits beside it
COMMA = re.compile(r'(?<=[0-9])(?:\\!)?\{+,\}+(?:\\!)?(?=[0-9])|(?:\\!)?(?<!\\),(?:\\!)?')
THOUSANDS = re.compile(r'(?<![0-9.,])[0-9]{1,3}(?:\\,[0-9]{3})+(?![0-9])')
FRACTION = re.compile(r'(?:(?<![0-9.,])(?:([0-9]{1,64})(?:\\[!,;: ]|[~ ])*)?|(?<=(,)))\\[cdt]?frac ?'
                      r'(?:\{ ?(-?[0-9][0-9.,]{0,63}) ?\}|([0-9])) ?(?:\{ ?([0-9][0-9.,]{0,63}) ?\}|([0-9]))(?![.,]?[0-9])')


def number_text(x):
    """Fraction -> its one spelling: '18', '-0.25', and '1/3' where no decimal of at most 64 places is exact."""
    for places in range(MAX_NUMBER + 1):
        scaled = x * 10 ** places
        if scaled.denominator == 1:
            whole, rest = divmod(abs(scaled.numerator), 10 ** places)
            return ('-' if x < 0 else '') + (f'{whole}.{rest:0{places}d}' if places else str(whole))
    return f'{x.numerator}/{x.denominator}'


def _digits(text):
    """'1,800.' -> Fraction(1800); None for what is no number: '1,2,3', '1.2.3', '1.800,50'."""
    text = text.rstrip('.,')
    return Fraction(text.replace(',', '')) if text and DIGITS.fullmatch(text) else None


def _number(text, whole):
    """The number that text starts with or, if whole, that it is; as number_text spells it, or None."""
    m = NUMBER.match(text)
    if m is None or whole and m.end() != len(text) or max(len(t or '') for t in m.groups()) > MAX_NUMBER:
        return None
    sign, top, bottom = m.groups()
    top, bottom = _digits(top), _digits(bottom or '1')
    if top is None or not bottom or sign.count('-') > 1:  # not bottom: no number, or 0
        return None
    return number_text((-top if '-' in sign else top) / bottom)


def _fraction(m):
    r"""A match of FRACTION as a/b: \frac{4}{5} -> 4/5, 1\frac{4}{5} -> 9/5; as it was where it is neither: 1\frac{5}{4}."""
    whole, comma, top, bottom = m[1], m[2], m[3] or m[4], m[5] or m[6]
    if whole is None:
        return f'{" " if comma else ""}{top}/{bottom}'  # (3,\frac{1}{2}) is a list
    proper = top.isdigit() and bottom.isdigit() and int(top) < int(bottom)
    return f'{int(whole) * int(bottom) + int(top)}/{bottom}' if proper else m[0]


def _plain(text):
    """LaTeX's notation of numbers, spelled plainly. Digits are joined only where it says that they are one number."""
    text = COMMA.sub(',', re.sub(r'\\+([$%])', r'\1', text.translate(MINUS)))
    return FRACTION.sub(_fraction, THOUSANDS.sub(lambda m: m[0].replace('\\,', ''), text))


def _boxed(given):
    r"""What \boxed{} holds, normalised: a number's one spelling, else the text without its white space."""
    text = re.sub(r'\s|\\[!,;: ]|~', ' ', _plain(re.sub(r'\s+', ' ', given)))
    text = re.sub(r'^ *\\(?:text|mathrm|mathbf)[a-z]*\{([^{}]*)\} *$', r'\1', text)
    text = re.sub(' ?/ ?', '/', ' '.join(text.split()))
    number = _number(text, whole=True)
    if number is not None:
        return number
    joined = re.sub(r'(?<![0-9.]) | (?![0-9.])', '', text)  # 1 2 is not 12 ...
    if joined != text and _boxed(joined) == joined:         # ... nor 1, 234 a number
        return joined
    return text or None if text == given else _boxed(text)  # what is normalised stays as it is


def extract_answer(text):
    r"""
    The final answer of a solution as a string with one spelling a value ('18.0', '018' and '18' are '18'), or None.
    The last "####" of the text decides, alone: a number must follow it on its line. Only where there is no "####" does the
    last \boxed{...} count: a number in the same notations, and \boxed{\text{18}} and \boxed{1 / 2} too, or any other text,
    such as \boxed{1 2}, \boxed{1, 234} and \boxed{1 1/2}: what stands apart is never joined to a number. Linear in the
    text's length.

    after ####                                      answer    why
    18  ####18  18.0  18.  018  +18  $18            18        one value, one spelling
    18%                                             18        GSM8K answers "what percentage" so
    18 apples, 18, 18 and a long tail, 18\nThe ...  18        what follows the number is not read
    1 1/2                                           1         nor is a mixed number
    17 ... #### 18                                  18        the last marker decides
    17 ... ####    18 ... ####.                     None      even where it has nothing to say
    -18  \u221218  - 18  -$18  $-18                 -18       \u2212 is the unicode minus; so for the en dash
    1,800  1,800.00                                 1800      thousands commas in their places
    1{,}800  1,\!800  1\,800  \$1{,}800             1800      so LaTeX writes them
    1,2,3  18,00  1.800,50  1.2.3  3\,4  3\ 4       None      which number is meant is a guess
    1\frac{4}{5}  1\frac45  1 \frac{4}{5}           1.8       a whole number and a proper fraction; 1\frac{5}{4} is None
    9^2  9{.}5  2\sqrt{3}  \frac{9}{2}5             None      the number goes on, as no number that is read here
    1/2  1 / 2  .5  \frac{1}{2}  \frac12            0.5       a fraction is a number: 3/4 is not a right answer to 3
    1/3                                             1/3       compared exactly
    1/0  1e5  --18  1/2/3                           None
    .   ,   (nothing)   eighteen   **18**   x = 18  None      the number follows the marker, in digits
    \n18                                            None      it is on the marker's line
    65 digits or more                               None
    """
    if '####' in text:
        line = _plain(' '.join(text[text.rindex('####') + 4:].split('\n', 1)[0].split()))
        # any sign and number fit into 4 * MAX_NUMBER, where the regular expression has no room to backtrack for long
        return _number(line[:4 * MAX_NUMBER], whole=False)
    start = text.rfind('\\boxed{')
    if start < 0:
        return None
    depth, start = 1, start + len('\\boxed{')
    for end in range(start, min(len(text), start + MAX_BOXED)):
        depth += {'{': 1, '}': -1}.get(text[end], 0)
        if depth == 0:
            return _boxed(text[start:end])
    return None  # never closed, or too long


def is_correct(completion, answer):
    """Is the completion's final answer the given one (a number, or a text with its own #### or \\boxed)? None equals nothing."""
    if answer is None:
        return False
    answer = str(answer)
    wanted = extract_answer(answer) if '####' in answer or '\\boxed{' in answer else _boxed(answer)
    return wanted is not None and extract_answer(completion) == wanted


# ---- Steps and equations ----

ANNOTATION = re.compile(r'<<([^<>=\n]+=[^<>=\n]+)>>')
OPERAND = r'-?(?:[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})'
# No "= c" is a match too, so that a long sum without one is passed over once and not from each of its terms. "= 5x" is none.
PLAIN = re.compile(rf'(?<![\w.+*/)])({OPERAND}(?:\s*[-+*/x×÷]\s*{OPERAND})+)(?:\s*=\s*({OPERAND})(?![0-9]|[\w.]*[^\W\d]))?')
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv}  # GSM8K writes // twice


def _work(solution):
    """The text before the marker that decides the answer."""
    return solution.rpartition('####')[0].rstrip('#') if '####' in solution else solution


def answered(text):
    """The text up to the end of the line with the marker that decides its answer: without what a base model writes after it."""
    head, marker, tail = text.rpartition('####')
    return head + marker + tail.split('\n')[0] if marker else text


def steps(solution):
    """The lines that lead to the answer, in order; blank lines are no steps."""
    return [line for line in _work(solution).split('\n') if line.strip()]


def equations(solution):
    """
    -> tuple of 'lhs=rhs', spaces dropped, in order: the calculator annotations <<lhs=rhs>>; where a solution has none, every
    `a op b = c` (of two operands or more) that its text spells out, with x × ÷ written as * and /, and $ and commas dropped.
    """
    text = _work(solution)
    found = [''.join(e.split()) for e in ANNOTATION.findall(text)]
    if not found:
        plain = PLAIN.finditer(re.sub('[$,]', '', text).translate(MINUS))
        found = [''.join(f'{m[1]}={m[2]}'.split()).translate(str.maketrans('x×÷', '**/')) for m in plain if m[2]]
    return tuple(found)


def results(solution):
    """The right-hand sides of its equations, in order, in the one spelling of a number (None for what is none)."""
    return [_number(e.rpartition('=')[2], whole=True) for e in equations(solution)]


def without_equation(problems):
    """How many of the problems' solutions have no equation, so that the dense heuristic pays none of their steps."""
    return sum(not equations(p.solution) for p in problems)


def evaluate(expression):
    """'(12+3)*2' -> Fraction(30), by + - * / // and brackets alone; anything else: ValueError or SyntaxError."""
    if len(expression) > 200 or not re.fullmatch(r'[-+*/().0-9\s]+', expression):
        raise ValueError(f'not arithmetic: {expression[:200]!r}')
    expression = re.sub(r'(?<![0-9.])0+(?=[0-9])', '', expression.strip())  # to Python, 05 is no number

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(ast.get_source_segment(expression, node))  # its digits, so that 0.1 is 1/10
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f'not arithmetic: {expression!r}')

    return value(ast.parse(expression, mode='eval').body)


def annotation_is_right(equation):
    """'0.2*50=10' -> True: both sides have exactly one value."""
    try:
        left, right = equation.split('=')
        return evaluate(left) == evaluate(right)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return False


# ---- Rewards: a batch of solutions -> (B, T), a reward for each of their tokens ----

class Response(NamedTuple):
    """A sampled solution as the rewards see it. Its actions are `ids`; a prefix that it was given (backtracking) is no action."""
    problem: Problem
    prefix: str     # steps of the reference solution that it was started from, mostly ''
    ids: list       # what was sampled, EOS included
    lines: list     # [(number of its last token in ids, text)] of its steps; the last one, with the answer, ends with the ids
    finished: bool
    correct: bool   # finished, and with the right answer


def step_lines(ids, tokenizer):
    """Sampled ids (at least one) -> [(number of the last token, text)] of their lines that are not blank. The last line goes
    up to the last id, so that its reward is the last action's."""
    lines, start = [], 0
    for end, token in enumerate(ids):
        if token in tokenizer.newline_ids:
            line = tokenizer.decode(ids[start:end + 1]).strip()
            lines += [(end, line)] if line else []
            start = end + 1
    rest = tokenizer.decode(ids[start:]).strip()
    if rest or not lines:
        return lines + [(len(ids) - 1, rest)]
    return lines[:-1] + [(len(ids) - 1, lines[-1][1])]


def respond(problem, sample, tokenizer, prefix='', stop=()):
    """A sample.Sample of the problem, drawn after the prefix's text, as a Response. Of one that ended by a stop string the text
    before that counts; the ids stay, as actions that the policy took, in its last line."""
    text, lines = tokenizer.decode(sample.ids), step_lines(sample.ids, tokenizer)
    for s in stop:
        text = text.split(s)[0]
        if len(lines) > 1 and lines[-1][1].startswith(s.strip()):
            lines = lines[:-2] + [(lines[-1][0], lines[-2][1])]
    right = sample.finished and is_correct(prefix + text, problem.answer)
    return Response(problem, prefix, sample.ids, lines, sample.finished, right)


def responses_of(problems, found, tokenizer):
    """What eval.explore found, a list of records for each problem, as lists of Responses, without the empty ones."""
    return [[Response(p, '', r['ids'], step_lines(r['ids'], tokenizer), r['finished'], r['correct']) for r in records if r['ids']]
            for p, records in zip(problems, found)]


def at_positions(responses, positions, values):
    """(B, T) zeros, T the longest response, with values[i] at the actions positions[i] of row i."""
    rewards = torch.zeros(len(responses), max(len(r.ids) for r in responses))
    for row, where, what in zip(rewards, positions, values):
        row[torch.as_tensor(where)] = torch.as_tensor(what, dtype=torch.float32)
    return rewards


def step_ends(response):
    return [end for end, _ in response.lines]


def sparse_rewards(responses, right=1.0, wrong=0.0, truncated=0.0):
    """The outcome, on the last action: right, wrong, or truncated where the budget ended before the solution did."""
    outcomes = [truncated if not r.finished else right if r.correct else wrong for r in responses]
    return at_positions(responses, [[len(r.ids) - 1] for r in responses], [[o] for o in outcomes])


def dense_rewards(responses):
    """The heuristic of Havrilla et al. 2024: a step whose result equals one of the reference solution's results that are still
    ahead earns 1 / (number of reference results), on its last token. The first such result is the one that it meets: those
    before it count as passed, skipped or merged into this step, and earn nothing any more. So each result is met at most once,
    a solution earns 1 at most, and a step that repeats another or leads elsewhere earns nothing, nor does one that the
    budget cut off, perhaps within a number."""
    values = []
    for r in responses:
        wanted, earned = results(r.problem.solution), []
        ahead = wanted[len(results(r.prefix)):]
        for end, line in r.lines:
            earned.append(0.0)
            for result in results(line) if r.finished or end < len(r.ids) - 1 else []:
                if result is not None and result in ahead:
                    ahead = ahead[ahead.index(result) + 1:]
                    earned[-1] += 1 / len(wanted)
        values.append(earned)
    return at_positions(responses, [step_ends(r) for r in responses], values)


def step_scores(response, scores):
    """(K,) a learned model's scores of its K steps. scores: (n,), one an action. A step that the budget cut off counts 0."""
    found = scores[step_ends(response)]
    if not response.finished:
        found[-1] = 0.0
    return found


def orm_rewards(responses, scores):
    """The ORM's score of the whole solution, on the last action; 0 for one that the budget cut off. scores: for each response
    (n,), one score an action."""
    values = [step_scores(r, s)[-1:] for r, s in zip(responses, scores)]
    return at_positions(responses, [[len(r.ids) - 1] for r in responses], values)


def orm_dense_rewards(responses, scores, refine='none', eta=0.0):
    """The ORM's score of the solution so far, at the end of every step: raw or refined, as in prm_rewards."""
    return prm_rewards(responses, scores, refine, eta)


def clip_rewards(r, eta):
    """Clip of Gao et al. 2024: min(r - eta, 0). r: (K,) the scores of a solution's steps. No step earns more than nothing, so
    that none is worth adding."""
    return (r - eta).clamp(max=0)


def delta_rewards(r):
    """Delta of Gao et al. 2024: r_k - r_{k+1} for k < K - 1, r_{K-1} at k = K - 1, and 0 at the last step K, which holds the
    answer and has the outcome's reward. r: (K,). From step k on they sum to r_k, whatever comes after it."""
    following = torch.cat([r[1:-1], r.new_zeros(min(len(r), 2))])  # r_{k+1}; 0 after K - 1, and in place of the answer
    steps = torch.cat([r[:-1], r.new_zeros(min(len(r), 1))])
    return steps - following


REFINEMENTS = {'none': lambda r, eta: r, 'clip': clip_rewards, 'delta': lambda r, eta: delta_rewards(r),
               'clip_delta': lambda r, eta: delta_rewards(clip_rewards(r, eta))}


def prm_rewards(responses, scores, refine='none', eta=0.0):
    """The PRM's score of each step on the step's last token: raw (unbounded: repeating good steps pays), or refined by 'clip',
    'delta' or 'clip_delta' (Gao et al. 2024). scores: for each response (n,), one score an action.

    No step of a solution that the budget cut off earns more than 0 (ours). So each of its steps earns at most what it would
    in the same solution, finished, whatever a finished last step is scored; hence so does the return from every step on."""
    values = [REFINEMENTS[refine](step_scores(r, s), eta) for r, s in zip(responses, scores)]
    values = [v if r.finished else v.clamp(max=0) for r, v in zip(responses, values)]
    return at_positions(responses, [step_ends(r) for r in responses], values)


def score_quantile(lines, scores, q):
    """The q-quantile of the scores of steps that do not end their solution, as Clip's eta: Delta pays nothing for the last
    step, which holds the answer. lines: step_lines of each solution, also of an empty one; scores: for each (n,). UserError
    where there is no such step."""
    found = torch.cat([torch.zeros(0)] + [s[[end for end, _ in row[:-1]]] for row, s in zip(lines, scores)])
    if not len(found):
        raise UserError('eta_quantile: no sampled solution has a step before its last; set eta')
    return found.quantile(q).item()


# ---- Reward models ----

def check_context(config, policy, name):
    """UserError if a model reads fewer tokens than the policy writes. config, policy: their ModelConfigs."""
    if config.block_size < policy.block_size:
        raise UserError(f'{name} has a context of {config.block_size} tokens, shorter than the policy\'s '
                        f'{policy.block_size}')


def load_reward_model(path, policy, tokenizer, device, dtype=torch.float32, shard='none', kinds=('orm', 'prm')):
    """A trained reward model of one of the kinds, without gradients. UserError if it has no scalar head or one of another kind,
    was made for another tokenizer, or has a shorter context than the policy (its ModelConfig)."""
    check_same_tokenizer(load_tokenizer(path), tokenizer, f'the reward model {path} and the policy')
    model = Transformer.from_pretrained(path, device, dtype, shard=shard, product_dtype=dtype)
    if model.value_head is None:
        raise UserError(f'{path} is no reward model: it has no scalar head (python rewards.py config/demo_orm.py trains one)')
    if model.head_kind not in kinds:
        raise UserError(f'the scalar head of {path} is of kind {model.head_kind or "unknown, an old file"}, not '
                        f'{" or ".join(kinds)}')
    check_context(model.config, policy, f'the reward model {path}')
    return model.requires_grad_(False)


@torch.no_grad()
def score(model, examples, max_tokens, dtype=torch.float32):
    """For each example (ids, n_prompt) the probability that the reward model gives to every prefix of what follows the
    prompt: a list of (n,) fp32 on the CPU, n = len(ids) - n_prompt, the t-th one having read the t-th token. A row that is
    longer than the model's context has scores of 0."""
    scores = {}
    fits = [i for i, e in enumerate(examples) if len(e.ids) <= model.config.block_size]
    for micro, weight in my_micro_batches(fits, max_tokens, lambda i: len(examples[i].ids)):
        ids, actions = collate([examples[i] for i in micro], model.embed.weight.device, model.config.block_size)
        cells = real_cells([len(examples[i].ids) for i in micro], ids.shape[1], ids.device)
        with autocast(ids.device, dtype):
            p = model.run(values_at, ids, actions, cells).sigmoid().cpu()
        for i, s in zip(micro, p.split([len(examples[i].ids) - examples[i].n_prompt for i in micro])):
            scores[i] = s
    scores = {i: s for part in from_all(scores) for i, s in part.items()}
    return [scores[i] if i in scores else torch.zeros(len(e.ids) - e.n_prompt) for i, e in enumerate(examples)]


def values_at(model, ids, at, cells=None):
    """The scalar head's outputs (N,) at the N positions of ids (B, T) where `at` (B, T) is True. cells: sample.real_cells."""
    return model.values(model.trunk(ids, cells=cells)[at])


class Labelled(NamedTuple):
    """A solution to learn from. labels: for each id from n_prompt on a probability, or nan where it has no label."""
    ids: list
    n_prompt: int
    labels: list
    unlearned = ()  # as in sample.Example


def outcome_labels(response, label_at):
    """The ORM's labels: whether the whole solution is right, at every token or at every step's end."""
    ends = set(step_ends(response))
    return [float(response.correct) if label_at == 'token' or i in ends else math.nan for i in range(len(response.ids))]


def balanced(groups, rng):
    """groups: each question's responses. -> as many right as wrong solutions of each question, each text once; of the questions
    that have one kind alone, a solution each, as many right ones as wrong ones."""
    chosen, alone = [], {True: [], False: []}
    for group in groups:
        distinct = list({tuple(r.ids): r for r in group}.values())
        right, wrong = [r for r in distinct if r.correct], [r for r in distinct if not r.correct]
        n = min(len(right), len(wrong))
        chosen += rng.sample(right, n) + rng.sample(wrong, n)
        if distinct and not n:
            alone[distinct[0].correct].append(distinct[0])
    n = min(len(alone[True]), len(alone[False]))
    return chosen + alone[True][:n] + alone[False][:n]


def step_prefix(response, end, tokenizer):
    """(problem, question as ids, the solution's ids up to the step's end): where rollouts that judge a step start."""
    return response.problem, tuple(tokenizer.encode_prompt(prompt(response.problem.question))), tuple(response.ids[:end + 1])


def rollouts_from(sampler, prefixes, counts, max_new_tokens, temperature, seed):
    """For each prefix (step_prefix) whether each of counts[i] samples from it reaches the right answer, within what it leaves of a
    solution's budget. A prefix is prefilled once for all of its samples. -> [[bool]]"""
    starts = [list(question + ids) for (_, question, ids), count in zip(prefixes, counts) for _ in range(count)]
    left = [max_new_tokens - len(ids) for (_, _, ids), count in zip(prefixes, counts) for _ in range(count)]
    drawn = iter(answer(sampler, starts, 1, [max(1, n) for n in left], temperature, seed=seed) if starts else [])
    outcomes = []
    for (problem, _, ids), count in zip(prefixes, counts):
        text = sampler.tokenizer.decode(ids)
        outcomes.append([s.finished and len(ids) < max_new_tokens and is_correct(text + sampler.tokenizer.decode(s.ids), problem.answer)
                         for s in (next(drawn) for _ in range(count))])
    return outcomes


def step_success(sampler, responses, rollouts, max_new_tokens, temperature, seed):
    """For each response the share of `rollouts` samples from the end of each of its steps that reach the right answer; for the
    last step whether the response did. Equal prefixes are sampled once."""
    places = [[step_prefix(r, end, sampler.tokenizer) for end in step_ends(r)[:-1]] for r in responses]
    prefixes = list(dict.fromkeys(place for row in places for place in row))
    outcomes = rollouts_from(sampler, prefixes, [rollouts] * len(prefixes), max_new_tokens, temperature, seed)
    share = {place: sum(right) / rollouts for place, right in zip(prefixes, outcomes)}
    return [[share[place] for place in row] + [float(r.correct)] for r, row in zip(responses, places)]


def labels_loss(model, rows):
    """Summed binary cross-entropy of the known labels of some Labelled rows, a scalar."""
    ids, actions = collate(rows, model.embed.weight.device, model.config.block_size)
    labels = torch.tensor([x for row in rows for x in row.labels], device=ids.device)
    known = ~labels.isnan()
    logits = values_at(model, ids, actions, real_cells([len(row.ids) for row in rows], ids.shape[1], ids.device))
    return F.binary_cross_entropy_with_logits(logits[known], labels[known], reduction='sum')


def fit(model, rows, steps, log, *, batch_size=64, micro_tokens=16384, lr=1e-5, min_lr=1e-6, warmup=0.03, weight_decay=0.0,
        grad_clip=1.0, seed=0, dtype=torch.float32, out_dir='', save_interval=0, resume=False):
    """Trains a reward model in place on a list of Labelled (at least batch_size): binary cross-entropy, the mean over an
    update's labels. log(step, **metrics) gets the loss. out_dir, if given, gets states every save_interval updates and when a stop is
    asked for, and resume goes on from the newest one. UserError if the loss is not finite."""
    device, optimizer, per_epoch = model.embed.weight.device, make_optimizer(model, lr, weight_decay), len(rows) // batch_size
    parameters, checkpoints = [p for p in model.parameters() if p.requires_grad], Checkpoints(out_dir)
    state = checkpoints.load({'model': model}, optimizer) if resume else None
    for step in bar(range(state['step'] if state else 0, steps), desc='reward model'):
        order = epoch_order(rows, batch_size, seed, step // per_epoch)  # the rest of an epoch's rows sits it out
        batch = [rows[i] for i in order[step % per_epoch * batch_size:][:batch_size]]
        n_labels, total = sum(not math.isnan(x) for row in batch for x in row.labels), 0.0
        for micro, weight in my_micro_batches(batch, micro_tokens):
            with enough_memory(f'update {step + 1}, a micro-batch of {len(micro)} rows',
                               f'lower micro_tokens = {micro_tokens}, or set grad_checkpointing'), autocast(device, dtype):
                loss = weight * model.run(labels_loss, micro) / n_labels
                backward(loss, model)
            total += loss.item()
        norm = finish_gradients(parameters, model.shard, grad_clip)
        total = sum_over_processes(torch.tensor(total, dtype=torch.float64)).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(f'update {step + 1}: loss {total}, gradient norm {norm}; stopped (a lower lr helps most often)'
                            + (f'. {checkpoints.keep_batch(step + 1, batch)}' if out_dir else ''))
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, lr, min_lr, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
            log(step + 1, loss=total, lr=optimizer.param_groups[0]['lr'], grad_norm=norm)
        if out_dir:
            stops = asked_to_stop() and step + 1 < steps
            if stops or step + 1 == steps or save_interval and (step + 1) % save_interval == 0:
                checkpoints.save(step + 1, {'model': model}, optimizer, {'step': step + 1})
            if stops:
                leave(f' after update {step + 1} of {steps}')


def auroc(scores, labels):
    """The probability that a right one scores above a wrong one, ties counting half; nan if there is but one kind."""
    s, y = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.bool)
    right, wrong = s[y], s[~y].sort().values
    below, up_to = torch.searchsorted(wrong, right), torch.searchsorted(wrong, right, right=True)
    return ((below + up_to).double().mean() / 2 / max(1, len(wrong))).item() if len(right) and len(wrong) else math.nan


def calibration_error(scores, labels, bins=10):
    """Expected calibration error: |mean score - mean label|, averaged over equal bins of the score by how many fall there."""
    s, y = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.float64)
    bin_of = (s * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, s - y)
    return (gap.abs().sum() / len(s)).item()


if __name__ == '__main__':
    settings = override(globals())
    if not kind:
        for split in ('train', 'val', 'test'):
            problems = load_problems(task, split)
            right = sum(is_correct(completion(p.solution), p.answer) for p in problems)
            found = [ANNOTATION.findall(p.solution) for p in problems]
            good = sum(annotation_is_right(e) for row in found for e in row)
            print(f'{split}: {len(problems):,} problems, {right:,} of their own answers earn reward 1; '
                  f'{sum(len(steps(p.solution)) for p in problems) / len(problems):.2f} steps a solution; '
                  f'annotations: {good:,} right, {sum(map(len, found)) - good:,} wrong, {found.count([]):,} solutions without; '
                  f'{without_equation(problems):,} references without an equation')
        raise SystemExit

    # 0. everything that can be wrong with the input, before anything is written
    import eval as evaluation  # here alone: eval.py imports this module
    device, dtype = setup(device, dtype, seed)
    for name, allowed in (('kind', ('orm', 'prm')), ('label_at', ('token', 'step')), ('step_label', ('share', 'any'))):
        if settings[name] not in allowed:
            raise UserError(f'{name} is one of {allowed}, not {settings[name]!r}')
    if min(k, rollouts, heldout, batch_size, micro_tokens) < 1 or temperature <= 0 or epochs <= 0 or keep_states < 0:
        raise UserError('k, rollouts, heldout, batch_size and micro_tokens must be at least 1, temperature and epochs above 0, keep_states 0 or more')
    resume = from_main(lambda: resuming(init_from, out_dir, 'best'))
    policy_from = read_run(out_dir)['init_from'] if resume else init_from
    problems = load_problems(task, 'train')
    if not 0 <= n_questions <= len(problems):
        raise UserError(f'n_questions is from 0 (all) to {len(problems)}, the rows of {task} to train on')
    problems, val_problems = problems[:n_questions or None], load_problems(task, 'val')[:heldout]
    tok = load_tokenizer(policy_from, conditioned=False)
    sampler = Sampler(Transformer.from_pretrained(policy_from, device, dtype).requires_grad_(False), tok, max_rows, dtype)
    learner = sampler.model.config  # the shape of the reward model
    if base:
        learner = config_from_hf(read_json(os.path.join(find_checkpoint(base), 'config.json')), base)
        check_same_tokenizer(load_tokenizer(base, conditioned=False), tok, f'{base} and {policy_from}')
    check_context(learner, sampler.model.config, f'base = {base}')
    prompts, val_prompts = ([tok.encode_prompt(prompt(p.question)) for p in some] for some in (problems, val_problems))
    check_room(prompts, max_new_tokens, learner.block_size)
    check_room(val_prompts, max_new_tokens, learner.block_size)
    if samples and not (os.path.isfile(samples) and all(len(row['samples']) == k for row in read_rows(samples))):
        raise UserError(f'samples = {samples!r} is no file with k = {k} solutions of each question')
    start_run(settings, resume, overwrite)
    listen_for_stop()
    log = Log(out_dir, resume)
    print(memory_needed([sampler.model], dtype, 0, 0, max_rows, max(map(len, prompts)), max_new_tokens))
    print(disk_needed(learner, 1, keep_states, lora_rank))
    if samples and not resume and rank() == 0:
        shutil.copy(samples, os.path.join(out_dir, 'samples_train.jsonl'))

    def label(problems, name):
        """Labelled solutions of the problems: drawn and judged as they come, so that a stopped run goes on within them."""
        def row(r, labels):
            ids = tok.encode_prompt(prompt(r.problem.question))
            return Labelled(ids + r.ids, len(ids), labels)

        found = evaluation.explore(sampler, problems, os.path.join(out_dir, f'samples_{name}.jsonl'), k, max_new_tokens, temperature,
                                   seed, f'{name}: sample')
        groups = responses_of(problems, found, tok)
        if kind == 'orm':
            chosen = balanced(groups, random.Random(seed)) if balance else [r for group in groups for r in group]
            return [row(r, outcome_labels(r, label_at)) for r in chosen]

        path = os.path.join(out_dir, f'labels_{name}.jsonl')  # a line a problem: of each solution each step's share of success
        shares = from_main(lambda: read_rows(path))
        chunk = world_size() * max(1, 4 * max_rows // (3 * k * rollouts))  # problems a time: enough to fill some batches
        progress = bar(desc=f'{name}: label', total=len(problems))
        progress.update(len(shares))
        with open(path if rank() == 0 else os.devnull, 'a') as f:
            for start in range(len(shares), len(problems), chunk):
                todo = groups[start:start + chunk]
                judged = iter(step_success(sampler, [r for group in todo for r in group], rollouts, max_new_tokens, temperature, seed + 1))
                shares += [[next(judged) for _ in group] for group in todo]
                f.writelines(json.dumps(group) + '\n' for group in shares[start:])
                f.flush()
                progress.update(len(todo))
                if asked_to_stop():
                    progress.close()
                    leave(f' after the labels of {len(shares):,} of {len(problems):,} questions')
        progress.close()
        rows = []
        for group, successes in zip(groups, shares):
            for r, success in zip(group, successes):
                labels = [math.nan] * len(r.ids)
                for end, s in zip(step_ends(r), success):
                    labels[end] = s if step_label == 'share' else float(s > 0)
                rows.append(row(r, labels))
        return rows

    # 1. samples and their labels
    every = label(problems, 'train')
    rows, val_rows = [row for row in every if len(row.ids) <= learner.block_size], label(val_problems, 'val')
    if len(rows) < len(every):  # another policy's samples
        print(f'left out: {len(every) - len(rows)} of {len(every)} solutions, longer than the context of {learner.block_size}')
    known = [x for row in rows for x in row.labels if not math.isnan(x)]
    if len(rows) < batch_size or not val_rows or len(set(known)) < 2:
        raise UserError(f'{len(rows)} solutions to learn from, {len(val_rows)} held out, {len(set(known))} different labels: too few; '
                        f'a policy that is sometimes right and sometimes wrong is needed, or more of n_questions and k')
    steps = math.ceil(epochs * (len(rows) // batch_size))
    print(f'{len(rows):,} solutions of {len(problems):,} questions with {len(known):,} labels, mean {sum(known) / len(known):.3f}; '
          f'{steps} updates * {batch_size} = {steps * batch_size:,} solutions; {len(val_rows):,} held out')

    # 2. learn to tell them
    del sampler  # and the policy with it: its memory is needed now
    model = Transformer.from_pretrained(base or policy_from, device, dtype if lora_rank else torch.float32, value_head=True,
                                        lora_rank=lora_rank, lora_alpha=lora_alpha, shard=shard, product_dtype=dtype)
    model.grad_checkpointing, model.head_kind = grad_checkpointing, kind
    print(memory_needed([model], dtype, micro_tokens, max(len(row.ids) for row in rows)))
    fit(model, rows, steps, log, batch_size=batch_size, micro_tokens=micro_tokens, lr=lr, min_lr=min_lr, warmup=warmup,
        weight_decay=weight_decay, grad_clip=grad_clip, seed=seed, dtype=dtype, out_dir=out_dir, save_interval=save_interval, resume=resume)

    # 3. how well, on the solutions of questions that it has not seen: the whole solution's score, or for the PRM each step's
    pairs = []
    for row, s in zip(val_rows, score(model, val_rows, micro_tokens, dtype)):
        labels = torch.tensor(row.labels)
        at = [len(labels) - 1] if kind == 'orm' else (~labels.isnan()).nonzero().squeeze(-1).tolist()
        pairs += [(s[t].item(), labels[t].item()) for t in at]
    scores, labels = zip(*pairs)
    right = [x >= 0.5 for x in labels]
    log(steps, heldout=len(scores), heldout_accuracy=sum((s >= 0.5) == y for s, y in zip(scores, right)) / len(scores),
        heldout_auroc=auroc(scores, right), calibration_error=calibration_error(scores, labels),
        mean_score=sum(scores) / len(scores), mean_label=sum(labels) / len(labels))
    model.save_pretrained(os.path.join(out_dir, 'best'), tok)
    Checkpoints(out_dir).keep(keep_states)
    print(f'reward model: {out_dir}/best')
