"""
A run's settings in, its metrics out.

A script's settings are the bare `name = literal  # comment` lines above its main guard. Under the guard, override(globals())
applies the command line to them, from left to right, so that what comes later wins:

$ python sft.py config/demo_sft.py --lr=3e-4 --overwrite    # a recipe, a value, and a switch (short for =True)
$ python sft.py --help                                      # every setting with its default and its comment

A recipe is a Python file that assigns settings; names of its own begin with an underscore. A run's folder holds its
settings in config.json (start_run) and its metrics in log.jsonl (Log). Of the processes that torchrun starts, the one with RANK 0
prints and writes.
"""
import ast
import difflib
import errno
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import tokenize
import traceback
import types

from tqdm import tqdm

TYPES = {int: 'an int', float: 'a finite float', bool: 'a bool (write True or False)', str: 'a string',
         tuple: 'a tuple (write 1,2 or [1])', list: 'a list (write 1,2 or [1])'}
RANK, SEVERAL = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1)) > 1  # set by torchrun


class UserError(ValueError):
    """Something that the person at the keyboard can mend: a script ends with its one line, without a traceback."""


# -----------------------------------------------------------------------------
# settings in

def override(settings, argv=None):
    """Applies argv (sys.argv[1:]) to a script's settings in place, prints them and returns {name: value}.

    settings: the script's globals(). argv: recipes and flags, in order; with [] nothing is printed. UserError for what cannot
    be applied, before anything is changed. From here on the script ends with one line where such an error is not caught."""
    sys.excepthook = one_line
    quiet, argv = argv == [] or RANK > 0, sys.argv[1:] if argv is None else list(argv)
    source = b''
    if '__file__' in settings:
        with open(settings['__file__'], 'rb') as f:
            source = f.read()
    lines = setting_lines(settings, source)
    values, origins = {name: settings[name] for name in lines}, {}
    if '--help' in argv or '-h' in argv:
        print_help(settings, lines, source)
        raise SystemExit(0)
    for before, arg, after in zip([''] + argv[:-1], argv, argv[1:] + ['']):
        is_recipe = arg.endswith('.py') and not arg.startswith('-')
        for name, value, origin in run_recipe(arg, values) if is_recipe else parse_flag(before, arg, after, values):
            check_known(name, values, origin)
            try:
                values[name], origins[name] = cast(value, settings[name]), origin
            except ValueError as error:
                raise UserError(f'{name} must be {error}, not {value!r:.80} ({origin})') from None
    settings.update(values)
    if not quiet:
        given = [f'*{name}={values[name]!r}' for name in origins]
        items = ', '.join(given + [f'{name}={value!r}' for name, value in values.items() if name not in origins])
        print(textwrap.fill(f'settings (* given): {items}', 120, break_long_words=False, break_on_hyphens=False))
    return values


def setting_lines(settings, source):
    """{name: last line of its assignment} for the settings of a script: plain values, assigned alone above the main guard,
    neither _private nor CONSTANT. Without a source, as in a notebook, every such name there is, on line 0."""
    lines = {} if source else dict.fromkeys(settings, 0)
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and '__name__' in ast.unparse(node.test):
            break
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            lines[node.targets[0].id] = node.end_lineno
    return {name: line for name, line in lines.items()
            if type(settings.get(name)) in TYPES and not name.startswith('_') and not name.isupper()}


def check_known(name, values, origin):
    """UserError, with the nearest names, if there is no such setting."""
    if name not in values:
        near = difflib.get_close_matches(name.lower(), values, 3, 0.5)
        hint = f'nearest: {", ".join(near)}' if near else '--help lists them'
        raise UserError(f'unknown setting {name} ({origin}); {hint}')


