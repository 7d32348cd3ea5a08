"""The official files of GSM8K and SVAMP: facts counted on them, and the prepare scripts. Skipped where DATA_DIR lacks them."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, real_data

import rewards
from config import UserError
from rewards import ANNOTATION, annotation_is_right, equations, extract_answer, is_correct, read_problems, steps


def prepare(task):
    return os.path.join(ROOT, 'data', task, 'prepare.py')


# ---- GSM8K ----
# rows, commas, negatives, annotations, rows without, rows whose last one is not the answer, most steps
GSM8K = {'train': (7473, 79, 3, 23716, 95, 377, 9), 'test': (1319, 14, 2, 4282, 18, 93, 11)}


@pytest.mark.parametrize('split', GSM8K)
def test_every_gsm8k_answer_earns_its_reward(split):
    problems = read_problems(real_data('gsm8k', f'{split}.jsonl'))
    assert len(problems) == GSM8K[split][0]
    for p in problems:
        assert re.fullmatch(r'-?[0-9]+', p.answer)
        assert is_correct(rewards.completion(p.solution), p.answer) and is_correct(p.solution, p.solution)
        assert not is_correct(rewards.completion(p.solution), str(int(p.answer) + 1))
        assert not is_correct(rewards.completion(p.solution.split('####')[0]), p.answer)


@pytest.mark.parametrize('split', GSM8K)
def test_gsm8k_facts(split):
    problems = read_problems(real_data('gsm8k', f'{split}.jsonl'))
    finals = [p.solution.rsplit('\n#### ', 1)[1] for p in problems]
    annotations = [ANNOTATION.findall(p.solution) for p in problems]
    wrong = [e for row in annotations for e in row if not annotation_is_right(e)]
    last = [row and extract_answer('#### ' + row[-1].split('=')[1]) != p.answer for row, p in zip(annotations, problems)]
    assert wrong == []
    assert (len(problems), sum(',' in f for f in finals), sum('-' in f for f in finals), sum(map(len, annotations)),
            annotations.count([]), sum(map(bool, last)), max(len(steps(p.solution)) for p in problems)) == GSM8K[split]
    for p, row in zip(problems, annotations):
        assert not row or equations(p.solution) == tuple(''.join(e.split()) for e in row)
    if split == 'train':
        assert round(sum(len(steps(p.solution)) for p in problems) / len(problems), 2) == 3.58


def test_prepare_gsm8k(script, tmp_path):
    done = script(prepare('gsm8k'), f'--source={real_data("gsm8k")}', f'--out={tmp_path}')
    assert 'train.jsonl: 7,473 problems' in done.stdout and 'test.jsonl: 1,319 problems' in done.stdout
    assert sorted(os.listdir(tmp_path)) == ['test.jsonl', 'train.jsonl']
    assert [len(rewards.load_problems(str(tmp_path), split)) for split in ('train', 'val', 'test')] == [7473 - 256, 256, 1319]


@pytest.mark.parametrize('task, name', [('gsm8k', 'test.jsonl'), ('svamp', 'SVAMP.json')])
def test_a_file_that_is_not_the_official_one_is_refused(script, tmp_path, task, name):
    source, out = tmp_path / 'source', tmp_path / 'out'
    shutil.copytree(real_data(task), source)
    for path in [source, *source.rglob('*')]:   # the data may be read-only
        path.chmod(0o755)
    (source / name).write_bytes((source / name).read_bytes().replace(b'apples', b'pears!', 1))
    out.mkdir()
    for old in ('train.jsonl', 'test.jsonl'):
        (out / old).write_text('what was here')
    for reason in ('is not the official file: its sha256 is', 'No such file'):
        done = script(prepare(task), f'--source={source}', f'--out={out}', code=2)
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
        assert name in done.stderr and reason in done.stderr
        assert {p.name: p.read_text() for p in out.iterdir()} == {'train.jsonl': 'what was here', 'test.jsonl': 'what was here'}
        (source / name).unlink(missing_ok=True)


@pytest.mark.parametrize('task, there', [
    ('gsm8k', {'train.jsonl': 'train.jsonl', 'test.jsonl': 'test.jsonl'}),
    ('svamp', {'SVAMP.json': 'SVAMP.json', 'data/mawps-asdiv-a_svamp': 'mawps-asdiv-a_svamp'})])
def test_download(tmp_path, task, there):
    """From a folder that is laid out as the repositories on GitHub are, since tests don't use the network."""
    script = importlib.util.spec_from_file_location(f'prepare_{task}', prepare(task))
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    assert module.URL.startswith('https://')
    module.URL = tmp_path.as_uri() + '/'
    for name in module.SHA256:
        with pytest.raises(UserError, match='cannot read file:.*--source=DIR'):
            module.fetch(name, '')
    (tmp_path / 'data').mkdir()
    for theirs, ours in there.items():
        (tmp_path / theirs).symlink_to(real_data(task, ours))
    for name in module.SHA256:
        with open(real_data(task, name), 'rb') as f:
            assert module.fetch(name, '') == f.read()


# ---- SVAMP ----
@pytest.fixture(scope='module')
def svamp(tmp_path_factory):
    """(folder, what the script printed). Made in a process of its own, started from another folder."""
    source, out = real_data('svamp'), tmp_path_factory.mktemp('svamp')
    done = subprocess.run([sys.executable, prepare('svamp'), f'--source={source}', f'--out={out}'], check=True, capture_output=True, text=True,
                          cwd=os.path.dirname(ROOT))
    return out, done.stdout


