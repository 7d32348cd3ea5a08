"""
Problems, prompts, the answer check, and the steps and equations of a solution: text only, no torch.

A task is a folder with train.jsonl and test.jsonl. A row is {"question", "answer"} in GSM8K's form: one step
a line with <<a+b=c>> annotations, then "#### n"; other columns are kept in Problem.fields. Where numbers and
\\boxed{} are not its answers, the folder also has a task.py, which is executed:

    def extract(text): ...            # the final answer of a solution, a string, or None
    def same(answer, reference): ...  # whether two extracted answers are equal
"""
import ast
import functools
import json
import operator
import os
import re
import runpy
from fractions import Fraction
from typing import NamedTuple

from config import UserError, failure

DATA = os.path.dirname(os.path.abspath(__file__))
VALIDATION_ROWS = 256  # the last rows of train.jsonl: selection happens on them, never on test
MAX_NUMBER = 64        # characters of a number
MAX_BOXED = 256        # characters within \boxed{}

class Problem(NamedTuple):
    question: str
    solution: str      # the whole worked text, "#### n" included
    answer: str        # the final answer, as extract_answer gives it
    task: str = ''     # the folder whose task.py checks answers; '': numbers and \boxed{}
    fields: dict = {}  # the row's other columns

def load_problems(task, split):
    """-> list[Problem], in the file's order. task: a folder, or a name for data/<task>/. split: 'train' (all
    of train.jsonl but the last 256 rows), 'val' (those) or 'test'. UserError: file missing, row malformed."""
    if split not in ('train', 'val', 'test'):
        raise UserError(f"split must be 'train', 'val' or 'test', not {split!r}")
    known = sorted(d for d in os.listdir(DATA) if os.path.exists(os.path.join(DATA, d, 'prepare.py')))
    folder = os.path.join(DATA, task) if task in known else task
    path = os.path.join(folder, 'test.jsonl' if split == 'test' else 'train.jsonl')
    if not os.path.isfile(path):
        none = f'{task!r} is no folder with it, nor one of {known}'
        raise UserError(f'no {path}: ' + (f'run `python data/{task}/prepare.py`' if task in known else none))
    problems = read_problems(path, folder if os.path.exists(os.path.join(folder, 'task.py')) else '')
    if len(problems) <= (0 if split == 'test' else VALIDATION_ROWS):
        raise UserError(f'{path} has too few rows, {len(problems)}: the last {VALIDATION_ROWS} validate')
    return {'train': problems[:-VALIDATION_ROWS], 'val': problems[-VALIDATION_ROWS:], 'test': problems}[split]

def first_rows(problems, n, name):
    """The first n problems (0: all); UserError, with the setting's name, where there are fewer."""
    if not 0 <= n <= len(problems):
        raise UserError(f'{name} is from 0 (all) to {len(problems)}, the rows to train on')
    return problems[:n or None]

def validation_rows(task, few_shot, n):
    """-> (worked examples to show before a question, n problems to validate on), of the validation slice."""
    problems = load_problems(task, 'val')
    if not 0 <= few_shot < len(problems):
        raise UserError(f'few_shot is from 0 to {len(problems) - 1}, for examples of the validation slice')
    return problems[:few_shot], problems[few_shot:][:n]

def read_problems(path, task=''):
    """A .jsonl file -> list[Problem]. UserError "file:line: reason" for the first malformed row."""
    problems = []
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                problems.append(read_problem(line, task))
            except ValueError as error:
                raise UserError(f'{path}:{number}: {error}') from None
    return problems

def read_problem(line, task):
    """A line of bytes -> Problem; ValueError says what is wrong with it."""
    try:
        row = json.loads(line.decode('utf-8'))
    except (ValueError, RecursionError) as error:  # RecursionError: for '[[[[...'
        raise ValueError(f'not JSON: {error}') from None
    if not isinstance(row, dict):
        raise ValueError(f'a row is an object {{"question": ..., "answer": ...}}, not a {type(row).__name__}')
    for key in ('question', 'answer'):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f'"{key}" is missing, empty or no string')
        row[key].encode('utf-8')  # half a surrogate pair passes JSON and would fail later, in the tokenizer
    question, solution = row.pop('question'), row.pop('answer')
    answer = extract_answer(solution, task)
    if answer is None:
        wanted = f'extract of {task}/task.py gave None' if task else '"#### <number>" or \\boxed{...}'
        raise ValueError(f'"answer" has no final answer: {wanted}')
    return Problem(question, solution, answer, task, row)

