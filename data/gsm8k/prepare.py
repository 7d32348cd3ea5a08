"""
GSM8K (Cobbe et al. 2021, arXiv 2110.14168; MIT licence): 7,473 training and 1,319 test problems, grade school
arithmetic in words. The official files are used unchanged; every other task is brought into their form.

$ python data/gsm8k/prepare.py                 # downloads 5 MB from GitHub
$ python data/gsm8k/prepare.py --source=DIR    # uses DIR/train.jsonl and DIR/test.jsonl
"""
import hashlib
import os
import sys
import tempfile
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))

from config import UserError, override
from data import VALIDATION_ROWS, read_problems

# -----------------------------------------------------------------------------
source = ''               # a folder that already has both files; '': download them
out = ''                  # where train.jsonl and test.jsonl go; '': beside this script
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/'
SHA256 = {
    'train.jsonl': '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
    'test.jsonl': '3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14',
}


def fetch(name, source):
    """-> the official file's bytes, from source or GitHub. UserError if it can't be read or differs."""
    place = os.path.join(source, name) if source else URL + name
    try:
        with open(place, 'rb') if source else urllib.request.urlopen(place, timeout=60) as f:
            content = f.read()
    except OSError as e:  # urllib's errors are OSErrors too
        hint = '' if source else '; --source=DIR takes files that you have'
        raise UserError(f'cannot read {place}: {e}{hint}') from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(f'{place} is not the official file: its sha256 is {found}, not {SHA256[name]}')
    return content


if __name__ == '__main__':
    override(globals())
    folder = out or HERE
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as tmp:  # both files, complete and checked, or neither
        for name in SHA256:
            path = os.path.join(tmp, name)
            with open(path, 'wb') as f:
                f.write(fetch(name, source))
            print(f'{name}: {len(read_problems(path)):,} problems')
        for name in SHA256:
            os.replace(os.path.join(tmp, name), os.path.join(folder, name))
    print(f'written to {folder}; the last {VALIDATION_ROWS} rows of train.jsonl are the validation slice')
