"""Problems, prompts, the answer check, steps and equations, on texts made here."""
import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest
from conftest import ROOT

import rewards
from config import UserError
from rewards import Problem, equations, extract_answer, is_correct, steps

# ---- the answer check: text -> answer ----
TABLE = [
    # one value, one spelling
    ('#### 18', '18'), ('#### 18.', '18'), ('#### 18.0', '18'), ('#### 18.00', '18'), ('#### 018', '18'),
    ('#### 0018.50', '18.5'), ('####18', '18'), ('#####18', '18'), ('####\t18', '18'), ('####    18   ', '18'),
    ('#### +18', '18'), ('so it is #### 18', '18'), ('#### 0', '0'), ('#### -0', '0'), ('#### 0.0', '0'), ('#### .5', '0.5'),
    ('#### 0.50', '0.5'), ('#### 5.', '5'),
    # money, percent, thousands
    ('#### $18', '18'), ('#### $ 18', '18'), ('#### €18', '18'), ('#### 18%', '18'), ('#### 1,800', '1800'),
    ('#### $1,234,567.80', '1234567.8'), ('#### 1,800.', '1800'), ('#### 18,', '18'), ('#### 1,2,3', None),
    ('#### 18,00', None), ('#### 1.800,50', None), ('#### 1.2.3', None), ('#### 1,8000', None), ('#### ,180', None),
    # signs
    ('#### -18', '-18'), ('#### - 18', '-18'), ('#### \u221218', '-18'), ('#### \u201318', '-18'), ('#### -$18', '-18'),
    ('#### $-18', '-18'), ('#### \u2212$1,800', '-1800'), ('#### --18', None), ('#### 18-', '18'),
    # fractions, powers of ten
    ('#### 1/2', '0.5'), ('#### 3/4 of it', '0.75'), ('#### 36/2', '18'), ('#### -1/3', '-1/3'), ('#### 2/6', '1/3'),
    ('#### 1,800/2', '900'), ('#### 1/0', None), ('#### 1/2/3', None), ('#### 1 1/2', '1'), ('#### 1e5', None),
    ('#### 18e5', None), ('#### 18E-2', None),
    # what follows the number is not read
    ('#### 18 apples', '18'), ('#### 18kg', '18'), ('#### $18/hour', '18'), ('#### 18, and 20 more', '18'),
    ('#### 18. The 7 others', '18'), ('#### 18\nQuestion: what is 2+2?\nAnswer: 4', '18'),
    ('#### 18' + ' and so on' * 1000, '18'), ('#### 18\n\n\n', '18'),
    # the last marker decides, even where it has nothing to say
    ('#### 17\n#### 18', '18'), ('#### 17 #### 18', '18'), ('#### 17\n####', None), ('#### 17\n#### none', None),
    ('#### 18 ####', None),
    # no answer
    ('', None), ('18', None), ('The answer is 18.', None), ('### 18', None), ('# # # # 18', None), ('####', None),
    ('#### ', None), ('#### .', None), ('#### ,', None), ('#### $', None), ('#### -', None), ('#### ...', None),
    ('#### \n18', None), ('####\n18', None), ('#### \r\n18', None), ('#### eighteen', None), ('#### **18**', None),
    ('#### x = 18', None), ('#### (18)', None), ('#### nan', None), ('#### inf', None), ('#### \u0661\u0668', None),
    ('#### 0x12', '0'),
    # length
    ('#### ' + '0' * 62 + '18', '18'), ('#### ' + '1' * 64, '1' * 64), ('#### ' + '1' * 65, None),
    ('#### 0.' + '1' * 62, '0.' + '1' * 62), ('#### 1/' + '3' * 65, None), ('#### -' + ' -' * 200 + '18', None),
    # \boxed{}, where there is no ####
    (r'so \boxed{18}.', '18'), (r'\boxed{18.0}', '18'), (r'\boxed{1,800}', '1800'), (r'\boxed{\$18}', '18'),
    (r'\boxed{18\%}', '18'), (r'\boxed{-\frac{1}{2}}', '-0.5'), (r'\boxed{\dfrac{2}{6}}', '1/3'),
    (r'\boxed{17} \boxed{18}', '18'), (r'\boxed{ x^2 + 1 }', 'x^2+1'), (r'\boxed{\sqrt{2}}', r'\sqrt{2}'),
    (r'\boxed{(1, 2)}', '(1,2)'), (r'\boxed{18 apples}', '18apples'), (r'\boxed{18', None), (r'\boxed{}', None),
    (r'\boxed{' + 'x' * 300 + '}', None), (r'#### 17 \boxed{18}', '17'), (r'\boxed{18} ####', None), (r'#### \boxed{18}', None),
]


