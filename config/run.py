"""
A run's life: its processes and device, the signals that stop it, its folder, its log, its states.

Under torchrun every process runs the same script in lockstep, with the same questions, samples and rewards.
They share what is expensive: drawing samples and passing batches through models.
"""
import atexit
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from config import RANK, SEVERAL, UserError

START_PATIENCE = timedelta(minutes=5)  # importing torch from a cold network disk takes a minute or two
PATIENCE = timedelta(hours=4)          # others may draw samples; torchrun notices a process that died


# -----------------------------------------------------------------------------
# processes, device and stop signals

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def from_main(f):
    """Runs f on process 0 and broadcasts its result; its exception is raised everywhere."""
    if world_size() == 1:
        return f()
    box = [None, None]  # result, exception
    if rank() == 0:
        try:
            box[0] = f()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]

def wait_for_main():
    """Until process 0 is here, too, and what it has written can be read."""
    from_main(lambda: None)

def from_all(x):
    """[x of process 0, x of process 1, ...], on every process."""
    found = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, x)
    return found

def sum_over_processes(tensor):
    """In place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor

def same_everywhere(number):
    if len(set(from_all(number))) > 1:
        raise RuntimeError('the processes have different weights')

def join_job(device):
    """Connects the processes that torchrun has started. The environment's RUN_JOB then names the job: a word
    in torchrun's store, which outlives restarts and ends with the job."""
    hook, backend = sys.excepthook, 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        store, number, n = next(rendezvous('env://', timeout=START_PATIENCE))
        os.environ['RUN_JOB'] = store.compare_set('job', '', uuid.uuid4().hex).decode()
        if n == 1:
            return
        start = dist.PrefixStore(meet(store, number, n), store)
        store.set_timeout(PATIENCE)
        dist.init_process_group(backend, store=start, rank=number, world_size=n, timeout=START_PATIENCE)
    except RuntimeError as error:
        raise UserError(f'process {RANK} waited {START_PATIENCE} for the others, or cannot connect: '
                        f'{first_line(error)}') from None
    dist.group.WORLD.set_timeout(PATIENCE)
    sys.excepthook = hook  # init_process_group replaces it by one that swallows what ours writes
    # Taking down PyTorch's threads at the end sometimes aborts, which torchrun would call a failure.
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(hasattr(sys, 'last_type'))))
    if number > 0:
        sys.stdout = open(os.devnull, 'w')  # every process prints the same

def meet(store, number, n):
    """A random name that only the n processes of this start share; a UserError says who did not come.

    The store may hold words of an earlier start, and no variable tells two apart: an agent counts only its
    own failures. So each process writes a random word, beside those it has read of others, until all have
    written the same words: whoever has read mine is there now."""
    keys, words = [f'word {i} of {n}' for i in range(n)], [''] * n
    words[number], deadline = uuid.uuid4().hex, time.time() + START_PATIENCE.total_seconds()
    for key in keys:
        store.append(key, '')  # so that all can be read at once
    while True:
        store.set(keys[number], json.dumps(words))
        found = [json.loads(text) if text else [''] * n for text in store.multi_get(keys)]
        if all(theirs == words for theirs in found):
            return words[0]
        if time.time() > deadline:
            absent = ', '.join(str(i) for i in range(n) if found[i][number] != words[number])
            raise UserError(f'process {number} of {n} waited {START_PATIENCE} for processes {absent}')
        words = [theirs[i] for i, theirs in enumerate(found)]
        time.sleep(0.05)