def parse_flag(before, arg, after, values):
    """'--name=value' -> [(name, value, '--name=value')], the value read as Python's literal where the setting is no string.
    before and after, the arguments beside it, tell what was meant by '--name value'."""
    if not arg.startswith('--'):
        if before.startswith('--') and '=' not in before:
            raise UserError(f'{arg!r} stands alone; write {before}={arg}')
        hint = f'write --{arg.lstrip("-")}' if '=' in arg or arg.startswith('-') else 'flags are --name=value, recipes end in .py'
        raise UserError(f'cannot read {arg!r}; {hint}')
    name, equals, text = arg[2:].partition('=')
    check_known(name, values, arg)
    if not equals and not isinstance(values[name], bool):
        raise UserError(f'{arg} needs a value; write {arg}=' + ('...' if not after or after.startswith('--') else after))
    value = text if equals else True
    if equals and isinstance(values[name], bool):
        value = {'True': True, 'true': True, 'False': False, 'false': False}.get(text, text)
    elif not isinstance(values[name], (bool, str)):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text  # which cast refuses, saying what it wants instead
    return [(name, value, arg)]


def run_recipe(path, values):
    """Runs a recipe in a namespace of its own -> [(name, value, 'path:line')]; UserError with the line if it fails."""
    space = {'__file__': path, '__name__': '__recipe__'}
    try:
        with open(path, 'rb') as f:
            source = f.read()
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), space)
    except Exception as error:  # whatever a recipe can do wrong
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines, error = [error.lineno], f'SyntaxError: {error.msg}'
        elif isinstance(error, OSError) and not lines:
            raise UserError(f'{path}: {error.strerror}') from None
        else:
            error = f'{type(error).__name__}: {error}'
        raise UserError(f'{path}:{lines[-1] if lines else 1}: {error}') from None
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    lines = {node.id: node.lineno for node in sorted(stored, key=lambda node: node.lineno)}
    # What a recipe imports or defines is no setting, unless it takes a setting's name.
    return [(name, value, f'{path}:{lines.get(name, 1)}') for name, value in space.items() if not name.startswith('_')
            and (name in values or not callable(value) and not isinstance(value, types.ModuleType))]


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
            raise ValueError(f'{TYPES[wanted]}, each element {error}') from None
    raise ValueError(TYPES.get(wanted, 'a plain value'))


def print_help(settings, lines, source):
    """The script's docstring, then --name=default and the comment beside it, under the comment line of its group."""
    comments, headers = {}, {}  # line -> text
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT:
            where = headers if token.line.lstrip().startswith('#') else comments
            where[token.start[0]] = token.string.lstrip('# ')
    print((settings.get('__doc__') or '').strip() + '\n\nsettings and their defaults:')
    shown = {name: f'--{name}={settings[name]!r}' for name in lines}
    width = min(32, max(map(len, shown.values()), default=0))
    for name, line in lines.items():
        if headers.get(line - 1, '').strip('- '):  # not a ruler
            print(f'{headers[line - 1]}:')
        print(f'  {shown[name]:{width}}  {comments.get(line, "")}'.rstrip())


def one_line(kind, error, trace):
    """sys.excepthook of the scripts: UserError, a full disk, too little memory and Ctrl-C end in one line, with exit codes 2 and 130; a
    bug in a traceback.

    Processes mostly fail for one reason: the first one says it, and torchrun ends the others while they wait. What goes wrong in
    one of them alone is said by that one."""
    if RANK > 0:
        time.sleep(3)
    if issubclass(kind, BrokenPipeError):  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        kind, error = UserError, f'{error.filename or "a file"} could not be written: {error.strerror}; what was written before is whole'
    if kind.__name__ == 'OutOfMemoryError' or "can't allocate memory" in str(error):  # torch's, which is not imported here
        kind, error = UserError, f'out of memory: lower micro_tokens or max_rows, or set grad_checkpointing ({error})'
    if issubclass(kind, UserError):
        who = f'error (process {RANK}): ' if RANK else 'error: '
        tqdm.write(who + ' '.join(str(error).split()), file=sys.stderr)  # write: beside a bar that is still drawn
        sys.stderr.flush()
        os._exit(2) if SEVERAL else sys.exit(2)
    if issubclass(kind, KeyboardInterrupt):
        tqdm.write('stopped by Ctrl-C: what was written so far is kept', file=sys.stderr)
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)
    if SEVERAL:
        os._exit(1)  # see model.setup


# -----------------------------------------------------------------------------
# stopping

