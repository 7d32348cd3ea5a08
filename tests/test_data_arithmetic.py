"""The problems that data/arithmetic/prepare.py makes: reproducible, right, different, and within their settings."""
import collections
import importlib.util
import json
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import rewards
from config import UserError

SCRIPT = os.path.join(ROOT, 'data', 'arithmetic', 'prepare.py')
STEP = re.compile(r'(?<!\d)(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)(?!\d)')
SMALL = ('--n_train=1500', '--n_test=300', '--n_base=2000')


@pytest.fixture(scope='module')
def made():
    """prepare.py as a module."""
    spec = importlib.util.spec_from_file_location('prepare_arithmetic', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A small data set: its folder and the rows of its files. Made in a process of its own, started from another folder."""
    folder = tmp_path_factory.mktemp('arithmetic')
    subprocess.run([sys.executable, SCRIPT, f'--out={folder}', *SMALL], check=True, capture_output=True, cwd=os.path.dirname(ROOT),
                   env=os.environ | {'PYTHONHASHSEED': '1'})
    rows = {name: [json.loads(line) for line in open(folder / f'{name}.jsonl', encoding='utf-8')]
            for name in ('train', 'test', 'base')}
    return folder, rows


def work(answer):
    """An answer -> [(a, op, b, c)], after checking each of its lines by plain integer arithmetic."""
    *lines, last = answer.split('\n')
    found = []
    for line in lines:
        (a, op, b, a2, op2, b2, c, c2), = STEP.findall(line)  # one annotation a line
        assert (a, op, b, c) == (a2, op2, b2, c2), line
        a, b, c = int(a), int(b), int(c)
        assert {'+': a + b == c, '-': a - b == c, '*': a * b == c, '/': b * c == a}[op], line
        found.append((a, op, b, c))
    assert last == f'#### {found[-1][3]}'
    return found


def numbers(text):
    return [int(n) for n in re.findall(r'\d+', text)]


def problems(made, count, steps, seed=0, **knobs):
    rng = random.Random(seed)
    return [made.make_problem(rng, steps, **knobs) for _ in range(count)]


# ---- the files ----
def test_same_seed_same_bytes(files, script, tmp_path):
    folder, _ = files
    script(SCRIPT, f'--out={tmp_path}/same', *SMALL)  # with another seed of hashes: no set's order must matter
    script(SCRIPT, f'--out={tmp_path}/other', *SMALL, '--seed=1')
    for name in ('train.jsonl', 'test.jsonl', 'base.jsonl'):
        old = (folder / name).read_bytes()
        assert (tmp_path / 'same' / name).read_bytes() == old
        assert (tmp_path / 'other' / name).read_bytes() != old
    assert sorted(os.listdir(tmp_path / 'same')) == ['base.jsonl', 'test.jsonl', 'train.jsonl']  # nothing left behind


def test_test_does_not_depend_on_train_nor_train_on_base(files, script, tmp_path):
    folder, _ = files
    script(SCRIPT, f'--out={tmp_path}', '--n_train=1000', '--n_test=300', '--n_base=100')
    assert (tmp_path / 'test.jsonl').read_bytes() == (folder / 'test.jsonl').read_bytes()
    assert (folder / 'train.jsonl').read_bytes().startswith((tmp_path / 'train.jsonl').read_bytes())


def test_no_question_twice(files):
    _, rows = files
    questions = [row['question'] for name in ('train', 'test') for row in rows[name]]
    assert len(questions) == 1800 and len(set(questions)) == 1800
    asked = [row['text'].removeprefix('Question: ').split('\nAnswer:')[0] for row in rows['base'] if '?' in row['text']]
    assert len(asked) == 1100 == len(set(asked))
    assert not set(asked) & set(questions)


def test_rows_are_problems(files):
    folder, _ = files
    assert [len(rewards.load_problems(str(folder), split)) for split in ('train', 'val', 'test')] == [1244, 256, 300]
    for problem in rewards.load_problems(str(folder), 'train'):
        assert rewards.is_correct(rewards.completion(problem.solution), problem.answer)


def test_every_annotation_is_right(files):
    _, rows = files
    counts = collections.Counter()
    for row in rows['train'] + rows['test']:
        found = work(row['answer'])
        counts[len(found)] += 1
        assert all(2 <= n <= 30 for n in numbers(row['question'] + row['answer'].split('####')[0]))
    assert sorted(counts) == [2, 3, 4]
    for n, share in ((2, 19 / 27), (3, 7 / 27), (4, 1 / 27)):  # the smallest of three draws; five standard errors
        assert abs(counts[n] / 1800 - share) < 5 * (share * (1 - share) / 1800) ** 0.5


def test_questions_read_as_text(files):
    _, rows = files
    lengths = []
    for row in rows['train'] + rows['test']:
        assert re.fullmatch(r"([A-Z0-9][A-Za-z0-9 ,]*\. )+[A-Z][A-Za-z ,]*\?", row['question']), row['question']
        assert not re.search(r'  | ,|\b[01]\b', row['question'])
        lengths.append(len(row['question'].split()))
        for line in row['answer'].split('\n')[:-1]:
            assert re.fullmatch(r'([A-Z][A-Za-z ]* )?\S*<<\S*>>\d+( [A-Za-z ]*)?\.', line) and len(line.split()) <= 9, line
    assert 25 < sum(lengths) / len(lengths) < 35 and max(lengths) <= 55


def test_base_is_facts_one_step_problems_tales_and_bare_questions(files):
    _, rows = files
    texts = [row['text'] for row in rows['base']]
    solved = [text for text in texts if text.startswith('Question: ')]
    asked = [text for text in texts if text.endswith('?')]
    tales = [text for text in texts if '?' not in text and text.count('. ') >= 2 and re.search('[A-Z]', text)]
    facts = [text for text in texts if '?' not in text and text not in tales]
    assert (len(facts), len(solved), len(asked), len(tales)) == (400, 1000, 100, 500)
    for text in solved:
        question, solution = text.removeprefix('Question: ').split('\nAnswer: ')
        assert text == rewards.prompt(question) + rewards.completion(solution)
        assert len(work(solution)) == 1
    assert not any(re.search('[<#=:]', text) for text in asked)
    forms = {'+': r'(\d+) (?:plus|and) (\d+) (?:is|make) (\d+)\.', '*': r'(\d+) (?:times|groups of) (\d+) (?:is|make) (\d+)\.',
             '-': r'(\d+) minus (\d+) is (\d+)\.', '-from': r'(\d+) from (\d+) leaves (\d+)\.',
             '/': r'(\d+) (?:divided by|in groups of) (\d+) (?:is|make) (\d+)(?: groups)?\.'}
    seen = collections.Counter()
    for text in facts:
        left = text
        for a, op, b, a2, op2, b2, c, c2 in STEP.findall(left):
            assert (a, op, b, c) == (a2, op2, b2, c2)
            work(f'{a}{op}{b}=<<{a}{op}{b}={c}>>{c}\n#### {c}')
            seen[op] += 1
        left = STEP.sub('', left)
        for op, form in forms.items():
            for a, b, c in re.findall(form, left):
                a, b = (b, a) if op == '-from' else (a, b)
                work(f'{a}{op[0]}{b}=<<{a}{op[0]}{b}={c}>>{c}\n#### {c}')
                seen[op + ' in words'] += 1
            left = re.sub(form, '', left)
        assert left.strip() == '' and all(1 <= n <= 30 for n in numbers(text)), text
    assert sum(seen.values()) == 1200 and len(seen) == 9 and min(seen.values()) > 15


def test_tales_keep_the_books(made):
    """Every step of a tale is right, and works with the last totals and the numbers of the sentence before it."""
    rng = random.Random(0)
    for n in (2, 3, 4):
        for _ in range(100):
            text, known = made.make_tale(rng, n), []
            for sentence in re.split(r'(?<=\.) ', text):
                if '<<' in sentence:
                    last = re.search(r'>>([0-9]+)', sentence)[1]
                    (a, _, b, c), = work(sentence + '\n#### ' + last)
                    assert {a, b} <= set(known), text
                    known = known[:-2] + [c]  # two operands become one total; before a product there waits another
                else:
                    known = known + numbers(sentence) + [2] * ('half' in sentence.lower())
            assert len(STEP.findall(text)) == n


# ---- the settings ----
def test_ops(made):
    for ops in ('+', '-', '*', '/', '+-', '*/', '-*', '+-*/'):
        used = set()
        for n in (1, 2, 3):
            for _, answer in problems(made, 30, n, ops=ops):
                used |= {op for _, op, _, _ in work(answer)}
        assert used == set(ops)


def test_steps(made):
    for n in range(1, 7):
        assert all(len(work(answer)) == n for _, answer in problems(made, 200, n))


def test_max_number(made):
    for most in (12, 100):
        found = [n for text in problems(made, 300, 2, max_number=most, distractor=1) for part in text for n in numbers(part)]
        assert 2 <= min(found) and most * 0.9 < max(found) <= most


def test_distractor(made, monkeypatch):
    monkeypatch.setattr(made, 'DISTRACTORS', ['The code is {n}.'])
    monkeypatch.setattr(made, 'MORE_DISTRACTORS', [])
    counts = [sum('The code is' in question for question, _ in problems(made, 500, 2, distractor=p)) for p in (0, 0.2, 1)]
    assert counts[0] == 0 and 60 < counts[1] < 140 and counts[2] == 500


def test_numbers_told_are_needed(made):
    """Without a distractor, a solution works with every number of the story, as often as it was told."""
    for n in (1, 2, 3, 4):
        for question, answer in problems(made, 300, n, distractor=0):
            used = collections.Counter(x for a, _, b, _ in work(answer) for x in (a, b))
            assert not collections.Counter(numbers(question)) - used, (question, answer)


BAD_SETTINGS = [
    (('--min_steps=3', '--max_steps=2'), 'min_steps'), (('--min_steps=0',), 'min_steps'), (('--max_steps=7',), 'max_steps'),
    (("--ops=''",), 'ops'), (('--ops=+x',), 'ops'), (('--ops=++',), 'ops'), (('--distractor=1.5',), 'distractor'),
    (('--reorder=-1',), 'reorder'), (('--n_test=-1',), 'n_test'), (('--max_number=1',), 'a max_number of 4'),
    (('--base_facts=.7', '--base_one_step=.4'), 'base_facts'),
    (('--ops=/', '--min_steps=4', '--max_number=10'), 'no problem of 4 steps'),
    (('--ops=+', '--max_number=4'), 'no problem of')]


def test_bad_settings(script, tmp_path):
    for flags, message in BAD_SETTINGS:
        done = script(SCRIPT, f'--out={tmp_path}', *flags, code=2)
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and message in done.stderr
        assert os.listdir(tmp_path) == []


def test_too_many_problems(made, monkeypatch):
    """A small world runs out of questions: that is said, and searched for not forever."""
    monkeypatch.setattr(made, 'NAMES', dict(list(made.NAMES.items())[:4]))
    monkeypatch.setattr(made, 'LEDGERS', [made.CHILDREN])
    monkeypatch.setattr(made, 'TRIES', 500)
    with pytest.raises(UserError, match=r'^5,000 different problems are asked for, but only [1-9][0-9,]* were found$'):
        made.make_problems(random.Random(0), 5000, (1, 1), set(), (6, '+-*/', 0, 0))


# ---- riches ----
def test_many_sentence_forms(made, files):
    """Told apart after names, things, numbers and verbs are masked; counted where they occur at least three times."""
    _, rows = files
    words = {name: 'P' for name in made.NAMES} | {'He': 'P', 'She': 'P'}
    words |= {word: 'o' for thing in made.OBJECTS for word in (thing, thing[:-1])} | {c: 'c' for c in made.CONTAINERS}
    words |= {verb: 'has' for pair in made.VERBS for verb in pair}

    def forms(texts):
        masked = collections.Counter(re.sub(r'\d+', 'n', re.sub(r'\w+', lambda m: words.get(m[0], m[0]), t)) for t in texts)
        return [form for form, count in masked.items() if count >= 3]

    both = rows['train'] + rows['test']
    told = forms(s for row in both for s in re.split(r'(?<=\.) ', row['question'])[:-1])
    asked = forms(row['question'].rsplit('. ', 1)[1] for row in both)
    worked = forms(re.sub(r'\S*<<\S*>>', '', line) for row in both for line in row['answer'].split('\n')[:-1])
    assert len(told) >= 80 and len(asked) >= 25 and len(worked) >= 40, (len(told), len(asked), len(worked))


def orders(made, root, slots, tries=200):
    """The equation sequences that solve() finds for one story, and the wordings."""
    texts = ['\n'.join(made.solve(random.Random(i), root, slots)) + f'\n#### {root.value}' for i in range(tries)]
    return {tuple(f'{a}{op}{b}' for a, op, b, _ in work(text)) for text in texts}, set(texts)


def test_orders_of_one_graph(made):
    """All valid orders and nothing else, counted by hand."""
    def result(*terms):
        return made.Result(terms, {'whole': ['{e}']} | {'part': ['{e}']}, {})

    def found(root):
        return orders(made, root, {})[0]
    a, b = result(('+', 3), ('*', 4)), result(('+', 2), ('*', 5))
    assert found(result(('+', a), ('+', b))) == {('3*4', '2*5', '12+10'), ('2*5', '3*4', '12+10')}
    assert found(result(('+', 20), ('+', 5), ('-', 3))) == {('20+5', '25-3'), ('20-3', '17+5'), ('5-3', '20+2')}
    assert found(result(('+', 20), ('-', 5), ('-', 3))) == {('20-5', '15-3'), ('20-3', '17-5'), ('5+3', '20-8')}
    assert found(result(('+', 20), ('-', 5), ('+', 8))) == {('20-5', '15+8'), ('20+8', '28-5'), ('8-5', '20+3')}
    assert found(result(('+', 4), ('-', 3), ('+', 8))) == {('4+8', '12-3'), ('8-3', '4+5')}  # 4-3 = 1 is not in the range
    assert found(result(('+', result(('+', 9), ('-', 3))), ('/', 2))) == {('9-3', '6/2')}
    c = result(('+', 7), ('+', 6))
    assert found(result(('+', 7), ('+', c), ('+', 5))) == {
        ('7+6', '7+13', '20+5'), ('7+6', '13+5', '7+18'), ('7+6', '7+5', '12+13'), ('7+5', '7+6', '12+13')}
    straight = ['\n'.join(made.solve(random.Random(i), result(('+', a), ('-', 3), ('+', b)), {}, reorder=0)) for i in range(9)]
    assert {tuple(line.split('=')[0] for line in text.split('\n')) for text in straight} == {('3*4', '12-3', '2*5', '9+10')}
    minus = [made.solve(random.Random(i), result(('+', 20), ('-', 5), ('-', 3)), {}, ops='-')[0][:4] for i in range(50)]
    assert set(minus) == {'20-5', '20-3'}  # 5+3 would be an operation that is not allowed


def test_stories_have_several_solutions(made):
    rng, several, wordings = random.Random(0), collections.Counter(), []
    for n in (2, 3, 4):
        for _ in range(100):
            _, root, slots = made.make_story(rng, n)
            equations, texts = orders(made, root, slots, tries=30)
            several[n] += len(equations) > 1
            wordings.append(len(texts))
    assert several[2] > 10 and several[3] > 45 and several[4] > 70, several
    assert sorted(wordings)[len(wordings) // 10] >= 4  # nine stories of ten can be told in four ways or more


def test_nobody_gives_what_he_has_not(made):
    """In the order of the story too, every amount on the way is in the range."""
    rng = random.Random(0)
    for _ in range(500):
        todo = [made.make_story(rng, 4)[1]]
        for q in todo:
            todo += [term for _, term in q.terms if not isinstance(term, int)]
            if all(op in '+-' for op, _ in q.terms):
                amount = 0
                for op, term in q.terms:
                    amount += made.value(term) if op == '+' else -made.value(term)
                    assert 2 <= amount <= 30
