"""
Problems and the check of their answers. A task is a folder with train.jsonl and test.jsonl, rows {"question", "answer"} in
GSM8K's form: one step a line with <<a+b=c>> annotations, then "#### n". Whoever trains, samples or evaluates takes the
problem, the prompt and the answer check from here, so that they can't disagree on what is asked and what is right.

$ python data/gsm8k/prepare.py && python rewards.py --task=gsm8k    # counts of a task; does the check accept its own answers?
"""
import ast
import json
import operator
import os
import re
from fractions import Fraction
from typing import NamedTuple

from config import UserError, override

# -----------------------------------------------------------------------------
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
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


def prompt(question):
    """What the model reads; no space at the end, since tokenizers join the space to the word after it."""
    return f'Question: {question}\nAnswer:'


def completion(solution):
    """What follows the prompt, up to the EOS."""
    return ' ' + solution


def few_shot_prompt(question, examples):
    """Worked examples (list[Problem]), then the question: for a base model that has never seen the form."""
    return ''.join(f'{prompt(p.question)}{completion(p.solution)}\n\n' for p in examples) + prompt(question)


# ---- Answer check ----

NUMBER = re.compile(r'([-+$£€\s]*)([.,]?[0-9][0-9.,]*)(?:/([0-9][0-9.,]*))?(?![0-9.,]*(?:[eE/][-+]?)?[0-9])%?')
DIGITS = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
MINUS = str.maketrans('\u2212\u2013', '--')  # the minus sign and the en dash


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


def _boxed(text):
    r"""What \boxed{} holds, normalised: a number's one spelling, else the text without its white space."""
    text = re.sub(r'\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}', r'\1/\2', text)
    text = re.sub(r'\s|\\[!,;]|\\(?=[$%])', '', text).translate(MINUS)
    return _number(text, whole=True) or text or None


def extract_answer(text):
    r"""
    The final answer of a solution as a string with one spelling a value ('18.0', '018' and '18' are '18'), or None.
    The last "####" of the text decides, alone: a number must follow it on its line. Only where there is no "####" does the
    last \boxed{...} count, with a number or any other text in it. Linear in the text's length.

    after ####                                      answer    why
    18  ####18  18.0  18.  018  +18  $18            18        one value, one spelling
    18%                                             18        GSM8K answers "what percentage" so
    18 apples, 18, 18 and a long tail, 18\nThe ...  18        what follows the number is not read
    1 1/2                                           1         nor is a mixed number
    17 ... #### 18                                  18        the last marker decides
    17 ... ####    18 ... ####.                     None      even where it has nothing to say
    -18  \u221218  - 18  -$18  $-18                 -18       \u2212 is the unicode minus; so for the en dash
    1,800  1,800.00                                 1800      thousands commas in their places
    1,2,3  18,00  1.800,50  1.2.3                   None      which number is meant is a guess
    1/2  .5                                         0.5       a fraction is a number: 3/4 is not a right answer to 3
    1/3                                             1/3       compared exactly
    1/0  1e5  --18  1/2/3                           None
    .   ,   (nothing)   eighteen   **18**   x = 18  None      the number follows the marker, in digits
    \n18                                            None      it is on the marker's line
    65 digits or more                               None
    """
    if '####' in text:
        line = ' '.join(text[text.rindex('####') + 4:].split('\n', 1)[0].split())
        # any sign and number fit into 4 * MAX_NUMBER, where the regular expression has no room to backtrack for long
        return _number(line[:4 * MAX_NUMBER].translate(MINUS), whole=False)
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


if __name__ == '__main__':
    override(globals())
    for split in ('train', 'val', 'test'):
        problems = load_problems(task, split)
        right = sum(is_correct(completion(p.solution), p.answer) for p in problems)
        found = [ANNOTATION.findall(p.solution) for p in problems]
        good = sum(annotation_is_right(e) for row in found for e in row)
        print(f'{split}: {len(problems):,} problems, {right:,} of their own answers earn reward 1; '
              f'{sum(len(steps(p.solution)) for p in problems) / len(problems):.2f} steps a solution; '
              f'annotations: {good:,} right, {sum(map(len, found)) - good:,} wrong, {found.count([]):,} solutions without')