stop_asked_at = None  # when the first signal came


def listen_for_stop():
    """From now on SIGINT (Ctrl-C) and SIGTERM ask for a stop after the step at hand: see model.asked_to_stop. A second Ctrl-C, a second
    or more later, stops at once. torchrun passes a signal on to its processes, and kills them after --shutdown-timeout seconds."""
    def ask(number, frame):
        global stop_asked_at
        if stop_asked_at is None:
            stop_asked_at = time.time()
            if RANK == 0:
                tqdm.write(f'{signal.Signals(number).name}: stops when this step is done (Ctrl-C again: at once)', file=sys.stderr)
        elif number == signal.SIGINT and time.time() - stop_asked_at > 1:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)


def stop_asked():
    """Whether a signal has asked this process to stop; model.asked_to_stop asks for all of them."""
    return stop_asked_at is not None


def leave(what='', resume='--init_from=resume'):
    """Ends the script with exit code 0 and a line on how to go on. what: where it stands; resume: the flag that does it, if any."""
    command = shlex.join(sys.argv + ([resume] if resume and resume not in sys.argv else []))
    launcher = f'torchrun --nproc_per_node={os.environ.get("LOCAL_WORLD_SIZE")} [and its other flags]' if SEVERAL else 'python'
    if RANK == 0:
        tqdm.write(f'stopped{what}; to go on: {launcher} {command}', file=sys.stderr)
    raise SystemExit(0)


# -----------------------------------------------------------------------------
# a run's folder

def resuming(init_from, out_dir, export='last'):
    """Whether to go on with the run in out_dir: asked for by init_from = 'resume', or since this torchrun job has begun it and was started
    again after a failure (--max-restarts). UserError where there is no run to go on with, or one that has written `export`, its last
    checkpoint, and kept no state."""
    if init_from == 'resume' and not read_run(out_dir):
        raise UserError(f'{out_dir}: there is no run to resume')
    resumes = init_from == 'resume' or job() != '' and read_run(out_dir).get('_job') == job()
    states = os.path.join(out_dir, 'state')
    if resumes and os.path.exists(os.path.join(out_dir, export)) and not (os.path.isdir(states) and os.listdir(states)):
        raise UserError(f'{out_dir}: this run has finished and kept no state to go on from (keep_states = 0)')
    return resumes


def job():
    """A random name that a process shares with those that torchrun started before it for the same job: see
    model.join_job. '' without torchrun. A count of restarts would not do: an agent counts only its own failures."""
    return os.environ.get('RUN_JOB', '')


def start_run(settings, resume=False, overwrite=False):
    """Creates settings['out_dir'] and writes config.json there: the settings, as "_commands" the command lines that ran, and "_job".

    resume goes on with the run of that folder (it keeps its first init_from), and wins over overwrite, which removes it.
    UserError where the folder holds anything else, or a run without either being asked for."""
    if SEVERAL and settings.get('shard') == 'none':
        raise UserError("shard = 'none' is for one process: several would each learn on their own; 'auto', 'ddp' or "
                        "'fsdp'")
    if RANK > 0:
        return
    out_dir = settings['out_dir']
    config = json.loads(json.dumps(settings)) | {'_commands': [shlex.join(sys.argv)], '_job': job()}  # as it will be read: tuples are lists
    try:
        found = os.listdir(out_dir) if os.path.exists(out_dir) else []
        found = [name for name in found if name != 'config.json.tmp']  # which a kill may leave
        before = read_run(out_dir)
        if resume and not before:
            raise UserError(f'{out_dir}: there is no run to resume')
        if found and not before:
            raise UserError(f'{out_dir} is not empty and holds no run; choose another --out_dir')
        if found and not (resume or overwrite):
            raise UserError(f'{out_dir} holds another run; --init_from=resume goes on with it, --overwrite replaces it')
        if resume:
            harmless = ('init_from', 'out_dir', 'overwrite', 'device', 'shard', '_commands', '_job')
            changed = [f'{key} {before.get(key)!r} -> {value!r}' for key, value in config.items()
                       if key not in harmless and (key not in before or before[key] != value)]
            if changed:
                print(f'resumed with other settings than before: {", ".join(changed)}')
            config |= {'_commands': before['_commands'] + config['_commands']}
            config |= {'init_from': before['init_from']} if 'init_from' in before else {}  # where it came from; not 'resume'
        elif found:
            remove_run(out_dir, found, settings)
        os.makedirs(out_dir, exist_ok=True)
        file = os.path.join(out_dir, 'config.json')
        with open(file + '.tmp', 'w', encoding='utf-8') as f:
            json.dump(config, f, indent=2)
        os.replace(file + '.tmp', file)
    except OSError as error:
        raise UserError(f'out_dir = {out_dir!r}: {error.strerror}') from None


