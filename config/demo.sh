#!/usr/bin/env bash
# Everything on a laptop's CPU: word problems, a base model, SFT, Expert Iteration, PPO, return-conditioned RL, two
# controls, a reward model, and the table that compares them. Stages that don't need each other run side by side,
# a core each.
# $ bash config/demo.sh              # some ten minutes on two cores
# $ bash config/demo.sh --quick      # three: SFT, a round of Expert Iteration; a later call without it goes on
# $ bash config/demo.sh --row=ei     # only what this row of the table needs
# $ bash config/demo.sh --seed=1     # in folders of its own, out/demo_*_s1
# Other flags go to all training runs. Ctrl-C stops everything, and the same command goes on where it was.
# To start over: rm -r out/demo_*
set -euo pipefail
set -m                               # a process group a stage: Ctrl-C reaches only this script, which asks them
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1             # two processes of one thread do more than one of two, and wait asleep

quick='' suffix='' flags='' last=table
for flag in "$@"; do
    case $flag in
        --quick) quick=yes last=quick_table ;;
        --row=*) last=eval_${flag#--row=} ;;
        --seed=0) ;;
        --seed=[0-9]*) suffix=_s${flag#--seed=} flags+=" $flag" ;;
        --*=*) flags+=" $(printf %q "$flag")" ;;
        *) echo "demo.sh takes --quick, --row=ei and flags like --seed=1, not $flag" >&2; exit 2 ;;
    esac
done
logs=out/demo_log$suffix             # what each stage printed, and a mark when it has finished
mkdir -p "$logs"
[ -e "$logs/flags" ] || echo "$flags" > "$logs/flags"
if [ "$(cat "$logs/flags")" != "$flags" ]; then
    echo "$logs has a demo with the flags '$(cat "$logs/flags")': give the same, or rm -r out/demo_*$suffix" >&2
    exit 2
fi

# -----------------------------------------------------------------------------
# stages: a name, the stages that it needs, what it is, its command

names=() needs=() titles=() commands=() pids=() began=()
stage() {
    names+=("$1") needs+=("$2") titles+=("$3") commands+=("${*:4}") pids+=('') began+=(0)
}
train() {                            # NAME NEEDS TITLE SCRIPT RECIPE [FLAG...]: by config/demo_<RECIPE>
    stage "$1" "$2" "$3" "train_or_resume ${*:4}"
}
train_or_resume() {
    local run=out/demo_$2$suffix recipe=config/demo_$2.py paths='' parent
    parent=$(sed -n 's|^from config\.\(.*\) import.*|config/\1.py|p' "$recipe")
    if [ -n "$suffix" ]; then        # the runs that a recipe names are this seed's
        paths=$(cat $parent "$recipe" |
                sed -n "s|^\([a-z_]*\) *= *'\(out/demo_[a-z_]*\)\([^']*\)'.*|--\1=\2$suffix\3|p")
    fi
    [ ! -e "$run/config.json" ] || paths+=' --init_from=resume'
    eval "$launcher" "$1" "$recipe" $paths "${*:3}" "$flags"
}
evaluate() {                         # NAME NEEDS RUN [FLAG...]
    stage "$1" "$2" "evaluation of $3" "python eval.py --init_from=out/demo_$3$suffix ${*:4}"
}
jobs=$(getconf _NPROCESSORS_ONLN) launcher=python shared=''
if [ "$jobs" -gt 1 ]; then           # a stage without others beside it is shared by two processes
    shared="launcher='torchrun --standalone --nproc_per_node=2'; "
fi
few='--n_problems=200 --k=8 --max_new_tokens=110 --max_rows=1024 --overwrite'
many='--k=16 --n_sampled=256 --max_new_tokens=110 --max_rows=1024 --overwrite'

stage data '' 'word problems' 'python data/arithmetic/prepare.py'
stage base data 'a base model from scratch' "$shared train_or_resume sft.py base --micro_tokens=512"
if [ $quick ]; then
    stage sft base 'SFT on 500 worked solutions' "$shared train_or_resume sft.py sft --micro_tokens=1024"
else
    train sft base 'SFT on 500 worked solutions' sft.py sft
fi
evaluate first_base base base $few "--out_dir=$logs/base"
evaluate first_sft sft sft $few "--out_dir=$logs/sft"
stage first 'first_base first_sft' 'a first table' "python eval.py --compare $logs/base $logs/sft"
runs='sft sft_long ei_random ei ppo rcrl'
if [ $quick ]; then
    stage quick sft 'one round of Expert Iteration' \
        "$shared train_or_resume ei.py ei --n_rounds=1 --micro_tokens=1024"
    evaluate quick_ei quick ei $few "--out_dir=$logs/ei"
    stage quick_table 'first quick_ei' 'the table' "python eval.py --compare $logs/sft $logs/ei"
