"""
A script's settings: the bare lines `name = literal  # comment` above its main guard, below which
override(globals()) applies the command line to them, from left to right:

$ python sft.py config/demo_sft.py --lr=3e-4 --overwrite   # a recipe, a value, and a switch (short for =True)
$ python sft.py --help                                     # every setting with its default and its comment

A recipe is a Python file that assigns settings; names of its own begin with an underscore. A setting's
comment is checked: `# 'auto' | 'ddp' | 'fsdp'` at its start lists what a string may be, and brackets bound
a number: (at least 1), (above 0), (0 to 1), (at least 0, below 1).
"""
import ast
import difflib
import errno
import operator
import os
import re
import sys
import textwrap
import time
import traceback
import types
from pathlib import Path

from tqdm import tqdm

TYPES = {int: 'an int', float: 'a finite float', bool: 'a bool (write True or False)', str: 'a string',
         tuple: 'a tuple (1,2 or [1])', list: 'a list (1,2 or [1])'}
BOUNDS = {'at least': operator.ge, 'above': operator.gt, 'at most': operator.le, 'below': operator.lt}
RANK = int(os.environ.get('RANK', 0))  # set by torchrun
SEVERAL = int(os.environ.get('WORLD_SIZE', 1)) > 1

class UserError(ValueError):
    """What the person at the keyboard can mend: a script ends with this one line, without a traceback."""

def override(settings, argv=None):
    """Applies argv (sys.argv[1:]) to a script's globals(), prints its settings and returns {name: value}.

    argv: recipes and flags; [] prints nothing. UserError for what cannot be applied, with nothing changed.
    From here on the script ends as one_line says."""
    sys.excepthook = one_line
    quiet, argv = argv == [] or RANK > 0, sys.argv[1:] if argv is None else list(argv)
    comments, block = read_source(settings)
    if '--help' in argv or '-h' in argv:
        print(f'{settings.get("__doc__") or ""}\nsettings (change one by --name=value):\n{block}')
        sys.exit()
    values, origins = {name: settings[name] for name in comments}, {}
    for arg in argv:
        is_recipe = arg.endswith('.py') and not arg.startswith('-')
        for name, value, origin in run_recipe(arg, values) if is_recipe else [parse_flag(arg, values)]:
            if name not in values:
                near = difflib.get_close_matches(name.lower(), values, 3, 0.5)
                hint = f'nearest: {", ".join(near)}' if near else '--help lists them'
                raise UserError(f'unknown setting {name} ({origin}); {hint}')
            try:
                values[name], origins[name] = cast(value, settings[name]), origin
                check(values[name], comments[name])
            except ValueError as error:
                raise UserError(f'{name} must be {error}, not {value!r:.80} ({origin})') from None
    settings.update(values)
    if not quiet:
        pairs = ', '.join(f'{"*" * (name in origins)}{name}={value!r}' for name, value in values.items())
        text = f'settings (* given): {pairs}'
        print(textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False))
    return values

def read_source(settings):
    """({setting: the comment beside it}, the lines from the first setting to the last). A setting is a plain
    value, assigned alone, neither _private nor CONSTANT. A notebook has no source."""
    names = [name for name, value in settings.items()
             if type(value) in TYPES and not name.startswith('_') and not name.isupper()]
    if '__file__' not in settings:
        return dict.fromkeys(names, ''), ''
    source = Path(settings['__file__']).read_bytes()
    lines, comments, first, last = source.splitlines(), {}, 0, 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and ast.unparse(node.targets[0]) in names:
            rest = lines[node.end_lineno - 1][node.end_col_offset:].decode()
            comments[node.targets[0].id] = rest.lstrip('# ')
            first, last = first or node.lineno - 1, node.end_lineno  # with the comment above
    return comments, b'\n'.join(lines[first - 1:last]).decode()

