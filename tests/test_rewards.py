"""Problems, prompts, the answer check, steps and equations, on texts made here."""
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import loud, run_script, tiny_config

import rewards
from config import UserError
from model import Transformer
from rewards import Labelled, Problem, clip_rewards, delta_rewards, equations, extract_answer, is_correct, respond, step_lines, steps
from sample import Example, Sample, bpe_tokenizer, load_tokenizer

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
# in LaTeX's notation: text, answer after ####, answer within \boxed{}
LATEX = [
    (r'9{,}500', '9500', '9500'), (r'\$12{,}000', '12000', '12000'), (r'12\,000', '12000', '12000'), (r'9\,500.50', '9500.5', '9500.5'),
    (r'12,\!000', '12000', '12000'), (r'12{,}\!000', '12000', '12000'), (r'1\,234\,567', '1234567', '1234567'), (r'-9{,}500', '-9500', '-9500'),
    (r'50\%', '50', '50'), ('50 %', '50', '50'), (r'\$ 18', '18', '18'), (r'18\text{ kg}', '18', r'18\text{kg}'), (r'18\,cm', '18', '18cm'),
    (r'\text{18}', None, '18'), (r'\mathrm{18}', None, '18'), (r'\textbf{1{,}800}', None, '1800'), (r'\text{Monday}', None, 'Monday'),
    # fractions and mixed numbers
    (r'\frac{1}{2}', '0.5', '0.5'), (r'\frac12', '0.5', '0.5'), (r'\frac 1 2', '0.5', '0.5'), (r'\dfrac{14}{5}', '2.8', '2.8'),
    (r'-\frac{1}{2}', '-0.5', '-0.5'), (r'\frac{-1}{2}', '-0.5', '-0.5'), (r'\frac{1{,}000}{8}', '125', '125'), (r'\frac{1.5}{2}', '0.75', '0.75'),
    (r'1\frac{4}{5}', '1.8', '1.8'), (r'1\frac45', '1.8', '1.8'), (r'-1\frac{4}{5}', '-1.8', '-1.8'), (r'2 \frac{1}{2}', '2.5', '2.5'),
    (r'2\,\frac{1}{2}', '2.5', '2.5'), (r'\frac{1}{3}', '1/3', '1/3'), (r'\frac{1}{0}', None, '1/0'), ('1 / 2', '0.5', '0.5'),
    ('-3 / 4', '-0.75', '-0.75'), ('18 / hour', '18', '18/hour'), ('1{{,}}800', '1800', '1800'),
    # nothing that was joined is a number, nor is what a number goes on after
    (r'3\ 4', None, '3 4'), (r'3\,4', None, '3 4'), (r'3\!4', None, '3 4'), ('1 2', '1', '1 2'), ('1, 234', '1', '1, 234'), ('1 1/2', '1', '1 1/2'),
    (r'9{,} 500', None, '9{,} 500'), (r'9 {,}500', None, '9 {,}500'), (r'5 {\frac12}', None, '5{1/2}'), ('3½', None, '3½'),
    ("9'500", None, "9'500"), ('9_500', None, '9_500'), ('1 / 2 / 3', None, '1/2/3'),
    (r'12\,000\,5', None, '12000 5'), (r'1{,}2', None, '1,2'), (r'9{.}5', None, '9{.}5'), (r'1\text{2}', None, r'1\text{2}'),
    (r'1\text{}2', None, r'1\text{}2'), (r'1\frac{5}{4}', None, r'1\frac{5}{4}'), (r'1.5\frac12', None, r'1.5\frac12'), (r'\frac456', None, r'\frac456'),
    (r'\frac{4}{5}6', None, r'\frac{4}{5}6'), (r'1,\frac{234}{5}', '1', '1, 234/5'), (r'(1,\frac{2}{4})', None, '(1,2/4)'),
    (r'1 \frac{5}{4}', None, r'1\frac{5}{4}'), (r'9 \,500', None, '9 500'), (r'2 \times 10', None, r'2\times10'), (r'18 \quad', '18', r'18\quad'),
    ('9^2', None, '9^2'), (r'2\sqrt{3}', None, r'2\sqrt{3}'), (r'000\,\!500', None, '000 500'), (r'1\text{1{,}000}', None, r'1\text{1,000}'),
]
TABLE += [('#### ' + text, after) for text, after, _ in LATEX] + [(rf'\boxed{{{text}}}', within) for text, _, within in LATEX]


def test_extract_answer():
    for text, answer in TABLE:
        assert extract_answer(text) == answer, text
    for text, _, within in LATEX:  # as a reference too
        assert within is None or is_correct(rf'\boxed{{{text}}}', text), text


def test_an_answer_is_its_own_spelling():
    """What is equal as a number is equal as a string: majority votes count strings. And a text stays what it is: it becomes no number
    when it is read again, as a reference is."""
    for answer in {a for _, a in TABLE if a is not None}:
        assert extract_answer(rf'\boxed{{{answer}}}') == answer
    parts = ['1', '2', '500', '000', '{,}', ',', r'\,', r'\!', r'\ ', ' ', '~', r'\frac', '{4}', '{5}', '{', '}', '-', r'\$', '%', '.', '/',
             r'\text{', r'\text{}', 'x', r'\ f', 'rac', 'e', '^', '(', ')', '\\']
    rng = random.Random(0)
    for _ in range(5000):
        text = ''.join(rng.choices(parts, k=rng.randint(1, 7)))
        answer = rewards._boxed(text)
        assert answer is None or rewards._boxed(answer) == answer, text
        if 'frac' not in text and re.search(r'[0-9](?:[ ~]|\\[ !]|\\text\{\})+[0-9]', text):
            assert not re.fullmatch('-?[0-9.]+(/[0-9]+)?', answer), text


