"""The metrics: goldens, identities, and the evaluation's life on disk."""
import itertools
import json
import random

import pytest
import torch
from conftest import loud, tiny_config

import eval as evaluation
from config import UserError
from eval import judge, maj_at_k, markdown_table, pass_at_k, read_records, rerank_at_k, summarize, unique_equations, weighted_at_k, with_scores
from model import Transformer
from rewards import Problem
from sample import Sample, Sampler


def test_pass_at_k_by_exact_enumeration():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_goldens():
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert pass_at_k(96, 0, 96) == 0.0 and pass_at_k(96, 1, 96) == 1.0  # n = k is plainly "any"
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198))
    values = [pass_at_k(96, 7, k) for k in range(1, 97)]
    assert values == sorted(values)
    for bad in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def test_maj_at_k():
    for answers, right, expected in [
            (['5', '7', '7'], '7', 1.0), (['5', '7', '7'], '5', 0.0),
            (['5', '7'], '5', 1.0), (['7', '5'], '5', 0.0),                      # a tie: the first given wins
            (['7', '5', '5', '7'], '7', 1.0), (['7', '5', '5', '7'], '5', 0.0),
            ([None, None, '5'], '5', 1.0),                                       # no answer, no vote
            ([None, None], '5', 0.0), ([], '5', 0.0), (['5'], '5', 1.0)]:
        assert maj_at_k(answers, [a == right for a in answers]) == maj_at_k(answers, right) == expected


def samples_of(tokenizer, *texts):
    """Records of samples; '...' at the end: the budget ended there."""
    return [judge(Sample([1], [ord(c) for c in text.removesuffix('...')] + [0], [], not text.endswith('...')), Problem('q', '#### 18', '18'), tokenizer)
            for text in texts]


def test_a_vote_counts_the_answers_of_finished_samples():
    def metrics(*texts):
        samples = samples_of(Decodes(), *(f'#### {t}' for t in texts))
        return {name: mean for name, (mean, _) in summarize([{'greedy': samples[0], 'samples': samples}]).items()}
    for order in set(itertools.permutations(['18...', '18', '18', '7'])):
        found = metrics(*order)
        assert found['maj@4'] == found['pass@4'] == 1
    assert maj_at_k(['18', '18', '7'], [False, True, False]) == weighted_at_k(['18', '18', '7'], [1, 1, 1], [False, True, False]) == 1
    assert samples_of(Decodes(), '#### 1...')[0]['answer'] is None  # perhaps it was 18
    assert metrics('1...', '1...', '18')['maj@3'] == 1 and metrics('18...', '18...', '7')['maj@3'] == 0
    older = [{'answer': '1', 'correct': False, 'finished': False}] * 2 + [{'answer': '18', 'correct': True, 'finished': True}]
    older = [s | {'text': '', 'tokens': 1} for s in older]  # as records were written before
    assert summarize([{'greedy': older[0], 'samples': older}])['maj@3'][0] == 1


def test_votes_and_reranks_solve_at_most_what_any_sample_solves():
    """Against brute force, in any order of the samples."""
    rng = random.Random(0)
    for _ in range(500):
        samples = samples_of(Decodes(), *(rng.choice(['#### 18', '#### 7', '#### 1', 'so']) + rng.choice(['', '', '...'])
                                          for _ in range(rng.randint(1, 6))))
        answers, correct = [s['answer'] for s in samples], [s['correct'] for s in samples]
        scores = [rng.choice([0.2, 0.5, 0.9]) for _ in samples]
        voted = [a for a in answers if a is not None]
        for weights, found in (([1] * len(samples), maj_at_k(answers, correct)), (scores, weighted_at_k(answers, scores, correct))):
            sums = [round(sum(w for a, w in zip(answers, weights) if a == b), 6) for b in voted]
            winner = voted[sums.index(max(sums))] if voted else None
            assert found == (winner == '18') <= any(correct)
        assert rerank_at_k([s['score'] for s in with_scores(samples, [torch.tensor([x]) for x in scores])], correct) <= any(correct)
        assert maj_at_k(answers, correct) == maj_at_k(answers, '18')


def test_rerank_at_k():
    assert rerank_at_k([0.1, 0.9, 0.5], [True, False, True]) == 0.0
    assert rerank_at_k([0.1, 0.5, 0.9], [False, False, True]) == 1.0
    assert rerank_at_k([0.9, 0.9], [True, False]) == 1.0  # a tie: the first