def parse_flag(arg, values):
    """'--name=value' -> (name, value, '--name=value')."""
    if not arg.startswith('--'):
        is_flag = arg.startswith('-') or '=' in arg
        hint = f'write --{arg.lstrip("-")}' if is_flag else 'flags are --name=value, recipes end in .py'
        raise UserError(f'cannot read {arg!r}; {hint}')
    name, equals, text = arg[2:].partition('=')
    default = values.get(name, False)  # override refuses an unknown name
    if not equals:
        if not isinstance(default, bool):
            raise UserError(f'{arg} needs a value; write {arg}=...')
        return name, True, arg
    if isinstance(default, str):
        return name, text, arg
    try:
        return name, ast.literal_eval(text.title() if text in ('true', 'false') else text), arg
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, text, arg  # cast refuses it, saying what it wants instead

def run_recipe(path, values):
    """Runs a recipe in a namespace of its own -> [(name, value, 'path:line')]; UserError if it fails."""
    if re.search(r'\bconfig/(run|__init__)\.py$', os.path.realpath(path)):
        raise UserError(f'{path} is no recipe, but a part of the program')
    space = {'__file__': path, '__name__': '__recipe__'}
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        exec(compile(tree, path, 'exec'), space)
    except Exception as error:  # whatever a recipe can do wrong
        raise UserError(failure(path, error)) from None
    stores = sorted((node.lineno, node.id) for node in ast.walk(tree)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    lines = {name: line for line, name in stores}
    # What a recipe imports or defines is no setting, unless it takes a setting's name.
    return [(name, value, f'{path}:{lines.get(name, 1)}') for name, value in space.items()
            if not name.startswith('_')
            and (name in values or not callable(value) and not isinstance(value, types.ModuleType))]

def failure(path, error):
    """'path:line: reason' of what went wrong in a file that was executed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    place = f'{path}:{lines[-1]}' if lines else path
    return f'{place}: {type(error).__name__}: {error}'

def cast(value, default):
    """value in the type of default; ValueError names that type where something would be lost or guessed."""
    wanted, is_number = type(default), isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int and is_number and value == value // 1:  # 1e6 is fine; inf // 1 is nan, never equal
        return int(value)
    if wanted is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted in (tuple, list) and isinstance(value, (tuple, list)):
        try:
            return wanted(cast(element, default[0] if default else element) for element in value)
        except ValueError as error:
            raise ValueError(f'{TYPES[wanted]}, each element {error}') from None
    raise ValueError(TYPES.get(wanted, 'a plain value'))

def check(value, comment):
    """ValueError, saying what the comment beside a setting allows, where it does not allow the value."""
    listed = re.match(r"'[^']*'(?: \| '[^']*')+(?!.* \| )", comment)  # a list that goes on in words is open
    if listed and repr(value) not in (allowed := listed[0].split(' | ')):
        raise ValueError(f'{", ".join(allowed[:-1])} or {allowed[-1]}')
    for text in re.findall(r'\((.*?)\)', comment) if type(value) in (int, float) else []:
        spelled_out = re.sub(r'^(-?[\d.]+) to (-?[\d.]+)$', r'at least \1, at most \2', text)
        for words, bound in re.findall(r'(at least|above|at most|below) (-?\d[\d.e-]*)', spelled_out):
            if not BOUNDS[words](value, float(bound)):
                raise ValueError(text)

def one_line(kind, error, trace):
    """sys.excepthook of the scripts: a UserError is one line and exit code 2, a bug a traceback."""
    if RANK > 0:
        time.sleep(3)  # mostly all fail for one reason: the first says it, and torchrun ends the others
    if issubclass(kind, BrokenPipeError):  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    said, code = f'error (process {RANK}): {error}' if RANK else f'error: {error}', 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        file = error.filename or 'a file'
        said = f'error: {file} could not be written: {error.strerror}; what was written before is whole'
    elif kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in said:  # torch's, not imported here
        said = f'error: out of memory: lower micro_tokens or max_rows, or set grad_checkpointing ({error})'
    elif issubclass(kind, KeyboardInterrupt):
        said, code = 'stopped by Ctrl-C: what was written so far is kept', 130
    elif not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, trace)
        return os._exit(1) if SEVERAL else None  # at once: the other processes wait
    tqdm.write(' '.join(said.split()), file=sys.stderr)  # write: beside a bar that is still drawn
    sys.stderr.flush()
    os._exit(code) if SEVERAL else sys.exit(code)
