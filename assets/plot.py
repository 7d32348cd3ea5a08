"""
Draws the paper's figures (Havrilla et al. 2024) from the log.jsonl and the eval_<task>.json of runs:
samples    validation maj@1 against samples drawn, with those of the run it started from; SFT is a level
frontier   maj@1 against pass@K: of a run, or along its checkpoints epoch_* or round* that were evaluated
pass_at_k  pass@k and maj@k against k; a maj@k is the mean over disjoint groups of k samples
found      different equation sequences a problem, and which of the right ones the first run's samples held
training   return, KL, entropy, length, share cut off, share of questions whose samples all tie

Folders NAME, NAME_s1, NAME_s2 are one run with other seeds: the mean, in a band from least to largest.
The numbers drawn go beside the picture as .json, from which it can be drawn again.
$ python assets/plot.py out/demo_sft out/demo_ei out/demo_ppo out/demo_rcrl --out=out/demo.png
$ python assets/plot.py out/demo.json --figure=samples --out=out/samples.svg
"""
import glob
import json
import os
import re
import sys
from importlib.util import find_spec
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from config import UserError, override
from config.run import read_json, read_rows, write_rows
from data import equations
from eval import maj_at_k, pass_at_k

# -----------------------------------------------------------------------------
out = 'out/plot.png'  # the picture: .png, .svg or .pdf
figure = 'all'        # 'all' | 'samples' | 'frontier' | 'pass_at_k' | 'found' | 'training'
task = 'arithmetic'   # whose evaluations: eval_<task>.json
# -----------------------------------------------------------------------------

TRAINING = {  # key of the log: (label, factor)
    'mean_return': ('return\na solution', 1), 'kl': ('KL from reference\n(nats a token)', 1),
    'entropy': ('entropy\n(nats a token)', 1), 'response_tokens': ('length\n(tokens)', 1),
    'share_truncated': ('cut off by the\nbudget (%)', 100), 'ties': ('questions whose\nsamples tie (%)', 100)}
NEEDS = dict.fromkeys(('samples', 'frontier', 'pass_at_k', 'found', 'training'), 'evaluations with samples')
NEEDS |= {'samples': 'validations', 'training': 'logs of ppo.py or ei.py'}
COLORS = ['black', '#d55e00', '#0072b2', '#009e73', '#aa4499', '#8a8a8a', '#e6a800', '#56b4e9']
DASHES = ['-', (0, (6, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3))]
PARTS = [{'color': '0.35'}, {'color': 'white', 'hatch': '///'}, {'color': '0.85'}]  # of a bar
STYLE = {'font.size': 14, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
         'grid.color': '0.9', 'axes.axisbelow': True, 'legend.frameon': False, 'lines.markersize': 7}

class Run(NamedTuple):
    name: str          # the folder's, without the seed
    seed: str          # '', or '_s1'
    log: list          # rows of log.jsonl, with samples_drawn in each
    start: tuple       # (samples drawn, best maj@1 or None) of the run that it started from
    checkpoints: dict  # {file in the folder: metrics} of those evaluated with samples, or else of itself
    rows: list         # of eval_<task>.jsonl, where it is finished and has samples

def read_run(folder, task):
    """UserError for a folder with neither a log nor an evaluation."""
    name, seed = re.fullmatch(r'(.*?)(_s\d+)?', folder).groups('')
    log, before = read_log(folder), []
    if log:  # init_from is relative to where the run was started, which knew its folder as out_dir
        given = read_json(f'{folder}/config.json')
        before = read_log(os.path.join(folder.removesuffix(given['out_dir'].rstrip('/')), given['init_from']))
    start = (max((row['samples_drawn'] for row in before), default=0),
             max((row['val_maj1'] for row in before if 'val_maj1' in row), default=None))
    own = f'{folder}/eval_{task}.json'
    inner = sorted(glob.glob(f'{glob.escape(folder)}/*[0-9]/eval_{task}.json'))
    metrics = {path: read_json(path).get('metrics', {}) for path in (own, *inner) if os.path.exists(path)}
    if not log and not metrics:
        raise UserError(f'{folder}: neither log.jsonl nor eval_{task}.json')
    sampled = [path for path, found in metrics.items() if 'unsolved' in found]
    checkpoints = {path[len(folder) + 1:]: metrics[path] for path in sampled[own in sampled:] or sampled}
    rows = read_rows(own + 'l') if own in sampled else []
    return Run(name, seed, log, start, checkpoints, [row for row in rows if row['samples']])

def read_log(folder):
    """The rows of a log, which a run may be writing, each with samples_drawn; [] without one."""
    path, drawn = f'{folder}/log.jsonl', 0
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8') as f:
        try:
            rows = [json.loads(line) for line in f if line.endswith('\n')]
        except ValueError as error:
            raise UserError(f'{path}: a line is not JSON ({error})') from None
    for row in rows:
        drawn = row['samples_drawn'] = row.get('samples_drawn', drawn)
        if 'all_right' in row:
            row['ties'] = row['all_right'] + row['all_wrong']
    return rows

