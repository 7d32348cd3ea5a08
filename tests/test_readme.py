"""config/check_readme.sh with a stand-in for the demo, whose one evaluation has maj@1 = $MAJ1."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

DEMO = """echo "$@" > flags && mkdir -p out/demo_ei_s4
printf '{"metrics": {"maj@1": [%s, 0.01], "tokens": [9, 1]}}' $MAJ1 > out/demo_ei_s4/eval_arithmetic.json"""

@pytest.mark.parametrize('words, maj1, code, said', [
    (['ei'], 0.539, 0, 'README 50.0 ± 4.0\n'), (['ei'], 0.461, 0, 'README 50.0 ± 4.0\n'),
    (['ei'], 0.541, 1, 'README 50.0 ± 4.0  off\n'), ([], 0.459, 1, 'README 50.0 ± 4.0  off\n'),
    (['ie'], 0.5, 2, 'assets/demo.json has no demo_ie\n'), (['--row=ei'], 0.5, 2, 'not --row=ei\n')])
def test_a_number_is_off_where_it_leaves_the_spread_over_seeds(tmp_path, words, maj1, code, said):
    (tmp_path / 'config').mkdir()
    shutil.copy(f'{ROOT}/config/check_readme.sh', tmp_path / 'config')
    (tmp_path / 'config/demo.sh').write_text(DEMO)
    (tmp_path / 'assets').mkdir()
    rows = {'demo_ei': {'maj@1': [0.48, 0.5, 0.52], 'tokens': [1, 2, 3]}}
    (tmp_path / 'assets/demo.json').write_text(json.dumps({'rows': rows}))
    env = os.environ | {'MAJ1': str(maj1), 'PATH': f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'}
    run = subprocess.run(['bash', 'config/check_readme.sh', '--seed=4', *words], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert run.returncode == code and (run.stdout + run.stderr).endswith(said), run
    flags = ['--seed=4', *(f'--row={row}' for row in words)]
    assert code == 2 or (tmp_path / 'flags').read_text().split() == flags