NEXT_QUESTION = '\nQuestion:'  # a base model that was shown examples goes on with a question of its own
GOES_ON = re.compile(rf'(?:####|\\boxed{{) *[^\s#][^\n#]*[\n#]|{NEXT_QUESTION}')  # an answer, and more text

def prompt(question, shown=()):
    """What the model reads: shown Problems (for a base model without SFT), then the question. No space at the
    end: tokenizers join it to the next word."""
    worked = ''.join(f'{prompt(p.question)}{completion(p.solution)}\n\n' for p in shown)
    return f'{worked}Question: {question}\nAnswer:'

def completion(solution):
    """What follows the prompt, up to the EOS."""
    return ' ' + solution


# -----------------------------------------------------------------------------
# the answer check

@functools.cache
def own_check(path):
    """{'extract': f, 'same': f} of a task.py."""
    found = runpy.run_path(path)
    for name in ('extract', 'same'):
        if not callable(found.get(name)):
            raise NameError(f'no function {name}')
    return found

def ask_task(task, name, *args):
    """What a function of a folder's task.py gives; UserError, with the line, where the file fails."""
    path = os.path.join(task, 'task.py')
    try:
        return own_check(path)[name](*args)
    except Exception as error:  # whatever a user's file can do wrong
        raise UserError(failure(path, error)) from None

def is_correct(completion, answer, task=''):
    """Whether the completion's final answer is the given one (without a task: a number, or a text with its
    own #### or \\boxed{}). None never matches."""
    if answer is not None and not task:
        answer = str(answer)
        answer = extract_answer(answer) if '####' in answer or '\\boxed{' in answer else _boxed(answer)
    return same_answer(extract_answer(completion, task), answer, task)

def same_answer(answer, reference, task=''):
    """Whether two extracted answers are equal. None never matches."""
    if answer is None or reference is None:
        return False
    return bool(ask_task(task, 'same', answer, reference)) if task else answer == reference

# A number ends where no other notation goes on: 1e5, 1/2/3, 9^2, 9{.}5, 3\ 4 are none; 18\text{ kg} is 18.
NUMBER = re.compile(
    r'([-+$£€\s]*)([.,]?[0-9][0-9.,]*)(?: ?/ ?([0-9][0-9.,]*))?'
    r'(?![0-9.,]*(?:(?:(?:[eE]| ?/ ?)[-+]?)?[0-9]|\^| ?_?\{|[½⅓⅔¼¾]|[\'_][0-9]'
    r'| ?(?:\\[!,;: ]|~)(?:\\[!,;: ]|[~ ])*[0-9]'
    r'| ?\\(?!(?:text|mathrm)[a-z]*\{[^{}0-9]*\}(?![0-9])|boxed|end|q?quad)[A-Za-z]))(?: ?%)?')
DIGITS = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
MINUS = str.maketrans('\u2212\u2013', '--')  # the minus sign and the en dash
# LaTeX: 1{,}800 and 1,\!800; 12\,000; \frac{a}{b}, also after a whole number, with no other digit beside it
COMMA = re.compile(r'(?<=[0-9])(?:\\!)?\{+,\}+(?:\\!)?(?=[0-9])|(?:\\!)?(?<!\\),(?:\\!)?')
THOUSANDS = re.compile(r'(?<![0-9.,])[0-9]{1,3}(?:\\,[0-9]{3})+(?![0-9])')
FRACTION = re.compile(
    r'(?:(?<![0-9.,])(?:([0-9]{1,64})(?:\\[!,;: ]|[~ ])*)?|(?<=(,)))\\[cdt]?frac ?'
    r'(?:\{ ?(-?[0-9][0-9.,]{0,63}) ?\}|([0-9])) ?(?:\{ ?([0-9][0-9.,]{0,63}) ?\}|([0-9]))(?![.,]?[0-9])')

