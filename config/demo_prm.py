# A process reward model for the demo: steps of the SFT policy's solutions, labelled by 8 rollouts from their ends.
# $ python rewards.py config/demo_prm.py      (after config/demo_sft.py)
kind = 'prm'
init_from = 'out/demo_sft'  # the policy that is judged, and whose weights the reward model starts from
out_dir = 'out/demo_prm'
n_questions = 1500
k = 2                       # 1,500 * 2 * about 2.2 steps before the answer * 8 rollouts = 53,000 samples
rollouts = 8
heldout = 128
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
epochs = 2.0
batch_size = 32
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