def setup(device='auto', dtype='auto', seed=0):
    """(torch.device, dtype of the matrix products); seeds torch and, under torchrun, connects the processes.
    'auto': a GPU, else the CPU; bf16 where the GPU has it."""
    if device == 'auto':
        device = torch.accelerator.current_accelerator(check_available=True) or 'cpu'
    try:
        device = torch.device(device)
        if device.type == 'cuda':  # set_device wants a number
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']) if SEVERAL else device.index or 0)
            torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
        torch.empty(1, device=device)
    except Exception as error:
        raise UserError(f'device {str(device)!r} cannot be used: {first_line(error)}') from None
    if (SEVERAL or 'TORCHELASTIC_RUN_ID' in os.environ) and not dist.is_initialized():
        join_job(device)
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    elif dtype not in ('float32', 'bfloat16'):
        raise UserError(f"dtype is 'auto', 'float32' or 'bfloat16', not {dtype!r}")
    bf16 = any(torch.cpu.get_capabilities().get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16'))
    if (device.type, dtype, bf16) == ('cpu', 'bfloat16', False):
        print("warning: this CPU has no bf16 arithmetic: dtype = 'float32' can be 60 times as fast")
    torch.manual_seed(seed)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 for what stays fp32 beside bf16
    elif device.type == 'cpu':
        fast_cpu_matmul()
    return device, getattr(torch, dtype)

def fast_cpu_matmul():
    """Sends fp32 products to oneDNN, twice as fast on AMD cores. The switch permits bf16 inside, which a core
    with AMX would use: it stays on only where products are still true fp32."""
    if not torch.backends.mkldnn.is_available():
        return
    generator, matmul = torch.Generator().manual_seed(0), torch.backends.mkldnn.matmul
    a, b = torch.randn(2, 256, 256, generator=generator)
    before, matmul.fp32_precision = matmul.fp32_precision, 'bf16'
    error = (F.linear(a, b) - F.linear(a.double(), b.double())).abs().max()
    if error > 1e-3:  # true fp32 is off by 3e-5 here, bf16 by 0.2
        matmul.fp32_precision = before

@contextmanager
def enough_memory(doing, advice):
    """Running out of memory within it is a UserError: while doing what, and what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not re.search("can't allocate memory|out of memory", str(error)):  # a CPU's, CUDA's
            raise
        raise UserError(f'out of memory in {doing}: {advice} ({first_line(error)})') from None

stop_asked_at = None  # when the first signal came

def listen_for_stop():
    """SIGINT (Ctrl-C) and SIGTERM, which torchrun passes on, ask for a stop after the step at hand; Ctrl-C
    again, a second or more later, stops at once."""
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

def on_signal(number, frame):
    global stop_asked_at
    if stop_asked_at is None:
        stop_asked_at = time.time()
        if RANK == 0:
            name = signal.Signals(number).name
            tqdm.write(f'{name}: stops when this step is done (Ctrl-C again: at once)', file=sys.stderr)
    elif number == signal.SIGINT and time.time() - stop_asked_at > 1:
        raise KeyboardInterrupt

def stop_asked():
    return stop_asked_at is not None

def asked_to_stop():
    """Whether a signal has asked any process to stop; then all do, after the same step."""
    return sum_over_processes(torch.tensor(int(stop_asked()))).item() > 0

def leave(what='', resume='--init_from=resume'):
    """Ends the script with exit code 0 and a line: where it stands, and the command to go on."""
    command = shlex.join(sys.argv + [resume] * (resume != '' and resume not in sys.argv))
    n = os.environ.get('LOCAL_WORLD_SIZE')
    launcher = f'torchrun --nproc_per_node={n} [and its other flags]' if SEVERAL else 'python'
    if RANK == 0:
        tqdm.write(f'stopped{what}; to go on: {launcher} {command}', file=sys.stderr)
    raise SystemExit(0)


# -----------------------------------------------------------------------------
# a run's folder, files and log

def origin(init_from, out_dir, export='last'):
    """(whether to go on with the run in out_dir, the checkpoint that the run starts from).

    It goes on if init_from = 'resume', or this torchrun job has begun it. UserError where there is no run, or
    one that has finished (out_dir/export is there) and kept no state."""
    run, job = from_main(lambda: read_run(out_dir)), os.environ.get('RUN_JOB')
    if init_from == 'resume' and not run:
        raise UserError(f'{out_dir}: there is no run to resume')
    if init_from != 'resume' and (not job or run.get('_job') != job):
        return False, init_from
    if from_main(lambda: os.path.exists(f'{out_dir}/{export}') and not Checkpoints(out_dir).steps()):
        raise UserError(f'{out_dir}: this run has finished and kept no state to go on from (keep_states = 0)')
    return True, run['init_from']

def start_run(settings, resume=False):
    """Creates settings['out_dir'] with its config.json (settings, command lines, job), listens for a stop
    and returns the run's Log.

    resume continues the run there; else settings['overwrite'] removes it. UserError where the folder holds
    anything else, or a run and neither is asked for."""
    if SEVERAL and settings.get('shard') == 'none':
        raise UserError("shard = 'none' is for one process: several would each learn on their own")
    tracker = settings.get('tracker', 'none')
    if tracker != 'none' and not importlib.util.find_spec(tracker):
        raise UserError(f'tracker = {tracker!r} is not installed: pip install {tracker}')
    if RANK == 0:
        try:
            begin(settings['out_dir'], settings, resume)
        except OSError as error:
            raise UserError(f'out_dir = {settings["out_dir"]!r}: {error.strerror}') from None
    listen_for_stop()
    return Log(settings['out_dir'], resume, tracker)

def begin(out_dir, settings, resume):
    """start_run's folder and config.json, by process 0."""
    before, config = read_run(out_dir), json.loads(json.dumps(settings))  # as read again: tuples are lists
    found = set(os.listdir(out_dir) if os.path.exists(out_dir) else []) - {'config.json.tmp'}  # a kill's
    if found and not before:
        raise UserError(f'{out_dir} is not empty and holds no run; choose another --out_dir')
    if found and not (resume or settings.get('overwrite')):
        raise UserError(f'{out_dir} holds a run; --init_from=resume continues it, --overwrite replaces it')
    if resume:
        harmless = ('init_from', 'out_dir', 'overwrite', 'device', 'shard')
        changed = [f'{name} {before.get(name)!r} -> {value!r}' for name, value in config.items()
                   if name not in harmless and (name not in before or before[name] != value)]
        if changed:
            print(f'resumed with other settings than before: {", ".join(changed)}')
        config['init_from'] = before['init_from']
    elif found:
        remove_run(out_dir, found, settings)
    os.makedirs(out_dir, exist_ok=True)
    config['_commands'] = (before['_commands'] if resume else []) + [shlex.join(sys.argv)]
    config['_job'] = os.environ.get('RUN_JOB', '')
    config['_id'] = before.get('_id') if resume else uuid.uuid4().hex[:8]
    write_json(f'{out_dir}/config.json', config)

def remove_run(out_dir, found, settings):
    """Empties a run's folder; UserError if the current folder, a setting's file, or another run is in it."""
    root = os.path.realpath(out_dir)
    needed = [x for name, x in settings.items() if isinstance(x, str) and x and name != 'out_dir']
    inner = [f'{out_dir}/{name}' for name in found if read_run(f'{out_dir}/{name}')]
    for path in [os.getcwd(), *needed, *inner]:
        if os.path.exists(path) and os.path.commonpath([root, os.path.realpath(path)]) == root:
            raise UserError(f'--overwrite would remove {path}; choose another --out_dir')
    for name in sorted(found, key='config.json'.__eq__):  # it goes last: a stopped removal can be repeated
        path = f'{out_dir}/{name}'
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)

