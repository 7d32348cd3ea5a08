"""
A run's settings in, its metrics out.

A script's settings are the bare `name = literal  # comment` lines above its main guard. Under the guard, override(globals())
applies the command line to them, from left to right, so that what comes later wins:

$ python sft.py config/demo_sft.py --lr=3e-4 --overwrite    # a recipe, a value, and a switch (short for =True)
$ python sft.py --help                                      # every setting with its default and its comment

A recipe is a Python file that assigns settings; names of its own begin with an underscore. The folder of a run holds
config.json (start_run) and log.jsonl (Log).
"""
import ast
import difflib
import io
import json
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
import tokenize
import traceback
import types

from tqdm import tqdm

TYPES = {int: 'an int', float: 'a float', bool: 'a bool (write True or False)', str: 'a string', tuple: 'a tuple', list: 'a list'}


class UserError(ValueError):
    """Something that the person at the keyboard can mend: a script ends with its one line, without a traceback."""


# -----------------------------------------------------------------------------
# settings in

def override(settings, argv=None):
    """Applies argv (sys.argv[1:]) to a script's settings in place, prints them and returns {name: value}.

    settings: the script's globals(). argv: recipes and flags, in order; an empty list prints nothing. UserError, before
    anything is changed, for what cannot be applied; from here on the script ends such errors with one line and exit code 2."""
    sys.excepthook = one_line
    quiet, argv = argv == [], sys.argv[1:] if argv is None else argv
    lines = setting_lines(settings)
    defaults = {name: settings[name] for name in lines}
    if '--help' in argv or '-h' in argv:
        print_help(settings, defaults, lines)
        raise SystemExit(0)
    values, origins = dict(defaults), {}
    for i, arg in enumerate(argv):
        if arg.endswith('.py') and not arg.startswith('-'):
            given = run_recipe(arg, defaults)
        else:
            given = parse_flag(arg, argv[i - 1] if i else '', argv[i + 1] if i + 1 < len(argv) else '', defaults)
        for name, (value, origin) in given.items():
            default = known(name, defaults, origin)
            try:
                values[name], origins[name] = cast(value, default), origin
            except ValueError as error:
                raise UserError(f'{name} must be {error}, not {value!r:.80} ({origin})') from None
    settings.update(values)
    if not quiet:
        for title, names in (('settings', origins), ('defaults', [n for n in values if n not in origins])):
            items = [f'{n}={values[n]!r}' + (f' ({origins[n]})' if n in origins and '--' not in origins[n] else '') for n in names]
            if items:
                print(textwrap.fill(f'{title}: ' + ', '.join(items), 120, subsequent_indent=' ' * 10, break_long_words=False,
                                    break_on_hyphens=False))
    return values


def setting_lines(settings):
    """{name: last line of its assignment} of the settings in globals(): plain values, assigned alone above the main guard,
    neither _private nor CONSTANT. Without a file, as in a notebook, every such name of the dictionary, on line 0."""
    lines = dict.fromkeys(settings, 0)
    if '__file__' in settings:
        lines = {}
        with open(settings['__file__'], 'rb') as f:
            body = ast.parse(f.read()).body
        for node in body:
            if isinstance(node, ast.If) and '__name__' in ast.unparse(node.test):
                break
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                lines[node.targets[0].id] = node.end_lineno
    return {name: line for name, line in lines.items()
            if type(settings.get(name)) in TYPES and not name.startswith('_') and not name.isupper()}


def known(name, defaults, origin):
    """The default of a setting; UserError with the nearest names if there is no such setting."""
    if name in defaults:
        return defaults[name]
    near = difflib.get_close_matches(name.lower().replace('-', '_'), defaults, 3, 0.5)
    helper = '' if origin.startswith('-') else "; a recipe's own names begin with _"
    raise UserError(f'unknown setting {name} ({origin}); ' + (f'nearest: {", ".join(near)}' if near else '--help lists them') + helper)


