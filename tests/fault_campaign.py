"""
Kills runs at random moments after each has made some progress, with kill -9, and lets them go on, until they are done;
then compares what they leave with what a run leaves that nobody disturbed: weights to the bit, samples line by line.
Exit code 1 if anything differs, or nothing was interrupted. Some minutes; the suite holds a short form (test_faults.py).

$ python tests/fault_campaign.py                  # 10 kills of each of sft, ei, ppo, rcrl and rewards
$ python tests/fault_campaign.py --kills=30 --only=ppo
"""
import contextlib
import glob
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

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
    """What a run has on the disk: the names of its states, and the bytes of its samples and labels."""
    files = glob.glob(os.path.join(out, '**', '*'), recursive=True)
    states = {path for path in files if re.fullmatch(r'.*/state/\d+', path)}
    n_bytes = 0
    for path in files:
        if re.fullmatch(r'(samples|labels).*\.jsonl', os.path.basename(path)):
            with contextlib.suppress(FileNotFoundError):  # replaced just now
                n_bytes += os.path.getsize(path)
    return states, n_bytes


def start_and_kill(command, out, kills, longest, seed, break_states=False, patience=600):
    """Starts a script (its name and flags), waits until it has written a state or samples that were not there before,
    kills it up to `longest` seconds later, resumes it, and so on; then lets it end. -> a count of what happened.
    AssertionError where nothing was interrupted, or there is no progress within `patience` seconds. A run that was
    done before its kill came is not killed again."""
    rng, harmed, count = random.Random(f'campaign {seed}'), [], {'kills': 0, 'resumed': 0, 'broken states': 0, 'states lost': 0}

    def states():
        return [s for s in sorted(progress(out)[0]) if s not in harmed]
    while True:
        resume = ['--init_from=resume'] if os.path.exists(os.path.join(out, 'config.json')) else []
        before, (known, n_bytes), started = states(), progress(out), time.time()
        with tempfile.TemporaryFile('w+') as said:
            process = subprocess.Popen([sys.executable, *command, *resume], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    assert time.time() - started < patience, f'no progress in {patience} s, or no end'
                    time.sleep(0.01)
                    now, now_bytes = progress(out)
                    if count['kills'] < kills and (now - known or now_bytes > n_bytes):
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(rng.uniform(0, longest))
                        break
                killed = process.poll() is None
            finally:
                process.kill()
                process.wait()
            said.seek(0)
            assert killed or process.returncode == 0, f'{command} {resume} ended with {process.returncode}:\n{said.read()}'
        count['resumed'] += bool(resume)
        if not killed:
            assert count['kills'] and count['resumed'], f'{command}: interrupted nothing'
            return count
        count['kills'] += 1
        after = states()
        count['states lost'] += bool(before) and os.path.exists(os.path.dirname(before[-1])) and (not after or after[-1] < before[-1])
        if break_states and len(after) == 2 and count['kills'] % 3 == 0:
            file = rng.choice(sorted(glob.glob(os.path.join(after[-1], '*'))))
            content = bytearray(open(file, 'rb').read())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            with open(file, 'wb') as f:
                f.write(content)
            count['broken states'] += 1
            harmed.append(after[-1])


if __name__ == '__main__':
    from config import override
    override(globals())
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # bit-equal is promised for equally many threads

    import conftest
    from test_faults import assert_same_run, command

    work, wrong, started = tempfile.mkdtemp(), 0, time.time()
    total = dict.fromkeys(('kills', 'resumed', 'broken states', 'states lost'), 0)

    class Folders:
        """What the fixture asks pytest for."""
        def mktemp(self, name):
            os.makedirs(os.path.join(work, name))
            return __import__('pathlib').Path(work, name)
    coin = conftest.coin.__wrapped__(Folders()) if hasattr(conftest.coin, '__wrapped__') else conftest.coin.__pytest_wrapped__.obj(Folders())
    for name in [only] if only else ['sft', 'ei', 'ppo', 'rcrl', 'rewards']:
        subprocess.run([sys.executable, *command(name, coin, f'{work}/{name}_whole', scale)], cwd=ROOT, check=True, capture_output=True)
        try:
            found = start_and_kill(command(name, coin, f'{work}/{name}', scale), f'{work}/{name}', kills, longest, f'{seed} {name}', broken)
            print(f'{name}: {found}')
            total = {key: total[key] + n for key, n in found.items()}
            assert_same_run(f'{work}/{name}_whole', f'{work}/{name}', 2)
        except AssertionError as error:
            wrong += 1
            print(f'{name}: {error}')
    shutil.rmtree(work)
    print(f'{total["kills"]} kills after progress survived, {total["resumed"]} times resumed, {total["broken states"]} states broken on purpose, '
          f'{total["states lost"]} states lost, {wrong} scripts where nothing was interrupted or that ended otherwise than undisturbed; '
          f'{time.time() - started:.0f} s')
    sys.exit(bool(wrong or total['states lost']))