def read_run(out_dir):
    """The config.json that start_run wrote; {} where there is none, or a checkpoint's."""
    try:
        config = dict(read_json(f'{out_dir}/config.json'))
    except (ValueError, TypeError):  # ValueError: also read_json's
        return {}
    return config if '_commands' in config else {}

def read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: not readable as JSON ({error})') from None

def read_rows(path):
    """The rows of a .jsonl file; [] if there is none. A torn last line is cut off the file."""
    return list(iterate_rows(path))

def iterate_rows(path):
    """read_rows, with one row at a time in memory."""
    if not os.path.exists(path):
        return
    with open(path, 'rb') as f:
        n_bytes = 0
        for line in f:
            if not line.endswith(b'\n'):
                return os.truncate(path, n_bytes)
            n_bytes += len(line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f'{path}: a line is not JSON ({error}); start with --overwrite') from None
            yield row

def write_rows(path, rows, indent=None):
    """Atomic replace of a file of JSON values."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, indent=indent) + '\n' for row in rows)
    os.replace(path + '.tmp', path)

def write_json(path, value):
    write_rows(path, [value], indent=2)

def replace_folder(tmp, path):
    """Atomic replace of a folder by a finished one, synced to the disk first: after a kill a whole one is at
    path, or at path + '.old'."""
    for name in [*os.listdir(tmp), '']:
        sync(f'{tmp}/{name}')
    old = path.rstrip('/') + '.old'
    if os.path.exists(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(tmp, path)
    sync(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(old, ignore_errors=True)

def sync(path):
    """A file's content, or a folder's list of names, is on the disk when this returns."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)

def checksums(folder):
    """{file: its SHA-256, '' where it cannot be read}; processes share the reading."""
    mine = dict.fromkeys(from_main(lambda: sorted(os.listdir(folder)))[rank()::world_size()], '')
    for name in mine:
        with suppress(OSError), open(f'{folder}/{name}', 'rb') as f:
            mine[name] = hashlib.file_digest(f, 'sha256').hexdigest()
    return {name: found for part in from_all(mine) for name, found in part.items()}

