# gsm8k_smollm2_ppo_sparse with the ORM's score at the end of every step as the reward.
# $ python rewards.py config/gsm8k_smollm2_orm.py && python ppo.py config/gsm8k_smollm2_ppo_orm_dense.py
# Not run: it needs a GPU and the model hub.
from config.gsm8k_smollm2_ppo_sparse import *

out_dir = 'out/gsm8k_smollm2_ppo_orm_dense'
reward = 'orm_dense'
reward_model = 'out/gsm8k_smollm2_orm'
reward_right = 0.0          # the score alone, as in Havrilla et al. 2024 (ours: whether it stood alone there is not said)
alpha = 0.25                # a solution has about four steps, and each is paid
