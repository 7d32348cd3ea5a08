# Expert Iteration that keeps what the ORM scores high, right or wrong: no final answer is used after the ORM's
# training.
# $ python ei.py config/demo_ei_orm.py      (after config/demo_orm.py)
from config.demo_ei import *

out_dir = 'out/demo_ei_orm'
reward = 'orm'
reward_model = 'out/demo_orm'
tau = 0.65                  # with an earlier demo a fifth of the SFT policy's samples scored this, half of them right