def make_panel(runs, curve, x, y, metric=''):
    """The labels, and a series for the seeds of each name: the mean, the least and the largest of their y, as
    far as the shortest goes. curve: Run -> [(x, y), ...]."""
    series = {}
    for name in dict.fromkeys(run.name for run in runs):
        curves = [points for run in runs if run.name == name and (points := curve(run))]
        points = [tuple(zip(*each)) for each in zip(*curves)]  # [(the seeds' x, their y), ...]
        if points:
            series[f'{name} {metric}'.strip()] = {
                'run': name, 'seeds': len(curves), 'x': [fmean(xs) for xs, _ in points],
                'y': [fmean(ys) for _, ys in points],
                'low': [min(ys) for _, ys in points], 'high': [max(ys) for _, ys in points]}
    return {'x': x, 'y': y, 'series': series}

def validations(run):
    """[(samples drawn, maj@1 in %)]: the best, where several are of equally many samples."""
    (before, first), points = run.start, {}
    for row in run.log:
        if (y := row.get('val_maj1', row.get('prompted_maj1'))) is not None:
            x = row['samples_drawn'] + before
            points[x] = max(100 * y, points.get(x, 0))
    if first is not None and max(points, default=0) > before:  # it draws samples
        points.setdefault(before, 100 * first)
    return sorted(points.items())

def mean_maj(samples, k):
    groups = [samples[i:i + k] for i in range(0, len(samples) - k + 1, k)]
    return fmean(maj_at_k([s['answer'] for s in group], [s['correct'] for s in group]) for group in groups)

def at_each_k(run, metric):
    K = len(run.rows[0]['samples']) if run.rows else 0
    return [(k, 100 * fmean(metric(row['samples'], k) for row in run.rows))
            for k in sorted({2 ** i for i in range(K.bit_length())} | {K}) if k]

def sequences(run, first, k):
    """[(part, number)] of the different equation sequences of a problem's k samples: right and among those of
    the run `first`, right and not among them, never right. The problems are those of both."""
    known, counts = {(row['index'], row['question']): row['samples'] for row in first.rows}, []
    for row in run.rows:
        if before := known.get((row['index'], row['question'])):
            held, every = ({equations(s['text']) for s in group[:k]} for group in (before, row['samples']))
            right = {equations(s['text']) for s in row['samples'][:k] if s['correct']}
            counts.append([len(right & held), len(right - held), len(every - right)])
    return [(part, fmean(numbers)) for part, numbers in enumerate(zip(*counts))]

def gather(runs):
    """[Run] -> {panel: its labels and series}, of those that there are numbers for."""
    panels = {'samples': make_panel(runs, validations, 'samples drawn', 'validation maj@1 (%)')}
    if every := [set(metrics) for run in runs for metrics in run.checkpoints.values()]:
        K = max(int(metric[5:]) for metric in set.intersection(*every) if metric.startswith('pass@'))
        files = {run.name: [*run.checkpoints] for run in reversed(runs) if run.checkpoints}  # the first's
        panels['frontier'] = make_panel(
            [run for run in runs if [*run.checkpoints] == files.get(run.name)], lambda run: [
                (100 * m[f'pass@{K}'][0], 100 * m['maj@1'][0]) for m in run.checkpoints.values()],
            f'pass@{K} (%)', 'maj@1 (%)')
        for name, series in panels['frontier']['series'].items():
            series['names'] = [os.path.dirname(file) for file in files[name]]
    passes = make_panel(runs, lambda run: at_each_k(run, lambda samples, k: pass_at_k(
        len(samples), sum(s['correct'] for s in samples), k)), 'k samples', 'problems (%)', 'pass@k')
    majs = make_panel(runs, lambda run: at_each_k(run, mean_maj), '', '', 'maj@k')
    panels['pass_at_k'] = passes | {'series': passes['series'] | majs['series']}
    if sampled := [run for run in runs if run.rows]:
        first, k = sampled[0], min(len(run.rows[0]['samples']) for run in sampled)
        firsts = {run.seed: run for run in sampled if run.name == first.name}
        panels['found'] = make_panel(sampled, lambda run: sequences(run, firsts.get(run.seed, first), k),
                                f'different equation sequences of {k} samples', '')
        panels['found']['parts'] = [f'right, by {os.path.basename(first.name)}, too', 'right, new', 'wrong']
    for key, (label, factor) in TRAINING.items():
        panels[f'training: {key}'] = make_panel(runs, lambda run: sorted(
            {row['samples_drawn']: factor * row[key] for row in run.log if row.get(key) is not None}.items()),
            'samples drawn', label)
    return {name: found for name, found in panels.items() if found['series']}