def extract_answer(text, task=''):
    r"""The final answer of a solution, a string with one spelling a value, or None.

    The last "####" decides: a number must follow on its line. Without any "####" the last \boxed{...} counts:
    a number, or any other text (\boxed{1 2}: what stands apart is never joined). Linear in the text's length.
    A task with its own check decides alone.

    after ####                                      answer    why
    18  ####18  18.0  18.  018  +18  $18            18        one value, one spelling
    18%                                             18        GSM8K answers "what percentage" so
    18 apples, 18, 18 and a long tail, 18\nThe ...  18        what follows the number is not read
    1 1/2                                           1         nor is a mixed number
    17 ... #### 18                                  18        the last marker decides
    17 ... ####    18 ... ####.                     None      even where nothing follows it
    -18  \u221218  - 18  -$18  $-18                 -18       \u2212 is the unicode minus; so for the en dash
    1,800  1,800.00  1{,}800  1,\!800  1\,800       1800      commas in their places, LaTeX's spellings
    1,2,3  18,00  1.800,50  1.2.3  3\,4  3\ 4       None      which number is meant is a guess
    1\frac{4}{5}  1\frac45  1 \frac{4}{5}           1.8       a proper fraction; 1\frac{5}{4} is None
    9^2  9{.}5  2\sqrt{3}  \frac{9}{2}5             None      the number goes on, in a notation not read
    1/2  1 / 2  .5  \frac{1}{2}  \frac12            0.5       compared exactly: 1/3 is not 0.3333
    1/0  1e5  --18  1/2/3  65 digits or more        None
    .   ,   (nothing)   eighteen   **18**   x = 18  None      the number follows the marker, in digits
    \n18                                            None      it is on the marker's line
    """
    if task:
        answer = ask_task(task, 'extract', text)
        if not isinstance(answer, str | None):
            raise UserError(f'{task}/task.py: extract gave {answer!r:.80}, neither a string nor None')
        return answer
    if '####' in text:
        line = _plain(' '.join(text[text.rindex('####') + 4:].split('\n', 1)[0].split()))
        return _number(line[:4 * MAX_NUMBER], whole=False)  # cut, to bound the expression's backtracking
    start = text.rfind('\\boxed{')
    if start < 0:
        return None
    depth, start = 1, start + len('\\boxed{')
    for end in range(start, min(len(text), start + MAX_BOXED)):
        depth += {'{': 1, '}': -1}.get(text[end], 0)
        if depth == 0:
            return _boxed(text[start:end])
    return None  # never closed, or too long

def lenient_answer(text, task=''):
    """extract_answer, or without a task the text's last number where that finds none."""
    answer = extract_answer(text, task)
    if answer is None and not task and (found := re.findall('(?<![0-9])-?[0-9][0-9.,/]*', _plain(text))):
        return _number(found[-1][:4 * MAX_NUMBER], whole=False)
    return answer

def _number(text, whole):
    """The number that text starts with (whole: that it is), as number_text spells it, or None."""
    m = NUMBER.match(text)
    if m is None or whole and m.end() != len(text) or max(len(t or '') for t in m.groups()) > MAX_NUMBER:
        return None
    sign, top, bottom = m.groups()
    top, bottom = _digits(top), _digits(bottom or '1')
    if top is None or not bottom or sign.count('-') > 1:  # not bottom: no number, or 0
        return None
    return number_text((-top if '-' in sign else top) / bottom)

def _digits(text):
    """'1,800.' -> Fraction(1800); None for what is no number: '1,2,3', '1.2.3', '1.800,50'."""
    text = text.rstrip('.,')
    return Fraction(text.replace(',', '')) if text and DIGITS.fullmatch(text) else None

def number_text(x):
    """Fraction -> its one spelling: '18', '-0.25', and '1/3' where no decimal of up to 64 places is exact."""
    for places in range(MAX_NUMBER + 1):
        scaled = x * 10 ** places
        if scaled.denominator == 1:
            whole, rest = divmod(abs(scaled.numerator), 10 ** places)
            return ('-' if x < 0 else '') + (f'{whole}.{rest:0{places}d}' if places else str(whole))
    return f'{x.numerator}/{x.denominator}'

