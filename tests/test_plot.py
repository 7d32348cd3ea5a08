"""assets/plot.py draws what made logs and evaluations say, worked out by hand."""
import json
import sys

import pytest

from assets import plot
from config.run import write_rows
from eval import summarize

LOGS = {'sft': [{'loss': 1}, {'val_maj1': 0.5}, {'val_maj1': 0.25}],
        'ei': [{'samples_drawn': 100}, {'val_maj1': 0.6}, {'samples_drawn': 200}, {'val_maj1': 0.75}],
        'rcrl': [{'samples_drawn': 50}, {'val_maj1': 0.9}, {'val_maj1': 0.5}],
        'ppo': [{'samples_drawn': 64, 'val_maj1': 0.25, 'all_right': 0.25, 'all_wrong': 0.125}],
        'ppo_s1': [{'samples_drawn': 64, 'val_maj1': 0.75, 'all_right': 0.5, 'all_wrong': 0.125}]}
STARTS = {'ei': 'sft', 'rcrl': 'ei'}
ANSWERS = {  # {folder: {question: its samples' answers}}: 2 is right, and the first is the greedy one
    'sft': {0: (2, 2, 3, 2), 1: (5, 5, 4, 2), 2: (7, 7, 7, 7)}, 'ei': {0: (3, 3, 3, 2), 2: (2, 2, 2, 8)},
    'sft/epoch_010.00': {0: (3, 2)}, 'sft/epoch_009.00': {0: (2, 3), 1: (3, 3)}}
DRAWN = {  # {panel: {series: {x: y}}}
    'samples': {'sft': {0: 50}, 'ei': {0: 50, 100: 60, 200: 75}, 'rcrl': {200: 75, 250: 90}, 'ppo': {64: 50}},
    'frontier': {'sft': {50: 50, 100: 0}, 'ei': {75: 50}}, 'training: ties': {'ppo': {64: 50}},
    'pass_at_k': {'sft pass@k': {1: 100 / 3, 2: 50, 4: 200 / 3}, 'ei pass@k': {1: 50, 2: 75, 4: 100},
                  'sft maj@k': {1: 100 / 3, 2: 50 / 3, 4: 100 / 3}, 'ei maj@k': {1: 50, 2: 50, 4: 50}},
    'found': {'sft': {0: 2 / 3, 1: 0, 2: 4 / 3}, 'ei': {0: 0.5, 1: 0.5, 2: 1}}}  # the parts of a bar

def test_what_is_drawn_is_what_the_runs_say(script, tmp_path, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure')
    for name, log in LOGS.items():
        (run := tmp_path / name).mkdir()
        write_rows(f'{run}/config.json', [{'out_dir': name, 'init_from': STARTS.get(name, 'base')}])
        unfinished = '{"val_maj1": 1'  # a row that is being written
        (run / 'log.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in log) + unfinished)
    for name, answers in ANSWERS.items():
        (tmp_path / name).mkdir(exist_ok=True)
        samples = {i: [{'text': f'<<1+1={a}>>', 'answer': str(a), 'correct': a == 2, 'lenient': a == 2,
                        'finished': True, 'tokens': 5} for a in given] for i, given in answers.items()}
        rows = [{'index': i, 'question': '', 'greedy': s[0], 'samples': s} for i, s in samples.items()]
        write_rows(f'{tmp_path}/{name}/eval_made.jsonl', rows)
        write_rows(f'{tmp_path}/{name}/eval_made.json', [{'metrics': summarize(rows)}])
    folders = [f'{tmp_path}/{name}' for name in LOGS]
    script('assets/plot.py', *folders, '--task=made', f'--out={tmp_path}/a.png')
    panels = json.loads((tmp_path / 'a.json').read_text())
    assert (tmp_path / 'a.png').stat().st_size < 150_000 and panels.keys() == DRAWN.keys()
    for name, panel in panels.items():
        ax, look = figure.Figure().subplots(), {'color': 'red', 'linestyle': '-'}
        plot.draw_bars(panel, ax) if name == 'found' else plot.draw(panel, ax, dict.fromkeys(folders, look))
        bars = [bar.get_width() for bar in ax.patches]
        lines = [list(enumerate(bars[i:i + 3])) for i in range(0, len(bars), 3)] or [
            line.get_xydata() for line in ax.lines if line.get_xdata()[-1] != 1]  # without SFT's level
        assert [series.split('/')[-1] for series in panel['series']] == [*DRAWN[name]]
        assert [dict(line) for line in lines] == [pytest.approx(line) for line in DRAWN[name].values()]
    assert [panels['samples']['series'][folders[3]][key] for key in ('low', 'high')] == [[25], [75]]
    script('assets/plot.py', f'{tmp_path}/a.json', '--figure=found', f'--out={tmp_path}/b.svg')
    assert json.loads((tmp_path / 'b.json').read_text()) == {'found': panels['found']}
    said = script('assets/plot.py', f'{tmp_path}/b.json', f'--out={tmp_path}/c.pdf').stdout
    assert 'left out: samples (no validations), frontier (no evaluations' in said
    assert 'neither log.jsonl nor' in script('assets/plot.py', str(tmp_path), code=2).stderr
    unwritable = script('assets/plot.py', f'{tmp_path}/b.json', f'--out={tmp_path}/none/a.png', code=2)
    assert 'none/a.png: not written' in unwritable.stderr
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'needs matplotlib' in script('assets/plot.py', *folders, code=2).stderr
