"""
SVAMP (Patel et al. 2021, arXiv 2103.07191; MIT licence) by its authors' protocol: train on MAWPS and ASDiv-A, test on all
1,000 problems of SVAMP. Both give an equation and no text, so the worked solution is the equation, one operation a line,
innermost first: ( ( 8.0 - 3.0 ) * 2.0 ) becomes

    8-3=<<8-3=5>>5
    5*2=<<5*2=10>>10
    #### 10

Test keeps every row and its official answer. Where an equation contradicts that answer (chal-680), it has no steps. From
train three kinds of rows are left out, and counted: repeated questions (MAWPS and ASDiv-A overlap; the validation slice
must not stand in train), numbers that are rounded (0.3333 for a third), and equations that contradict their answer.

$ python data/svamp/prepare.py                 # downloads 1.6 MB from GitHub
$ python data/svamp/prepare.py --source=DIR    # or takes DIR/SVAMP.json and DIR/mawps-asdiv-a_svamp/train.csv
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

import rewards
from config import UserError, override

# -----------------------------------------------------------------------------
source = ''               # a folder that has the two files already; '': download them
out = ''                  # where train.jsonl and test.jsonl go; '': beside this script
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/arkilpatel/SVAMP/main/'
TEST, TRAIN = 'SVAMP.json', 'mawps-asdiv-a_svamp/train.csv'  # the second is under data/ on GitHub
SHA256 = {
    TEST: '5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e',
    TRAIN: 'c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821',
}
PLACES = 4                # a number with more decimals than this is a rounded one
OPERATORS = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.truediv}


def fetch(name, source):
    """-> the bytes of the official file, from the folder source or the net; UserError where they are not to be had."""
    place = os.path.join(source, name) if source else URL + ('data/' if name == TRAIN else '') + name
    try:
        with open(place, 'rb') if source else urllib.request.urlopen(place, timeout=60) as f:
            data = f.read()
    except OSError as e:  # urllib's errors are OSErrors too
        raise UserError(f'cannot read {place}: {e}' + ('' if source else '; --source=DIR takes files that you have')) from None
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256[name]:
        raise UserError(f'{place} is not the official file: its sha256 is {found}, not {SHA256[name]}')
    return data


def solve(tokens, numbers, lines):
    """
    Takes one expression, '( a - b )' or '- a b', off the front of tokens (list of str) and returns its value (a Fraction);
    appends an annotated line for each operation. numbers: what number0, number1, ... stand for (list of Fraction).
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
    left = f'{rewards.number_text(a)}{op}{rewards.number_text(b) if b >= 0 else f"({rewards.number_text(b)})"}'
    result = rewards.number_text(value)
    lines.append(f'{left}=<<{left}={result}>>{result}')
    return value


def plain_text(text):
    """Text as a person writes it, from a tokenised one: "Emily 's father has $ 5 , does n't he ?"."""
    text = f' {text} '.replace('’', "'").replace(' `` ', ' "').replace(" ''", '"')
    text = re.sub(r"(?<=\w) (n't|' ?(?:s|ve|re|ll|d|m))(?= )", lambda m: m[1].replace(' ', ''), text)
    text = re.sub(r"(?<= )' ?(\w[^']*?) '(?= )", r"'\1'", text)   # ' whack a mole '
    text = re.sub(r"(?<=\w) '(?= )", "'", text)                   # the Wagners ' bill
    text = re.sub(r'(?<=\w) - (?=\w)', '-', text)                 # t - shirt
    text = re.sub(r' +([.,?!;:%)])', r'\1', text)
    text = re.sub(r'([$(]) +', r'\1', text)
    return ' '.join(text.split())


def join(body, question):
    """SVAMP's Body has lost its last full stop, or the comma of an "If ..., how many ...?"."""
    body, question = plain_text(body), plain_text(question)
    if body[-1] in '.?!':
        return f'{body} {question}'
    if re.split(r'(?<=[.?!]) ', body)[-1].startswith('If '):
        return f'{body}, {question[0].lower()}{question[1:]}'
    return f'{body}. {question}'


def test_rows(data):
    """SVAMP.json's bytes -> rows {question, answer}, all of them, in order, and the IDs that have no steps."""
    rows, unsolved = [], []
    for r in json.loads(data):
        lines = []
        answer = Fraction(str(r['Answer']))
        if solve(r['Equation'].split(), [], lines) != answer:
            unsolved.append(r['ID'])
            lines = []
        lines.append(f'#### {rewards.number_text(answer)}')
        rows.append({'question': join(r['Body'], r['Question']), 'answer': '\n'.join(lines)})
    return rows, unsolved


def train_rows(data):
    """train.csv's bytes -> rows {question, answer}, shuffled, and a count of the rows left out, by reason."""
    rows, dropped, seen = [], collections.Counter(), set()
    for r in csv.DictReader(io.StringIO(data.decode('utf-8'))):
        numbers = [Fraction(n) for n in r['Numbers'].split()]
        lines = []
        value = solve(r['Equation'].split(), numbers, lines)
        question = plain_text(re.sub(r'number(\d+)', lambda m: rewards.number_text(numbers[int(m[1])]), r['Question']))
        key = ' '.join(re.findall(r'\w+', question.lower()))
        if any((x * 10 ** PLACES).denominator != 1 for x in numbers + [value]):
            dropped['a rounded number'] += 1
        elif abs(value - Fraction(r['Answer'])) > Fraction(1, 10 ** 6):
            dropped['the equation contradicts the answer'] += 1
        elif key in seen:
            dropped['a repeated question'] += 1
        else:
            seen.add(key)
            lines.append(f'#### {rewards.number_text(value)}')
            rows.append({'question': question, 'answer': '\n'.join(lines)})
    random.Random(0).shuffle(rows)  # the file goes by source; the validation slice, its last rows, is to have some of each
    return rows, dropped


if __name__ == '__main__':
    override(globals())
    folder = out or HERE
    os.makedirs(folder, exist_ok=True)
    test, unsolved = test_rows(fetch(TEST, source))
    train, dropped = train_rows(fetch(TRAIN, source))
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # both files, whole and checked, or neither
        for name, rows in (('train.jsonl', train), ('test.jsonl', test)):
            path = os.path.join(tmp, name)
            with open(path, 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
            print(f'{name}: {len(rewards.read_problems(path)):,} problems')
        for name in ('train.jsonl', 'test.jsonl'):
            os.replace(os.path.join(tmp, name), os.path.join(folder, name))
    for reason, n in dropped.items():
        print(f'train.jsonl: {n:,} rows left out: {reason}')
    print(f'test.jsonl: without steps, since the equation contradicts the official answer: {", ".join(unsolved)}')
    print(f'written to {folder}; the last {rewards.VALIDATION_ROWS} rows of train.jsonl are the validation slice')
