"""GSM8K and SVAMP: facts counted on the official files, and the scripts. Skipped without DATA_DIR."""
import importlib
import json
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, real_data, run_script

import data
from config import UserError
from data import ANNOTATION, annotation_is_right, equations, extract_answer, is_correct, read_problems, steps

def prepare(task, source, out, code=0):
    script = os.path.join(ROOT, 'data', task, 'prepare.py')
    return run_script(script, f'--source={source}', f'--out={out}', code=code)

# rows; answers with comma, minus; annotations, rows without, rows whose last one isn't the answer; steps
GSM8K = {'train': (7473, 79, 3, 23716, 95, 377, 26720), 'test': (1319, 14, 2, 4282, 18, 93, 4819)}

@pytest.mark.parametrize('split', GSM8K)
def test_gsm8k(split):
    problems = read_problems(real_data('gsm8k', f'{split}.jsonl'))
    finals = [p.solution.rsplit('\n#### ', 1)[1] for p in problems]
    found = [ANNOTATION.findall(p.solution) for p in problems]
    n_other = 0
    for p, row in zip(problems, found):
        assert re.fullmatch(r'-?[0-9]+', p.answer)
        assert is_correct(data.completion(p.solution), p.answer) and is_correct(p.solution, p.solution)
        assert not is_correct(data.completion(p.solution), str(int(p.answer) + 1))
        assert not is_correct(data.completion(p.solution.split('####')[0]), p.answer)
        assert all(map(annotation_is_right, row))
        assert not row or equations(p.solution) == tuple(''.join(e.split()) for e in row)
        n_other += bool(row) and extract_answer('#### ' + row[-1].split('=')[1]) != p.answer
    marks = [sum(mark in f for f in finals) for mark in ',-']
    n_steps = sum(len(steps(p.solution)) for p in problems)
    assert (len(problems), *marks, sum(map(len, found)), found.count([]), n_other, n_steps) == GSM8K[split]

# ---- the prepare scripts ----
@pytest.fixture(scope='module')
def svamp(tmp_path_factory):
    """All its problems, first the test set."""
    out = tmp_path_factory.mktemp('svamp')
    prepare('svamp', real_data('svamp'), out)
    return read_problems(out / 'test.jsonl') + read_problems(out / 'train.jsonl')

def test_prepare(svamp, tmp_path):
    for task, sizes in (('gsm8k', (7473, 1319)), ('svamp', (2663, 1000))):
        said = prepare(task, real_data(task), tmp_path).stdout
        assert f'train.jsonl: {sizes[0]:,} problems' in said and f'test.jsonl: {sizes[1]:,} problems' in said
        assert sorted(os.listdir(tmp_path)) == ['test.jsonl', 'train.jsonl']
        splits = [data.load_problems(str(tmp_path), split) for split in ('train', 'val', 'test')]
        assert [len(split) for split in splits] == [sizes[0] - 256, 256, sizes[1]]
    assert splits[2] + splits[0] + splits[1] == svamp  # reproducible
    assert 0.2 < sum(p.question[0].islower() for p in splits[1]) / 256 < 0.5  # MAWPS's: not one source alone
    assert re.findall('([0-9]+) rows left out', said) == ['59', '409', '7'] and 2663 + 59 + 409 + 7 == 3138
    assert 'contradicts the official answer: chal-680\n' in said

@pytest.mark.parametrize('task, name', [('gsm8k', 'test.jsonl'), ('svamp', 'SVAMP.json')])
def test_what_is_not_the_official_file_is_refused(tmp_path, monkeypatch, task, name):
    official, source, out = Path(real_data(task)).resolve(), tmp_path / 'source', tmp_path / 'out'
    for folder in (source, out):
        folder.mkdir()
    for path in official.iterdir():
        (source / path.name).symlink_to(path)
    for old in ('train.jsonl', 'test.jsonl'):
        (out / old).write_text('what was here')
    (source / name).unlink()
    for reason in ('No such file', 'is not the official file: its sha256 is'):
        said = prepare(task, source, out, code=2).stderr
        assert said.startswith('error: ') and said.count('\n') == 1 and name in said and reason in said
        assert [path.read_text() for path in out.iterdir()] == ['what was here'] * 2
        (source / name).write_bytes((official / name).read_bytes().replace(b'apples', b'pears!', 1))
    # downloads: from a folder that is laid out as the repositories on GitHub are
    module = importlib.import_module(f'data.{task}.prepare')
    monkeypatch.setattr(module, 'URL', tmp_path.as_uri() + '/')
    with pytest.raises(UserError, match='cannot read file:.*--source=DIR'):
        module.fetch(name, '')
    (tmp_path / 'data').symlink_to(official)
    for file in {name, 'train.jsonl'}:
        (tmp_path / file).symlink_to(official / file)
    for file in module.SHA256:
        assert module.fetch(file, '') == module.fetch(file, official)

