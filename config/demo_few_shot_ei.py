# Expert Iteration without SFT at demo size: from a base model that is shown two worked examples, on final answers
# only.
# $ python ei.py config/demo_few_shot_ei.py      (after config/demo_few_shot_base.py)
init_from = 'out/demo_few_shot_base'
base = 'out/demo_few_shot_base'
out_dir = 'out/demo_few_shot_ei'
few_shot = 2                # in the first round
include_sft = False
n_questions = 2500          # all of train but the validation slice
n_rounds = 5                # paper: 4 to 5 from a pretrained model
k = 4                       # 2,500 * 4 * 5 = 50,000 samples
max_new_tokens = 110
max_rows = 512
max_steps = 750             # a round
batch_size = 16
micro_tokens = 2048
lr = 1e-3
min_lr = 1e-4
weight_decay = 0.1
