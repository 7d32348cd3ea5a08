"""The problems of data/arithmetic/prepare.py: reproducible, right, different, and as its settings say."""
import collections
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_rewards import rows_of

import data
import data.arithmetic.prepare as made
from config import UserError

STEP = re.compile(r'(?<!\d)(\d+)([-+*/])(\d+)=<<\1\2\3=(\d+)>>\4(?!\d)')
SMALL = ('--n_train=1500', '--n_test=300', '--n_base=2000')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small data set, made by a process of its own that starts elsewhere."""
    folder = tmp_path_factory.mktemp('arithmetic')
    subprocess.run([sys.executable, made.__file__, f'--out={folder}', *SMALL], check=True,
                   capture_output=True, cwd=os.path.dirname(ROOT), env=os.environ | {'PYTHONHASHSEED': '1'})
    return folder

def is_right(a, op, b, c):
    return {'+': a + b == c, '-': a - b == c, '*': a * b == c, '/': b * c == a}[op]

def work(answer):
    """An answer -> [(a, op, b, c)], one a line, after checking them and the final answer."""
    *lines, last = answer.split('\n')
    found = [(int(a), op, int(b), int(c)) for line in lines for a, op, b, c in STEP.findall(line)]
    assert len(found) == len(lines) and all(is_right(*step) for step in found), answer
    assert last == f'#### {found[-1][3]}'
    return found

def numbers(text):
    return [*map(int, re.findall(r'\d+', text))]

def problems(count, steps, **knobs):
    rng = random.Random(0)
    return [made.make_problem(rng, steps, **knobs) for _ in range(count)]

# ---- the files ----
def test_bytes_follow_from_the_seed_and_from_no_larger_file(folder, script, tmp_path):
    def read(folder):
        names = sorted(os.listdir(folder))
        assert names == ['base.jsonl', 'test.jsonl', 'train.jsonl']  # nothing left behind
        return [(folder / name).read_bytes() for name in names]

    def files(*flags):
        script(made.__file__, f'--out={tmp_path}', *flags)  # another seed of hashes than the folder's
        return read(tmp_path)
    old = read(folder)
    assert files(*SMALL) == old
    assert all(a != b for a, b in zip(files(*SMALL, '--seed=1'), old))
    _, test, train = files('--n_train=1000', '--n_test=300', '--n_base=100')
    assert test == old[1] and old[2].startswith(train)

def test_questions_differ_and_rows_are_right(folder):
    both = rows_of(folder / 'train.jsonl') + rows_of(folder / 'test.jsonl')
    base = [row['text'].removeprefix('Question: ') for row in rows_of(folder / 'base.jsonl')]
    questions = [row['question'] for row in both] + [t.split('\nAnswer:')[0] for t in base if '?' in t]
    assert len(questions) == len(set(questions)) == 1500 + 300 + 1500
    counts = collections.Counter(len(work(row['answer'])) for row in both)
    assert set(counts) == {2, 3}
    for n, share in ((2, 7 / 8), (3, 1 / 8)):  # smallest of three draws; 5 standard errors
        assert abs(counts[n] / 1800 - share) < 5 * (share * (1 - share) / 1800) ** 0.5
    for question, answer in (row.values() for row in both):
        assert re.fullmatch(r'([A-Z0-9][A-Za-z0-9 ,]*\. )+[A-Z][A-Za-z ,]*\?', question)
        assert not re.search(r'  | ,', question) and len(question.split()) <= 55
        assert all(2 <= n <= 20 for n in numbers(question + answer.split('####')[0]))
        for line in answer.split('\n')[:-1]:
            assert re.fullmatch(r'([A-Z][A-Za-z ]* )?\S*<<\S*>>\d+( [A-Za-z ]*)?\.', line), line

def test_base_is_facts_one_step_problems_tales_and_bare_questions(folder):
    texts = [row['text'] for row in rows_of(folder / 'base.jsonl')]
    solved, asked = [t for t in texts if '\n' in t], [t for t in texts if t.endswith('?')]
    facts = [t for t in texts if not re.search('[A-Z]', t)]
    tales = set(texts) - {*solved, *asked, *facts}
    assert [len(some) for some in (texts, solved, asked, facts, tales)] == [2000, 1400, 100, 200, 300]
    for text in solved:
        question, solution = text.removeprefix('Question: ').split('\nAnswer: ')
        assert text == data.prompt(question) + data.completion(solution) and len(work(solution)) == 1
    assert not any(re.search('[<#=:]', text) for text in asked)
    assert all(is_right(int(a), op, int(b), int(c)) for t in tales for a, op, b, c in STEP.findall(t))
    words = {'plus': '+', 'and': '+', 'minus': '-', 'times': '*', 'groups of': '*', 'divided by': '/',
             'in groups of': '/'} | dict(zip('+-*/', '+-*/'))
    for text in facts:
        text = re.sub(r'(\d+) from (\d+) leaves', r'\2 minus \1 is', STEP.sub(r'\1 \2 \3 is \4.', text))
        found = re.findall(r'(\d+) (\D+) (\d+) (?:is|make) (\d+)(?: groups)?\.(?: |$)', text)
        assert len(found) == 3, text
        assert all(is_right(int(a), words[op], int(b), int(c)) for a, op, b, c in found), text

# ---- the settings ----
def test_settings(monkeypatch):
    for ops in ('+', '-', '*', '/', '+-', '*/', '-*', '+-*/'):
        answers = [answer for n in (1, 2, 3) for _, answer in problems(30, n, ops=ops)]
        assert {op for answer in answers for _, op, _, _ in work(answer)} == set(ops)
    for n in range(1, 7):  # without a distractor, a solution uses each number as often as it was told
        for question, answer in problems(200, n, distractor=0):
            used = collections.Counter(x for a, _, b, _ in work(answer) for x in (a, b))
            assert len(work(answer)) == n and not collections.Counter(numbers(question)) - used, question
    for most in (12, 100):
        found = numbers(str(problems(300, 2, max_number=most, distractor=1)))
        assert 2 <= min(found) and most * 0.9 < max(found) <= most
    monkeypatch.setattr(made, 'DISTRACTORS', ['The code is {n}.'])
    monkeypatch.setattr(made, 'MORE_DISTRACTORS', [])
    for p, low, high in ((0, 0, 0), (0.2, 60, 140), (1, 500, 500)):
        assert low <= str(problems(500, 2, distractor=p)).count('The code is') <= high

@pytest.mark.parametrize('flags, message', [
    ('--min_steps=3 --max_steps=2', 'min_steps'), ('--max_steps=7', 'steps'), ('--ops=+x', 'ops'),
    ('--ops=++', 'ops'), ('--distractor=1.5', 'distractor'), ('--n_test=-1', 'n_test'),
    ('--max_number=1', 'max_number'), ('--base_facts=.7 --base_one_step=.4', 'base_facts'),
    ('--ops=/ --max_number=6', 'no problem of')])
def test_bad_settings(script, tmp_path, flags, message):
    said = script(made.__file__, f'--out={tmp_path}', *flags.split(), code=2).stderr
    assert said.startswith('error: ') and said.count('\n') == 1 and message in said
    assert os.listdir(tmp_path) == []

def test_too_many_problems_are_refused(monkeypatch):
    monkeypatch.setattr(made, 'LEDGERS', [made.CHILDREN])
    monkeypatch.setattr(made, 'TRIES', 100)
    with pytest.raises(UserError, match='^9,000 different problems are asked for, but only [1-9][0-9,]*'):
        made.make_problems(random.Random(0), 9000, (1, 1), set(), (4, '+', 0, 0))

# ---- several solutions of one story ----
def orders(root, **knobs):
    """-> the orders of operations that solve() finds for a story, each as '3*4 2*5'."""
    texts = {'\n'.join([*made.solve(random.Random(i), root, {}, **knobs), f'#### {root.value}'])
             for i in range(200)}
    return {' '.join(f'{a}{op}{b}' for a, op, b, _ in work(text)) for text in texts}

def test_orders_of_one_graph():
    """All valid orders and no others, counted by hand."""
    def result(*terms):
        terms = [(t[0], int(t[1:])) if isinstance(t, str) else ('+', t) for t in terms]
        return made.Result(terms, {'whole': ['{e}'], 'part': ['{e}']}, {})

    a, b, c = result('+3', '*4'), result('+2', '*5'), result('+7', '+6')
    for terms, found in [
            ((a, b), ['3*4 2*5 12+10', '2*5 3*4 12+10']), ((result('+9', '-3'), '/2'), ['9-3 6/2']),
            (('+20', '+5', '-3'), ['20+5 25-3', '20-3 17+5', '5-3 20+2']),
            (('+20', '-5', '-3'), ['20-5 15-3', '20-3 17-5', '5+3 20-8']),
            (('+20', '-5', '+8'), ['20-5 15+8', '20+8 28-5', '8-5 20+3']),
            (('+4', '-3', '+8'), ['4+8 12-3', '8-3 4+5']),  # 4-3 = 1 is not in the range
            (('+7', c, '+5'), ['7+6 7+13 20+5', '7+6 13+5 7+18', '7+6 7+5 12+13', '7+5 7+6 12+13'])]:
        assert orders(result(*terms)) == set(found)
    assert orders(result(a, '-3', b), reorder=0) == {'3*4 12-3 2*5 9+10'}  # the story's own
    assert orders(result('+20', '-5', '-3'), ops='-') == {'20-5 15-3', '20-3 17-5'}  # no 5+3
