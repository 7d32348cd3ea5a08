"""
What policies wrote, a question at a time and the runs side by side: the greedy solution, the most frequent
right and wrong samples, and the reward of each step in PPO's rollouts.

Read are eval_<task>.jsonl of eval.py, where runs are matched by question, and the training samples of ei.py
(its last round), rcrl.py and ppo.py (a question's last iteration). Files that a run is writing can be read.

$ python assets/browse.py out/demo_sft out/demo_ei                      # in the terminal, through the pager
$ python assets/browse.py out/demo_sft out/demo_ppo --only=lost
$ python assets/browse.py out/demo_ppo --only=training                  # with the rewards of the steps
$ python assets/browse.py out/demo_sft out/demo_ei --html=samples.html  # one page for a browser
"""
import base64
import glob
import hashlib
import json
import os
import pydoc
import shutil
import sys
import textwrap
from collections import Counter
from html import escape
from itertools import zip_longest
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import UserError, override  # noqa: E402

# -----------------------------------------------------------------------------
only = 'all'      # 'all' | 'gained' | 'lost' | 'right' | 'wrong' | 'training'; the last run beside the first
n_each = 2        # distinct right and distinct wrong samples shown of a question (at least 0)
n_training = 200  # training questions, PPO's last ones first; 0: all (at least 0)
html = ''         # a page to write, e.g. samples.html; empty: the terminal
# -----------------------------------------------------------------------------

STATUS = {(False, True): 'gained', (True, False): 'lost', (True, True): 'right', (False, False): 'wrong'}

class Text(NamedTuple):
    """A solution as it is shown."""
    correct: bool
    title: str
    lines: list  # its steps, in PPO's rollouts after their rewards

class Cell(NamedTuple):
    """What a run wrote for a question."""
    answer: str = ''  # the reference, where the file has it
    greedy: list = ()  # one Text; none in training
    samples: list = ()
    count: str = 'no samples'

class Entry(NamedTuple):
    status: str
    source: str  # 'eval_<task>' or 'samples'
    question: str
    cells: list  # one a run


# -----------------------------------------------------------------------------
# reading

def visible(text):
    """Shows control and format characters, which could rule a terminal or reorder a line, as escapes."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)

def read_rows(path):
    """Yields the rows of a .jsonl file, but for a torn last one."""
    with open(path, 'rb') as f:
        for line in f:
            if line.endswith(b'\n'):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f'{path}: a line is not JSON ({error})') from None
                if 'question' not in row or not {'samples', 'steps'} & set(row):
                    raise UserError(f'{path}: a line is no question with samples; is it of another version?')
                yield row

def as_text(sample, name):
    """A sample of eval.py, ei.py or rcrl.py, or a row of ppo.py."""
    lines = sample['text'].strip().split('\n')
    if 'steps' in sample:
        lines = [f'{"given":>7}  {line}' for line in sample['prefix'].strip().split('\n') if line]
        lines += [f'{reward:+7.3f}  {line}' for line, reward in sample['steps']]
    title = ('✓ ' if sample['correct'] else '✗ ') + name
    title += f', score {sample["score"]:.2f}' if 'score' in sample else ''
    title += '' if sample['finished'] else ', cut off by the budget'
    return Text(sample['correct'], title, [visible(line) for line in lines])

def as_cell(row):
    """Equal samples are shown once: right ones before wrong ones, the most frequent first."""
    groups = {True: {}, False: {}}
    for s in row['samples']:
        groups[s['correct']].setdefault((s.get('prefix'), s['text']), []).append(s)
    n = len(row['samples'])
    samples = [as_text(same[0], f'{len(same)} of {n}') for alike in groups.values()
               for same in sorted(alike.values(), key=len, reverse=True)[:n_each]]
    count = f'{sum(s["correct"] for s in row["samples"])} of {n} samples right' if n else 'no samples'
    greedy = [as_text(row['greedy'], 'greedy')] if 'greedy' in row else []
    return Cell(row.get('answer', ''), greedy, samples, count)

def paths_in(folder, pattern):
    """round10 after round9."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)), key=lambda path: (len(path), path))

def load_run(folder):
    """{(source, question): Cell}, evaluations first, then training samples, PPO's last ones first."""
    cells, rollouts = {}, {}
    evaluations, rounds = paths_in(folder, 'eval_*.jsonl'), paths_in(folder, 'samples_round*.jsonl')
    for path in evaluations + rounds[-1:] + paths_in(folder, 'samples.jsonl'):
        name = os.path.basename(path).removesuffix('.jsonl')
        for row in read_rows(path):
            key = name if name.startswith('eval_') else 'samples', row['question']
            if 'samples' in row:
                cells[key] = as_cell(row)
            else:  # ppo.py writes a row a solution
                drawn = rollouts.pop(key, [])  # pop: a new iteration's questions come last
                rollouts[key] = [r for r in drawn if r['iteration'] == row['iteration']] + [row]
    for key, rows in reversed(rollouts.items()):
        cells[key] = as_cell({'answer': rows[0]['answer'], 'samples': rows})
    if not cells:
        raise UserError(f'{folder}: no eval_<task>.jsonl (eval.py --init_from=...), nor training samples')
    return cells

def load_entries(folders):
    """-> [Entry]: the questions that all runs were evaluated on, then training questions, those that all runs
    drew before others. UserError if they share none."""
    runs = [load_run(folder) for folder in folders]
    keys = dict.fromkeys(key for run in reversed(runs) for key in run)
    keys = sorted(keys, key=lambda key: sum(key not in run for run in runs))
    if any(keys[0] not in run for run in runs):
        raise UserError(f'{", ".join(folders)} share no question: evaluate them on one task')
    evaluated = [key for key in keys if key[0] != 'samples' and all(key in run for run in runs)]
    trained = [key for key in keys if key[0] == 'samples'][:n_training or None]
    entries = []
    for source, question in evaluated + trained:
        cells = [run.get((source, question), Cell()) for run in runs]
        outcome = tuple(text.correct for cell in (cells[0], cells[-1]) for text in cell.greedy)
        answer = max(cell.answer for cell in cells)
        question = visible(question + (f' (answer {answer})' if answer else ''))
        entries.append(Entry(STATUS.get(outcome, 'training'), visible(source), question, cells))
    return entries


