"""
What MAWPS (Koncel-Kedziorski et al. 2016) has beyond SVAMP's train set: a test for models trained on that,
without a train.jsonl. The train set is made of MAWPS and ASDiv-A and has nearly all of it, the whole of
MultiArith included, so only some 50 of 2,065 rows are new. Left out are questions of the train set, those
that differ from one in numbers or in a word or two, repeats, and rounded numbers (0.3333 for a third).

$ python data/svamp/prepare.py
$ python data/mawps/prepare.py --source=DIR    # AddSub, MultiArith, SingleEq and SingleOp of
                                               # ZubinGou/math-evaluation-harness on GitHub (MIT licence)
"""
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from fractions import Fraction

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from config import UserError, override
from data import load_problems, number_text, read_problems
from data.svamp.prepare import PLACES, plain_text

# -----------------------------------------------------------------------------
source = ''               # the folder with the four files, required
train = 'svamp'           # the task, or a prepared folder, whose train set's questions are left out
alike = 0.8               # nearly the same: with this share of words in common (above 0, at most 1)
out = ''                  # where test.jsonl goes; '': beside this script
# -----------------------------------------------------------------------------

SHA256 = {
    'mawps_addsub.jsonl': '2fae2c92530cdf1ac0487db9a90e68d6af84049d755c07c4486411c1d7f43e75',
    'mawps_multiarith.jsonl': '12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951',
    'mawps_singleeq.jsonl': '07bec92bae226dd5231a966e907a0f097ba3170a1557c73ceeb135caad8d09f8',
    'mawps_singleop.jsonl': 'feb012e7ed5503cdb96fd127d539692b033000e9134655acaf4f4e0091328e94',
}


def read_rows(path):
    """-> the rows {input, target} of an official file; UserError if it can't be read or differs."""
    try:
        with open(path, 'rb') as f:
            content = f.read()
    except OSError as e:
        raise UserError(f'cannot read {path}: {e}; --source=DIR names the folder that has it') from None
    if hashlib.sha256(content).hexdigest() != SHA256[os.path.basename(path)]:
        raise UserError(f'{path} is not the official file: its sha256 differs')
    return [json.loads(line, parse_int=Fraction, parse_float=Fraction) for line in content.splitlines()]


@functools.cache
def words(question):
    """Its different words, without numbers."""
    return frozenset(re.findall('[a-z]+', question.lower()))


def near(question, others):
    """Whether it is nearly one of the others, see `alike`."""
    found = words(question)
    return any(len(found & w) >= alike * len(found | w) for w in map(words, others))


def spelling(question):
    """The question without signs, spaces and capitals."""
    return ' '.join(re.findall(r'\w+', question.lower()))


def new_rows(rows, known, kept):
    """Appends to kept, as {question, answer}, the rows {input, target} whose question is neither there nor
    known -> how many were left out, by reason."""
    dropped, spellings = Counter(), {spelling(question) for question in known}
    for row in rows:
        question = plain_text(row['input'])
        if spelling(question) in spellings:
            dropped['in the train set'] += 1
        elif near(question, known):
            dropped['nearly in the train set'] += 1
        elif near(question, [row['question'] for row in kept]):
            dropped['repeated'] += 1
        elif re.search(rf'\.\d{{{PLACES + 1}}}', f'{question} {number_text(row["target"])}'):
            dropped['with a rounded number'] += 1
        else:
            kept.append({'question': question, 'answer': f'#### {number_text(row["target"])}'})
    return dropped


if __name__ == '__main__':
    override(globals())
    folder = out or HERE
    known = [p.question for split in ('train', 'val') for p in load_problems(train, split)]
    kept = []
    for name in SHA256:
        rows, n_before = read_rows(os.path.join(source, name)), len(kept)
        dropped = new_rows(rows, known, kept)
        reasons = ', '.join(f'{n} {reason}' for reason, n in sorted(dropped.items()))
        print(f'{name}: {len(rows)} rows, {len(kept) - n_before} new; left out: {reasons}')
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # complete and checked, or not at all
        path = os.path.join(tmp, 'test.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in kept)
        print(f'test.jsonl: {len(read_problems(path))} problems')
        os.replace(path, os.path.join(folder, 'test.jsonl'))
    print(f'written to {folder}')
