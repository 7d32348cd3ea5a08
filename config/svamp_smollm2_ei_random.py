# The control: the first round of svamp_smollm2_ei, its best one, with a filter that keeps as many new solutions,
# right or wrong.
# $ python ei.py config/svamp_smollm2_ei_random.py
# Measured: 17 minutes, 7.9 GiB, validation maj@1 30 (± 4); see assets/smollm2.md.
from config.svamp_smollm2_ei import *
reward = 'random'
n_rounds = 1
out_dir = 'out/svamp_smollm2_ei_random'
