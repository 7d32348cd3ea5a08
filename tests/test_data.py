"""Problems, prompts, answers, steps and equations, on texts made here; and a task with its own answers."""
import itertools
import json

import pytest

import data
from config import UserError
from data import Problem, equations, extract_answer, is_correct, load_problems, steps

# ---- the answer check: {answer: texts, separated by bars} ----
BOTH = {  # after "#### " and in \boxed{}
    '18': r'18 | 18.0 | 018 | +18 | $18 | \$ 18 | 18% | 36/2',
    '-18': '-18 | - 18 | \u221218 | \u201318 | $-18', '1800': '1,800 | 1,800. | 1,800.00 | 1{{,}}800',
    '-1800': '\u2212$1,800', '1234567': r'1\,234\,567 | $1,234,567.0',
    '12000': r'\$12{,}000 | 12\,000 | 12,\!000 | 12{,}\!000', '9500.5': r'9\,500.50 | 9{,}500.5',
    '0': '-0 | 0.0', '18.5': '0018.50', '50': r'50\% | 50 %', '900': '1,800/2', '125': r'\frac{1{,}000}{8}',
    '-9500': '-9{,}500', '0.5': r'.5 | 1/2 | 1 / 2 | \frac{1}{2} | \frac12 | \frac 1 2',
    '-0.5': r'-\frac{1}{2} | \frac{-1}{2}', '0.75': r'3/4 | \frac{1.5}{2}', '1/3': r'2/6 | \dfrac{2}{6}',
    '-1/3': '-1/3', '1.8': r'1\frac{4}{5} | 1\frac45', '-1.8': r'-1\frac{4}{5}',
    '2.5': r'2 \frac{1}{2} | 2\,\frac{1}{2}', f'1/{2 ** 65}': f'1/{2 ** 65}', '1' * 64: '1' * 64,
    '0.' + '1' * 62: '0.' + '1' * 62, None: ''}
MARKED = {  # after "#### "
    '18': r'18- | 18 apples | 18kg | $18/hour | 18 / hour | 18, and 20 more | 18. The 7 others | '
          r'18\text{ kg} | 18\,cm | 18 \quad | 17 #### 18 | 18 \boxed{17}',
    '1': r'1 1/2 | 1 2 | 1, 234 | 1,\frac{234}{5}', '0': '0x12',
    None: r'. | , | $ | - | ... | 1,2,3 | 18,00 | 1.800,50 | 1.2.3 | 1,8000 | ,180 | --18 | 1/0 | 1/2/3 | '
          r'1e5 | 18E-2 | 18 #### | **18** | eighteen | x = 18 | (18) | nan | \boxed{18} | \text{18} | '
          r'\frac{1}{0} | 3\ 4 | 3\!4 | 1{,}2 | 12\,000\,5 | 9 \,500 | 1 \frac{5}{4} | (1,\frac{2}{4})'}
BOXED = {  # in \boxed{}
    '18': r'\text{18} | \mathrm{18}', '1800': r'\textbf{1{,}800}', 'Monday': r'\text{Monday}',
    'x^2+1': ' x^2 + 1 ', '(1,2)': '(1, 2)', '18apples': '18 apples', '18/hour': '18 / hour',
    r'18\text{kg}': r'18\text{ kg}', '1 2': '1 2', '1/0': r'\frac{1}{0}', '1/2/3': '1 / 2 / 3',
    '3 4': r'3\ 4 | 3\,4 | 3\!4', '12000 5': r'12\,000\,5', '1,2': '1{,}2', '1 1/2': '1 1/2',
    '9 500': r'9 \,500', '000 500': r'000\,\!500', '1, 234': '1, 234', '5{1/2}': r'5 {\frac12}',
    '1, 234/5': r'1,\frac{234}{5}', '(1,2/4)': r'(1,\frac{2}{4})', r'1\text{1,000}': r'1\text{1{,}000}',
    None: 'x' * 300}
SAME = [  # no number after "#### ", unchanged in \boxed{}
    '9^2', '3½', "9'500", '9_500', '9{.}5', r'2\sqrt{3}', '9{,} 500', '9 {,}500', r'1\text{2}',
    r'1\text{}2', r'1\frac{5}{4}', r'1.5\frac12', r'\frac456', r'\frac{4}{5}6']
TABLE = [(form % text, answer) for texts, *forms in (
    (BOTH, '#### %s', r'\boxed{%s}'), (MARKED, '#### %s'), (BOXED, r'\boxed{%s}'))
    for form in forms for answer, some in texts.items() for text in some.split(' | ')]