def draw(panel, ax, styles):
    """styles: {run: arguments of plot}."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter
    ax.set(xlabel=panel['x'], ylabel=panel['y'])
    for name, series in panel['series'].items():
        x, y, style = series['x'], series['y'], dict(styles[series['run']])
        if panel['x'] == 'k samples':  # two metrics of a run
            is_maj = name.endswith(' maj@k')
            style |= {'linestyle': '--', 'fillstyle': 'none'} if is_maj else {'linestyle': '-'}
            ax.set_xscale('log', base=2)
            ax.set_xticks(x, [f'{k:g}' for k in x])
        ax.plot(x, y, markevery=max(1, len(x) // 8), **style)
        if x == [0]:
            ax.axhline(y[0], color=style['color'], linestyle=style['linestyle'])
        ax.fill_between(x, series['low'], series['high'], color=style['color'], alpha=0.2, linewidth=0)
        ax.vlines(x, series['low'], series['high'], color=style['color'], linewidth=len(x) < 3)
        for i in {0, len(x) - 1} if len(series.get('names', [])) > 1 else ():
            ax.annotate(series['names'][i], (x[i], y[i]), (8, -17), textcoords='offset points', fontsize=12)
    if panel['x'] == 'k samples':
        grey = [Line2D([], [], color='0.5', linestyle=each) for each in ('-', '--')]
        ax.legend(grey, ['pass@k', 'maj@k'], loc='upper left')
    elif panel['x'] == 'samples drawn':
        ax.xaxis.set_major_formatter(EngFormatter(sep=''))

def draw_bars(panel, ax):
    """A bar a run; beside it the share of its right sequences that the first run's samples held."""
    names = [os.path.basename(name) for name in panel['series']]
    ax.set(xlabel=panel['x'], yticks=range(len(names)), yticklabels=names)
    for i, series in enumerate(panel['series'].values()):
        for part, (y, low, high) in enumerate(zip(series['y'], series['low'], series['high'])):
            ax.barh(i, y, left=sum(series['y'][:part]), xerr=[[y - low], [high - y]], edgecolor='black',
                    label=panel['parts'][part] if i == 0 else None, **PARTS[part])
        held, new, _ = series['y']
        ax.text(held + new + series['high'][2], i, f' {held / (held + new or 1):.0%} of right', va='center')
    ax.margins(x=0.25)
    ax.invert_yaxis()
    ax.legend(loc='lower center', bbox_to_anchor=(0.4, 1), ncols=2)

def picture(panels, path):
    """All panels in one picture, those of the training smaller."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL import Image
    seeds = {each['run']: each['seeds'] for found in panels.values() for each in found['series'].values()}
    styles = {run: {'color': COLORS[i % 8], 'marker': 'osD^vPX*'[i % 8], 'linestyle': DASHES[i % 6]}
              for i, run in enumerate(seeds)}
    main = [name for name in panels if not name.startswith('training')]
    small = [name for name in panels if name not in main]
    rows = [main[i:i + 2] for i in range(0, len(main), 2)] + [small[i:i + 3] for i in range(0, len(small), 3)]
    heights = [4 if row[0] in main else 2.8 for row in rows]
    with rc_context(STYLE):
        fig = Figure((8 if len(panels) == 1 else 12, sum(heights) + 0.6), layout='constrained')
        for name, ax in fig.subplot_mosaic([[[row]] for row in rows], height_ratios=heights).items():
            draw_bars(panels[name], ax) if name == 'found' else draw(panels[name], ax, styles)
        handles = [Line2D([], [], label=os.path.basename(run), **style) for run, style in styles.items()
                   if [*panels] != ['found']]
        if (n := max(seeds.values())) > 1:
            handles.append(Line2D([], [], color='0.8', linewidth=8, label=f'{n} seeds: mean, min to max'))
        fig.legend(handles=handles, loc='outside upper center', ncols=2 if len(panels) == 1 else 3)
        fig.savefig(path, dpi=100)
    if path.endswith('.png'):  # a third of the bytes
        Image.open(path).convert('RGB').quantize(256).save(path, optimize=True)


if __name__ == '__main__':
    paths = [a for a in sys.argv[1:] if not a.startswith('-')]
    override(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    if find_spec('matplotlib') is None:
        raise UserError('plot.py needs matplotlib: pip install matplotlib')
    stem, ending = os.path.splitext(out)
    if not paths or ending not in ('.png', '.svg', '.pdf'):
        raise UserError('use: python assets/plot.py out/a out/b ... --out=FILE.png (or .svg, .pdf)')
    wanted = NEEDS if figure == 'all' else [figure]
    runs = dict.fromkeys(map(os.path.normpath, paths))
    panels = read_json(paths[0]) if paths[0].endswith('.json') else gather([read_run(r, task) for r in runs])
    panels = {name: panel for name, panel in panels.items() if name.split(':')[0] in wanted}
    lacks = [f'{name} (no {NEEDS[name]})' for name in wanted if not any(p.startswith(name) for p in panels)]
    if not panels:
        raise UserError(f'nothing to draw: {", ".join(lacks)}')
    try:
        picture(panels, out)
        write_rows(stem + '.json', [panels])
    except OSError as error:
        raise UserError(f'{out}: not written ({error.strerror})') from None
    print(f'{out} and {stem}.json' + (f'; left out: {", ".join(lacks)}' if lacks else ''))