def test_weighted_at_k():
    assert weighted_at_k(['5', '7', '7'], [0.9, 0.3, 0.3], [True, False, False]) == 1.0  # the sum of scores, not of samples
    assert weighted_at_k(['5', '7', '7'], [0.5, 0.3, 0.3], [True, False, False]) == 0.0
    assert weighted_at_k([None, '5'], [0.9, 0.1], [False, True]) == 1.0 and weighted_at_k([None], [1.0], [False]) == 0.0
    answers, right = ['5', '7', None, '7', '5'], [True, False, False, False, True]
    assert weighted_at_k(answers, [1.0] * 5, right) == maj_at_k(answers, right)  # equal scores: the plain vote, ties alike


def test_a_sample_without_an_answer_never_wins_by_its_score():
    records = [sample_record('5'), sample_record(None), sample_record('5', finished=False), sample_record('5')]
    scored = with_scores(records, [torch.tensor([0.9, 0.2]), torch.tensor([0.99]), torch.tensor([0.99]), torch.tensor([])])
    assert [r['score'] for r in scored] == pytest.approx([0.2, 0, 0, 0])  # the score of the last token


def sample_record(answer, right='5', text=None, finished=True, tokens=10, **more):
    return {'text': text or f' #### {answer}', 'answer': answer, 'correct': answer == right, 'finished': finished, 'tokens': tokens} | more


def problem_record(greedy, *answers, **more):
    return {'question': 'q', 'answer': '5', 'greedy': sample_record(greedy), 'samples': [sample_record(a, **more) for a in answers]}


def test_summary_by_hand():
    records = [problem_record('5', '5', '5', '3', '4'), problem_record('3', '3', '3', '5', '5'), problem_record('5', None, None, None, '5'),
               problem_record(None, '1', '2', '3', '4')]
    metrics = summarize(records)
    assert metrics['maj@1'] == (0.5, pytest.approx(0.5 / 3 ** 0.5))  # sqrt(p (1 - p) / (n - 1))
    assert metrics['maj@4'][0] == 0.5
    assert metrics['pass@1'][0] == pytest.approx((2 + 2 + 1 + 0) / 16)
    assert metrics['pass@2'][0] == pytest.approx((5 / 6 + 5 / 6 + 1 / 2 + 0) / 4)
    assert metrics['pass@4'][0] == 0.75
    assert 'rerank@4' not in metrics
    for record in records:
        for score, s in enumerate(record['samples']):
            s['score'] = score
    assert summarize(records)['rerank@4'][0] == 0.5  # the last sample of each
    assert summarize(records)['weighted@4'][0] == 0.5  # 5 has 0 + 1 of 6; 5 has 2 + 3 of 6; the only one; none


def test_at_one_sample_every_measure_is_the_same():
    records = [problem_record('5', a, score=1.0) for a in ('5', '5', '3', None)]
    metrics = summarize(records)
    assert metrics['maj@1'][0] == 1.0 and metrics['pass@1'] == metrics['rerank@1']
    for r in records:
        r['greedy'] = r['samples'][0]
    metrics = summarize(records)
    assert metrics['maj@1'] == metrics['pass@1'] == metrics['rerank@1'] == metrics['weighted@1']


def test_greedy_alone_and_lengths():
    metrics = summarize([problem_record('5'), problem_record('3')])
    assert metrics['maj@1'][0] == 0.5 and not any(m.startswith(('pass', 'maj@0')) for m in metrics)
    records = [problem_record('5', '5', '3')]
    records[0]['samples'][1] |= {'finished': False, 'tokens': 30}
    assert summarize(records)['truncated'][0] == 0.5 and summarize(records)['tokens'][0] == 20


def test_unique_equations():
    texts = ['<<1+2=3>>3', 'so <<1+2=3>> 3', '<<2+1=3>>3', '<<1+2=3>> then <<3*2=6>>']
    assert unique_equations([{'text': t} for t in texts]) == 3