def test_mawps_is_what_the_train_set_lacks(svamp, tmp_path):
    known = [{'question': p.question, 'answer': p.solution} for p in svamp[1000:]]
    flags = f'--source={real_data("mwp")}', f'--train={tmp_path}', f'--out={tmp_path}'
    assert 'train.jsonl' in run_script('data/mawps/prepare.py', *flags, code=2).stderr
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, known)))
    said = run_script('data/mawps/prepare.py', *flags).stdout
    counts = [[int(n) for n in re.findall(r'\d+', line)] for line in said.splitlines() if 'left out' in line]
    # rows, new ones; nearly in the train set, in it, repeated, rounded
    assert counts == [[395, 9, 330, 24, 32], [600, 0, 600], [508, 39, 320, 108, 9, 32], [562, 0, 549, 12, 1]]
    test = data.load_problems(str(tmp_path), 'test')
    assert len(test) == 48 and test[0].question.startswith('Mike has 35 books') and test[0].answer == '21'
    assert all(len(p.answer) < 12 and p.solution == f'#### {p.answer}' for p in test)

# ---- SVAMP ----
def test_svamp_keeps_the_official_test_set(svamp):
    official = json.loads(Path(real_data('svamp', 'SVAMP.json')).read_text(encoding='utf-8'))
    for row, p in zip(official, svamp[:1000], strict=True):
        assert re.fullmatch('[0-9]+', p.answer) and is_correct(p.solution, str(row['Answer']))
        n_operations = sum(row['Equation'].count(f' {op} ') for op in '+-*/')
        assert len(steps(p.solution)) == (0 if row['ID'] == 'chal-680' else n_operations)
        end = row['Question'].replace(' - ', '-').replace("' crazy silly school '", "'crazy silly school'")
        assert p.question.endswith((f'. {end}', f', {end[0].lower()}{end[1:]}')), p.question

def test_svamp_rows(svamp):
    """Steps are right and lead to the answer; texts have no trace of tokens; no question occurs twice."""
    for p in svamp:
        found = equations(p.solution)
        assert len(found) == len(steps(p.solution)) and all(map(annotation_is_right, found))
        assert not found or found[-1].split('=')[1] == p.answer
        assert not re.search(r'\.[0-9]*0(?![0-9])', p.solution)  # 5, not 5.0
        assert not re.search(r"number[0-9]|\s[.,?!;%)]|[$(]\s|  | 's | n't|’|``|\s'\s", p.question)
    assert len({' '.join(re.findall(r'\w+', p.question.lower())) for p in svamp}) == len(svamp)

@pytest.mark.parametrize('part, lines', [  # by hand
    ('Conner has 25000', '1500*8=<<1500*8=12000>>12000 25000-12000=<<25000-12000=13000>>13000'),
    ('You deposit 70', '70*3=<<70*3=210>>210 210*2.5=<<210*2.5=525>>525 525*0.01=<<525*0.01=5.25>>5.25'),
    ("Marco's strawberries weighed 19", '4-19=<<4-19=-15>>-15 19-(-15)=<<19-(-15)=34>>34'),
    ('Thereafter 3 new apples grew on the tree. How many apples are there on', ''),  # chal-680
    ("playing 'whack a mole' and", None), ("didn't leave", None), ('3%.', None)])
def test_svamp_golden_rows(svamp, part, lines):
    found = [p for p in svamp if part in p.question]
    assert found and (lines is None or lines.split() in [steps(p.solution) for p in found])