def parse_flag(arg, before, after, defaults):
    """'--name=value' -> {name: (value, origin)}, the value a literal of Python where the setting is no string."""
    if not arg.startswith('--'):
        if before.startswith('--') and '=' not in before and not arg.startswith('-'):
            raise UserError(f'{arg!r} stands alone: write {before}={arg}')
        hint = f': write --{arg.lstrip("-")}' if '=' in arg or arg.startswith('-') else ' (flags are --name=value, recipes end in .py)'
        raise UserError(f'cannot read {arg!r}{hint}')
    name, equals, text = arg[2:].partition('=')
    default = known(name, defaults, arg)
    if not equals:
        if isinstance(default, bool):
            return {name: (True, arg)}
        raise UserError(f'{arg} needs a value: write {arg}=' + ('...' if not after or after.startswith('--') else after))
    if isinstance(default, str):
        return {name: (text, arg)}
    if isinstance(default, bool):
        return {name: ({'true': True, 'True': True, 'false': False, 'False': False}.get(text, text), arg)}
    try:
        return {name: (ast.literal_eval(text), arg)}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {name: (text, arg)}  # no literal: a string, which cast refuses with the type that it wants


def run_recipe(path, defaults):
    """Runs a recipe in a namespace of its own -> {name: (value, 'path:line')}; UserError with the line if it fails."""
    space = {'__file__': path, '__name__': '__recipe__'}
    try:
        with open(path, 'rb') as f:
            source = f.read()
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), space)
    except Exception as error:  # whatever a recipe can do wrong
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == path else lines[-1] if lines else 1
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f'{path}:{line}: {type(error).__name__}: {reason}') from None
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines[node.id] = max(node.lineno, lines.get(node.id, 0))
    # imports and functions are helpers too, unless they take a setting's name
    return {name: (value, f'{path}:{lines[name]}' if name in lines else path) for name, value in space.items()
            if not name.startswith('_') and (name in defaults or not (callable(value) or isinstance(value, types.ModuleType)))}


def cast(value, default):
    """value in the type of default; ValueError, saying which type that is, unless nothing is lost or guessed by it."""
    wanted, number = type(default), isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int and number and value == value // 1:  # 1e6 is fine; inf // 1 is nan, and equal to nothing
        return int(value)
    if wanted is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted in (tuple, list) and isinstance(value, (tuple, list)):
        try:
            return wanted(cast(element, default[0] if default else element) for element in value)
        except ValueError as error:
            raise ValueError(f'{TYPES[wanted]} whose every element is {error}') from None
    if wanted is float and number:
        raise ValueError('a finite float')
    if wanted in (tuple, list):
        raise ValueError(f'{TYPES[wanted]} (write 1,2 or [1])')
    raise ValueError(TYPES.get(wanted, 'a plain value'))


def print_help(settings, defaults, lines):
    """The script's docstring, then --name=default and the comment beside it, under the comment line of its group."""
    print((settings.get('__doc__') or '').strip() + '\n\nsettings and their defaults:')
    comments, own_line = {}, set()
    if '__file__' in settings:
        with open(settings['__file__'], 'rb') as f:
            for token in tokenize.tokenize(io.BytesIO(f.read()).readline):
                if token.type == tokenize.COMMENT:
                    comments[token.start[0]] = token.string.lstrip('# ')
                    if token.line.lstrip().startswith('#'):
                        own_line.add(token.start[0])
    width = min(32, max(len(f'{name}={value!r}') for name, value in defaults.items()) if defaults else 0)
    for name, line in lines.items():
        header = comments.get(line - 1, '') if line - 1 in own_line else ''
        if header.strip('- '):
            print(f'{header}:')
        print(f'  --{f"{name}={defaults[name]!r}":{width}}  {comments.get(line, "")}'.rstrip())


def one_line(kind, error, trace):
    """sys.excepthook of the scripts: UserError and Ctrl-C end in one line, with exit codes 2 and 130; a bug in a traceback."""
    if issubclass(kind, UserError):
        tqdm.write('error: ' + ' '.join(str(error).split()), file=sys.stderr)  # write: past a bar that is still drawn
        raise SystemExit(2)
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write('stopped by Ctrl-C: what was written so far is kept', file=sys.stderr)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


# -----------------------------------------------------------------------------
# a run's folder

