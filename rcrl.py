"""
Return-conditioned RL, as Havrilla et al. 2024 (section 3) do it after the Decision Transformer (Chen et al.
2021, arXiv 2106.01345): the policy reads beforehand how good its next step will be. A policy (the best of
Expert Iteration) draws solutions. A step is [GOOD] if at least half of some rollouts from its end reach the
right answer, else [BAD]. The pretrained base is fine-tuned on all solutions, right and wrong, with its label
before each step; at test time every step is labelled [GOOD]. So it can learn from wrong solutions, if it
learns what the labels mean, which the paper's authors doubted: eval.py can ask for [BAD] steps, too.

Not in the paper: sampled solutions that pass through a step's end count among its rollouts, and where they
settle the label none is drawn. granularity = 'solution' has one label a solution, its outcome.

$ python rcrl.py config/demo_rcrl.py                     # CPU, after config/demo_ei.py
$ python rcrl.py config/demo_rcrl.py --init_from=resume  # goes on where a stopped run was
$ python rcrl.py config/gsm8k_smollm2_rcrl.py            # one GPU
$ torchrun --nproc_per_node=8 rcrl.py config/gsm8k_llama2_7b_rcrl.py    # eight
"""
import math
import random
import shutil
from itertools import chain
from statistics import fmean

from config import UserError, override
from config.run import (Checkpoints, from_main, origin, rank, read_rows, setup, start_run, wait_for_main,
                        world_size)
from data import first_rows, load_problems
from eval import encode_prompts, explore, greedy_accuracy, judge, resumable
from model import Transformer
from rewards import rollouts_from, step_prefixes
from sample import Example, Sample, Sampler, check_room, disk_needed, load_tokenizer, memory_needed, n_learned
from sft import base_config, finetune, load_learner, solution_examples, training

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # rows of train to sample, the first ones; only their answers are used; 0: all
n_worked = 0              # rows of train whose human solutions are known, the first ones; 0: all
include_sft = True        # whether these join the solutions to learn from, all their steps [GOOD]
# policy
init_from = 'out/ei'      # the policy whose solutions are labelled, or 'resume'
base = ''                 # the pretrained checkpoint that fine-tuning starts from
prompt_form = 'auto'      # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
# samples and labels
k = 4                     # solutions a question (at least 1)
temperature = 1.0         # of the solutions, and of the rollouts that judge their steps (above 0)
max_new_tokens = 256      # budget of a solution (at least 1)
max_rows = 256            # samples decoded at a time (at least 1)
granularity = 'step'      # 'step' | 'solution'; a label before every step, or one: is the answer right?
rollouts = 8              # samples from a step's end that judge it, the solution among them (at least 1)
threshold = 0.5           # share of them that makes it [GOOD]; paper: 0.5 (as recalled) (above 0, at most 1)
label_tokens = 'new'      # 'new' | 'text'; two new rows of the vocabulary, or the text "[GOOD]" and "[BAD]"
unlabelled = 0.0          # share of solutions learned without labels (at least 0, below 1)
# what is learned from: a share of 0 takes all there is
right_share = 0.75        # share of right solutions; paper: an even mix was the worst (as recalled) (0 to 1)
good_share = 0.0          # share of [GOOD] among the steps that are learned; the others are read (0 to 1)
# fine-tuning, as in sft.py
epochs = 4.0              # (above 0)
max_steps = 0             # updates; 0: as many as `epochs` takes (at least 0)
batch_size = 128          # (at least 1)
micro_tokens = 16384      # (at least 1)
grad_checkpointing = False
shard = 'auto'            # 'auto' | 'none' | 'ddp' | 'fsdp'
lora_rank = 0
lora_alpha = 32.0
lr = 2e-5
min_lr = 2e-7
warmup = 0.03
weight_decay = 0.0
grad_clip = 1.0
save_interval = 0         # updates between states to resume from; 0: at every validation (at least 0)
# evaluation
eval_interval = 0         # updates between validations; 0: once an epoch (at least 0)
eval_problems = 256       # problems of the validation slice for maj@1 after [GOOD] (at least 1)
# run
keep_states = 1           # states that stay when the run has finished, e.g. for more epochs (at least 0)
out_dir = 'out/rcrl'
overwrite = False         # replace the run that out_dir holds
seed = 0
tracker = 'none'          # 'none' | 'tensorboard' | 'trackio' | 'wandb'; where the log also goes
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16'; of the matrix products; weights are fp32
compile = 'auto'          # 'auto' | 'on' | 'off'; 'auto': on CUDA
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# labels

