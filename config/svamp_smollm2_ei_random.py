# The control: the first round of svamp_smollm2_ei with a filter that keeps as many new solutions of the same questions,
# right or wrong (half of them are right).
# $ python ei.py config/svamp_smollm2_ei_random.py
# Measured: 2 minutes on an H100 beside six other runs, 4.4 GiB; validation maj@1 34, 39, 34 (seeds 0 to 2,
# standard error 3), where
# the right ones give 48, 49, 46; see assets/smollm2.md.
from config.svamp_smollm2_ei import *
reward = 'random'
n_rounds = 1
out_dir = 'out/svamp_smollm2_ei_random'
