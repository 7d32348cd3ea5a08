"""Metrics by enumeration and by hand, what a judged solution is, and the evaluation's life on disk."""
import itertools
import random

import pytest
from conftest import loud, tiny_config, write_task
from test_rewards import rows_of

import eval as evaluation
from config import UserError
from config.run import write_json, write_rows
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
    return s.row(tokens=len(s.ids), **more)

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
    assert metrics['pass@1'][0] == pytest.approx((2 + 2 + 1 + 0) / 16)
    assert metrics['pass@2'][0] == pytest.approx((5 / 6 + 5 / 6 + 1 / 2 + 0) / 4)
    # reranked, the last sample of each; weighted, 18 has 0 + 1 of 6, 2 + 3 of 6, is the only answer, is none
    expected = {'maj@4': 0.5, 'pass@4': 0.75, 'rerank@4': 0.5, 'weighted@4': 0.5, 'unsolved': 0.25,
                'unique_equations': 2}
    assert {name: metrics[name][0] for name in expected} == expected
    metrics = summarize([problem(18, 18, '3...')])
    assert metrics['truncated'] == (0.5, None) and metrics['tokens'][0] == (18 + 17) / 2
    assert set(summarize([problem(18), problem(3)])) == {'maj@1', 'tokens', 'truncated'}

def test_what_another_run_had_found():
    texts = ['<<1+2=3>>3', 'so <<1+2=3>> 3', '<<2+1=3>>3', '<<1+2=3>> then <<3*2=6>>']
    assert evaluation.unique_equations(texts) == 3

    def samples(found):
        return {'samples': [{'text': f'<<{e}>>', 'correct': e != 'wrong=1'} for e in found.split()]}
    # of four sequences two were there, of three right ones one; of two solved problems one was solved
    said = evaluation.explored('out/a', [(samples('1+2=3 wrong=1'), samples('1+2=3 wrong=1 4-1=3')),
                                         (samples('wrong=1'), samples('2+2=4 2+2=4'))])
    for part in ('sequences 50% of 4', 'right ones 33% of 3', 'of the 2 problems', '50% are solved by'):
        assert part in said

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

# ---- tables and the script ----
def test_compare_is_by_problem(tmp_path, capsys):
    """Two problems with one question, and a run that evaluated fewer problems."""
    def run(name, answers, right):
        rows = [{'index': i, 'question': 'Tom?' if i < 2 else f'{i}?', 'answer': a, 'samples': [],
                 'greedy': row(f'#### {18 if i in right else 1}')} for i, a in enumerate(answers)]
        summary = dict(task='t', problems=len(rows), k=0, condition='', settings={}, metrics=summarize(rows))
        (tmp_path / name).mkdir()
        write_rows(f'{tmp_path}/{name}/eval_t.jsonl', rows)
        write_json(f'{tmp_path}/{name}/eval_t.json', summary)
        return str(tmp_path / name)

    a = run('a', '123', [1])
    for b, of, gained, lost in ((run('copy', '123', [1]), 3, 0, 0), (run('fewer', '12', [0]), 2, 1, 1),
                                (run('other', '7234', [0, 1, 2, 3]), 2, 1, 0)):  # another first one
        evaluation.compare([a, b])
        said = capsys.readouterr().out
        assert f'of {of} problems {b} solves {gained} that {a} does not, and fails {lost} that it' in said
        assert f'| {a} | t | 3 | 33.3 ± 33.3 | 7.3 | 0.0 ± 0.0 |\n| {b} | ' in said

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
    assert '| maj@1 | maj@3 | pass@3 |' in run().stdout
    before, rows = (records.read_text(), summary.read_text()), rows_of(records)
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
    assert 'no finished eval_<task>.json' in script('eval.py', '--compare', f'{m}', code=2).stderr
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
