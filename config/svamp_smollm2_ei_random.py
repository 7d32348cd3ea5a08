# The control: svamp_smollm2_ei with a filter that keeps as many new solutions, right or wrong.
# $ python ei.py config/svamp_smollm2_ei_random.py
from config.svamp_smollm2_ei import *
reward = 'random'
out_dir = 'out/svamp_smollm2_ei_random'