else
    train ei sft 'Expert Iteration, two rounds' ei.py ei
    train ppo sft 'PPO' ppo.py ppo
    train orm ei 'a reward model' rewards.py orm
    train rcrl ei 'return-conditioned RL' rcrl.py rcrl
    train ei_random sft 'control: Expert Iteration with a random filter' ei.py ei_random
    train sft_long base 'control: SFT, trained as long as Expert Iteration' sft.py sft_long
    for run in $runs; do
        case $run in                 # reading all samples takes as long as drawing them
            sft|ei) evaluate "eval_$run" "$run orm" "$run" $many "--scorer=out/demo_orm$suffix" ;;
            *) evaluate "eval_$run" "$run" "$run" $many ;;
        esac
    done
    stage table "first $(printf 'eval_%s ' $runs)" 'the table' \
        "python eval.py --compare $(printf "out/demo_%s$suffix " $runs)"
fi

needed=()                            # the last stage, and what it needs
need() {
    local name i found=''
    for name in "$@"; do
        for i in ${!names[@]}; do
            [ "${names[i]}" != "$name" ] || { found=yes needed[i]=yes; need ${needs[i]}; }
        done
    done
    [ $# = 0 ] || [ "$found" ]
}
need $last || { echo "no row ${last#eval_}: one of $runs" >&2; exit 2; }

# -----------------------------------------------------------------------------
# the life of a stage

finished() {                         # STAGE...: have all of them?
    local name
    for name in "$@"; do [ -e "$logs/$name.done" ] || return 1; done
}
say() {
    printf '%2d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}
start() {
    say "starts    ${titles[$1]}"
    began[$1]=$SECONDS
    local log=$logs/${names[$1]}
    { eval "${commands[$1]}" && touch "$log.done"; } > "$log.txt" 2>&1 < /dev/null &
    pids[$1]=$!
}
report() {
    local log=out/demo_${names[$1]}$suffix/log.jsonl maj1=''
    if [ -e "$log" ]; then
        maj1=$({ grep -o '"val_maj1": [0-9.]*' "$log" || true; } | tail -1 |
               awk '{printf "; validation maj@1 %.0f%%", 100 * $2}')
    fi
    say "finished  ${titles[$1]} ($((SECONDS - began[$1])) s$maj1)"
    [ "${names[$1]}" != first ] || sed -n '/^|/p' "$logs/first.txt"
}
alive() {
    local pid
    for pid in ${pids[@]}; do kill -0 -- "-$pid" 2> /dev/null && return; done
    return 1
}
ask() {                              # SIGNAL: to all stages that run
    local pid
    for pid in ${pids[@]}; do kill "-$1" -- "-$pid" 2> /dev/null || true; done
}
stop() {                             # EXIT_CODE: when all stages have saved what they need to go on
    trap 'ask KILL' INT TERM         # Ctrl-C again: at once
    exec 2> /dev/null                # bash would report every job that it has seen end
    ask TERM
    while alive; do sleep 0.1; done
    exit "$1"
}
estimate() {                         # from the base model's first updates: all else is the same kind of work
    local log=out/demo_base$suffix/log.jsonl
    [ -e "$log" ] && [ "$(grep -c '"loss"' "$log")" -ge 4 ] || return 0
    estimated=yes
    sed 's/[:,{}]//g' "$log" | awk -v alone="$alone" -v beside="$beside" -v jobs="$jobs" '
        NR == 2 { step = $2; time = $4 } NR == 4 { update = ($4 - time) / ($2 - step) }
        END { printf "       %.0f ms an update of the base model here: some %.0f minutes in all\n",
              1000 * update, (alone + beside / (jobs < 4 ? jobs : 4)) * update / 60 }'
}

# -----------------------------------------------------------------------------
# of the stages whose needs are met the first ones run, one a core

running=0 estimated=''
alone=2500 beside=11500              # work until SFT is there, and after it, in updates of the base model
trap 'ask TERM' EXIT
trap 'echo; say "stops when each stage has saved where it is (Ctrl-C again: at once)"; stop 130' INT TERM HUP
! finished base || estimated=yes
while ! finished $last || [ "$running" -gt 0 ]; do
    for i in ${!names[@]}; do
        if [ -n "${pids[i]}" ] && ! kill -0 "${pids[i]}" 2> /dev/null; then
            pids[i]='' running=$((running - 1))
            if ! finished "${names[i]}"; then
                say "failed    ${titles[i]}: the end of $logs/${names[i]}.txt is"
                tail -n 5 "$logs/${names[i]}.txt"
                stop 1
            fi
            report "$i"
        fi
    done
    for i in ${!names[@]}; do
        if [ -z "${pids[i]}" ] && [ "${needed[i]-}" ] && [ "$running" -lt "$jobs" ] &&
                ! finished "${names[i]}" && finished ${needs[i]}; then
            running=$((running + 1))
            start "$i"
        fi
    done
    [ "$estimated" ] || estimate
    sleep 0.2
done
case $last in
    eval_*) sed -n '/^|/p' "$logs/$last.txt" ;;
    *) sed '/^settings/d' "$logs/$last.txt" ;;
esac
if [ $last = table ]; then
    picture=out/demo$suffix.png
    runs=$(printf "out/demo_%s$suffix " $runs)
    if python assets/plot.py $runs --out=$picture > "$logs/picture.txt" 2>&1; then
        echo "picture: $picture"
    else
        tail -n 1 "$logs/picture.txt"
    fi
fi
