# The ORM's score at the end of every step beside the sparse reward, clipped and then as a difference (Gao et al.
# 2024; ours): raw sums of scores pay for needless steps.
# $ python ppo.py config/demo_ppo_orm_dense.py      (after config/demo_sft.py and config/demo_orm.py)
from config.demo_ppo_prm_clip_delta import *

out_dir = 'out/demo_ppo_orm_dense'
reward = 'orm_dense'
reward_model = 'out/demo_orm'