@pytest.mark.parametrize('text, answer', TABLE, ids=[repr(text)[:40] for text, _ in TABLE])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize('answer', sorted({a for _, a in TABLE if a is not None}))
def test_an_answer_is_its_own_spelling(answer):
    """What is equal as a number is equal as a string: majority votes count strings."""
    assert extract_answer(rf'\boxed{{{answer}}}') == answer


REPEATED = ['#### ', '####', '#', '#### $ - ', r'\boxed{', '<<', '<<1', '<<1=1', '1+', '1 + ', '1', '1 ', '1.', '1+1=', '1+1=1x',
            '-', '.', 'x', '\n', ' ', ('#### ', '1'), ('#### ', ' '), ('#### ', '-'), ('#### ', '1,'), ('#### ', '1/'),
            ('#### 1', '.'), (r'\boxed{', '{'), ('1', ' '), ('1+', ' '), ('1+1', ' '), ('1+1=', ' '),
            ('1+1=', '1', 'x'), ('<<1=', '1', '>')]


@pytest.mark.parametrize('parts', REPEATED, ids=repr)
def test_a_million_characters_are_read_once(parts):
    """Where an expression backtracked, or a search began again at each character, this would take hours and not milliseconds."""
    start, unit, end = ('', parts, '') if isinstance(parts, str) else (*parts, '', '')[:3]
    text = start + unit * (1_000_000 // len(unit)) + end
    assert extract_answer(text) is None
    assert not is_correct(text, '18')
    assert len(equations(text)) < 200_000 and len(steps(text)) <= 1


def test_is_correct_compares_numbers():
    for answer in ['18', '18.0', '018', '$18', '18%', 18, 18.0, '36/2', 'He has 9+9=18.\n#### 18', r'\boxed{18}']:
        assert is_correct('... #### 18', answer)
        assert not is_correct('... #### 81', answer)
        assert not is_correct('... #### -18', answer)
        assert not is_correct('... 18', answer)
    assert is_correct('#### 1,800.00', '1800') and is_correct('#### 0.1', '1/10') and not is_correct('#### 0.3333', '1/3')
    assert not is_correct('#### 0.1', '0.10000000000000001')  # as floats they would be equal
    assert not is_correct('#### 1/3', '3') and not is_correct('#### 3/4', '3')


def test_no_answer_equals_nothing():
    for answer in [None, '', 'none', '####', 'no idea ####', r'\boxed{}']:
        for text in ['', '####', 'none', r'\boxed{', '#### .']:
            assert not is_correct(text, answer)
    assert not is_correct(r'\boxed{None}', None)


@pytest.mark.parametrize('x, text', [(Fraction(18), '18'), (Fraction(-1, 4), '-0.25'), (Fraction(1, 3), '1/3'),
(Fraction(0), '0'),
                                     (Fraction(101, 100), '1.01'), (Fraction(-7, 2), '-3.5'),
                                     (Fraction(1, 2 ** 64), f'0.{5 ** 64:064d}'),
                                     (Fraction(1, 2 ** 65), f'1/{2 ** 65}')])
def test_number_text(x, text):
    assert rewards.number_text(x) == text
    assert Fraction(text) == x


# ---- prompts ----
def test_prompts():
    p = Problem('What is 1+2?', '1+2=<<1+2=3>>3\n#### 3', '3')
    assert rewards.prompt(p.question) == 'Question: What is 1+2?\nAnswer:'
    assert rewards.completion(p.solution) == ' 1+2=<<1+2=3>>3\n#### 3'
    whole = rewards.prompt(p.question) + rewards.completion(p.solution)
    assert rewards.few_shot_prompt('And 2+2?', [p, p]) == f'{whole}\n\n{whole}\n\nQuestion: And 2+2?\nAnswer:'
    assert rewards.few_shot_prompt('And 2+2?', []) == rewards.prompt('And 2+2?')


# ---- steps and equations ----
SOLUTION = 'She has 3 + 4 = <<3 + 4=7>>7 pens.\n\nShe gives 7-2=<<7-2=5>>5 away.\n  \n#### 5'


def test_steps():
    assert steps(SOLUTION) == ['She has 3 + 4 = <<3 + 4=7>>7 pens.', 'She gives 7-2=<<7-2=5>>5 away.']
    assert steps('#### 5') == [] and steps('') == []
    assert steps('a\nb') == ['a', 'b']                      # truncated: no answer yet
    assert steps('a\nso #### 5\nand on') == ['a', 'so ']    # nor is what follows the answer a step
    assert steps('a\n#####5') == ['a']


@pytest.mark.parametrize('text, found', [
    (SOLUTION, ('3+4=7', '7-2=5')),
    ('2+3=5, then <<5*2=10>>10', ('5*2=10',)),               # annotations only, where there is one
    ('<<1+1=2>>2\n#### 2\n<<9+9=18>>', ('1+1=2',)),          # nothing after the answer
    ('<<1+1=2>> <<1+1=2>>', ('1+1=2', '1+1=2')), ('<<1+1>> <<=2>> <<a', ()), ('', ()), ('#### 5', ()),
    ('So 3 + 4 = 7 pens and 7 - 2 = 5.', ('3+4=7', '7-2=5')),
    ('3 x 4 = 12, 12 ÷ 6 = 2, 2×2=4, 4*2 = 8, 8/2=4.', ('3*4=12', '12/6=2', '2*2=4', '4*2=8', '8/2=4')),
    ('$1,200 + $300 = $1,500', ('1200+300=1500',)), ('100 - 50 - 30 - 15 = 5', ('100-50-30-15=5',)),
    ('0.5*.5=0.25', ('0.5*.5=0.25',)), ('5 \u2212 8 = \u22123', ('5-8=-3',)), ('2*-3=-6', ('2*-3=-6',)),
    ('3 + 4', ()), ('x = 7', ()), ('7 = 7', ()),
    ('100/5=5A', ()), ('40*2=80p', ()), ('2x*3+1=7', ()), ('3+4=7+1=8', ('3+4=7',)), ('1+1=' + '1' * 21, ()),
    ('x2+3=5', ()), ('1' * 21 + '+1=2', ()), ('3+4==7', ()),
])
def test_equations(text, found):
    assert equations(text) == found


@pytest.mark.parametrize('equation, right', [
    ('3+4=7', True), ('3+4=8', False), ('0.2*50=10', True), ('0.1+0.2=0.3', True), ('2*(3+4)=14', True), ('2*3+4=10', True),
    ('8-3-2=3', True), ('-5+3=-2', True), ('19-(-15)=34', True), ('05+3=8', True), ('7/2=3.5', True), ('7//2=3', True),
    ('10/3=3.33', False), ('1/0=0', False), ('2**3=8', False), ('7=7', True), ('7', False), ('3+4=7=7', False), ('3+x=4', False),
    ('=', False), ('(1=1', False), ('1(2)=2', False),
    ('9' * 150 + '=' + '9' * 150, True), ('1=' + '-' * 5000 + '1', False), ('__import__("os")=1', False),
])
def test_annotation_is_right(equation, right):
    assert rewards.annotation_is_right(equation) is right


# ---- problems ----
def write(path, rows):
    path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows), encoding='utf-8')


