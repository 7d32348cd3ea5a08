"""
SVAMP (Patel et al. 2021, arXiv 2103.07191; MIT licence) with its authors' protocol: train on MAWPS and
ASDiv-A, test on all 1,000 problems of SVAMP. The sources give an equation instead of a worked solution, so
the solution is that equation, one operation a line, innermost first: ( ( 8.0 - 3.0 ) * 2.0 ) becomes

    8-3=<<8-3=5>>5
    5*2=<<5*2=10>>10
    #### 10

The test set keeps every row and its official answer; where the equation contradicts the answer (chal-680),
the solution has no steps. Three kinds of training rows are left out and counted: repeated questions (MAWPS
and ASDiv-A overlap, and no validation question may occur in training), rounded numbers (0.3333 for a third),
and equations that contradict their answer.

$ python data/svamp/prepare.py                 # downloads 1.6 MB from GitHub
$ python data/svamp/prepare.py --source=DIR    # uses DIR/SVAMP.json and DIR/mawps-asdiv-a_svamp/train.csv
"""
import collections
import csv
import hashlib
import io
import json
import operator
import os
import random
import re
import sys
import tempfile
import urllib.request
from fractions import Fraction

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from config import UserError, override
from data import VALIDATION_ROWS, number_text, read_problems

# -----------------------------------------------------------------------------
source = ''               # a folder that already has both files; '': download them
out = ''                  # where train.jsonl and test.jsonl go; '': beside this script
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/arkilpatel/SVAMP/main/'
TEST, TRAIN = 'SVAMP.json', 'mawps-asdiv-a_svamp/train.csv'  # on GitHub the second is in data/
SHA256 = {
    TEST: '5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e',
    TRAIN: 'c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821',
}
PLACES = 4                # a number with more decimals is a rounded one
OPERATORS = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.truediv}


def fetch(name, source):
    """-> the official file's bytes, from source or GitHub. UserError if it can't be read or differs."""
    place = os.path.join(source, name) if source else URL + ('data/' if name == TRAIN else '') + name
    try:
        with open(place, 'rb') if source else urllib.request.urlopen(place, timeout=60) as f:
            content = f.read()
    except OSError as e:  # urllib's errors are OSErrors too
        hint = '' if source else '; --source=DIR takes files that you have'
        raise UserError(f'cannot read {place}: {e}{hint}') from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(f'{place} is not the official file: its sha256 is {found}, not {SHA256[name]}')
    return content


def solve(tokens, numbers, lines):
    """
    Removes one expression, '( a - b )' or '- a b', from the front of tokens (list of str) and returns its
    value, a Fraction. Appends an annotated line per operation. numbers: the values of number0, number1, ...
    """
    token = tokens.pop(0)
    if token == '(':
        a, op, b = solve(tokens, numbers, lines), tokens.pop(0), solve(tokens, numbers, lines)
        tokens.pop(0)  # ')'
    elif token in OPERATORS:
        op, a, b = token, solve(tokens, numbers, lines), solve(tokens, numbers, lines)
    else:
        return numbers[int(token.removeprefix('number'))] if token.startswith('number') else Fraction(token)
    value = OPERATORS[op](a, b)
    right = number_text(b) if b >= 0 else f'({number_text(b)})'
    left, result = f'{number_text(a)}{op}{right}', number_text(value)
    lines.append(f'{left}=<<{left}={result}>>{result}')
    return value


def plain_text(text):
    """Undoes tokenisation: "Emily 's dad has $ 5 , does n't he ?" -> "Emily's dad has $5, doesn't he?"."""
    text = f' {text} '.replace('’', "'").replace(' `` ', ' "').replace(" ''", '"')
    text = re.sub(r"(?<=\w) (n't|' ?(?:s|ve|re|ll|d|m))(?= )", lambda m: m[1].replace(' ', ''), text)
    text = re.sub(r"(?<= )' ?(\w[^']*?) '(?= )", r"'\1'", text)   # ' whack a mole '
    text = re.sub(r"(?<=\w) '(?= )", "'", text)                   # the Wagners ' bill
    text = re.sub(r'(?<=\w) - (?=\w)', '-', text)                 # t - shirt
    text = re.sub(r' +([.,?!;:%)])', r'\1', text)
    text = re.sub(r'([$(]) +', r'\1', text)
    return ' '.join(text.split())


def join(body, question):
    """Restores the full stop that SVAMP's Body lacks at its end, or the comma of "If ..., how many ...?"."""
    body, question = plain_text(body), plain_text(question)
    if body[-1] in '.?!':
        return f'{body} {question}'
    if re.split(r'(?<=[.?!]) ', body)[-1].startswith('If '):
        return f'{body}, {question[0].lower()}{question[1:]}'
    return f'{body}. {question}'


def test_rows(content):
    """SVAMP.json's bytes -> (all rows {question, answer}, in order; the IDs of rows without steps)."""
    rows, unsolved = [], []
    for r in json.loads(content):
        lines = []
        answer = Fraction(str(r['Answer']))
        if solve(r['Equation'].split(), [], lines) != answer:
            unsolved.append(r['ID'])
            lines = []
        lines.append(f'#### {number_text(answer)}')
        rows.append({'question': join(r['Body'], r['Question']), 'answer': '\n'.join(lines)})
    return rows, unsolved


def train_rows(content):
    """train.csv's bytes -> (rows {question, answer}, shuffled; how many rows were dropped, by reason)."""
    rows, dropped, seen = [], collections.Counter(), set()
    for r in csv.DictReader(io.StringIO(content.decode('utf-8'))):
        numbers = [Fraction(n) for n in r['Numbers'].split()]
        lines = []
        value = solve(r['Equation'].split(), numbers, lines)
        question = re.sub(r'number(\d+)', lambda m: number_text(numbers[int(m[1])]), r['Question'])
        question = plain_text(question)
        key = ' '.join(re.findall(r'\w+', question.lower()))
        if any((x * 10 ** PLACES).denominator != 1 for x in numbers + [value]):
            dropped['a rounded number'] += 1
        elif abs(value - Fraction(r['Answer'])) > Fraction(1, 10 ** 6):
            dropped['the equation contradicts the answer'] += 1
        elif key in seen:
            dropped['a repeated question'] += 1
        else:
            seen.add(key)
            lines.append(f'#### {number_text(value)}')
            rows.append({'question': question, 'answer': '\n'.join(lines)})
    random.Random(0).shuffle(rows)  # the file goes by source; the last rows, for validation, should have both
    return rows, dropped


if __name__ == '__main__':
    override(globals())
    folder = out or HERE
    os.makedirs(folder, exist_ok=True)
    test, unsolved = test_rows(fetch(TEST, source))
    train, dropped = train_rows(fetch(TRAIN, source))
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # both files, complete and checked, or neither
        for name, rows in (('train.jsonl', train), ('test.jsonl', test)):
            path = os.path.join(tmp, name)
            with open(path, 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
            print(f'{name}: {len(read_problems(path)):,} problems')
        for name in ('train.jsonl', 'test.jsonl'):
            os.replace(os.path.join(tmp, name), os.path.join(folder, name))
    for reason, n in dropped.items():
        print(f'train.jsonl: {n:,} rows left out: {reason}')
    ids = ', '.join(unsolved)
    print(f'test.jsonl: without steps, since the equation contradicts the official answer: {ids}')
    print(f'written to {folder}; the last {VALIDATION_ROWS} rows of train.jsonl are the validation slice')