TABLE += [(f'#### {text}', None) for text in SAME] + [(rf'\boxed{{{text}}}', text) for text in SAME]
TABLE += [(text, '18') for text in (
    '####18', '#####18', '####\t18', '####    18   ', r'so \boxed{18}.', r'\boxed{17} \boxed{18}',
    '#### 17\n#### 18\n\n', '#### 18\nQuestion: what is 2+2?\nAnswer: 4', '#### 18' + ' and so on' * 1000,
    '#### ' + '0' * 62 + '18')]
TABLE += [(text, None) for text in (
    '', '18', 'The answer is 18.', '### 18', '# # # # 18', r'\boxed{18', r'\boxed{18} ####', '#### 17\n####',
    '#### 17\n#### no', '####\n18', '#### \r\n18', '#### \u0661\u0668', '#### ' + '1' * 65,
    '#### 1/' + '3' * 65, '#### -' + ' -' * 200 + '18')]

@pytest.mark.parametrize('text, answer', TABLE, ids=range(len(TABLE)))
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    if answer is None:
        assert not is_correct(text, 'None') and not is_correct(text, '18')
    else:
        assert is_correct(text, answer) and is_correct(text, text) and not is_correct(text, answer + '1')
        assert extract_answer(rf'\boxed{{{answer}}}') == answer  # its one spelling

@pytest.mark.parametrize('text', [  # start|what is repeated|end
    '|#### |', '|#|', '|#### $ - |', r'|\boxed{|', '|<<|', '|<<1=1|', '|1|', '|1.|', '|1+1=1x|', '|-|',
    '|\n|', '#### |1|', '#### | |', '#### |-|', '#### |1,|', '#### |1/|', '#### 1|.|', r'\boxed{|{|', '1| |',
    '1+1| |', '1+1=| |', '1+1=|1|x', '<<1=|1|>', r'#### 1|\,000|', r'#### |\frac{1|', r'#### 1|\,0 |',
    r'#### 1|\text{|', '#### |1{,}|', r'\boxed{|\,|'])
