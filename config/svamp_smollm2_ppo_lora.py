# PPO as svamp_smollm2_ppo, but only adapters of rank 16 learn.
# $ python ppo.py config/svamp_smollm2_ppo_lora.py
from config.svamp_smollm2_ppo import *
out_dir = 'out/svamp_smollm2_ppo_lora'
lora_rank = 16
lr = 2e-4
min_lr = 2e-5