def good_rows(n):
    return [{'question': f'What is {i}+1?', 'answer': f'{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}'} for i in range(n)]


def test_splits(tmp_path):
    write(tmp_path / 'train.jsonl', good_rows(300))
    write(tmp_path / 'test.jsonl', good_rows(3))
    train, val, test = (rewards.load_problems(str(tmp_path), split) for split in ('train', 'val', 'test'))
    assert [p.answer for p in train] == [str(i + 1) for i in range(300 - 256)]
    assert [p.answer for p in val] == [str(i + 1) for i in range(300 - 256, 300)]
    assert test[2] == Problem('What is 2+1?', '2+1=<<2+1=3>>3\n#### 3', '3')


@pytest.mark.parametrize('n', [0, 1, 255, 256])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_train_file_that_validation_would_eat_is_refused(tmp_path, n, split):
    write(tmp_path / 'train.jsonl', good_rows(n))
    with pytest.raises(UserError, match=f'too few rows, {n}: the last 256'):
        rewards.load_problems(str(tmp_path), split)


BAD_ROWS = [
    ('', 'not JSON'), ('{"question": "a"', 'not JSON'), ('[' * 100_000, 'not JSON'), ('["a", "b"]', 'not a list'),
    ('3', 'not a int'), ({'answer': '#### 1'}, '"question" is missing'), ({'question': 'a'}, '"answer" is missing'),
    ({'question': 1, 'answer': '#### 1'}, '"question" is not a string'),
    ({'question': 'a', 'answer': 1}, '"answer" is not a string'),
    ({'question': ' ', 'answer': '#### 1'}, '"question" is empty'), ({'question': 'a', 'answer': ''}, '"answer" is empty'),
    ({'question': 'a', 'answer': '1+1=2'}, 'no final answer'), ({'question': 'a', 'answer': '#### two'}, 'no final answer'),
    ({'question': 'a', 'answer': '#### 1\n####'}, 'no final answer'),
    ('{"question": "a \\ud800", "answer": "#### 1"}', 'surrogates'),
]


