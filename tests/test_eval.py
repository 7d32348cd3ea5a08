"""Metrics by enumeration and by hand, what a judged solution is, and the evaluation's life on disk."""
import itertools
import random
import re

import numpy as np
import pytest
from conftest import loud, tiny_config, write_task
from test_rewards import rows_of

import eval as evaluation
from config import UserError
from config.run import read_json, write_json, write_rows
from data import Problem
from eval import first_spellings, judge, maj_at_k, pass_at_k, rerank_at_k, summarize, weighted_at_k
from model import Transformer
from sample import Sample, Sampler

class Letters:
    eos, newline_ids = 0, {10}

    def decode(self, ids):
        return ''.join(chr(i) for i in ids if i)

def solution(text, **arguments):
    """'...' at the end: the budget ended there."""
    sample = Sample([1], [ord(c) for c in text.removesuffix('...')] + [0], [], not text.endswith('...'))
    return judge(Problem('q', 'so\n#### 18', '18'), sample, Letters(), **arguments)

def row(text, **more):
    s = solution(text)
    return s.row(tokens=len(s.ids), lenient=s.lenient, **more)

def test_pass_at_k():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198))
    for bad in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)

def test_votes_and_reranks_against_brute_force_and_never_above_pass():
    assert maj_at_k(['7', '5', '5', '7'], '7') == 1 == maj_at_k(['18', '7'], [True, False])  # the first wins
    assert maj_at_k(['18', '18', '7'], [False, True, False]) == 1  # right if any sample that gave it is
    assert rerank_at_k((0.9, 0.9, 0.1), [1, 0, 0]) == 1 and rerank_at_k((0.1, 0.9), [1, 0]) == 0
    rng = random.Random(0)
    for _ in range(500):
        K = rng.randint(1, 6)
        samples = [row(rng.choice(['#### 18', '#### 7', 'so']) + rng.choice(['', '...'])) for _ in range(K)]
        answers, correct = [s['answer'] for s in samples], [s['correct'] for s in samples]
        scores = [rng.choice([0.25, 0.5, 0.75]) if a else 0.0 for a in answers]
        voted = [a for a in answers if a is not None]
        for weights, won in (([1] * K, maj_at_k(answers, correct)),
                             (scores, weighted_at_k(answers, scores, correct))):
            sums = [sum(w for a, w in zip(answers, weights) if a == b) for b in voted]
            assert won == bool(voted and voted[sums.index(max(sums))] == '18')  # index: the first
        samples = [s | {'score': x} for s, x in zip(samples, scores)]
        m = {name: x[0] for name, x in summarize([{'greedy': samples[0], 'samples': samples}]).items()}
        most = max(m[f'maj@{K}'], m[f'rerank@{K}'], m[f'weighted@{K}'])
        assert m['pass@1'] <= m[f'pass@{K}'] == any(correct) == 1 - m['unsolved'] >= most
        assert all((f'pass@{n}' in m) == (n <= K) for n in (1, 2, 4, 8))
        assert K > 1 or m['maj@1'] == m['pass@1'] == m['weighted@1'] == m['rerank@1']

