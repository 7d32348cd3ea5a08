#!/usr/bin/env bash
# Everything on two CPU cores: data, base model, SFT, Expert Iteration, PPO, return-conditioned RL, a reward model, and
# the table that compares them.
# $ bash config/demo.sh             # flags for all training runs may follow, e.g. --seed=1
# Replaces what an earlier demo left in out/demo_*.
set -euo pipefail
cd "$(dirname "$0")/.."

python data/arithmetic/prepare.py
python sft.py config/demo_base.py --overwrite "$@"        # a language model of the task's world
python sft.py config/demo_sft.py --overwrite "$@"         # + 500 worked solutions
python ei.py config/demo_ei.py --overwrite "$@"           # + final answers of 5,500 more questions
python ppo.py config/demo_ppo.py --overwrite "$@"         # the same SFT policy and final answers, by PPO
python rcrl.py config/demo_rcrl.py --overwrite "$@"       # learns from EI's solutions, each step labelled
python sft.py config/demo_sft_long.py --overwrite "$@"    # the control: as many updates as SFT and EI took
python rewards.py config/demo_orm.py --overwrite "$@"     # scores solutions: the judge of rerank@16
budget='--n_problems=500 --max_new_tokens=110 --max_rows=1024 --overwrite'
for run in demo_sft demo_sft_long demo_ei demo_ppo demo_rcrl; do
    python eval.py --init_from=out/$run --scorer=out/demo_orm --k=16 $budget
done
for condition in bad none; do                             # do the labels mean anything?
    python eval.py --init_from=out/demo_rcrl --condition=$condition --k=0 $budget
done
python eval.py --compare out/demo_sft out/demo_sft_long out/demo_ppo out/demo_rcrl out/demo_ei
