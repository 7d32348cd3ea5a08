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
import re
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
broken = True    # also flip a bit of the newest state after every third kill
seed = 0
# -----------------------------------------------------------------------------

def progress(out):
    """(the names of a run's states, sorted; the bytes of its samples and labels)"""
    files, n_bytes = glob.glob(f'{out}/**/*', recursive=True), 0
    for path in files:
        if re.fullmatch(r'(samples|labels).*\.jsonl', os.path.basename(path)):
            with suppress(FileNotFoundError):  # replaced just now
                n_bytes += os.path.getsize(path)
    return sorted(path for path in files if re.fullmatch(r'.*/state/\d+', path)), n_bytes

def run_until_killed(command, out, kill, wait, patience=600):
    """Runs a script; if kill, kills it `wait` seconds after its first progress. -> whether it was killed.
    AssertionError where it fails, or takes more than `patience` seconds."""
    (known, n_bytes), started = progress(out), time.time()
    with tempfile.TemporaryFile('w+') as said:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                assert time.time() - started < patience, f'no progress in {patience} s, or no end'
                time.sleep(0.01)
                states, now_bytes = progress(out)
                if kill and (set(states) - set(known) or now_bytes > n_bytes):
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(wait)
                    break
            killed = process.poll() is None
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        assert killed or process.returncode == 0, f'{command} ended with {process.returncode}:\n{said.read()}'
    return killed

def flip_a_bit(path, rng):
    content = bytearray(pathlib.Path(path).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    pathlib.Path(path).write_bytes(content)

def start_and_kill(command, out, kills, longest, seed, break_states=False):
    """Starts a script, kills it up to `longest` seconds after some progress, resumes it, and so on; then lets
    it end. -> a count of what happened. AssertionError where nothing was interrupted. A run that was done
    before its kill came is not killed again."""
    rng, harmed, resume = random.Random(f'campaign {seed}'), [], []
    count = dict.fromkeys(('kills', 'resumed', 'broken states', 'states lost'), 0)
    while True:
        before = [state for state in progress(out)[0] if state not in harmed]
        killed = run_until_killed(command + resume, out, count['kills'] < kills, rng.uniform(0, longest))
        count['resumed'] += bool(resume)
        if not killed:
            assert count['kills'] and count['resumed'], f'{command}: interrupted nothing'
            return count
        count['kills'] += 1
        resume = ['--init_from=resume'] if os.path.exists(f'{out}/config.json') else []
        after = [state for state in progress(out)[0] if state not in harmed]
        if before and os.path.exists(os.path.dirname(before[-1])):
            count['states lost'] += not after or after[-1] < before[-1]
        if break_states and len(after) == 2 and count['kills'] % 3 == 0:
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
            run_until_killed(command(name, coin, whole, scale), whole, False, 0)
            try:
                found = start_and_kill(command(name, coin, run, scale), str(run), kills, longest,
                                       f'{seed} {name}', broken)
                print(f'{name}: {found}')
                total.update(found)
                assert_same_run(whole, run, 2)
            except AssertionError as error:
                wrong += 1
                print(f'{name}: {error}')
    print(f'{total["kills"]} kills after progress survived, {total["resumed"]} times resumed, {total["broken states"]} '
          f'states broken on purpose, {total["states lost"]} states lost, {wrong} scripts where nothing was interrupted '
          f'or that ended otherwise than undisturbed; {time.time() - started:.0f} s')
    sys.exit(bool(wrong or total['states lost']))