def test_summary_by_hand():
    def problem(greedy, *answers):
        samples = [row(f'<<{i % 2}+1=2>> #### {a}', score=i) for i, a in enumerate(answers)]
        return {'greedy': row(f'#### {greedy}'), 'samples': samples}

    metrics = summarize([problem(18, 18, 18, 3, 4), problem(3, 3, 3, 18, 18), problem(18, 'x', 'x', 'x', 18),
                         problem('x', 1, 2, 3, 4)])
    assert metrics['maj@1'] == (0.5, pytest.approx(0.5 / 3 ** 0.5))  # sqrt(p (1 - p) / (n - 1))
    assert metrics['lenient_maj@1'] == metrics['maj@1']  # here an answer is what follows ####
    told = [{'greedy': row(text), 'samples': []} for text in (
        '#### 18', 'so 17, then 18.', '17 ... 18 ...', 'it is 18, or 17', '#### 17, 18')]
    assert summarize(told)['lenient_maj@1'][0] == 2 / 5 and summarize(told)['maj@1'][0] == 1 / 5
    assert metrics['pass@1'][0] == pytest.approx((2 + 2 + 1 + 0) / 16)
    assert metrics['pass@2'][0] == pytest.approx((5 / 6 + 5 / 6 + 1 / 2 + 0) / 4)
    # reranked, the last sample of each; weighted, 18 has 0 + 1 of 6, 2 + 3 of 6, is the only answer, is none
    expected = {'maj@4': 0.5, 'pass@4': 0.75, 'rerank@4': 0.5, 'weighted@4': 0.5, 'unsolved': 0.25,
                'unique_equations': 2}
    assert {name: metrics[name][0] for name in expected} == expected
    metrics = summarize([problem(18, 18, '3...')])
    assert metrics['truncated'] == (0.5, None) and metrics['tokens'][0] == (18 + 17) / 2
    assert set(summarize([problem(18), problem(3)])) == {'maj@1', 'lenient_maj@1', 'tokens', 'truncated'}

def test_what_another_run_had_found():
    texts = ['<<1+2=3>>3', 'so <<1+2=3>> 3', '<<2+1=3>>3', '<<1+2=3>> then <<3*2=6>>']
    assert evaluation.unique_equations(texts) == 3

    def samples(found):
        return {'samples': [{'text': f'<<{e}>>', 'correct': e != 'wrong=1'} for e in found.split()]}
    pairs = [(samples('1+2=3 wrong=1'), samples('1+2=3 wrong=1 4-1=3')),
             (samples('wrong=1'), samples('2+2=4 2+2=4'))]
    assert [share for share, _ in evaluation.known(pairs).values()] == [2 / 4, 1 / 3, 1 / 2]

def test_paired_statistics_against_enumeration():
    for n in range(9):
        sides = list(itertools.product([False, True], repeat=n))  # which run solves each, as the coins fall
        for gained in range(n + 1):
            uneven = [abs(2 * sum(side) - n) >= abs(2 * gained - n) for side in sides]
            lost = n - gained
            before, after = [0] * gained + [1] * lost + [0, 1], [1] * gained + [0] * lost + [0, 1]
            assert evaluation.mcnemar_p(before, after) == sum(uneven) / 2 ** n
    assert evaluation.mcnemar_p(np.zeros(1000, bool), np.ones(1000, bool)) == 2.0 ** -999
    difference = [0, 1, 1, -1, 0.5]
    # the bootstrap, whose variance is too small by (n - 1) / n
    resampled = [np.mean(x) for x in itertools.product(difference, repeat=5)]
    expected = 0.3, 1.96 * np.std(resampled) * (5 / 4) ** 0.5
    assert evaluation.paired_difference([1] * 5, np.add(difference, 1)) == pytest.approx(expected)

# ---- solutions ----
@pytest.mark.parametrize('text, answer, correct, more', [
    (' so\n#### 18.0', '18', True, {}), (' so\n#### 8', '8', False, {}), (' so', None, False, {}),
    (' so\n#### 18...', None, False, {}),                                     # perhaps it was 189
    (' #### 18\nQuestion: x\n#### 7', '18', True, {'stop': ['\nQuestion:']}),  # after a stop nothing is read
    ('8', '18', True, {'prefix': 'so\n#### 1'})])
def test_judge(text, answer, correct, more):
    s = solution(text, **more)
    assert s.text == text.split('\nQ')[0].removesuffix('...') and s.example == ([1] + s.ids, 1, None)
    assert s.row() == {'text': s.text, 'answer': answer, 'correct': correct, 'finished': text[-3:] != '...'}

def test_steps_of_a_solution():
    s = solution(' a\n\nb: Question\n#### 18')
    assert s.lines == [(2, 'a'), (15, 'b: Question'), (23, '#### 18')]
    for end in ('\nQuestion', '\nQuestion:', '\n\nQuestion: c'):  # its tokens are the last line's
        stopped = solution(s.text + end, stop=['\nQuestion'])
        assert stopped.lines == s.lines[:2] + [(len(stopped.ids) - 1, '#### 18')] and stopped.correct