def first_line(error):
    return f'{type(error).__name__}: ' + (str(error).strip().split('\n') or [''])[0]

def start_tracker(config):
    """track(metric, number, step), which after a resume writes to the same run again. config: read_run's."""
    if config['tracker'] == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(config['out_dir'], flush_secs=1).add_scalar
    name = f'{os.path.basename(config["out_dir"])}-{config["_id"]}'
    os.environ['WANDB_RUN_ID'] = name  # wandb finds a run by this, trackio by its name
    tracker = importlib.import_module(config['tracker'])
    run = tracker.init(project='nanoReason', name=name, config=config, resume='allow')
    return lambda metric, x, step: run.log({metric: x}, step=step)

class Log:
    """log = Log(out_dir); log(step, loss=1.2) appends a JSON object to out_dir/log.jsonl and prints a line.

    "time": seconds since the run began, without pauses before a resumption. "memory": the peak in GiB, of
    CUDA's allocator or else of the process. After a resume, later rows win."""

    def __init__(self, out_dir, resume=False, tracker='none'):
        self.path = f'{out_dir}/log.jsonl'
        if RANK == 0:
            if not resume:
                write_rows(self.path, [])
            self.track = None if tracker == 'none' else start_tracker(read_run(out_dir))
            self.start = time.time() - max((row['time'] for row in iterate_rows(self.path)), default=0.0)

    def __call__(self, step, **metrics):
        """metrics: plain values, or scalars of numpy and torch; nan and inf are null in the file."""
        if RANK > 0:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
        memory = round((torch.cuda.max_memory_allocated() or peak) / 2 ** 30, 3)
        row = {'step': step, 'time': round(time.time() - self.start, 3), 'memory': memory, **metrics}
        row = {name: x.item() if hasattr(x, 'item') else x for name, x in row.items()}
        floats = {name: x for name, x in row.items() if isinstance(x, float)}
        null = {name: None for name, x in floats.items() if not math.isfinite(x)}
        with open(self.path, 'a', encoding='utf-8') as f:  # closed again: a crash loses no buffer
            f.write(json.dumps(row | null, allow_nan=False) + '\n')
        for name, x in row.items() if self.track else ():
            if isinstance(x, (int, float)) and name not in null:
                self.track(name, x, row['step'])
        shown = row | {name: f'{x:.5g}' for name, x in floats.items()}
        tqdm.write(' | '.join(f'{name} {shown[name]}' for name in ['step', *metrics]))
        sys.stdout.flush()

def bar(iterable=None, desc=None, total=None):
    """A tqdm bar on stderr, gone when it is done; silent where stderr is no terminal."""
    return tqdm(iterable, desc=desc, total=total, disable=True if RANK else None, leave=False)


# -----------------------------------------------------------------------------
# states

def is_sharded(tensor):
    """Whether it is a DTensor, of which this process holds a part (importing the class takes .3 s)."""
    return hasattr(tensor, 'full_tensor')

def full(parameter):
    """A parameter's whole value; every process has to ask for it."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()

def bit_sum(tensors):
    """A checksum: the sum of the tensors' bits as integers, which no order of summation changes."""
    bits = (t.detach().view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32) for t in tensors)
    return sum(t.sum(dtype=torch.int64).item() for t in bits)

def learned_state(models, optimizer):
    """({name: tensor} of the weights that learn and of their Adam averages, a checksum of the others)."""
    learns, tensors, frozen = {id(p) for group in optimizer.param_groups for p in group['params']}, {}, []
    for key, model in models.items():
        for name, p in model.named_parameters():
            if id(p) in learns:
                if not optimizer.state[p]:  # as Adam begins
                    zeros = {part: torch.zeros_like(p) for part in ('exp_avg', 'exp_avg_sq')}
                    optimizer.state[p] = {'step': torch.zeros((), device=p.device)} | zeros
                tensors[f'{key}.{name}'] = p.detach()
                tensors |= {f'{key}.{name}.{part}': tensor for part, tensor in optimizer.state[p].items()}
            elif is_sharded(p) or rank() == 0:
                frozen.append(p.to_local() if is_sharded(p) else p)
    assert len(tensors) == 4 * len(learns), 'a weight that learns is in none of the models'
    return tensors, sum_over_processes(torch.tensor(bit_sum(frozen))).item()

