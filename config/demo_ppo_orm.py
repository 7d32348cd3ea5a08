# The ORM's score of the whole solution beside the sparse reward.
# $ python ppo.py config/demo_ppo_orm.py      (after config/demo_orm.py)
from config.demo_ppo import *

out_dir = 'out/demo_ppo_orm'
reward = 'orm'
reward_model = 'out/demo_orm'
