# gsm8k_smollm2_ppo_sparse with the heuristic dense reward beside the sparse one.
# $ python ppo.py config/gsm8k_smollm2_ppo_dense.py      (after config/gsm8k_smollm2_sft.py)
# Memory: 10.0 GiB on one GPU of 16 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# Not run: it needs a GPU and the model hub.
from config.gsm8k_smollm2_ppo_sparse import *

out_dir = 'out/gsm8k_smollm2_ppo_dense'
reward = 'dense'
