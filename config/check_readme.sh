#!/usr/bin/env bash
# Runs the README's table again with another seed, all rows or one, and says of each number whether it is within
# two standard deviations of the mean over the seeds in assets/demo.json. With three seeds chance alone puts one
# number in five outside. Exit code 1 if one is. A second call goes on where the first was stopped.
# $ bash config/check_readme.sh                # all rows, with seed 3: as long as the demo
# $ bash config/check_readme.sh ei --seed=4    # what Expert Iteration's row needs
set -euo pipefail
cd "$(dirname "$0")/.."

row='' key=rows seed=3
for word in "$@"; do
    case $word in
        --seed=[0-9]*) seed=${word#--seed=} ;;
        -*) echo "check_readme.sh takes a row such as ei, and --seed=3, not $word" >&2; exit 2 ;;
        *) row=$word key=demo_$word ;;
    esac
done
if ! grep -qsF "\"$key\"" assets/demo.json; then
    echo "assets/demo.json has no $key" >&2
    exit 2
fi
bash config/demo.sh "--seed=$seed" ${row:+"--row=$row"}
python - "$seed" "$row" << 'END'
import json
import sys
from statistics import mean, stdev

seed, row = sys.argv[1:]
rows, suffix, n_off = json.load(open('assets/demo.json'))['rows'], f'_s{seed}' if int(seed) else '', 0
for run in [f'demo_{row}'] if row else rows:
    found = json.load(open(f'out/{run}{suffix}/eval_arithmetic.json'))['metrics']
    for metric, seeds in rows[run].items():
        if '@' in metric:
            number, middle, spread = 100 * found[metric][0], 100 * mean(seeds), 200 * stdev(seeds)
            off = abs(number - middle) > spread + 1e-9
            n_off += off
            print(f'{run:16}{metric:12}{number:6.1f}, README {middle:.1f} ± {spread:.1f}{"  off" if off else ""}')
sys.exit(n_off > 0)
END