REPEATED = ['#### ', '####', '#', '#### $ - ', r'\boxed{', '<<', '<<1', '<<1=1', '1+', '1 + ', '1', '1 ', '1.', '1+1=', '1+1=1x',
            '-', '.', 'x', '\n', ' ', ('#### ', '1'), ('#### ', ' '), ('#### ', '-'), ('#### ', '1,'), ('#### ', '1/'),
            ('#### 1', '.'), (r'\boxed{', '{'), ('1', ' '), ('1+', ' '), ('1+1', ' '), ('1+1=', ' '),
            ('1+1=', '1', 'x'), ('<<1=', '1', '>'), ('#### 1', r'\,000'), ('#### ', r'\frac{1'), ('#### 1', r'\,0 '), ('#### 1', r'\text{'),
            ('#### ', '1{,}'), ('#### ', r'\frac'), (r'\boxed{', r'\,')]


def test_a_long_text_is_read_once():
    """Where an expression backtracked, or a search began again at each character, this would take hours and not milliseconds."""
    for parts in REPEATED:
        start, unit, end = ('', parts, '') if isinstance(parts, str) else (*parts, '', '')[:3]
        text = start + unit * (200_000 // len(unit)) + end
        assert extract_answer(text) is None, parts
        assert not is_correct(text, '18')
        assert len(equations(text)) < 40_000 and len(steps(text)) <= 1


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


def test_number_text():
    for x, text in [(Fraction(18), '18'), (Fraction(-1, 4), '-0.25'), (Fraction(1, 3), '1/3'), (Fraction(0), '0'), (Fraction(101, 100), '1.01'),
                    (Fraction(-7, 2), '-3.5'), (Fraction(1, 2 ** 64), f'0.{5 ** 64:064d}'), (Fraction(1, 2 ** 65), f'1/{2 ** 65}')]:
        assert rewards.number_text(x) == text
        assert Fraction(text) == x


# ---- prompts ----
def test_prompts():
    p = Problem('What is 1+2?', '1+2=<<1+2=3>>3\n#### 3', '3')
    assert rewards.prompt(p.question) == 'Question: What is 1+2?\nAnswer:'
    assert rewards.completion(p.solution) == ' 1+2=<<1+2=3>>3\n#### 3'
    whole = rewards.prompt(p.question) + rewards.completion(p.solution)
    assert rewards.prompt('And 2+2?', [p, p]) == f'{whole}\n\n{whole}\n\nQuestion: And 2+2?\nAnswer:'
    assert rewards.prompt('And 2+2?', []) == rewards.prompt('And 2+2?')


# ---- steps and equations ----
SOLUTION = 'She has 3 + 4 = <<3 + 4=7>>7 pens.\n\nShe gives 7-2=<<7-2=5>>5 away.\n  \n#### 5'


def test_steps():
    assert steps(SOLUTION) == ['She has 3 + 4 = <<3 + 4=7>>7 pens.', 'She gives 7-2=<<7-2=5>>5 away.']
    assert steps('#### 5') == [] and steps('') == []
    assert steps('a\nb') == ['a', 'b']                      # truncated: no answer yet
    assert steps('a\nso #### 5\nand on') == ['a', 'so ']    # nor is what follows the answer a step
    assert steps('a\n#####5') == ['a']


EQUATIONS = [
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
]
ANNOTATIONS = [
    ('3+4=7', True), ('3+4=8', False), ('0.2*50=10', True), ('0.1+0.2=0.3', True), ('2*(3+4)=14', True), ('2*3+4=10', True),
    ('8-3-2=3', True), ('-5+3=-2', True), ('19-(-15)=34', True), ('05+3=8', True), ('7/2=3.5', True), ('7//2=3', True),
    ('10/3=3.33', False), ('1/0=0', False), ('2**3=8', False), ('7=7', True), ('7', False), ('3+4=7=7', False), ('3+x=4', False),
    ('=', False), ('(1=1', False), ('1(2)=2', False),
    ('9' * 150 + '=' + '9' * 150, True), ('1=' + '-' * 5000 + '1', False), ('__import__("os")=1', False),
]


def test_equations_and_whether_they_are_right():
    for text, found in EQUATIONS:
        assert equations(text) == found, text
    for equation, right in ANNOTATIONS:
        assert rewards.annotation_is_right(equation) is right, equation


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


def test_a_train_file_that_validation_would_eat_is_refused(tmp_path):
    for n in (0, 1, 255, 256):
        write(tmp_path / 'train.jsonl', good_rows(n))
        for split in ('train', 'val'):
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


def test_a_malformed_row_is_refused_with_file_line_and_reason(tmp_path):
    path = tmp_path / 'test.jsonl'
    for row, reason in BAD_ROWS:
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


def test_the_script_counts(script, tmp_path):
    rows = good_rows(300)
    rows[0]['answer'] = '0+1=<<0+1=2>>1\n#### 1'     # a wrong annotation
    rows[1]['answer'] = '#### 2'
    rows[2]['answer'] = '2+1=3\n#### 3'
    write(tmp_path / 'train.jsonl', rows)
    write(tmp_path / 'test.jsonl', good_rows(5))
    done = script('rewards.py', f'--task={tmp_path}')
    assert ('train: 44 problems, 44 of their own answers earn reward 1; 0.98 steps a solution; '
            'annotations: 41 right, 1 wrong, 2 solutions without; 1 references without an equation') in done.stdout
    assert 'test: 5 problems, 5 of their own answers earn reward 1; 1.00 steps a solution' in done.stdout
    done = script('rewards.py', f'--task={tmp_path / "nothing"}', code=2)
    assert done.stderr.startswith('error: no ') and done.stderr.count('\n') == 1


# ---- rewards on tokens ----

REFERENCE = Problem('q', 'a <<1+2=3>>\nb <<3*4=12>>\nc <<12-2=10>>\n#### 10', '10')


def response(bpe, text, problem=REFERENCE, finished=True, prefix=''):
    sample = Sample([1], bpe.encode(text) + [bpe.eos] * finished, [], finished)
    return respond(problem, sample, bpe, prefix)


def earned(bpe, r, rewards_row):
    """[(text of the step, what its last token earns)]; every other token earns nothing."""
    assert rewards_row.sum().item() == pytest.approx(sum(rewards_row[end].item() for end, _ in r.lines))
    return [(line, round(rewards_row[end].item(), 4)) for end, line in r.lines]


def test_lines_of_sampled_ids(bpe):
    def found(text, eos=True):
        ids = bpe.encode(text) + [bpe.eos] * eos
        lines = step_lines(ids, bpe)
        assert lines[-1][0] == len(ids) - 1  # the last step's reward is the last action's, EOS or not
        for end, line in lines[:-1]:
            assert bpe.decode(ids[end:end + 1]).endswith('\n') and bpe.decode(ids[:end + 1]).strip().endswith(line)
        return [line for _, line in lines]
    assert found(' a\nb 1+1=2\n#### 2') == ['a', 'b 1+1=2', '#### 2'] == found(' a\nb 1+1=2\n#### 2', eos=False)
    assert found('\n\na\n \n\nb') == ['a', 'b'] and found('a\n') == ['a'] and found('a\n\n\n') == ['a']
    assert found('') == [''] and found('\n\n') == ['']


def test_lines_where_one_token_holds_two_breaks():
    tokenizer = bpe_tokenizer([bytes([b]) for b in range(256)] + [b'\n\n', b'.\n'])
    ids = [*b'ab', 257, *b'cd', 256, *b'e']
    assert tokenizer.decode(ids) == 'ab.\ncd\n\ne' and tokenizer.newline_ids == {10, 256, 257}
    assert step_lines(ids, tokenizer) == [(2, 'ab.'), (5, 'cd'), (6, 'e')]


def test_the_sparse_reward_stands_on_the_last_action(bpe):
    rs = [response(bpe, ' a\n#### 10'), response(bpe, ' ab\n#### 11'), response(bpe, ' long #### 10', finished=False)]
    assert [r.correct for r in rs] == [True, False, False]
    found = rewards.sparse_rewards(rs, 1.0, -0.5, -2.0)
    assert found.shape == (3, max(len(r.ids) for r in rs))
    for row, r, value in zip(found, rs, (1.0, -0.5, -2.0)):
        assert row[len(r.ids) - 1] == value and row.count_nonzero() == 1
    assert rs[0].ids[-1] == bpe.eos != rs[2].ids[-1]


def test_dense_heuristic(bpe):
    for text, expected in [
        (' a <<1+2=3>>\nb <<3*4=12>>\nc <<12-2=10>>\n#### 10', [1, 1, 1, 0]),
        (' <<3*4=12>>\nc <<12-2=10>>\n#### 10', [1, 1, 0]),                              # a step was skipped, or merged: it earns nothing
        (' b <<3*4=12>>\na <<1+2=3>>\nb <<3*4=12>>\n#### 10', [1, 0, 0, 0]),            # what was passed is no longer ahead
        (' c <<12-2=10>>\na <<1+2=3>>\nb <<3*4=12>>\nc <<12-2=10>>\n#### 10', [1, 0, 0, 0, 0]),
        (' a <<1+2=3>>\na <<1+2=3>>\na <<1+2=3>>\n#### 10', [1, 0, 0, 0]),              # a repeated step earns nothing
        (' x <<7+7=14>>\na <<2+1=3.0>>\n\n#### 10', [0, 1, 0]),                         # irrelevant; another way to 3; a blank line
        (' <<1+2=3>> and <<3*4=12>>\n#### 10', [2, 0]),
        (' 1 + 2 = 3\nthen 3 x 4 = 12', [1, 1]), (' no numbers\n#### 10', [0, 0])]:
        r = response(bpe, text)
        assert [x for _, x in earned(bpe, r, rewards.dense_rewards([r])[0])] == pytest.approx([x / 3 for x in expected], abs=1e-4), text
    cut = response(bpe, ' 1 + 2 = 3\n 1 + 11 = 12', finished=False)  # or 125
    assert rewards.dense_rewards([cut])[0].tolist() == pytest.approx([1 / 3 * (i == cut.lines[0][0]) for i in range(len(cut.ids))])


def test_dense_heuristic_meets_each_result_once(bpe):
    """Where a result stands twice in the reference, two steps earn; what is no number (1e5, x) is no result; and 1 is the most."""
    def total(text, *reference):
        problem = Problem('q', ''.join(f'<<0={x}>>\n' for x in reference) + '#### 10', '10')
        return rewards.dense_rewards([response(bpe, text, problem)]).sum().item()
    assert total(' <<1+2=3>>\n <<3+0=3>>\n <<3+0=3>>\n#### 10', 3, 3, 10) == pytest.approx(2 / 3)
    assert total(' <<1=x>>\n <<1=x>>\n#### 10', 'x', 10) == 0
    rng = random.Random(0)
    for _ in range(200):
        reference, taken = rng.choices('1234', k=rng.randint(1, 4)), rng.choices('12345', k=rng.randint(1, 12))
        found = total(''.join(f' <<0={x}>>' + rng.choice(['', '\n']) for x in taken) + '\n#### 10', *reference)
        met, ahead = 0, list(reference)
        for x in taken:
            if x in ahead:
                met, ahead = met + 1, ahead[ahead.index(x) + 1:]
        assert found == pytest.approx(met / len(reference), abs=1e-6) and found <= 1 + 1e-6
        repeated = total(''.join(f' <<0={x}>>\n <<0={x}>>\n' for x in sorted(set(reference), key=reference.index)) + '#### 10', *sorted(set(reference), key=reference.index))
        assert repeated == pytest.approx(1)


def test_dense_heuristic_pays_nothing_for_what_was_given(bpe):
    r = response(bpe, 'b <<3*4=12>>\nc <<12-2=10>>\n#### 10', prefix='a <<1+2=3>>\n')
    assert r.correct and rewards.dense_rewards([r])[0].sum().item() == pytest.approx(2 / 3)
    assert not rewards.dense_rewards([response(bpe, ' <<1+2=3>>\n#### 10', Problem('q', 'no equation\n#### 10', '10'))]).any()


def returns(r):
    return r.flip(0).cumsum(0).flip(0)


def test_clip_and_delta_by_their_identities():
    for K in (1, 2, 3, 7):
        r = torch.rand(K, generator=torch.Generator().manual_seed(K))
        clipped, delta, both = clip_rewards(r, 0.6), delta_rewards(r), delta_rewards(clip_rewards(r, 0.6))
        assert torch.allclose(clipped, torch.tensor([min(x - 0.6, 0.0) for x in r.tolist()])) and (returns(clipped) <= 0).all()
        assert delta[-1] == 0 == both[-1]
        # with gamma = 1 the return from step k is its own score, and nothing at the answer
        assert torch.allclose(returns(delta), torch.cat([r[:-1], torch.zeros(1)]), atol=1e-6)
        assert torch.allclose(returns(both), torch.cat([clipped[:-1], torch.zeros(1)]), atol=1e-6) and (returns(both) <= 1e-6).all()


def test_refinements_of_a_responses_scores(bpe):
    r = response(bpe, ' a\nb\nc\n#### 10')
    ends = [end for end, _ in r.lines]
    scores = torch.zeros(len(r.ids))
    scores[ends] = torch.tensor([0.9, 0.2, 0.7, 0.4])
    for refine, expected in (('none', [0.9, 0.2, 0.7, 0.4]), ('clip', [0, -0.3, 0, -0.1]), ('delta', [0.7, -0.5, 0.7, 0]),
                             ('clip_delta', [0.3, -0.3, 0, 0])):  # first clipped, then the difference
        assert rewards.prm_rewards([r], [scores], refine, 0.5)[0, ends].tolist() == pytest.approx(expected, abs=1e-6), refine


def test_clip_and_delta_by_hand():
    r = torch.tensor([0.9, 0.2, 0.7, 0.4])
    assert clip_rewards(r, 0.5).tolist() == pytest.approx([0, -0.3, 0, -0.1])
    assert delta_rewards(r).tolist() == pytest.approx([0.7, -0.5, 0.7, 0])
    assert delta_rewards(clip_rewards(r, 0.5)).tolist() == pytest.approx([0.3, -0.3, 0, 0], abs=1e-6)


def shaped(reward, refine, rs, scores, eta):
    """ppo.py's rewards beside the sparse one."""
    return {'dense': lambda: rewards.dense_rewards(rs), 'orm': lambda: rewards.orm_rewards(rs, scores),
            'orm_dense': lambda: rewards.orm_dense_rewards(rs, scores, refine, eta),
            'prm': lambda: rewards.prm_rewards(rs, scores, refine, eta)}[reward]()


def test_running_to_the_budget_never_pays(bpe):
    """Under every reward a solution that the budget cut off returns, from each step on, at most what it would have, finished wrong,
    whatever its end is scored then; and no step of it earns more than 0 from a learned model."""
    generator, rng, less = torch.Generator().manual_seed(0), random.Random(0), set()
    kinds = [('dense', 'none'), ('orm', 'none')] + [(reward, refine) for reward in ('orm_dense', 'prm') for refine in rewards.REFINEMENTS]
    for _ in range(60):
        lines = [rng.choice(['a <<1+2=3>>', 'b <<3*4=12>>', 'so', '<<12-2=10>>']) for _ in range(rng.randint(1, 6))]
        cut = response(bpe, ' ' + '\n'.join(lines), finished=False)
        wrong = response(bpe, ' ' + '\n'.join(lines))  # and the end token
        assert [line for _, line in cut.lines] == [line for _, line in wrong.lines] and wrong.finished and not wrong.correct
        p, eta = torch.rand(len(cut.ids), generator=generator), rng.random()
        for last in (0.0, 1.0, rng.random()):  # what the model says once it has read the end token
            scores = [p, torch.cat([p, torch.tensor([last])])]
            outcome = rewards.sparse_rewards([cut, wrong], 1.0, *rng.choice([(0.0, 0.0), (-0.5, -0.5), (0.0, -1.0)]))
            for reward, refine in kinds:
                found = shaped(reward, refine, [cut, wrong], scores, eta)
                a, b = (returns((outcome + 0.7 * found)[row][[end for end, _ in r.lines]]) for row, r in enumerate((cut, wrong)))
                assert (a <= b + 1e-6).all(), (reward, refine)
                assert reward == 'dense' or (found[0] <= 0).all(), (reward, refine)
                less |= {(reward, refine)} if found[0].sum() < found[1].sum() - 0.1 else set()
    assert less == set(kinds)  # and it is not that nothing is ever paid


def test_clips_threshold_leaves_the_last_steps_out(bpe):
    rs = [response(bpe, ' a\nb\n#### 10'), response(bpe, ' #### 10'), response(bpe, ' a\nb', finished=False)]
    scores = [torch.zeros(len(r.ids)) for r in rs]
    for r, s in zip(rs, scores):
        s[:] = 0.99                                    # of the last steps, and within steps
        s[[end for end, _ in r.lines[:-1]]] = torch.tensor([0.1, 0.5])[:len(r.lines) - 1]
    lines = [r.lines for r in rs] + [step_lines([], bpe)]  # a question that was too long has an empty solution
    assert rewards.score_quantile(lines, scores + [torch.zeros(0)], 1.0) == 0.5
    assert rewards.score_quantile(lines, scores + [torch.zeros(0)], 0.0) == pytest.approx(0.1)
    assert rewards.score_quantile(lines, scores + [torch.zeros(0)], 0.5) == pytest.approx(0.1)  # of .1, .5, .1
    for none in ([], lines[1:2]):
        with pytest.raises(UserError, match='set eta'):
            rewards.score_quantile(none, scores[1:1 + len(none)], 0.5)


ATTACKS = {'the same right step again and again': lambda n: ' a <<1+2=3>>\n' + 'a <<1+2=3>>\n' * n + 'b <<3*4=12>>\n#### 10',
           'empty steps': lambda n: ' a <<1+2=3>>\n' + '\n \n' * n + 'b <<3*4=12>>\n#### 10',
           'many tiny steps': lambda n: ' a <<1+2=3>>\n' + 'so\n' * n + 'b <<3*4=12>>\n#### 10'}


def test_needless_steps_raise_the_raw_sums_and_no_other_return(bpe):
    for attack in ATTACKS:
        rs = [response(bpe, ATTACKS[attack](n)) for n in (0, 1, 5, 20)]
        scores = [torch.full((len(r.ids),), 0.9) for r in rs]  # a model that likes every step, as one that is hacked does
        for reward in ('prm', 'orm_dense'):
            raw = shaped(reward, 'none', rs, scores, 0).sum(1).tolist()
            steps_more = (0, 0, 0, 0) if attack == 'empty steps' else (0, 1, 5, 20)  # a blank line is no step, for any reward
            assert raw == pytest.approx([0.9 * (3 + n) for n in steps_more])
        for found in (rewards.sparse_rewards(rs), shaped('dense', '', rs, scores, 0), shaped('orm', '', rs, scores, 0),
                      *(shaped(reward, refine, rs, scores, eta) for reward in ('prm', 'orm_dense')
                        for refine in ('clip', 'delta', 'clip_delta') for eta in (0.5, 0.95))):
            total = found.sum(1).tolist()
            assert all(x <= total[0] + 1e-5 for x in total)


def test_learned_rewards_stand_where_they_were_scored(bpe):
    rs = [response(bpe, ' a\nb\n#### 10'), response(bpe, ' a'), response(bpe, ' a', finished=False)]
    scores = [torch.arange(len(r.ids)) / 100 for r in rs]
    assert [x for _, x in earned(bpe, rs[0], rewards.prm_rewards(rs, scores)[0])] == pytest.approx([end / 100 for end, _ in rs[0].lines])
    sparse = rewards.orm_rewards(rs, scores)
    assert sparse[1, len(rs[1].ids) - 1] == scores[1][-1] and sparse[1].count_nonzero() == 1 and not sparse[2].any()


# ---- reward models ----

def scored_rows(bpe):
    texts = [(' a <<1+2=3>>\n#### 3', 5), (' #### 17', 2), (' b\nc\nd\n#### 2', 9)]
    return [Example([3] * n + bpe.encode(t) + [bpe.eos], n) for t, n in texts]


def test_scores_are_the_heads_probability_after_each_token(model, bpe):
    judge = Transformer(model.config)
    judge.load_state_dict(model.state_dict())
    loud(judge.add_value_head(), 3)
    rows = scored_rows(bpe)
    for max_tokens in (10, 1000):  # in whatever batches, a row's scores are its own
        for e, found in zip(rows, rewards.score(judge, rows, max_tokens)):
            hidden = judge.trunk(torch.tensor([e.ids]))[0]
            expected = [judge.value_head(hidden[t]).sigmoid().item() for t in range(e.n_prompt, len(e.ids))]
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_rows_that_cannot_be_scored_have_scores_of_0(model, bpe):
    """A question without a solution, since it left no room for one; a solution that is longer than the context."""
    judge = loud(Transformer(model.config).add_value_head(), 3)
    rows = scored_rows(bpe)
    long, empty = Example([3] * 94 + [5] * 3, 94), Example([3] * 200, 200)  # a context of 96
    found = rewards.score(judge, [long, rows[0], empty, rows[1]], 1000)
    assert [len(s) for s in found] == [3, len(rows[0].ids) - 5, 0, len(rows[1].ids) - 2] and not found[0].any()
    for a, b in zip(found[1::2], rewards.score(judge, rows[:2], 1000)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert [len(s) for s in rewards.score(judge, [long, empty], 1000)] == [3, 0]
    assert [len(s) for s in rewards.score(judge, [Example([3] * 5, 5)], 1000)] == [0]


def test_a_checkpoint_says_what_its_scalar_head_is(bpe, tmp_path):
    from safetensors.torch import load_file, save_file

    def saved(name, kind, **changes):
        model = loud(Transformer(tiny_config(bpe.vocab_size, **changes)).add_value_head())
        model.head_kind = kind
        model.save_pretrained(str(tmp_path / name), bpe)
        assert Transformer.from_pretrained(str(tmp_path / name)).head_kind == kind
        return str(tmp_path / name)
    policy = tiny_config(bpe.vocab_size)
    for kind in ('orm', 'prm'):
        for kinds in (('orm', 'prm'), (kind,)):
            assert rewards.load_reward_model(saved(kind, kind), policy, bpe, 'cpu', kinds=kinds).head_kind == kind
    save_file(load_file(tmp_path / 'orm' / 'value_head.safetensors'), tmp_path / 'orm' / 'value_head.safetensors')
    for folder, kinds, match in (
            (saved('value', Transformer(policy).add_value_head().head_kind), ('orm', 'prm'), 'of kind value, not orm or prm'),
            (str(tmp_path / 'prm'), ('orm',), 'of kind prm, not orm'), (str(tmp_path / 'orm'), ('orm',), 'of kind unknown, an old file, not orm'),
            (saved('short', 'orm', block_size=95), ('orm',), "a context of 95 tokens, shorter than the policy's 96")):
        with pytest.raises(UserError, match=match) as e:
            rewards.load_reward_model(folder, policy, bpe, 'cpu', kinds=kinds)
        assert '\n' not in str(e.value)


def test_outcome_labels(bpe):
    r = response(bpe, ' a\nb\n#### 10')
    assert rewards.outcome_labels(r, 'token') == [1.0] * len(r.ids)
    labels = rewards.outcome_labels(r, 'step')
    assert [i for i, x in enumerate(labels) if x == 1.0] == [end for end, _ in r.lines] and sum(map(math.isnan, labels)) == len(r.ids) - 3


def test_balanced(bpe):
    right, wrong = ([response(bpe, f' {i}\n#### {answer}') for i in range(4)] for answer in (10, 11))
    rng = random.Random(0)
    found = rewards.balanced([right[:3] + wrong[:1] + right[:1]], rng)
    assert sorted(r.correct for r in found) == [False, True]
    found = rewards.balanced([right[:2], right[2:], wrong[:3]], rng)  # each question has one kind alone
    assert sorted(r.correct for r in found) == [False, True]
    assert rewards.balanced([right, [], [right[0]]], rng) == []


class OneInFour:
    """A policy of known success: of four samples from a prefix the first is right, unless the prefix says 'lost'."""
    def __init__(self, tokenizer):
        self.tokenizer, self.asked, self.label = tokenizer, Counter(), []
        self.model = SimpleNamespace(config=SimpleNamespace(block_size=1000))

    def generate(self, prompts, k, max_new_tokens, temperature, seed, first=None):
        samples = []
        for p in prompts:
            text = self.tokenizer.decode(p)
            for _ in range(k):
                right = self.asked[text] % 4 == 0 and 'lost' not in text
                samples.append(Sample(p, self.tokenizer.encode('#### 10' if right else '#### 9') + [self.tokenizer.eos], [], True))
                self.asked[text] += 1
        return samples


def test_step_labels_against_a_policy_of_known_success(bpe):
    sampler = OneInFour(bpe)
    rs = [response(bpe, ' a\nb\n#### 10'), response(bpe, ' a\nlost\n#### 9'), response(bpe, ' #### 10'), response(bpe, ' a\nb\n#### 9')]
    assert rewards.step_success(sampler, rs, 8, 20, 1.0, 0) == [[0.25, 0.25, 1.0], [0.25, 0.0, 0.0], [1.0], [0.25, 0.25, 0.0]]
    # a, a b, a lost: each once
    assert list(sampler.asked.values()) == [8, 8, 8] and next(iter(sampler.asked)).endswith('Answer: a\n')


def test_auroc_against_all_pairs_and_calibration():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(60, generator=generator) * 10).round() / 10  # with ties
    labels = torch.rand(60, generator=generator) < scores
    pairs = [(s > t) + (s == t) / 2 for s, y in zip(scores, labels) for t, z in zip(scores, labels) if y and not z]
    assert rewards.auroc(scores.tolist(), labels.tolist()) == pytest.approx(sum(x.item() for x in pairs) / len(pairs))
    assert rewards.auroc([0.1, 0.9], [False, True]) == 1 and math.isnan(rewards.auroc([0.1, 0.9], [True, True]))
    # two bins: two scores of .05 and one right; three of .95, all right
    assert rewards.calibration_error([0.05, 0.05, 0.95, 0.95, 0.95], [1, 0, 1, 1, 1]) == pytest.approx((abs(0.1 - 1) + abs(2.85 - 3)) / 5)


def test_fit_learns_labels_and_skips_positions_without(bpe):
    judge = loud(Transformer(tiny_config(bpe.vocab_size)).add_value_head())
    # the label is whether the token is 7; where there is no label, the truth is turned round: learning there would show
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(64):
        ids = [1] + torch.randint(5, 9, (12,), generator=generator).tolist()
        rows.append(Labelled(ids, 1, [float(t == 7) if i % 2 else math.nan for i, t in enumerate(ids[1:])]))
    losses = []
    rewards.fit(judge, rows, 60, lambda step, **metrics: losses.append(metrics['loss']), batch_size=16, lr=1e-2, micro_tokens=50)
    assert losses[-1] < 0.1
    found = rewards.score(judge, rows[:8], 1000)
    assert all((s > 0.5).tolist() == [t == 7 for t in row.ids[1:]] for s, row in zip(found, rows))


MODELS = ['--k=6', '--n_questions=40', '--max_new_tokens=40', '--heldout=16', '--batch_size=16', '--lr=3e-3', '--device=cpu', '--rollouts=4', '--epochs=9']


@pytest.fixture(scope='module')
def judges(coin, tmp_path_factory):
    """An ORM and a PRM for the coin's policy. -> the folder, with orm/ and prm/."""
    folder = tmp_path_factory.mktemp('judges')
    for kind in ('orm', 'prm'):
        run_script('rewards.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--kind={kind}', f'--out_dir={folder}/{kind}', *MODELS)
    return folder


def test_reward_models_know_right_from_wrong(judges):
    """Of some 90 held-out scores; measured at two seeds: AUROC .96 to .99, accuracy .82 to .97, standard errors up to .04."""
    for kind in ('orm', 'prm'):
        last = [json.loads(line) for line in open(judges / kind / 'log.jsonl')][-1]
        assert last['heldout_auroc'] > 0.8 and last['heldout_accuracy'] > 0.6 and last['calibration_error'] < 0.3


def test_labelling_goes_on_where_it_stopped(coin, judges, script, tmp_path):
    shutil.copytree(judges / 'prm', tmp_path / 'prm')
    for name in ('samples_train.jsonl', 'labels_train.jsonl'):
        whole = (judges / 'prm' / name).read_text()
        (tmp_path / 'prm' / name).write_text(whole[:len(whole) // 2])
    shutil.rmtree(tmp_path / 'prm' / 'best')
    script('rewards.py', f'--task={coin}/task', '--kind=prm', f'--out_dir={tmp_path}/prm', *MODELS, '--init_from=resume')
    for name in ('samples_train.jsonl', 'labels_train.jsonl', 'best/model.safetensors', 'best/value_head.safetensors'):
        assert (judges / 'prm' / name).read_bytes() == (tmp_path / 'prm' / name).read_bytes(), name


def test_bad_input_to_reward_model_training(coin, script, tmp_path):
    def refused(*flags, match):
        done = script('rewards.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={tmp_path}/run', *MODELS, *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
    refused('--kind=judge', match="not 'judge'")
    refused('--kind=orm', '--label_at=end', match="not 'end'")
    refused('--kind=prm', '--rollouts=0', match='rollouts')
    refused('--kind=orm', '--n_questions=1000', match='n_questions')
    refused('--kind=orm', f'--base={tmp_path}/no/base', match='no/base')
    short = Transformer(tiny_config(load_tokenizer(f'{coin}/policy').vocab_size, block_size=64))
    short.save_pretrained(str(tmp_path / 'short'), load_tokenizer(f'{coin}/policy'))
    refused('--kind=orm', f'--base={tmp_path}/short', match="a context of 64 tokens, shorter than the policy's 128")
    assert not (tmp_path / 'run').exists()
    refused('--kind=orm', '--n_questions=2', '--k=1', match='too few')


REWARDS = {'sparse': [], 'dense': [], 'orm': ['orm'], 'orm_dense': ['orm'], 'prm': ['prm'], 'prm --refine=clip_delta --eta_quantile=0.8': ['prm']}
PPO = ['--max_new_tokens=40', '--lr=1e-3', '--epochs=1', '--temperature=1.0', '--eval_problems=16', '--device=cpu', '--show=0', '--advantage=group']


@pytest.mark.slow
@pytest.mark.parametrize('reward', REWARDS)
def test_every_reward_moves_itself_up(coin, judges, script, tmp_path, reward):
    """From the reward alone, without the sparse one beside it (but for the sparse one itself). An iteration's mean reward is that of
    128 samples, whose standard error is at most .045."""
    flags = [f'--reward_model={judges}/{kind}' for kind in REWARDS[reward]] + ['--reward_right=0'] * (reward != 'sparse')
    script('ppo.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--out_dir={tmp_path}/run', *f'--reward={reward}'.split(), *flags,
           *PPO, '--n_rollouts=128', '--minibatch=32', '--n_iterations=12')
    rows = [row for row in map(json.loads, open(tmp_path / 'run' / 'log.jsonl')) if 'share_correct' in row]
    gained = [row['reward_outcome'] + row['reward_shaped'] for row in rows]
    assert sum(gained[-3:]) / 3 > gained[0] + 0.1
    if 'dense' not in reward and reward != 'prm':  # sums of scores can grow by more steps instead of better ones
        assert sum(row['share_correct'] for row in rows[-3:]) / 3 > rows[0]['share_correct'] + 0.15


def test_ppo_refines_an_orms_scores_and_counts_references_without_equation(coin, judges, script, tmp_path):
    common = ['ppo.py', f'--task={coin}/task', f'--init_from={coin}/policy', *PPO, '--n_rollouts=8', '--minibatch=8', '--n_iterations=1',
              '--n_questions=8']
    done = script(*common, f'--out_dir={tmp_path}/orm', '--reward=orm_dense', f'--reward_model={judges}/orm', '--refine=clip_delta',
                  '--eta_quantile=0.5')
    assert 'the 0.5 quantile of the scores of steps before the last' in done.stdout
    row = [row for row in map(json.loads, open(tmp_path / 'orm' / 'log.jsonl')) if 'share_correct' in row][0]
    assert row['reward_shaped'] <= 0  # clipped, where the raw scores are above 0
    done = script(*common, f'--out_dir={tmp_path}/dense', '--reward=dense')
    assert '0 of 8 references have no equation' in done.stdout

    def refused(*flags, match):
        done = script(*common, f'--out_dir={tmp_path}/run', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
    refused('--reward_truncated=0.1', match='reward_truncated = 0.1 must not be above reward_wrong = 0.0')
    refused('--reward=orm', f'--reward_model={judges}/prm', match='of kind prm, not orm')
    refused('--reward=prm', f'--reward_model={judges}/orm', match='of kind orm, not prm')
    refused('--reward=orm', f'--reward_model={judges}/orm', '--refine=clip', match="for reward = 'prm' or 'orm_dense'")
    policy = Transformer.from_pretrained(f'{coin}/policy')
    policy.config.block_size = 64
    policy.save_pretrained(str(tmp_path / 'short'), load_tokenizer(f'{coin}/policy'))
    for flags in ([f'--ref={tmp_path}/short'], [f'--critic_from={tmp_path}/short', '--critic=separate', '--advantage=gae']):
        refused(*flags, match="short has a context of 64 tokens, shorter than the policy's 128")


def test_rerank_and_the_orm_as_a_filter(coin, judges, script, tmp_path):
    """Reranking by the ORM solves what the vote of a coin does not; and Expert Iteration can filter by the ORM. The ORM errs seldom
    (two of 16 problems are left to it); that a coin of .6 wins 16 votes of six has a probability below .01."""
    ask = ['eval.py', f'--init_from={coin}/policy', '--k=6', '--temperature=1', '--max_new_tokens=40', '--device=cpu']
    done = script(*ask, f'--scorer={judges}/orm', f'--task={coin}/task', f'--out_dir={tmp_path}')
    assert 'rerank@6' in done.stdout and 'weighted@6' in done.stdout
    os.utime(judges / 'orm' / 'best' / 'config.json')  # as if it had been trained anew
    done = script(*ask, f'--scorer={judges}/orm', f'--task={coin}/task', f'--out_dir={tmp_path}', code=2)
    assert 'other settings (scorer_weights)' in done.stderr
    metrics = {name: mean for name, (mean, _) in json.loads((tmp_path / 'eval_task.json').read_text())['metrics'].items()}
    assert metrics['pass@6'] >= metrics['rerank@6'] >= metrics['pass@6'] - 0.13
    assert metrics['rerank@6'] > metrics['maj@6'] and metrics['weighted@6'] >= metrics['maj@6']
    ei = ['ei.py', f'--task={coin}/task', f'--init_from={coin}/policy', f'--base={coin}/policy', '--n_rounds=1', '--k=4', '--n_questions=20',
          '--include_sft=False', '--max_new_tokens=40', '--max_steps=1', '--lr=1e-9', '--device=cpu', '--eval_problems=8', '--reward=orm']
    script(*ei, f'--out_dir={tmp_path}/ei', f'--reward_model={judges}/orm', '--tau=0.5')
    row = [row for row in map(json.loads, open(tmp_path / 'ei' / 'log.jsonl')) if 'new_right' in row][0]
    assert row['new_right'] > row['share_correct'] + 0.2 and row['new_solutions'] >= 10
    assert 'reward_model' in script(*ei, f'--out_dir={tmp_path}/no', code=2).stderr
    assert 'keeps nothing' in script(*ei, f'--out_dir={tmp_path}/no', f'--reward_model={judges}/orm', '--tau=1.0', code=2).stderr
    assert 'of kind prm, not orm' in script(*ei, f'--out_dir={tmp_path}/no', f'--reward_model={judges}/prm', '--tau=0.5', code=2).stderr


def test_questions_that_are_too_long_are_scored_like_wrong_answers(coin, judges, script, tmp_path):
    """With a scorer, and where eta is looked for: they end no run."""
    rows = (coin / 'task' / 'train.jsonl').read_text().splitlines(keepends=True)
    long = [row.replace('What', 'What is ' * 90) for row in rows[:2]]
    (tmp_path / 'test.jsonl').write_text(''.join(rows[:4] + long))
    (tmp_path / 'train.jsonl').write_text(''.join(rows[:8] + long + rows[8:262]))  # the first ones of the validation slice
    script('eval.py', f'--init_from={coin}/policy', f'--scorer={judges}/orm', f'--task={tmp_path}', f'--out_dir={tmp_path}/eval', '--k=2',
           '--max_new_tokens=40', '--device=cpu')
    records = [json.loads(line) for line in open(next((tmp_path / 'eval').glob('eval_*.jsonl')))][1:]
    assert len(records) == 6 and all(s['score'] == 0 and not s['correct'] for r in records[4:] for s in r['samples'])
    done = script('ppo.py', f'--task={tmp_path}', f'--init_from={coin}/policy', f'--out_dir={tmp_path}/ppo', '--reward=prm', '--refine=clip',
                  f'--reward_model={judges}/prm', *PPO, '--n_rollouts=8', '--minibatch=8', '--n_iterations=1', '--eta_quantile=0.5')
    assert 'eta = ' in done.stdout