def test_a_long_text_takes_linear_time(text):
    """Hours, if an expression backtracked or a search began again at each character."""
    start, unit, end = text.split('|')
    text = start + unit * (200_000 // len(unit)) + end
    assert extract_answer(text) is None and not is_correct(text, '18')
    assert len(equations(text)) < 40_000 and len(steps(text)) <= 1

def test_is_correct_compares_numbers():
    for answer in ['18', '18.0', '018', '$18', '18%', 18.0, '36/2', 'He has 18.\n#### 18', r'\boxed{18}']:
        assert is_correct('... #### 18', answer)
        assert not any(is_correct(text, answer) for text in ('... #### 81', '... #### -18', '... 18'))
    assert is_correct('#### 1,800.00', '1800') and is_correct('#### 0.1', '1/10')
    for text, answer in [('0.3333', '1/3'), ('3/4', '3'), ('0.1', '0.10000000000000001'), ('.', '####'),
                         ('none', None), ('none', 'none'), ('.', ''), (r'\boxed{None}', r'\boxed{}')]:
        assert not is_correct(f'#### {text}', answer)  # 0.1 is equal as a float

# ---- prompts, steps, equations ----
def test_prompts():
    p = Problem('What is 1+2?', '1+2=<<1+2=3>>3\n#### 3', '3')
    whole = data.prompt(p.question) + data.completion(p.solution)
    assert whole == 'Question: What is 1+2?\nAnswer: 1+2=<<1+2=3>>3\n#### 3'
    assert data.prompt('And 2+2?', [p, p]) == f'{whole}\n\n{whole}\n\nQuestion: And 2+2?\nAnswer:'
    assert data.answered(f'{whole} pens\nQuestion: b') == f'{whole} pens' and data.answered('a\nb') == 'a\nb'

SOLUTION = 'She has 3 + 4 = <<3 + 4=7>>7 pens.\n\nShe gives 7-2=<<7-2=5>>5 away.\n  \n#### 5'

@pytest.mark.parametrize('text, answer', [
    ('so 3 + 4 = 7.', '7'), ('It is 1,800 dollars', '1800'), ('5-8 = \u22123', '-3'), ('3-4', '4'),
    ('no', None), ('3\n#### 4\nor 5', '4'), (r'\boxed{x + 1} of 2', 'x+1'), ('1 or 2.5.3', None),
    ('1/2', '0.5'), ('9' * 70, None)])
def test_a_lenient_reading_takes_the_last_number_where_there_is_no_answer(text, answer):
    assert data.lenient_answer(text) == answer

def test_steps():
    assert steps(SOLUTION) == ['She has 3 + 4 = <<3 + 4=7>>7 pens.', 'She gives 7-2=<<7-2=5>>5 away.']
    for text, found in [('#### 5', ''), ('a\nb', 'ab'), ('a\nb#### 5\nc', 'ab'), ('a\n#####5', 'a')]:
        assert ''.join(steps(text)) == found
    assert steps('a\n#### 1\nb\n#### 2') == ['a', '#### 1', 'b']

@pytest.mark.parametrize('text, found', [
    (SOLUTION, '3+4=7 7-2=5'), ('2+3=5, then <<5*2=10>>10', '5*2=10'),
    ('<<1+1=2>>2\n#### 2\n<<9+9=18>>', '1+1=2'), ('<<1+1=2>> <<1+1=2>>', '1+1=2 1+1=2'),
    ('<<1+1>> <<=2>> <<a', ''), ('', ''), ('#### 5', ''), ('7 = 7', ''),
    ('So 3 + 4 = 7 pens and 7 - 2 = 5.', '3+4=7 7-2=5'), ('$1,200 + $300 = $1,500', '1200+300=1500'),
    ('x = 7', ''), ('3 x 4 = 12, 12 ÷ 6 = 2, 2×2=4, 4*2 = 8, 8/2=4.', '3*4=12 12/6=2 2*2=4 4*2=8 8/2=4'),
    ('2*-3=-6', '2*-3=-6'), ('100 - 50 - 30 - 15 = 5', '100-50-30-15=5'), ('0.5*.5=0.25', '0.5*.5=0.25'),
    ('5 \u2212 8 = \u22123', '5-8=-3'), ('3 + 4', ''), ('100/5=5A', ''), ('40*2=80p', ''), ('2x*3+1=7', ''),
    ('3+4=7+1=8', '3+4=7'), ('x2+3=5', ''), ('1+1=' + '1' * 21, ''), ('1' * 21 + '+1=2', ''), ('3==3', '')])
def test_equations_and_results(text, found):
    assert equations(text) == tuple(found.split())
    assert data.results(text) == [equation.split('=')[1] for equation in found.split()]

def test_annotations_are_checked_exactly():
    right = '3+4=7 0.2*50=10 0.1+0.2=0.3 2*(3+4)=14 2*3+4=10 8-3-2=3 19-(-15)=34 -5+3=-2 05+3=8 7//2=3 7=7'
    wrong = '3+4=8 10/3=3.33 1/0=0 2**3=8 7 3+4=7=7 3+x=4 = (1=1 1(2)=2 __import__("os")=1'
    for is_right, some in ((True, [*right.split(), '9' * 150 + '=' + '9' * 150]),
                           (False, [*wrong.split(), '1=' + '-' * 5000 + '1'])):
        for equation in some:
            assert data.annotation_is_right(equation) is is_right, equation

# ---- problems ----
def write(path, rows):
    lines = [(row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows]
    path.write_text(''.join(lines), encoding='utf-8', errors='surrogateescape')

def good_rows(n):
    return [{'question': f'What is {i}+1?', 'answer': f'{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}'}
            for i in range(n)]

def test_splits(tmp_path):
    write(tmp_path / 'train.jsonl', good_rows(300))
    write(tmp_path / 'test.jsonl', [{'question': 'a', 'answer': r'\boxed{x + 1}', 'id': [7]}])
    train, val, test = (load_problems(str(tmp_path), split) for split in ('train', 'val', 'test'))
    assert [p.answer for p in train + val] == [str(i + 1) for i in range(300)] and len(val) == 256
    assert train[0] == Problem('What is 0+1?', '0+1=<<0+1=1>>1\n#### 1', '1', '', {})
    assert test == [Problem('a', r'\boxed{x + 1}', 'x+1', '', {'id': [7]})]
    for n, split in itertools.product((0, 256), ('train', 'val')):  # none would be left to train on
        write(tmp_path / 'train.jsonl', good_rows(n))
        with pytest.raises(UserError, match=f'too few rows, {n}: the last 256'):
            load_problems(str(tmp_path), split)

@pytest.mark.parametrize('row, reason', [
    ('', 'not JSON'), ('{"question": "a"', 'not JSON'), ('[' * 99_999, 'not JSON'), ('"\udcff"', 'not JSON'),
    ('[]', 'not a list'), ('3', 'not a int'), ('{"question": "\\ud800", "answer": "#### 1"}', 'surrogate'),
    ({'answer': '#### 1'}, '"question" is missing'), ({'question': 'a'}, '"answer" is missing'),
    *(({'question': 'a', 'answer': '#### 1', key: wrong}, f'"{key}" is missing, empty or no string')
      for key in ('question', 'answer') for wrong in (1, ' ')),
    *(({'question': 'a', 'answer': text}, 'no final answer') for text in ('1', '#### b', '#### 1 ####'))])
def test_a_malformed_row_is_refused_with_file_line_and_reason(tmp_path, row, reason):
    write(tmp_path / 'test.jsonl', [*good_rows(4), row, *good_rows(1)])
    with pytest.raises(UserError) as e:
        load_problems(str(tmp_path), 'test')
    said = str(e.value)
    assert said.startswith(f'{tmp_path}/test.jsonl:5: ') and reason in said and '\n' not in said

def test_missing_data_says_what_makes_it(tmp_path, monkeypatch):
    (tmp_path / 'sums').mkdir()
    (tmp_path / 'sums' / 'prepare.py').touch()
    monkeypatch.setattr(data, 'DATA', str(tmp_path))
    for task, split, reason in [
            ('sums', 'test', 'run `python data/sums/prepare.py`'), ('sums', 'dev', "'train', 'val' or"),
            ('sms', 'train', r"'sms' is no folder with it, nor one of \['sums'\]")]:
        with pytest.raises(UserError, match=reason):
            load_problems(task, split)
    write(tmp_path / 'sums' / 'test.jsonl', good_rows(2))
    assert len(load_problems('sums', 'test')) == 2

def test_the_script_counts(script, tmp_path):
    rows = good_rows(300)
    for row, answer in zip(rows, ('0+1=<<0+1=2>>1\n#### 1', '#### 2', '2+1=3\n#### 3')):
        row['answer'] = answer  # with a wrong annotation, none, a plain equation
    write(tmp_path / 'train.jsonl', rows)
    write(tmp_path / 'test.jsonl', good_rows(5))
    said = script('rewards.py', f'--task={tmp_path}').stdout
    assert ('train: 44 problems, 44 of their own answers earn reward 1; 0.98 steps a solution; annotations: '
            '41 right, 1 wrong, 2 solutions without; 1 references without an equation') in said
    assert 'test: 5 problems, 5 of their own answers earn reward 1; 1.00 steps a solution' in said

# ---- a task with its own answers: the last letter from A to D in brackets, in either case ----
CHOICE = r'''import re

def extract(text):
    return (re.findall(r'\(([A-Da-d])\)', text) or [None])[-1]

def same(answer, reference):
    return answer.upper() == reference.upper()
'''

def write_choice(folder, code=CHOICE):
    (folder / 'task.py').write_text(code)
    row = {'question': 'Even: (A) 1 or (B) 2?', 'answer': 'It is (b)', 'choices': [1, 2]}
    write(folder / 'test.jsonl', [row])
    return str(folder)

def test_a_task_has_its_own_answers(tmp_path):
    task = write_choice(tmp_path)
    problem, = load_problems(task, 'test')
    assert problem == Problem('Even: (A) 1 or (B) 2?', 'It is (b)', 'b', task, {'choices': [1, 2]})
    for text, right in [('(B)', 1), ('(a)? No: (b)', 1), ('(b) or (A)', 0), ('B', 0), ('#### 1', 0)]:
        assert is_correct(text, problem.answer, task) == right and not is_correct(text, None, task), text
    assert is_correct('#### 18', '18') and not is_correct('(B)', 'B')  # other tasks are as before
    write(tmp_path / 'test.jsonl', [{'question': 'Which?', 'answer': '#### 18'}])
    with pytest.raises(UserError, match=r'test\.jsonl:1: .*no final answer'):
        load_problems(task, 'test')

@pytest.mark.parametrize('old, new, place', [
    ('reference):', 'reference)', 'task.py:6'), ('import re', 'import re, nothing', 'task.py:1'),
    ('re.findall', 're.find', 'task.py:4'), ('def same', 'def equal', 'same')])
def test_an_error_in_task_py_is_one_line(tmp_path, old, new, place):
    task = write_choice(tmp_path, CHOICE.replace(old, new))
    with pytest.raises(UserError) as e:
        load_problems(task, 'test')
    assert f'{task}/task.py' in str(e.value) and place in str(e.value) and '\n' not in str(e.value)
