"""
Kills runs at random moments after each has made some progress, with kill -9, and lets them go on, until they
are done; then compares their weights to the bit and their samples line by line with an undisturbed run's.
Exit code 1 if anything differs, or nothing was interrupted. Some minutes; the suite holds a short form
(test_faults.py).

$ python tests/fault_campaign.py                  # 10 kills of each of sft, ei, ppo, rcrl and rewards
$ python tests/fault_campaign.py --kills=30 --only=ppo
"""
import collections
import glob
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

# -----------------------------------------------------------------------------
kills = 10       # of each script
longest = 1.0    # seconds from its first progress, a state or samples on the disk, to its kill, at most
scale = 12       # how much work a script has: enough that it is not done before its last kill
only = ''        # one script's name; empty: all
seed = 0
# -----------------------------------------------------------------------------

def states_of(out):
    return sorted(glob.glob(f'{out}/**/state/' + 8 * '[0-9]', recursive=True))

def n_bytes_of(out):
    """Of a run's samples and labels."""
    n_bytes = 0
    for path in pathlib.Path(out).rglob('*.jsonl'):
        if path.name.startswith(('samples', 'labels')):
            with suppress(FileNotFoundError):  # replaced just now
                n_bytes += path.stat().st_size
    return n_bytes

def run_until_killed(command, out, wait=None):
    """Runs a script and kills it `wait` seconds after its first progress; None: not. -> whether it was."""
    newest, n_bytes = states_of(out)[-1:], n_bytes_of(out)
    with tempfile.TemporaryFile('w+') as said:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said, stderr=said)
        try:
            while (wait is not None and process.poll() is None
                   and states_of(out)[-1:] <= newest and n_bytes_of(out) <= n_bytes):
                time.sleep(0.01)
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait)
        finally:
            killed = process.poll() is None
            process.kill()
            process.wait()
        said.seek(0)
        assert killed or process.returncode == 0, f'{command} ended with {process.returncode}:\n{said.read()}'
    return killed

def flip_a_bit(path, rng):
    content = bytearray(pathlib.Path(path).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    pathlib.Path(path).write_bytes(content)

def start_and_kill(command, out, kills, longest, seed):
    """Starts a script, kills it up to `longest` seconds after some progress, resumes it, and so on; then lets
    it end. After every third kill a bit of the newest state is flipped. -> a count of what happened.
    AssertionError where nothing was interrupted. A run that was done before its kill is not killed again."""
    rng, harmed, resume = random.Random(f'campaign {seed}'), [], []
    count = dict.fromkeys(('kills', 'resumed', 'broken states', 'states lost'), 0)
    while True:
        before = [state for state in states_of(out) if state not in harmed]
        wait = rng.uniform(0, longest) if count['kills'] < kills else None
        killed = run_until_killed(command + resume, out, wait)
        count['resumed'] += bool(resume)
        if not killed:
            assert count['kills'] and count['resumed'], f'{command}: interrupted nothing'
            return count
        count['kills'] += 1
        resume = ['--init_from=resume'] if os.path.exists(f'{out}/config.json') else []
        after = [state for state in states_of(out) if state not in harmed]
        if before and os.path.exists(os.path.dirname(before[-1])):
            count['states lost'] += after[-1:] < before[-1:]
        if len(after) == 2 and count['kills'] % 3 == 0:
            flip_a_bit(rng.choice(sorted(glob.glob(f'{after[-1]}/*'))), rng)
            count['broken states'] += 1
            harmed.append(after[-1])


if __name__ == '__main__':
    from config import override
    override(globals())
    from conftest import make_coin  # it asks for one thread: bit-equal is promised for equally many
    from test_faults import assert_same_run, command

    wrong, total, started = 0, collections.Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        coin = make_coin(work)
        for name in [only] if only else ['sft', 'ei', 'ppo', 'rcrl', 'rewards']:
            whole, run = work / f'{name}_whole', work / name
            run_until_killed(command(name, coin, whole, scale), whole)
            try:
                found = start_and_kill(command(name, coin, run, scale), run, kills, longest, f'{seed} {name}')
                print(f'{name}: {found}')
                total.update(found)
                assert_same_run(whole, run, 2)
            except AssertionError as error:
                wrong += 1
                print(f'{name}: {error}')
    print(f'{dict(total)}; {wrong} scripts where nothing was interrupted, or that ended otherwise than '
          f'undisturbed; {time.time() - started:.0f} s')
    sys.exit(bool(wrong or total['states lost']))