def verdict(outcomes, rollouts, threshold):
    """What the outcomes so far (bools) of a step's `rollouts` say: True, the share `threshold` of all is
    right; False, that is out of reach; None, it is open."""
    needed = math.ceil(threshold * rollouts - 1e-9)  # 0.28 * 25 is a little above 7
    if sum(outcomes) >= needed:
        return True
    return False if len(outcomes) - sum(outcomes) > rollouts - needed else None

def step_labels(sampler, groups, rollouts, threshold, max_new_tokens, temperature, seed):
    """groups: lists of solutions. -> for each {'labels': whether each step of each solution is good,
    'rollouts': how many were drawn}.

    A step's outcomes are those of the solutions that pass through its end, and where these leave it open, of
    as many fresh samples as make `rollouts`. The last step is as good as the answer is right."""
    given, problems = {}, {}
    for s in chain(*groups):
        for start in step_prefixes(s):
            problems[start] = s.problem
            if len(given.setdefault(start, [])) < rollouts:
                given[start].append(s.correct)
    missing = {start: (problems[start], rollouts - len(outcomes)) for start, outcomes in given.items()
               if verdict(outcomes, rollouts, threshold) is None}
    fresh = rollouts_from(sampler, missing, max_new_tokens, temperature, seed)
    good = {start: verdict(outcomes + fresh.get(start, []), rollouts, threshold)
            for start, outcomes in given.items()}
    rows = []
    for group in groups:
        starts = [step_prefixes(s) for s in group]
        labels = [[good[start] for start in each] + [s.correct] for s, each in zip(group, starts)]
        n_drawn = sum(len(fresh.get(start, ())) for start in set(chain(*starts)))
        rows.append({'labels': labels, 'rollouts': n_drawn})
    return rows


# -----------------------------------------------------------------------------
# the data set

def with_share(good, share, rng):
    """good: bools. -> the indices, in order, of the largest random subset of which `share` is good; 0: of
    all."""
    if not share:
        return list(range(len(good)))
    yes, no = [i for i, g in enumerate(good) if g], [i for i, g in enumerate(good) if not g]
    n = min(len(yes) / share, len(no) / (1 - share) if share < 1 else math.inf)
    n_yes, n_no = min(len(yes), round(n * share)), min(len(no), round(n * (1 - share)))
    return sorted(rng.sample(yes, n_yes) + rng.sample(no, n_no))

def labelled_example(solution, good, tokenizer, learned=None):
    """A Solution's ids with a label where the sampler inserts one: after the prompt and, for labels of steps,
    after every token with a line break. good: a bool a step; None: no labels. learned: the steps that are
    learned; None: all. Labels never are."""
    told, ends, step, starts_line = tokenizer.labels, solution.ends, 0, True
    ids, labels = [], []
    for i, token in enumerate(solution.ids):
        if i > ends[step]:
            step += 1
        if good is not None and starts_line and (i == 0 or told.granularity == 'step'):
            label = told.good if good[step] else told.bad
            ids += label
            labels += [math.nan] * len(label)
        ids.append(token)
        labels.append(1.0 if learned is None or step in learned else math.nan)
        starts_line = token in tokenizer.newline_ids
    return Example(solution.prompt_ids + ids, len(solution.prompt_ids), labels)

