"""config/demo.sh, with a stand-in for python: order, resumption, refusals, Ctrl-C. The chain itself runs in
test_recipes.py."""
import os
import pty
import shutil
import signal
import subprocess
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Notes its call, makes its run's folder, takes a moment; at SIGTERM notes that, and ends a little later, as a
# training step does. SIGINT, which a terminal might send to all, must not reach it.
STAND_IN = r"""#!/usr/bin/env bash
echo "starts $*" >> calls
trap 'echo "$1 gets SIGINT" >> calls' INT
trap 'sleep 0.3; echo "$1 saves" >> calls; exit 0' TERM
run=$(printf '%s\n' "$@" | sed -n 's/^--out_dir=//p')
[ -n "$run" ] || run=$(sed -n "s/^out_dir = '\(.*\)'/\1/p" "$2" 2> /dev/null)
[ -z "$run" ] || { mkdir -p "$run"; echo '{}' | tee "$run/config.json" > "$run/log.jsonl"; }
[ "$1" != "${FAILS-}" ] || { echo 'what went wrong'; exit 1; }
for i in 1 2 3 4; do sleep "${PACE-0}" & wait $!; done
echo "ends $*" >> calls
"""

@pytest.fixture
def demo(tmp_path):
    """demo(*flags, **environment) -> a running demo.sh in a copy of the repository."""
    shutil.copytree(f'{ROOT}/config', tmp_path / 'repo/config')
    for name, text in (('python', STAND_IN), ('torchrun', '#!/usr/bin/env bash\nexec python "${@:3}"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started = []

    def start(*flags, **more):
        terminal, mine = pty.openpty()
        env = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | more
        run = subprocess.Popen(['bash', 'config/demo.sh', *flags], cwd=tmp_path / 'repo', env=env, text=True,
                               stdin=mine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True,  # and not as in the background, deaf to Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        os.close(mine)
        started.append((run, terminal))
        return run

    def calls():
        path = tmp_path / 'repo/calls'
        return path.read_text().splitlines() if path.exists() else []

    start.calls = calls
    yield start
    for run, terminal in started:
        run.kill()
        os.close(terminal)

def ended(calls):
    return [line.removeprefix('ends ') for line in calls if line.startswith('ends ')]

def test_stages_run_after_those_that_they_need_and_once(demo):
    first = demo('--seed=1', '--stop=["a b"]')
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 0, out
    calls = demo.calls()

    def place(what, kind):
        return next(i for i, line in enumerate(calls) if line.startswith(f'{kind} {what}'))
    for before, after in (('data/', 'sft.py config/demo_base'),
                          ('sft.py config/demo_base', 'sft.py config/demo_sft'),
                          ('sft.py config/demo_sft.py', 'ei.py config/demo_ei.py'),
                          ('ei.py config/demo_ei.py', 'rewards.py'), ('ei.py config/demo_ei.py', 'rcrl.py'),
                          ('rewards.py', 'eval.py --init_from=out/demo_ei_s1')):
        assert place(before, 'ends') < place(after, 'starts'), (before, after)
    # this seed's folders alone, and the flags whole
    training = [line for line in calls if line.startswith('starts') and 'config/demo_' in line]
    assert len(training) == 8 and all('--seed=1 --stop=["a b"]' in line for line in training)
    assert not [line for line in calls for word in line.split() if 'out/demo_' in word and '_s1' not in word]
    assert demo('--seed=1', '--stop=["a b"]').wait(60) == 0  # nothing is left to do but to show
    assert [c for c in demo.calls()[len(calls):] if 'assets/plot.py' not in c] == []
    calls = demo.calls()
    other = demo('--seed=1', '--lr=1')
    message, _ = other.communicate(timeout=60)
    assert other.returncode == 2 and message.count('\n') == 1 and 'give the same' in message
    assert demo.calls() == calls

@pytest.mark.parametrize('n_calls', [0, 1, 6])
def test_ctrl_c_stops_all_and_the_same_command_goes_on(demo, n_calls):
    run = demo(PACE='0.2')
    while len(demo.calls()) < n_calls:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    out, _ = run.communicate(timeout=60)
    assert run.returncode in (130, -signal.SIGINT), out
    started = [c for c in demo.calls() if c.startswith('starts ')]
    calls = demo.calls()
    assert 'gets SIGINT' not in ' '.join(calls)
    n_stopped = sum(c.endswith(' saves') for c in calls)
    assert len(started) == len(ended(calls)) + n_stopped  # none is left running
    run = demo()
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0, out
    finished = ended(demo.calls())
    assert len(finished) == len(set(finished)) and [c for c in finished if c.startswith('eval.py --compare')]

def test_a_stage_that_fails_ends_the_demo_with_its_last_lines(demo):
    run = demo(FAILS='rewards.py')
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 1 and 'failed' in out and out.rstrip().endswith('what went wrong')

def test_quick_is_a_part_of_the_whole(demo):
    quick = demo('--quick')
    assert quick.wait(60) == 0
    before = ended(demo.calls())
    assert any('--n_rounds=1' in c for c in before) and not any(c.startswith('ppo.py') for c in before)
    assert demo().wait(60) == 0
    after = ended(demo.calls())[len(before):]
    assert not any(c.startswith('sft.py config/demo_base') for c in after)
    assert any(c.startswith('ei.py config/demo_ei.py') and '--init_from=resume' in c for c in after)

def test_a_row_takes_only_what_it_needs(demo):
    assert demo('--row=ei').wait(60) == 0
    scripts = [call.split()[0] for call in ended(demo.calls())]
    assert sorted(scripts) == ['data/arithmetic/prepare.py', 'ei.py', 'eval.py', 'rewards.py',
                               'sft.py', 'sft.py']

@pytest.mark.parametrize('flag', ['quick', '--row=none'])
def test_wrong_flags_are_refused(demo, flag):
    run = demo(flag)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 2 and out.count('\n') == 1