def test_what_another_run_had_found():
    samples = lambda *equations: [{'text': f'<<{e}>>', 'correct': e != 'wrong=1', 'tokens': 1, 'finished': True, 'answer': '1'} for e in equations]  # noqa: E731
    assert evaluation.overlap(samples('1+2=3', '1+2=3', '2+1=3'), samples('1+2=3', '4-1=3', '4-1=3')) == (1, 2)
    assert evaluation.overlap([], samples('1+2=3')) == (0, 1) and evaluation.overlap(samples('1+2=3'), []) == (0, 0)
    # two problems: of four different sequences two were there, of three right ones one; of two solved problems one was solved before
    pairs = [({'samples': samples('1+2=3', 'wrong=1')}, {'samples': samples('1+2=3', 'wrong=1', '4-1=3')}),
             ({'samples': samples('wrong=1')}, {'samples': samples('2+2=4', '2+2=4')})]
    said = evaluation.explored('out/a', pairs)
    assert '50% of 4' in said and '33% of 3' in said and 'of the 2 problems' in said and '50% are solved by one of out/a' in said


def test_unsolved():
    records = [{'greedy': {'correct': False}, 'samples': [{'text': '', 'correct': c, 'answer': None, 'tokens': 1, 'finished': True} for c in row]}
               for row in ([True, False], [False, False], [False, False], [True, True])]
    assert summarize(records)['unsolved'][0] == 0.5 == 1 - summarize(records)['pass@2'][0]


def test_a_prompt_without_room_is_a_wrong_answer_not_the_end(bpe):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe)
    samples = evaluation.answer(sampler, ['A', 'Question: Tom ' * 50, 'Question: Tom'], 2, 10, 1.0)
    assert [bool(s.ids) for s in samples] == [True, True, False, False, True, True]
    assert [s.ids for s in samples if s.ids] == [s.ids for s in sampler.generate(['A', 'Question: Tom'], 2, 10, 1.0)]
    assert not judge(samples[2], Problem('q', '#### 18', '18'), bpe)['correct']
    assert [s.ids for s in evaluation.answer(sampler, ['Question: Tom ' * 50], 2, 10, 0)] == [[], []]


def test_questions_without_room_do_not_end_an_exploration_unless_it_is_all_of_them(bpe, tmp_path):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe, max_rows=1)
    long, short = Problem('Tom ' * 90, '#### 1', '1'), Problem('Tom?', '#### 1', '1')
    found = list(evaluation.explore(sampler, [long] * 9 + [short], str(tmp_path / 'a'), 2, 10, 1.0, 0, ''))  # whole chunks of the long one
    assert [len(r['ids']) for records in found[:9] for r in records] == [0] * 18 and all(r['ids'] for r in found[9])
    for call in (lambda: evaluation.explore(sampler, [long] * 9, str(tmp_path / 'b'), 2, 10, 1.0, 0, ''),
                 lambda: evaluation.greedy_accuracy(sampler, [long], 10)):
        with pytest.raises(UserError, match='exceed the context of 96 tokens'):
            call()


class Decodes:
    eos = 0

    def decode(self, ids):
        return ''.join(chr(i) for i in ids if i)


def test_judge():
    for text, finished, stop, correct in [
            (' so\n#### 18', True, (), True), (' so\n#### 18.0', True, (), True), (' so\n#### 8', True, (), False),
            (' so\n#### 18', False, (), False),                                                   # cut off: perhaps it was 189
            (' so\n#### 18\nQuestion: x\nAnswer:\n#### 7', True, ('\nQuestion:',), True)]:       # what follows a stop is not read
        sample = Sample([1], [ord(c) for c in text] + [0], [0.0] * (len(text) + 1), finished)
        record = judge(sample, Problem('q', '#### 18', '18'), Decodes(), stop)
        assert record['correct'] is correct and record['tokens'] == len(text) + 1
        assert (record['answer'] is None) == (not finished) and (not stop or 'Question' not in record['text'])


def test_torn_records_file(tmp_path):
    path = tmp_path / 'eval_x.jsonl'
    path.write_text(json.dumps({'k': 2}) + '\n' + json.dumps({'index': 0}) + '\n' + '{"index": 1, "gre')
    assert read_records(str(path)) == ({'k': 2}, [{'index': 0}])
    assert read_records(str(tmp_path / 'absent')) == ({}, [])


def test_markdown_table():
    summary = {'task': 't', 'problems': 4, 'k': 4, 'metrics': {'maj@1': (0.5, 0.25), 'pass@1': (0.1, 0.1), 'pass@4': (1.0, 0.0), 'tokens': (12.34, 1)}}
    lines = markdown_table({'a': summary, 'b': summary | {'metrics': {'maj@1': (0.25, None)}}}).split('\n')
    assert lines[0] == '| run | task | problems | maj@1 | pass@4 | tokens |'
    assert lines[2] == '| a | t | 4 | 50.0 ± 25.0 | 100.0 ± 0.0 | 12.3 |'
    assert lines[3] == '| b | t | 4 | 25.0 |  |  |'
    assert len({line.count('|') for line in lines}) == 1