def _plain(text):
    """LaTeX's notation of numbers, spelled plainly. Digits are joined only where it says so."""
    text = COMMA.sub(',', re.sub(r'\\+([$%])', r'\1', text.translate(MINUS)))
    return FRACTION.sub(_fraction, THOUSANDS.sub(lambda m: m[0].replace('\\,', ''), text))

def _fraction(m):
    r"""\frac{4}{5} -> 4/5, 1\frac{4}{5} -> 9/5; 1\frac{5}{4} stays."""
    whole, comma, top, bottom = m[1], m[2], m[3] or m[4], m[5] or m[6]
    if whole is None:
        return f'{" " if comma else ""}{top}/{bottom}'  # (3,\frac{1}{2}) is a list
    proper = top.isdigit() and bottom.isdigit() and int(top) < int(bottom)
    return f'{int(whole) * int(bottom) + int(top)}/{bottom}' if proper else m[0]

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


# -----------------------------------------------------------------------------
# steps and equations

ANNOTATION = re.compile(r'<<([^<>=\n]+=[^<>=\n]+)>>')
OPERAND = r'-?(?:[0-9]{1,20}(?:\.[0-9]{1,20})?|\.[0-9]{1,20})'
# A sum without "= c" matches too: a long one is passed over once, not from each term. "= 5x" is no result.
PLAIN = re.compile(rf'(?<![\w.+*/)])({OPERAND}(?:\s*[-+*/x×÷]\s*{OPERAND})+)'
                   rf'(?:\s*=\s*({OPERAND})(?![0-9]|[\w.]*[^\W\d]))?')
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv,  # GSM8K writes // twice
             ast.USub: operator.neg, ast.UAdd: operator.pos}
SIGNS = str.maketrans('x×÷', '**/')

def _work(solution):
    """The text before the marker that decides the answer."""
    return solution.rpartition('####')[0].rstrip('#') if '####' in solution else solution

def answered(text):
    """The text up to the end of the line with the deciding marker: a base model goes on after it."""
    head, marker, tail = text.rpartition('####')
    return head + marker + tail.split('\n')[0] if marker else text

def steps(solution):
    """The lines that lead to the answer, in order; blank lines are no steps."""
    return [line for line in _work(solution).split('\n') if line.strip()]

def random_prefix(problem, rng):
    """The first steps of the reference solution, at least one, as lines; '' where it has no steps."""
    lines = steps(problem.solution)
    return ''.join(line + '\n' for line in lines[:rng.randint(1, len(lines))]) if lines else ''

def equations(solution):
    """-> tuple of 'lhs=rhs' without spaces, in order: the annotations <<lhs=rhs>>; without any, each
    `a op b = c` (two operands or more) of the text, x × ÷ written as * and /, $ and commas dropped."""
    text = _work(solution)
    found = [''.join(e.split()) for e in ANNOTATION.findall(text)]
    if not found:
        plain = PLAIN.finditer(re.sub('[$,]', '', text).translate(MINUS))
        found = [''.join(f'{m[1]}={m[2]}'.split()).translate(SIGNS) for m in plain if m[2]]
    return tuple(found)

def results(solution):
    """The right-hand sides of its equations, in order, in a number's one spelling or None."""
    return [_number(e.rpartition('=')[2], whole=True) for e in equations(solution)]

def without_equation(problems):
    """How many of the solutions have no equation: the dense heuristic pays none of their steps."""
    return sum(not equations(p.solution) for p in problems)

def annotation_is_right(equation):
    """'0.2*50=10' -> True: both sides, of + - * / // and brackets, have exactly one value."""
    values = []
    for side in equation.split('='):
        if len(side) > 200 or not re.fullmatch(r'[-+*/().0-9\s]+', side):
            return False
        side = re.sub(r'(?<![0-9.])0+(?=[0-9])', '', side.strip())  # Python does not read 05
        try:
            values.append(_value(ast.parse(side, mode='eval').body, side))
        except (AttributeError, KeyError, SyntaxError, ValueError, ZeroDivisionError):  # no such arithmetic
            return False
    return len(values) == 2 and values[0] == values[1]

def _value(node, source):
    if isinstance(node, ast.Constant):
        return Fraction(ast.get_source_segment(source, node))  # its digits, so that 0.1 is 1/10
    operands = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return OPERATORS[type(node.op)](*(_value(child, source) for child in operands))