def choose(labelled, right_share, good_share, rng):
    """[(solution, labels)] -> [(solution, labels, learned steps)] in the wanted mix of right and wrong
    solutions and of good and bad steps. One that would keep none keeps its last step, so that right_share
    holds."""
    chosen = [labelled[i] for i in with_share([s.correct for s, _ in labelled], right_share, rng)]
    places = [(i, step) for i, (_, labels) in enumerate(chosen) for step in range(len(labels))]
    learned = [set() for _ in chosen]
    for place in with_share([chosen[i][1][step] for i, step in places], good_share, rng):
        i, step = places[place]
        learned[i].add(step)
    return [(s, labels, steps or {len(labels) - 1}) for (s, labels), steps in zip(chosen, learned)]

def check_settings():
    """UserError for settings that don't go together."""
    if granularity == 'solution' and good_share:
        raise UserError("granularity = 'solution' has no good_share of steps: right_share sets the mix")
    if lora_rank and label_tokens == 'new':
        raise UserError("lora_rank leaves the embedding as it is: new labels would not be learned; take "
                        "label_tokens = 'text'")
    if not base:
        raise UserError('fine-tuning needs the checkpoint to start from: --base=out/demo_base')


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume, policy_from = origin(init_from, out_dir)

    # 0. everything that can be wrong with the input, before anything is written
    check_settings()
    problems, val_problems = load_problems(task, 'train'), load_problems(task, 'val')[:eval_problems]
    questions = first_rows(problems, n_questions, 'n_questions')
    worked = first_rows(problems, n_worked, 'n_worked')
    if not include_sft:
        worked = []
    tok, base_tok = (load_tokenizer(path, conditioned=False) for path in (policy_from, base))
    tok.in_form(prompt_form)
    base_tok.add_labels(granularity, label_tokens == 'new')  # can they be added? Not after hours of sampling
    learner, n_label = base_config(base, tok, policy_from), len(base_tok.labels.good)
    policy = Transformer.from_pretrained(policy_from, device, dtype).requires_grad_(False)
    sampler = Sampler(policy, tok, max_rows, dtype)
    prompts = encode_prompts(questions, tok)
    check_room(prompts, max_new_tokens, policy.config.block_size)
    check_room(encode_prompts(val_problems, tok), max_new_tokens, learner.block_size, n_label)
    log = start_run(settings, resume)
    print(memory_needed([policy], dtype, 0, 0, max_rows, max(map(len, prompts)), max_new_tokens))
    print(disk_needed(learner, 2 + (label_tokens == 'new'), keep_states, lora_rank))

    # 1. solutions, right and wrong
    groups = [[s for s in group if s.ids] for group in explore(
        sampler, questions, f'{out_dir}/samples.jsonl', k, max_new_tokens, temperature, seed, 'sample')]

    # 2. is a step good? A line a question
    if granularity == 'step':
        path = f'{out_dir}/labels.jsonl'
        chunk = world_size() * max(1, 2 * max_rows // k)  # enough rollouts to fill some batches
        resumable(path, len(questions), chunk, lambda i, j: step_labels(
            sampler, groups[i:j], rollouts, threshold, max_new_tokens, temperature, seed * 1000 + 1), 'label')
        rows = from_main(lambda: read_rows(path))
    else:
        rows = [{'labels': [[s.correct] * len(s.lines) for s in group], 'rollouts': 0} for group in groups]
    del policy, sampler  # their memory is needed now

    # 3. the data set: each solution once, in the wanted mix
    solutions = {}  # (question, ids) -> (solution, labels of its steps)
    for p, e in zip(worked, solution_examples(worked, tok)):
        s = judge(p, Sample(e.ids[:e.n_prompt], e.ids[e.n_prompt:], [], True), tok)
        solutions[p.question, tuple(s.ids)] = s, [True] * len(s.lines)
    for s, labels in zip(chain(*groups), chain(*(row['labels'] for row in rows))):
        solutions.setdefault((s.problem.question, tuple(s.ids)), (s, labels))
    tok.add_labels(granularity, label_tokens == 'new')
    start_from = f'{out_dir}/start' if label_tokens == 'new' else base  # start: the base with two more rows
    if start_from != base and rank() == 0:
        Transformer.from_pretrained(base).add_tokens(tok.vocab_size, 2).save_pretrained(start_from, tok)
    wait_for_main()
    model = load_learner(start_from, settings, device, dtype)
    labelled = [(s, labels) for s, labels in solutions.values()
                if len(labelled_example(s, labels, tok).ids) <= model.config.block_size + 1]
    if len(labelled) < len(solutions):
        print(f'left out: {len(solutions) - len(labelled)} of {len(solutions)} solutions, with their labels '
              f'longer than the context of {model.config.block_size}')
    rng = random.Random(seed)
    chosen = choose(labelled, right_share, good_share, rng)
    dataset = [labelled_example(s, labels if rng.random() >= unlabelled else None, tok, steps)
               for s, labels, steps in chosen]
    if not dataset:
        raise UserError(f'nothing to learn from: of {len(labelled):,} solutions '
                        f'{sum(s.correct for s, _ in labelled):,} are right, and right_share = {right_share} '
                        'leaves none (0 takes all there is)')
    good = [label for _, labels, _ in chosen for label in labels]
    taken = [labels[step] for _, labels, steps in chosen for step in steps]
    n_rollouts = sum(row['rollouts'] for row in rows)
    log(0, samples_drawn=len(questions) * k + n_rollouts, rollouts_drawn=n_rollouts, solutions=len(labelled),
        solutions_right=fmean(s.correct for s, _ in labelled), dataset=len(dataset),
        dataset_right=fmean(s.correct for s, _, _ in chosen), steps=len(good), steps_good=fmean(good),
        learned_steps=len(taken), learned_good=fmean(taken), learned_tokens=n_learned(dataset))

    # 4. fine-tune the base on them: labels are read and not learned
    print(memory_needed([model], dtype, micro_tokens, max(len(e.ids) for e in dataset), max_rows,
                        max(e.n_prompt for e in dataset), max_new_tokens))
    state = {'best': -1.0}

    def validate(step):
        """maj@1 after [GOOD]; keeps the best policy. Ties go to the later step."""
        sampler = Sampler(model.for_sampling(dtype), tok, max_rows, dtype)
        accuracy, error = greedy_accuracy(sampler, val_problems, max_new_tokens)
        log(step, val_maj1=accuracy, val_maj1_error=error)
        if accuracy >= state['best']:
            state['best'] = accuracy
            model.save_pretrained(f'{out_dir}/best', tok)

    finetune(model, dataset, **training(settings, device, dtype), evaluate=validate, log=log, state=state,
             resume=resume, desc='rcrl')
    model.save_pretrained(f'{out_dir}/last', tok)

    # 5. do the labels mean anything?
    del model
    wait_for_main()
    best, after = Transformer.from_pretrained(f'{out_dir}/best', device, dtype), {}
    for condition in ('good', 'bad', 'none'):
        sampler = Sampler(best, tok, max_rows, dtype, condition)
        after[condition], _ = greedy_accuracy(sampler, val_problems, max_new_tokens)
    log(state['step'], **{f'val_maj1_{condition}': accuracy for condition, accuracy in after.items()})
    if rank() == 0:
        shutil.rmtree(f'{out_dir}/start', ignore_errors=True)
    Checkpoints(out_dir).keep(keep_states)
    print(f'maj@1 on the validation slice after [GOOD] {after["good"]:.3f}, after [BAD] {after["bad"]:.3f}, '
          f'without a label {after["none"]:.3f}: {out_dir}/best')
