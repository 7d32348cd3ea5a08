# gsm8k_smollm2_ppo_sparse with the ORM's score of the whole solution as the reward.
# $ python rewards.py config/gsm8k_smollm2_orm.py && python ppo.py config/gsm8k_smollm2_ppo_orm.py
# Memory: 10.3 GiB on one GPU of 16 GB. Disk: 5.5 GiB, 2.5 GiB when finished.
# Not run: it needs a GPU and the model hub.
from config.gsm8k_smollm2_ppo_sparse import *

out_dir = 'out/gsm8k_smollm2_ppo_orm'
reward = 'orm'
reward_model = 'out/gsm8k_smollm2_orm'
reward_right = 0.0          # only the score: ours, as Havrilla et al. 2024 don't say whether it stood alone