def reason(error):
    """torch.distributed.checkpoint wraps the errors of the processes; this is the first one."""
    failures = getattr(error, 'failures', {0: [error]})
    return first_line(next(iter(failures.values()))[0])

class Checkpoints:
    """out_dir/state/00000120/, and the one before it: all that a run needs to go on after update 120, on any
    number of processes. Each process's part is safetensors, which hold no code; the rest is JSON. A state is
    written beside the others, synced and renamed; each file has a SHA-256."""

    def __init__(self, out_dir):
        self.folder = f'{out_dir}/state'
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')  # with one process it is

    def steps(self):
        return sorted(filter(str.isdecimal, os.listdir(self.folder))) if os.path.isdir(self.folder) else []

    @torch.no_grad()
    def save(self, step, models, optimizer, state):
        """models: {name: Transformer}; state: plain values. Of weights that do not learn it keeps a checksum.
        UserError where it cannot be written; those before it are whole."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save  # slow
        path, tmp = f'{self.folder}/{step:08d}', f'{self.folder}/unfinished'
        tensors, frozen = learned_state(models, optimizer)
        rest = {'state': state, 'names': sorted(tensors), 'frozen': frozen}
        try:
            from_main(lambda: (shutil.rmtree(tmp, ignore_errors=True), os.makedirs(tmp),
                               write_rows(f'{tmp}/state.json', [rest])))
            save(tensors, storage_writer=HuggingFaceStorageWriter(tmp, save_distributed=True),
                 no_dist=world_size() == 1)
            sums = checksums(tmp)
            from_main(lambda: (write_rows(f'{tmp}/sha256.json', [sums]), replace_folder(tmp, path)))
        except (Exception, CheckpointException) as error:  # which is no Exception; most often a full disk
            shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(f'{path} was not written ({reason(error)}); {self.whole()}') from None
        self.keep(2)

    @torch.no_grad()
    def load(self, models, optimizer):
        """Fills models and optimizer from the newest whole state and returns its `state`; None where there
        are no states. UserError if all are broken, or it is of another model."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load
        names = from_main(self.steps)
        if not names:
            return None
        while broken := self.broken(path := f'{self.folder}/{names.pop()}'):
            if not names:
                raise UserError(f'{path} is broken ({broken}), and none is whole; --overwrite starts again')
            print(f'{path} is broken ({broken}); the one before it is taken')
            from_main(lambda: (shutil.rmtree(f'{path}.broken', True), os.rename(path, f'{path}.broken')))
        saved = from_main(lambda: read_json(f'{path}/state.json'))
        tensors, frozen = learned_state(models, optimizer)
        other = f'{path}: the state of another model'
        if differ := set(saved.get('names', ())) ^ set(tensors):
            raise UserError(f'{other}: one of them has no {min(differ)}')
        if saved.get('frozen') != frozen:
            raise UserError(f'{path}: the state of a run with other weights that do not learn; was a '
                            'checkpoint that it starts from written anew?')
        try:
            load(tensors, storage_reader=HuggingFaceStorageReader(path), no_dist=world_size() == 1)
        except (Exception, CheckpointException) as error:  # other shapes
            raise UserError(f'{other} ({reason(error)})') from None
        return saved['state']

    def broken(self, path):
        """What is wrong with a state; '' if it is whole."""
        try:
            sums = from_main(lambda: dict(read_json(f'{path}/sha256.json')))
        except (ValueError, TypeError) as error:
            return first_line(error)
        found = checksums(path)
        wrong = [name for name, written in sums.items() if not written or found.get(name) != written]
        return ', '.join(f'{name} is not what was written' for name in wrong)

    def keep(self, n):
        """Removes all states but the newest n."""
        for name in self.steps()[:-n or None] if rank() == 0 else []:
            shutil.rmtree(f'{self.folder}/{name}', ignore_errors=True)

    def keep_batch(self, step, examples):
        """Writes the token ids of a batch for inspection, and says where."""
        path = f'{os.path.dirname(self.folder)}/bad_batch.json'
        if rank() == 0:
            ids, n_prompt = [list(e.ids) for e in examples], [e.n_prompt for e in examples]
            write_rows(path, [{'step': step, 'ids': ids, 'n_prompt': n_prompt}])
        return f'Its batch is in {path}; {self.whole()}'

    def whole(self):
        return f'whole states in {self.folder}: {", ".join(self.steps()) or "none"}'