def test_a_prompt_without_room_is_a_wrong_answer_not_the_end(bpe, tmp_path):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe, max_rows=1)
    long, short = Problem('Tom ' * 90, '#### 1', '1'), Problem('Tom?', '#### 1', '1')

    def explore(name, problems):
        return list(evaluation.explore(sampler, problems, str(tmp_path / name), 2, 10, 1.0, 0, ''))
    *without, found = explore('a', [long] * 9 + [short])  # whole chunks of them
    assert not any(s.ids or s.correct for group in without for s in group)
    assert [s.ids for s in found] == [s.ids for s in explore('b', [short])[0]]
    for draw in (lambda: explore('c', [long] * 9), lambda: evaluation.greedy_accuracy(sampler, [long], 10)):
        with pytest.raises(UserError, match='exceed the context of 96 tokens'):
            draw()

# ---- the doctor ----
@pytest.mark.parametrize('texts, known, said, wrong', [  # texts: of a question's samples, for two questions
    (['#### 18', '#### 7', '#### 18', '#### 7'], {}, 'healthy: 100% of the questions give a signal', ''),
    (['#### 7'] * 4, {}, '100% of the questions give no signal (100% all wrong, 0% all right): easier '
     'questions, more samples, or SFT first', 'room contrast'),
    (['#### 18'] * 4, {}, '(0% all wrong, 100% all right): harder questions', 'room contrast'),
    (['#### 18', 'so...', 'so\n#### 1...', 'so 7...'], {},
     '75% of the samples are cut off by max_new_tokens = 40 (0% after an answer): raise max_new', 'budget'),
    (['it is 18.', 'it is $7', 'so', '#### 18', '#### 18...'], {}, '60% of the samples end without an '
     'answer (20.0% are right, by the last number 40.0%): SFT first, or few_shot = 2', 'form'),
    (['so\n#### 18\n\nQuestion: 3...', '#### 18#### 1...', 'x is\nQuestion: y...', '\\boxed{18}\nso...'], {},
     '= 40 (100% after an answer): no end token comes, SFT first', 'room contrast budget'),
    (['#### 18', '#### 7', 'so...', '#### 7'], {'gap': (0.2, 1.5, 0.05)}, 'the log-probs of sampler and '
     'trainer differ by 0.2 nats a token, at most 1.5: importance_cap = 2', 'budget sampler'),
    (['#### 18', '#### 7'], {'maj1': 0.97}, 'maj@1 97.0%, pass@2 100.0% of 2 questions: more samples',
     'room'),
    (['#### 18'], {}, 'harder questions', 'contrast')])
def test_a_diagnosis_names_the_cause(texts, known, said, wrong):
    drawn = [solution(t) for t in texts * 2]
    *lines, verdict = evaluation.diagnose(drawn, len(texts), 40, 'questions', **known)
    assert verdict.startswith('warning: ' if wrong else 'healthy: ') and said in verdict
    assert len(lines) == 5 and [line.split()[1][:-1] for line in lines if line[:2] == '!!'] == wrong.split()
    assert all((line[:2] == '!!') == ('; turn: ' in line) and '; healthy: ' in line for line in lines)

def test_one_sample_a_question_may_be_healthy(capsys):
    lines = evaluation.diagnose([solution('#### 18'), solution('#### 7')], 1, 40, 'questions')
    evaluation.print_diagnosis(lines, False)
    assert lines[-1].startswith('healthy') and not capsys.readouterr().out

