"""
Kills runs at random moments, with kill -9, and lets them go on, until they are done; then compares what they leave with what a run
leaves that nobody disturbed: weights to the bit, samples line by line. Some minutes; the suite holds a short form (test_faults.py).

$ python tests/fault_campaign.py                  # 10 kills of each of sft, ei, ppo, rcrl and rewards
$ python tests/fault_campaign.py --kills=30 --only=ppo
"""
import glob
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

# -----------------------------------------------------------------------------
kills = 10       # of each script
longest = 4.0    # seconds that a script lives at most
scale = 12       # how much work a script has: enough that it is not done before its last kill
only = ''        # one script's name; empty: all
broken = True    # also flip a bit of the newest state after every third kill
seed = 0
# -----------------------------------------------------------------------------


def start_and_kill(command, out, kills, longest, seed, break_states=False):
    """Starts the command, kills it after up to `longest` seconds, resumes it, and so on; then lets it end. -> a count of what happened.
    A run that was done before its kill came is not killed again."""
    rng, harmed, count = random.Random(f'campaign {seed}'), [], {'kills': 0, 'resumed': 0, 'broken states': 0, 'states lost': 0}

    def states():
        return [s for s in sorted(glob.glob(os.path.join(out, '**', 'state', '[0-9]*[0-9]'), recursive=True)) if s not in harmed]
    while True:
        resume = ['--init_from=resume'] if os.path.exists(os.path.join(out, 'config.json')) else []
        before = states()
        process = subprocess.Popen([*command, *resume], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
        try:
            said, _ = process.communicate(timeout=rng.uniform(0.5, longest) if count['kills'] < kills else 600)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
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
            continue
        if process.returncode != 0:
            raise AssertionError(f'{command} {resume} ended with {process.returncode}:\n{said}')
        count['resumed'] += bool(resume)
        return count


if __name__ == '__main__':
    from config import override
    override(globals())
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # bit-equal is promised for equally many threads

    import conftest
    from test_faults import assert_same_run, command

    work, total, wrong, started = tempfile.mkdtemp(), {}, 0, time.time()

    class Folders:
        """What the fixture asks pytest for."""
        def mktemp(self, name):
            os.makedirs(os.path.join(work, name))
            return __import__('pathlib').Path(work, name)
    coin = conftest.coin.__wrapped__(Folders()) if hasattr(conftest.coin, '__wrapped__') else conftest.coin.__pytest_wrapped__.obj(Folders())
    for name in [only] if only else ['sft', 'ei', 'ppo', 'rcrl', 'rewards']:
        subprocess.run(command(name, coin, f'{work}/{name}_whole', scale), cwd=ROOT, check=True, capture_output=True)
        found = start_and_kill(command(name, coin, f'{work}/{name}', scale), f'{work}/{name}', kills, longest, f'{seed} {name}', broken)
        try:
            assert_same_run(f'{work}/{name}_whole', f'{work}/{name}')
        except AssertionError as error:
            wrong += 1
            print(f'{name}: differs: {error}')
        print(f'{name}: {found}')
        total = {key: total.get(key, 0) + n for key, n in found.items()}
    shutil.rmtree(work)
    print(f'{total["kills"]} kills survived, {total["broken states"]} states broken on purpose, {total["states lost"]} states lost, '
          f'{wrong} runs that ended otherwise than undisturbed ones; {time.time() - started:.0f} s')
