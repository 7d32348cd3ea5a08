"""What assets/browse.py shows of runs: which questions, which samples, and hostile text as text."""
import json
from html.parser import HTMLParser

BROWSE = 'assets/browse.py'
HOSTILE = '</pre></script><script>x()</script><img onerror=x()>\x1b[2J\x9b\r\u202e\ud800&lt;"'

def sample(text, correct=False, **more):
    return {'text': text, 'correct': correct, 'finished': True} | more

def write(folder, name, *rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"torn')
    return str(folder)

def evaluation(run, solved, drawn=()):
    return write(run, 'eval_x.jsonl', *(
        {'question': f'q{i}', 'answer': '7', 'samples': drawn, 'greedy': sample(f'{run.name}{i}', c == '✓')}
        for i, c in enumerate(solved)))

def test_runs_are_matched_by_question(tmp_path, script):
    a, b = evaluation(tmp_path / 'a', '✗✓✓✗'), evaluation(tmp_path / 'b', '✓✗✓✗✓')
    for i, (status, marks) in enumerate({'gained': '✗✓', 'lost': '✓✗', 'right': '✓✓', 'wrong': '✗✗'}.items()):
        said = script(BROWSE, a, b, f'--only={status}').stdout
        assert f'1 of 1: {status} (eval_x)' in said and f'q{i} (answer 7)' in said
        assert [c for c in said if c in '✓✗'] == list(marks) and said.index(f'a{i}') < said.index(f'b{i}')
    assert '4 of 4' in script(BROWSE, a, b).stdout  # a has no fifth

def test_equal_samples_are_one_and_right_ones_come_first(tmp_path, script):
    drawn = [sample('w1'), sample('w2'), sample('w2'), sample('r', True, finished=False)]
    said = script(BROWSE, evaluation(tmp_path / 'a', '✓', drawn), '--n_each=1').stdout.split('a0')[1]
    assert said.split() == '✓ 1 of 4, cut off by the budget r ✗ 2 of 4 w2 1 of 4 samples right'.split()

def test_training_shows_the_latest_samples_and_the_rewards_of_steps(tmp_path, script):
    ppo = write(tmp_path / 'ppo', 'samples.jsonl', *(
        sample(line, iteration=n, question=question, answer='7', prefix='half\n', steps=[[line, reward]])
        for n, question, line, reward in ((1, 'q0', 'old', 1), (1, 'q1', 'kept', 1), (2, 'q0', 'new', -0.5))))
    ei = write(tmp_path / 'ei', 'samples_round9.jsonl', {'question': 'q3', 'samples': []})
    write(tmp_path / 'ei', 'samples_round10.jsonl', *({'question': f'q{i}', 'samples': ()} for i in '210'))
    said = script(BROWSE, ei, ppo).stdout
    places = [said.index(t) for t in ('q0 (answer 7)', 'given  half', '-0.500  new', 'q1 (answer 7)', 'q2')]
    assert places == sorted(places) and 'old' not in said and 'q3' not in said
    assert 'q2' not in script(BROWSE, ppo, ei, '--n_training=1').stdout

def test_what_a_model_wrote_is_text(tmp_path, script):
    run = write(tmp_path / '<i>', 'samples.jsonl', {'question': HOSTILE, 'samples': [sample(HOSTILE)]})
    page, seen = HTMLParser(), []
    page.handle_data = page.handle_starttag = lambda found, attributes=(): seen.append(found)
    script(BROWSE, run, f'--html={tmp_path}/a.html')
    page.feed((tmp_path / 'a.html').read_text(encoding='utf-8'))
    assert seen.count(ascii(HOSTILE)[1:-1]) == 2 and seen.count('script') == 1 and not {'i', 'img'} & {*seen}
    assert all(c.isprintable() for c in script(BROWSE, run).stdout.replace('\n', ''))

def test_wrong_use_is_one_line(tmp_path, script):
    a, old = evaluation(tmp_path / 'a', '✓'), write(tmp_path / 'old', 'eval_x.jsonl', {'task': 'x'})
    b = write(tmp_path / 'b', 'samples.jsonl', {'question': 'other', 'samples': []})
    for reason, *flags in (('use:',), ('no eval_<task>', 'none'), ('share no', a, b), ('version', old),
                           ('a page', a, f'--html={a}'), ('no question', a, '--only=lost')):
        said = script(BROWSE, *flags, code=2).stderr
        assert said.startswith('error: ') and reason in said and said.count('\n') == 1