def test_the_doctor_by_its_script(run, coin, script, tmp_path):
    """Nothing is written; what it counts is what an evaluation of the same samples counts."""
    before = sorted((coin / 'policy').iterdir())
    flags = f'--init_from={coin}/policy --task={coin}/task --k=4 --max_new_tokens=40 --device=cpu'.split()
    said = script('eval.py', '--doctor', *flags).stdout
    assert sorted((coin / 'policy').iterdir()) == before
    script('eval.py', *flags, '--split=val', f'--out_dir={tmp_path}/val')
    metrics = read_json(tmp_path / 'val' / 'eval_task.json')['metrics']
    one, four, cut = (metrics[name][0] for name in ('maj@1', 'pass@4', 'truncated'))
    assert f'maj@1 {one:.1%}, pass@4 {four:.1%} of 256 validation questions' in said
    assert f'{cut:.0%} of the samples are cut off' in said and '\nok sampler: the log-probs of' in said
    told = run('--doctor', '--few_shot=1', '--n_problems=4').stdout
    assert '!! budget' in told and not list((tmp_path / 'm').glob('eval_*'))

# ---- tables and the script ----
def test_compare_is_by_problem(tmp_path, capsys, monkeypatch):
    """Two problems with one question, and runs that evaluated other problems."""
    def run(name, answers, right):
        rows = [{'index': i, 'question': 'Tom?' if i < 2 else f'{i}?', 'answer': a, 'samples': [],
                 'greedy': row(f'#### {18 if i in right else 1}')} for i, a in enumerate(answers)]
        summary = dict(task='t', problems=len(rows), k=0, condition='', settings={}, metrics=summarize(rows))
        (tmp_path / name).mkdir()
        write_rows(f'{tmp_path}/{name}/eval_t.jsonl', rows)
        write_json(f'{tmp_path}/{name}/eval_t.json', summary)
        return name

    monkeypatch.chdir(tmp_path)
    run('a', '123', [1])
    for b, gained, lost, cells in ((run('copy', '123', [1]), 0, 0, '33.3 | +0.0 ± 0.0'),
                                   (run('fewer', '12', [0]), 1, 1, '50.0 | +0.0 ± 196.0'),
                                   (run('other', '7234', [0, 1, 2, 3]), 1, 0, '100.0 | +50.0 ± 98.0')):
        evaluation.compare(['a', f'{b}/'])  # the last one's first problem is another one
        said = squeezed(capsys.readouterr().out)
        assert f'{b} solves {gained} problems that a does not, and fails {lost} that it' in said
        assert f'| {b} | {cells} | 1 |' in said and (b == 'copy' or 'different problems: 2 in both' in said)
    run('a_s1', '12', [0]), run('b', '123', [0, 1, 2]), run('b_s1', '123', [0])
    evaluation.compare(['a', 'b'], seeds=(0, 1))  # b gains 1, 0 and 0, 0
    said = squeezed(capsys.readouterr().out)
    assert '| a | 41.7 (11.8) | | |\n| b | 66.7 (47.1) | +25.0 ± 49.0 | 1 |' in said
    assert 'over 2 seeds' in said
    with pytest.raises(UserError, match='a_s2: no finished eval_t.json'):
        evaluation.compare(['a', 'b'], seeds=(0, 1, 2))

def squeezed(table):
    return re.sub(' +', ' ', table)

@pytest.mark.parametrize('n_seeds, spread', [(1, '± 19.6'), (3, '(0.0)')])
def test_the_table_fits_a_terminal(n_seeds, spread):
    few, summary = ['maj@1', 'maj@96', 'rerank@96', 'weighted@96', 'pass@96'], dict(condition='none', k=96)
    metrics = [dict.fromkeys([*few, 'pass@1', 'tokens'], (0.999, 0.1))] * n_seeds
    row = evaluation.table_row('out/demo_rcrl', summary, metrics, every=False)
    table = evaluation.markdown_table([row | {'difference': '+99.9 ± 99.9', 'p': '1e-100'}])
    header, *lines = table.split('\n')
    assert {len(line) for line in lines} == {len(header)} and len(header) <= 110
    assert header.replace('|', ' ').split() == ['run', few[0], 'difference', 'p', *few[1:]]
    every = squeezed(evaluation.markdown_table([evaluation.table_row('a', summary, metrics)]))
    assert every.startswith('| run | maj@1 | maj@96 |') and f'| a [NONE] | 99.9 {spread} |' in every