def start_run(settings, resume=False, overwrite=False):
    """Creates settings['out_dir'] and writes config.json there: the settings, and as "_commands" the command lines that ran.

    resume goes on with the run of that folder, and wins over overwrite, which removes it; UserError where the folder holds
    anything else, a run that neither applies to, or what the new run starts from. A resumed run keeps its first init_from."""
    out_dir = settings['out_dir']
    try:
        found = sorted(os.listdir(out_dir)) if os.path.exists(out_dir) else []
        before = read_run(out_dir)
        if resume and not before:
            raise UserError(f'{out_dir}: there is no run to resume')
        if found and not before:
            raise UserError(f'{out_dir} is not empty and holds no run; choose another --out_dir')
        if found and not (resume or overwrite):
            raise UserError(f'{out_dir} holds another run: --init_from=resume goes on with it, --overwrite replaces it')
        if found and not resume:
            remove_run(out_dir, found, settings)
        os.makedirs(out_dir, exist_ok=True)
        config = json.loads(json.dumps(settings)) | {'_commands': [shlex.join(sys.argv)]}  # as it will be read: tuples are lists
        if resume:
            harmless = ('init_from', 'out_dir', 'overwrite', 'device', '_commands')
            changed = [f'{key} {before.get(key)!r} -> {config[key]!r}' for key in config
                       if key not in harmless and (key not in before or before[key] != config[key])]
            if changed:
                print(f'resumed with other settings than before: {", ".join(changed)}')
            config['_commands'] = before['_commands'] + config['_commands']
            if 'init_from' in before:  # 'resume' says nothing about where the run came from
                config['init_from'] = before['init_from']
        tmp = os.path.join(out_dir, 'config.json.tmp')
        with open(tmp, 'w', encoding='utf-8') as f:
            json.dump(config, f, indent=2)
        os.replace(tmp, os.path.join(out_dir, 'config.json'))
    except OSError as error:
        raise UserError(f'out_dir = {out_dir!r}: {error.strerror}') from None


def read_run(out_dir):
    """The config.json that start_run wrote; {} where there is none, or one of something else (a checkpoint has one too)."""
    try:
        with open(os.path.join(out_dir, 'config.json'), encoding='utf-8') as f:
            config = json.load(f)
    except (FileNotFoundError, ValueError):
        return {}
    return config if isinstance(config, dict) and '_commands' in config else {}


def remove_run(out_dir, found, settings):
    """Empties a run's folder; UserError if anything that is still needed lies in it."""
    inside = lambda path: os.path.commonpath([os.path.realpath(path), os.path.realpath(out_dir)]) == os.path.realpath(out_dir)
    needed = [os.getcwd()] + [v for k, v in settings.items() if k != 'out_dir' and isinstance(v, str) and os.path.exists(v)]
    needed += [os.path.join(out_dir, name) for name in found if read_run(os.path.join(out_dir, name))]
    for path in filter(inside, needed):
        raise UserError(f'--overwrite would remove {path}, which lies in {out_dir}; choose another --out_dir')
    for name in sorted(found, key='config.json'.__eq__):  # config.json last: a removal that was stopped can be repeated
        path = os.path.join(out_dir, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)


# -----------------------------------------------------------------------------
# metrics out

class Log:
    """log = Log(out_dir); log(step, loss=1.2) appends one JSON object to out_dir/log.jsonl and prints one line.

    "time" is in seconds since the run began, the time between a stop and its resumption left out. resume goes on with the
    file there is, without a last line that a crash tore; steps that a resumed run repeats stand there twice."""

    def __init__(self, out_dir, resume=False):
        self.path, elapsed = os.path.join(out_dir, 'log.jsonl'), 0.0
        with open(self.path, 'ab+' if resume else 'wb') as f:
            if resume:
                f.seek(0)
                lines = f.read().splitlines(keepends=True)
                if lines and not lines[-1].endswith(b'\n'):
                    f.truncate(f.tell() - len(lines.pop()))
                elapsed = json.loads(lines[-1])['time'] if lines else 0.0
        self.start = time.time() - elapsed

    def __call__(self, step, **metrics):
        metrics = {name: plain(value) for name, value in ({'step': step} | metrics).items()}
        row = {'step': metrics['step'], 'time': round(time.time() - self.start, 3)} | metrics
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}  # JSON has no nan
        with open(self.path, 'a', encoding='utf-8') as f:  # closed again: nothing waits in a buffer for a crash
            f.write(json.dumps(row, allow_nan=False) + '\n')
        tqdm.write(' | '.join(f'{name} {shown(value)}' for name, value in metrics.items()))
        sys.stdout.flush()


def plain(value):
    """A scalar of numpy or torch as Python's own; anything else as it is."""
    return value.item() if hasattr(value, 'item') else value


def shown(value):
    """A metric for the console: floats to 4 significant digits, thousands without an exponent."""
    if not isinstance(value, float):
        return str(value)
    return f'{value:.0f}' if 1000 <= abs(value) < 1e7 else f'{value:.4g}'


def bar(iterable=None, desc=None, total=None):
    """A tqdm bar on stderr, gone when it is done; silent where stderr is no terminal."""
    return tqdm(iterable, desc=desc, total=total, disable=None, leave=False, dynamic_ncols=True)
