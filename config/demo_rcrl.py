# The demo's return-conditioned RL: the SFT policy, fine-tuned on solutions of Expert Iteration's policy whose steps
# are labelled.
# $ python rcrl.py config/demo_rcrl.py      (after config/demo_ei.py)
init_from = 'out/demo_ei'   # draws the solutions, and the rollouts that judge their steps
base = 'out/demo_sft'       # where fine-tuning starts; in the paper, the base
out_dir = 'out/demo_rcrl'
n_worked = 500
n_questions = 1000          # more takes longer than the demo has
k = 2                       # 1,000 * 2 = 2,000 solutions
rollouts = 4                # of a step; the solution itself is one of them
unlabelled = 0.1            # so that it makes sense to ask what the policy does without a label
max_new_tokens = 110
max_rows = 1024             # a small model decodes many rows at a time
max_steps = 250             # as many as a round of demo_ei
batch_size = 16
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
eval_interval = 250