def read_run(out_dir):
    """The config.json that start_run wrote; {} where there is none, or that of something else (a checkpoint has one too)."""
    try:
        with open(os.path.join(out_dir, 'config.json'), encoding='utf-8') as f:
            config = json.load(f)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return config if isinstance(config, dict) and '_commands' in config else {}


def read_rows(path):
    """The rows of a .jsonl file that a run writes as they come; [] if there is none. A last line that a crash tore is cut off
    the file, so that what is appended next stands on a line of its own."""
    return list(iterate_rows(path))


def iterate_rows(path):
    """read_rows, with one row at a time in memory."""
    if not os.path.exists(path):
        return
    with open(path, 'rb+') as f:
        whole = 0  # bytes
        for line in f:
            if not line.endswith(b'\n'):
                f.truncate(whole)
                return
            whole += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f'{path}: a line is not JSON ({error}); start with --overwrite') from None
            yield row


def write_rows(path, rows):
    """Replaces a .jsonl file in one go: at every moment the old one or the new one is there."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)
    os.replace(path + '.tmp', path)


def remove_run(out_dir, found, settings):
    """Empties a run's folder; UserError if it holds another run, what a setting names, or the current folder."""
    root = os.path.realpath(out_dir)
    needed = [os.getcwd()] + [value for key, value in settings.items() if key != 'out_dir' and isinstance(value, str) and value]
    needed += [os.path.join(out_dir, name) for name in found if read_run(os.path.join(out_dir, name))]
    for path in needed:
        if os.path.exists(path) and os.path.commonpath([root, os.path.realpath(path)]) == root:
            raise UserError(f'--overwrite would remove {path}, which lies in {out_dir}; choose another --out_dir')
    for name in sorted(found, key=lambda name: name == 'config.json'):  # it goes last: a removal that stopped can be repeated
        path = os.path.join(out_dir, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)


# -----------------------------------------------------------------------------
# metrics out

class Log:
    """log = Log(out_dir); log(step, loss=1.2) appends one JSON object to out_dir/log.jsonl and prints one line.

    "time" is in seconds since the run began, without the pauses between a stop and a resumption. resume goes on with the file
    there is, less a last line that a crash tore; updates that are done again after it stand in it again, and the later count."""

    def __init__(self, out_dir, resume=False):
        if RANK > 0:
            return
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
        """step: an int; metrics: plain values, or scalars of numpy and torch. What is not finite is null in the file."""
        if RANK > 0:
            return
        row = {'step': step, 'time': round(time.time() - self.start, 3)} | metrics
        row = {name: value.item() if hasattr(value, 'item') else value for name, value in row.items()}
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        with open(self.path, 'a', encoding='utf-8') as f:  # closed again: nothing waits in a buffer for a crash
            f.write(json.dumps(finite, allow_nan=False) + '\n')
        tqdm.write(' | '.join(f'{name} {shown(row[name])}' for name in ['step', *metrics]))
        sys.stdout.flush()


def shown(value):
    """A metric for the console: floats to 4 significant digits, but thousands without an exponent."""
    if not isinstance(value, float):
        return str(value)
    return f'{value:.0f}' if 1000 <= abs(value) < 1e7 else f'{value:.4g}'


def bar(iterable=None, desc=None, total=None):
    """A tqdm bar on stderr, gone when it is done; silent where stderr is no terminal."""
    return tqdm(iterable, desc=desc, total=total, disable=True if RANK else None, leave=False)