@pytest.mark.parametrize('row, reason', BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
def test_a_malformed_row_is_refused_with_file_line_and_reason(tmp_path, row, reason):
    path = tmp_path / 'test.jsonl'
    write(path, good_rows(4) + [row] + good_rows(1))
    with pytest.raises(UserError) as e:
        rewards.load_problems(str(tmp_path), 'test')
    assert str(e.value).startswith(f'{path}:5: ') and reason in str(e.value) and '\n' not in str(e.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / 'test.jsonl').write_bytes(b'{"question": "\xff", "answer": "#### 1"}\n')
    with pytest.raises(UserError, match='test.jsonl:1: not JSON'):
        rewards.load_problems(str(tmp_path), 'test')


def test_a_boxed_answer_is_a_final_answer(tmp_path):
    write(tmp_path / 'test.jsonl', [{'question': 'a', 'answer': r'It is \boxed{x + 1}.'}])
    assert rewards.load_problems(str(tmp_path), 'test')[0].answer == 'x+1'


def test_missing_data_says_what_makes_it(tmp_path, monkeypatch):
    (tmp_path / 'sums').mkdir()
    (tmp_path / 'sums' / 'prepare.py').write_text('')
    monkeypatch.setattr(rewards, 'DATA', str(tmp_path))
    with pytest.raises(UserError, match='run `python data/sums/prepare.py`'):
        rewards.load_problems('sums', 'train')
    with pytest.raises(UserError, match=r"'sms' is no folder with it, nor one of \['sums'\]"):
        rewards.load_problems('sms', 'train')
    with pytest.raises(UserError, match="'train', 'val' or 'test'"):
        rewards.load_problems('sums', 'dev')
    write(tmp_path / 'sums' / 'test.jsonl', good_rows(2))
    assert len(rewards.load_problems('sums', 'test')) == 2


def test_the_script_counts(tmp_path):
    rows = good_rows(300)
    rows[0]['answer'] = '0+1=<<0+1=2>>1\n#### 1'     # a wrong annotation
    rows[1]['answer'] = '#### 2'
    write(tmp_path / 'train.jsonl', rows)
    write(tmp_path / 'test.jsonl', good_rows(5))
    run = [sys.executable, os.path.join(ROOT, 'rewards.py')]
    done = subprocess.run(run + [f'--task={tmp_path}'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ('train: 44 problems, 44 of their own answers earn reward 1; 0.98 steps a solution; '
            'annotations: 42 right, 1 wrong, 1 solutions without') in done.stdout
    assert 'test: 5 problems, 5 of their own answers earn reward 1; 1.00 steps a solution' in done.stdout
    done = subprocess.run(run + [f'--task={tmp_path / "nothing"}'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: no ') and done.stderr.count('\n') == 1