# -----------------------------------------------------------------------------
# the terminal

def wrap(lines, width):
    return [part for line in lines
            for part in textwrap.wrap(line, width, subsequent_indent=' ' * 4, break_on_hyphens=False)]

def in_terminal(folders, entries):
    """The entries as text, a column a folder, as wide as the terminal."""
    lines, width = [], shutil.get_terminal_size((110, 24)).columns  # of a pipe: 110
    each = max(20, (width + 3) // len(folders) - 3)
    for i, e in enumerate(entries, 1):
        columns = []
        for folder, cell in zip(folders, e.cells):
            column = [folder]
            for text in (*cell.greedy, *cell.samples):
                column += [text.title, *('  ' + line for line in text.lines)]
            columns.append([line.ljust(each) for line in wrap([*column, cell.count], each)])
        rows = zip_longest(*columns, fillvalue=' ' * each)
        lines += [f'── {i} of {len(entries)}: {e.status} ({e.source}) '.ljust(width, '─')]
        lines += [*wrap([e.question], width), '', *(' │ '.join(row).rstrip() for row in rows), '']
    return '\n'.join(lines)


# -----------------------------------------------------------------------------
# the page

STYLE = '''
:root { color-scheme: light dark }  /* the browser's own colours, as prefers-color-scheme asks */
body { max-width: 80rem; margin: auto; padding: 8px 1rem; font: 16px/1.4 system-ui; overflow-wrap: anywhere }
form { display: flex; flex-flow: wrap; gap: 8px; padding: 8px; position: sticky; top: 0; background: Canvas }
[type=search] { flex: 1 1 9rem; font: inherit }
article { padding: 1rem 0; border-top: 1px solid #8888 }
h1, h2 { margin: 0; font-size: 1.1rem }
h3, small, summary { margin: .5rem 0 0; font-size: .85rem; opacity: .75 }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 1.5rem }
div.right, div.wrong { margin: .4rem 0; padding-left: .7rem; border-left: 3px solid #d33 }
div.right { border-color: #2a5 }
pre { margin: 0; font-size: .85rem; white-space: pre-wrap }
'''
SCRIPT = '''
const form = document.forms[0], articles = [...document.querySelectorAll('article')];
const texts = articles.map(article => article.textContent.toLowerCase());
function show() {
    const only = form.only.value, wanted = form.find.value.toLowerCase();
    articles.forEach((article, i) =>
        article.hidden = !['all', article.className].includes(only) || !texts[i].includes(wanted));
    form.shown.value = articles.filter(article => !article.hidden).length + ' shown';
}
form.addEventListener('input', show);
form.addEventListener('submit', event => event.preventDefault());
form.only.value = 'all';
show();
'''

def text_html(text):
    lines = escape('\n'.join(text.lines))
    return f'<div class="{"right" if text.correct else "wrong"}">{text.title}<pre>{lines}</pre></div>'

def entry_html(folders, entry):
    runs = ''
    for folder, cell in zip(folders, entry.cells):
        greedy, samples = (''.join(map(text_html, texts)) for texts in (cell.greedy, cell.samples))
        runs += (f'<section><h3>{escape(folder)}</h3>{greedy}<details{"" if greedy else " open"}>'
                 f'<summary>{cell.count}</summary>{samples}</details></section>')
    return (f'<article class="{entry.status}"><small>{entry.status} ({escape(entry.source)})</small>'
            f'<h2>{escape(entry.question)}</h2><div class="runs">{runs}</div></article>\n')

def page(folders, entries):
    """-> HTML. Its policy lets nothing else load or run: what a model wrote is text."""
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    counts = Counter(['all'] * len(entries) + [e.status for e in entries])
    choices = ''.join(f'<label><input type="radio" name="only" value="{s}"> {s} {counts[s]}</label>'
                      for s in ('all', *STATUS.values(), 'training'))
    title = escape(' | '.join(folders))
    return f'''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>
<style>{STYLE}</style><h1>{title}</h1><small>Of the greedy solutions, gained: only the last run's is right;
lost: only the first's; right, wrong: both</small>
<form>{choices}<input type="search" name="find" placeholder="search"><output name="shown"></output></form>
{''.join(entry_html(folders, e) for e in entries)}<script>{SCRIPT}</script></html>
'''


if __name__ == '__main__':
    folders = list(dict.fromkeys(arg for arg in sys.argv[1:] if not arg.startswith('-')))
    override(globals(), [arg for arg in sys.argv[1:] if arg not in folders])
    if not folders:
        raise UserError('use: python assets/browse.py out/a out/b ...')
    if html and not html.endswith('.html'):
        raise UserError(f'html is a page to write, e.g. samples.html, not {html!r}')
    entries = [e for e in load_entries(folders) if only in ('all', e.status)]
    if not entries:
        raise UserError(f'no question is {only!r}')
    folders = [visible(folder) for folder in folders]
    if not html:
        pydoc.pager(in_terminal(folders, entries))
        sys.exit()
    try:
        with open(html, 'w', encoding='utf-8') as f:
            f.write(page(folders, entries))
    except OSError as error:
        raise UserError(f'{html} could not be written: {error.strerror}') from None
    print(f'{html}: {len(entries):,} questions')