@pytest.fixture
def run(tmp_path, bpe, script):
    """A function that runs eval.py on a tiny policy, m/, and a tiny task."""
    loud(Transformer(tiny_config(bpe.vocab_size))).save_pretrained(str(tmp_path / 'm'), bpe)
    problems = [Problem(f'Tom has {i}', f'Tom has {i}\n#### {i}', f'{i}') for i in (0, 1, 2, 3, 4, 0)]
    write_task(tmp_path, {'train': problems * 50, 'test': problems})
    given = (f'--init_from={tmp_path}/m --task={tmp_path}/task --k=3 --max_new_tokens=12 --device=cpu '
             '--max_rows=1').split()
    return lambda *flags, code=0: script('eval.py', *given, *flags, code=code)

def test_a_stopped_evaluation_goes_on_and_other_settings_are_refused(run, script, tmp_path, monkeypatch):
    m, records, summary = (tmp_path / 'm' / name for name in ('', 'eval_task.jsonl', 'eval_task.json'))
    assert '| maj@1 | maj@3 | pass@1 |' in squeezed(run().stdout)
    table = script('eval.py', '--compare', f'{m}', f'{m}').stdout
    assert 'task, 6 problems' in table and '| maj@1 | maj@3 | pass@3 |' in squeezed(table)
    before = records.read_text(), summary.read_text()
    rows = rows_of(records)
    assert [r['index'] for r in rows] == list(range(6))
    assert rows[0]['greedy'] == rows[5]['greedy'] and rows[0]['samples'] != rows[5]['samples']  # fresh ones
    records.write_text(before[0][:int(len(before[0]) * 0.6)])  # torn within a line
    run()
    assert (records.read_text(), summary.read_text()) == before
    refused = run('--temperature=0.5', code=2).stderr
    assert 'other settings (temperature)' in refused and records.read_text() == before[0]
    with monkeypatch.context() as patch:  # a signal while the evaluation is replaced
        patch.setattr('config.run.stop_asked', lambda: True)
        stopped = run('--temperature=0.5', '--overwrite').stderr
    assert 'after 1 of 6' in stopped and 'to go on: python eval.py' in stopped and 'resume' not in stopped
    assert 'no finished eval_task.json' in script('eval.py', '--compare', f'{m}', code=2).stderr
    run('--temperature=0.5')
    assert records.read_text() != before[0] and records.read_text().count('\n') == 6
    summary.unlink()  # records without settings
    assert 'other settings (init_from' in run(code=2).stderr
    assert 'exceed the context of 96 tokens' in run('--few_shot=20', '--overwrite', code=2).stderr
    assert 'use: python eval.py --compare' in script('eval.py', '--compare', code=2).stderr

def test_a_task_with_its_own_check(run, tmp_path):
    """The answer is whether a solution's length is even, in one of two spellings."""
    rows = [{'question': 'Tom?', 'answer': 'x' * (i + 1)} for i in range(4)]
    write_rows(f'{tmp_path}/task/test.jsonl', rows)
    (tmp_path / 'task' / 'task.py').write_text(
        'def extract(text): return ["even", "odd", "Even", "Odd"][len(text) % 4] if text else None\n'
        'def same(answer, reference): return answer.lower() == reference.lower()\n')
    spelled = first_spellings(['odd', 'Even', None, 'even', 'Odd'], f'{tmp_path}/task')
    assert spelled == ['odd', 'Even', None, 'Even', 'odd']
    run('--k=200', '--temperature=3', '--max_rows=256', '--max_new_tokens=40')
    for i, r in enumerate(rows_of(tmp_path / 'm' / 'eval_task.jsonl')):
        done = [s for s in r['samples'] if s['finished'] and s['text']]
        lengths, answers = [len(s['text']) for s in done], {s['answer'] for s in done}
        assert r['answer'] == ['odd', 'Even', 'Odd', 'even'][i] and len({n % 4 for n in lengths}) > 2
        assert [s['correct'] for s in done] == [(n - i) % 2 == 1 for n in lengths]
        assert len(answers) == len({a.lower() for a in answers})
