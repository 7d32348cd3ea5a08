# The ORM's score at the end of every step beside the sparse reward.
# $ python ppo.py config/demo_ppo_orm_dense.py      (after config/demo_sft.py and config/demo_orm.py)
from config.demo_ppo_orm import *

out_dir = 'out/demo_ppo_orm_dense'
reward = 'orm_dense'
alpha = 0.2                 # a solution has about three steps, and each is paid