def test_compare_is_by_problem(tmp_path, capsys):
    """Two problems with one question, and a run that evaluated fewer problems."""
    def run(name, *answers, right=()):
        (tmp_path / name).mkdir()
        rows = [{'index': i, 'question': 'Tom?' if i < 2 else f'{i}?', 'answer': a, 'greedy': sample_record(a, right=a if i in right else None),
                 'samples': []} for i, a in enumerate(answers)]
        (tmp_path / name / 'eval_t.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in [{'k': 0}] + rows))
        (tmp_path / name / 'eval_t.json').write_text(json.dumps({'task': 't', 'problems': len(rows), 'k': 0, 'metrics': summarize(rows)}))
        return str(tmp_path / name)

    def compared(*folders):
        evaluation.compare(folders)
        return capsys.readouterr().out
    a, copy = run('a', '1', '2', '3', right=[1]), run('copy', '1', '2', '3', right=[1])
    assert f'of 3 problems {copy} solves 0 that {a} does not, and fails 0 that it does' in compared(a, copy)
    fewer, other = run('fewer', '1', '2', right=[0]), run('other', '7', '2', '3', '4', right=[0, 1, 2, 3])
    assert f'of 2 problems {fewer} solves 1 that {a} does not, and fails 1 that it does' in compared(a, fewer)
    assert f'of 2 problems {other} solves 1 that {a} does not, and fails 0' in compared(a, other)  # its first problem is another one


def test_compare_needs_an_evaluation(tmp_path):
    with pytest.raises(UserError, match='no eval_<task>.json there'):
        evaluation.compare([str(tmp_path)])


# -----------------------------------------------------------------------------
# the script

@pytest.fixture
def run(tmp_path, bpe, script):
    """Writes a tiny policy and a tiny task; returns a function that runs eval.py on them."""
    loud(Transformer(tiny_config(bpe.vocab_size))).save_pretrained(str(tmp_path / 'm'), bpe)
    row = json.dumps({'question': 'Tom has 3', 'answer': 'Tom has 3\n#### 3'}) + '\n'
    (tmp_path / 'task').mkdir()
    (tmp_path / 'task' / 'train.jsonl').write_text(row * 300)
    (tmp_path / 'task' / 'test.jsonl').write_text(''.join(row.replace('has 3', f'has {i}') for i in range(6)))
    return lambda *flags, code=0: script('eval.py', f'--init_from={tmp_path}/m', f'--task={tmp_path}/task', '--k=3', '--max_new_tokens=12',
                                         '--device=cpu', '--max_rows=1', *flags, code=code)


def test_an_interrupted_evaluation_goes_on_and_other_settings_are_refused(run, tmp_path):
    out = run()
    assert '| maj@1 | maj@3 | pass@3 |' in out.stdout
    records, summary = (tmp_path / 'm' / 'eval_task.jsonl').read_text(), (tmp_path / 'm' / 'eval_task.json').read_text()
    (tmp_path / 'm' / 'eval_task.jsonl').write_text(records[:int(len(records) * 0.6)])
    run()
    assert (tmp_path / 'm' / 'eval_task.jsonl').read_text() == records
    assert (tmp_path / 'm' / 'eval_task.json').read_text() == summary
    refused = run('--temperature=0.5', code=2)
    assert 'other settings (temperature)' in refused.stderr and refused.stderr.count('\n') == 1
    assert (tmp_path / 'm' / 'eval_task.jsonl').read_text() == records
    run('--temperature=0.5', '--overwrite')
    assert (tmp_path / 'm' / 'eval_task.jsonl').read_text() != records


def test_few_shot_prompts_fit_or_are_refused(run):
    assert 'exceed the context of 96 tokens' in run('--few_shot=20', code=2).stderr


def test_compare_script(run, script, tmp_path):
    run()
    table = script('eval.py', '--compare', f'{tmp_path}/m', f'{tmp_path}/m').stdout
    assert f'| {tmp_path}/m | task | 6 |' in table
    assert 'use: python eval.py --compare' in script('eval.py', '--compare', code=2).stderr