def test_svamp_counts(svamp):
    out, printed = svamp
    assert len(read_problems(out / 'train.jsonl')) == 2663 and len(read_problems(out / 'test.jsonl')) == 1000
    assert {int(n) for n in re.findall(r'([0-9,]+) rows left out', printed)} == {409, 59, 7} and 2663 + 409 + 59 + 7 == 3138
    assert 'contradicts the official answer: chal-680\n' in printed


def test_svamp_test_keeps_the_official_answers(svamp):
    with open(real_data('svamp', 'SVAMP.json'), encoding='utf-8') as f:
        official = json.load(f)
    problems = read_problems(svamp[0] / 'test.jsonl')
    for row, p in zip(official, problems, strict=True):
        assert re.fullmatch(r'[0-9]+', p.answer) and float(p.answer) == row['Answer']
        assert is_correct(p.solution, str(row['Answer']))
        n_operations = sum(row['Equation'].count(f' {op} ') for op in '+-*/')
        assert len(steps(p.solution)) == (0 if row['ID'] == 'chal-680' else n_operations)
        assert p.question.replace('$', '').split()[:3] == row['Body'].replace('$ ', '').replace(' - ', '-').split()[:3]


def test_svamp_steps_are_right_and_lead_to_the_answer(svamp):
    for name in ('train.jsonl', 'test.jsonl'):
        for p in read_problems(svamp[0] / name):
            found = equations(p.solution)
            assert len(found) == len(steps(p.solution)) and all(map(annotation_is_right, found))
            assert not re.search(r'\.[0-9]*0(?![0-9])', p.solution)  # 5 and 2.5, not 5.0 and 2.50
            if found:
                assert found[-1].split('=')[1] == p.answer
            assert len(p.answer.partition('.')[2]) <= 4


def test_svamp_texts_read_as_text(svamp):
    """No tokenised punctuation, no number left out, a sign between Body and Question."""
    for name in ('train.jsonl', 'test.jsonl'):
        for p in read_problems(svamp[0] / name):
            assert not re.search(r"number[0-9]|\s[.,?!;%)]|[$(]\s|  | 's | n't|’|``|\s'\s", p.question), p.question
    test = [p.question for p in read_problems(svamp[0] / 'test.jsonl')]
    with open(real_data('svamp', 'SVAMP.json'), encoding='utf-8') as f:
        asked = [row['Question'].replace(' - ', '-') for row in json.load(f)]
    for question, end in zip(test, asked, strict=True):
        end = end.replace("' crazy silly school '", "'crazy silly school'")
        assert question.endswith(('. ' + end, ', ' + end[0].lower() + end[1:])), question
    for question in [
        # If ..., how
        'Dan has $4. He bought a candy bar for $8. Then his friend have him $5. How much money is left?',
        'Dan had $3 left with him after he bought a candy bar. If he had $4 at the start, how much did the candy bar cost?',
        # a full stop lost, a full stop kept
        'The school has 304 grades and each grade has 75 students. How many students were there in total?',
        'Baker made 121 cakes. He sold 105 of them and bought 170 new cakes. How many cakes does baker still have?',
    ]:
        assert question in test
    train = {p.question for p in read_problems(svamp[0] / 'train.jsonl')}
    assert ('Bryan took a look at his books as well. If Bryan has 56 books in each of his 9 bookshelves, how many books does he '
            'have in total?') in train
    assert any("playing 'whack a mole' and" in q for q in train) and any("the Wagners' real estate" in q for q in train)
    assert any("didn't leave him a tip" in q for q in train) and any('simple interest' in q and '3%.' in q for q in train)


def test_svamp_splits_share_no_question(svamp):
    def key(question):
        return ' '.join(re.findall(r'\w+', question.lower()))
    train = [key(p.question) for p in read_problems(svamp[0] / 'train.jsonl')]
    test = [key(p.question) for p in read_problems(svamp[0] / 'test.jsonl')]
    assert len(set(train)) == len(train) and len(set(test)) == len(test) and not set(train) & set(test)


def test_svamp_validation_has_both_sources(svamp):
    """MAWPS's part is in lower case: the slice is no block of one source."""
    val = rewards.load_problems(str(svamp[0]), 'val')
    assert 0.2 < sum(p.question[0].islower() for p in val) / len(val) < 0.5


def test_svamp_is_reproducible(svamp, script, tmp_path):
    script(prepare('svamp'), f'--source={real_data("svamp")}', f'--out={tmp_path}')
    for name in ('train.jsonl', 'test.jsonl'):
        assert (tmp_path / name).read_bytes() == (svamp[0] / name).read_bytes()


def test_svamp_golden_rows(svamp):
    """Worked out by hand: nested brackets, a prefix equation with a constant, decimals, a negative step."""
    rows = {p.question: p.solution for name in ('train.jsonl', 'test.jsonl') for p in read_problems(svamp[0] / name)}

    def check(start, *lines):
        found = [s for q, s in rows.items() if q.startswith(start)]
        assert found == ['\n'.join(lines)]
    check('Conner has 25000 dollars', '1500*8=<<1500*8=12000>>12000', '25000-12000=<<25000-12000=13000>>13000', '#### 13000')
    check('You deposit 70 dollars', '70*3=<<70*3=210>>210', '210*2.5=<<210*2.5=525>>525', '525*0.01=<<525*0.01=5.25>>5.25',
          '#### 5.25')
    check("Marco and his dad went strawberry picking. Together their strawberries weighed 4 pounds. Marco's strawberries weighed "
          '19', '4-19=<<4-19=-15>>-15', '19-(-15)=<<19-(-15)=34>>34', '#### 34')
    check("Rachel's tree had 4 apples. She picked 2 apples from her tree. Thereafter 3 new apples grew on the tree. "
          'How many apples are there on the tree now?', '#### 1')  # chal-680
