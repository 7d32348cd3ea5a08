"""
Return-conditioned RL, as Havrilla et al. 2024 (section 3) do it after the Decision Transformer (Chen et al. 2021, arXiv
2106.01345): no gradient of a reward, but a policy that reads beforehand how good its next step will be. A policy (the best of
Expert Iteration) draws solutions; a step is [GOOD] if at least half of some rollouts from its end reach the right answer, else
[BAD]; the pretrained base is fine-tuned on all these solutions, right ones and wrong ones, with a step's label before the step;
and at test time the label [GOOD] is put before every step. Where Expert Iteration throws the wrong solutions away, this learns
from them what a bad step looks like - if the policy learns what the labels mean, which the paper's authors doubted: so eval.py can
ask it for [BAD] steps, too.

What differs from the paper: sampled solutions that pass through a step's end count among its rollouts, which they are, and where
they settle the label, no rollout is drawn. With granularity = 'solution' there is one label a solution, its outcome, and
no rollout at all.

$ python rcrl.py config/demo_rcrl.py                     # CPU, after config/demo_ei.py
$ python rcrl.py config/demo_rcrl.py --init_from=resume  # goes on where a stopped run was
$ python rcrl.py config/gsm8k_smollm2_rcrl.py            # one GPU
$ torchrun --nproc_per_node=8 rcrl.py config/gsm8k_llama2_7b_rcrl.py    # eight
"""
import json
import math
import os
import random
import shutil
from collections import Counter

import torch

import eval as evaluation
import rewards
from config import Log, UserError, bar, leave, listen_for_stop, override, read_rows, read_run, resuming, start_run
from model import (Checkpoints, Transformer, asked_to_stop, config_from_hf, disk_needed, find_checkpoint, from_main, memory_needed, rank,
                   read_json, setup, wait_for_main, world_size)
from sample import Example, Sampler, check_room, check_same_tokenizer, load_tokenizer
from sft import finetune, n_learned, solution_examples

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # rows of train to sample, the first ones, by their final answers alone; 0: all
n_worked = 0              # rows of train whose human solutions are known, the first ones; 0: all
include_sft = True        # whether these join the solutions to learn from, all their steps [GOOD]
# policy
init_from = 'out/ei'      # the policy whose solutions are labelled, or 'resume'
base = ''                 # the pretrained checkpoint that fine-tuning starts from
# samples and labels
k = 4                     # solutions a question
temperature = 1.0         # of the solutions, and of the rollouts that judge their steps
max_new_tokens = 256      # budget of a solution
max_rows = 256            # samples decoded at a time
granularity = 'step'      # 'step': a label before every step; 'solution': one before the first, whether the answer is right
rollouts = 8              # samples from the end of a step that judge it, the solution itself among them
threshold = 0.5           # a step is [GOOD] if this share of them is right; paper: 0.5 (as recalled)
label_tokens = 'new'      # 'new': two more rows of the vocabulary; 'text': the plain text "[GOOD]" and "[BAD]"
unlabelled = 0.0          # share of solutions that are learned without labels; without any, condition = 'none' is a text never seen
# what is learned from: a share of 0 takes all there is
right_share = 0.75        # share of right solutions; the paper found an even mix of good and bad the worst (as recalled)
good_share = 0.0          # share of [GOOD] among the steps that are learned; the others are read, with their labels
# fine-tuning, as in sft.py
epochs = 4.0
max_steps = 0             # updates; 0: as many as `epochs` takes
batch_size = 128
micro_tokens = 16384
grad_checkpointing = False  # compute activations again in backward: about a third more time, and memory for one block's alone
shard = 'auto'            # over processes: 'ddp' (each has all weights), 'fsdp' (each has a part), or 'auto', by what fits
lora_rank = 0             # above 0: adapters of that rank learn and all else is frozen; the export has them merged, and beside
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
lr = 2e-5
min_lr = 2e-7
warmup = 0.03
weight_decay = 0.0
grad_clip = 1.0
save_interval = 0         # updates between states that a stopped run goes on from; 0: at every validation
# evaluation
eval_interval = 0         # updates between validations; 0: once an epoch
eval_problems = 256       # problems of the validation slice for maj@1 after [GOOD]
# run
keep_states = 1           # states that stay when the run has finished, e.g. to go on with more epochs; 0: none
out_dir = 'out/rcrl'
overwrite = False         # replace the run that out_dir holds
seed = 0
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'            # of the matrix products: 'auto', 'float32', 'bfloat16'; weights are fp32
compile = 'auto'          # 'on', 'off', or 'auto': on CUDA only
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# labels

def verdict(outcomes, rollouts, threshold):
    """What the outcomes so far (bools) of a step's `rollouts` say: True, the share `threshold` of all is right; False, that can no
    longer be; None, it is open."""
    needed = math.ceil(threshold * rollouts - 1e-9)  # a product of floats can end up just above a whole number
    if sum(outcomes) >= needed:
        return True
    return False if len(outcomes) - sum(outcomes) > rollouts - needed else None


def step_labels(sampler, responses, rollouts, threshold, max_new_tokens, temperature, seed):
    """-> ([[bool]], Counter): for each response whether each of its steps is good, and the rollouts drawn for each problem.

    A step's outcomes are those of the given responses that pass through its end, and where these leave it open, of as many fresh
    samples from there as make `rollouts`. The last step, which holds the answer, is as good as the answer is right."""
    places = [[rewards.step_prefix(r, end, sampler.tokenizer) for end in rewards.step_ends(r)[:-1]] for r in responses]
    outcomes = {place: [] for row in places for place in row}
    for r, row in zip(responses, places):
        for place in row:
            if len(outcomes[place]) < rollouts:
                outcomes[place].append(r.correct)
    unsettled = [place for place, so_far in outcomes.items() if verdict(so_far, rollouts, threshold) is None]
    counts = [rollouts - len(outcomes[place]) for place in unsettled]
    drawn = Counter()
    for place, count, new in zip(unsettled, counts, rewards.rollouts_from(sampler, unsettled, counts, max_new_tokens, temperature, seed)):
        outcomes[place] += new
        drawn[place[0]] += count
    return [[verdict(outcomes[place], rollouts, threshold) for place in row] + [r.correct] for r, row in zip(responses, places)], drawn


# -----------------------------------------------------------------------------
# the data set

def with_share(good, share, rng):
    """good: bools. -> the numbers, in order, of the largest random subset of which the share `share` is good; 0: of all."""
    if not share:
        return list(range(len(good)))
    yes, no = [i for i, g in enumerate(good) if g], [i for i, g in enumerate(good) if not g]
    n = min(len(yes) / share, len(no) / (1 - share) if share < 1 else math.inf)
    return sorted(rng.sample(yes, min(len(yes), round(n * share))) + rng.sample(no, min(len(no), round(n * (1 - share)))))


def labelled_example(prompt_ids, ids, ends, good, tokenizer, learned=None):
    """A solution's ids with a label before each line of a step, or before the first alone (tokenizer.labels), just as the
    sampler inserts them: after the prompt and after every token with a line break. ends: the number of each step's last id.
    good: a bool for each step; None: no labels. learned: the steps that are; None: all. Labels never are."""
    labels, out, unlearned, step, starts_line = tokenizer.labels, list(prompt_ids), [], 0, True
    for i, token in enumerate(ids):
        if i > ends[step]:
            step += 1
        if good is not None and starts_line and (i == 0 or labels.granularity == 'step'):
            label = labels.good if good[step] else labels.bad
            unlearned += range(len(out), len(out) + len(label))
            out += label
        if learned is not None and step not in learned:
            unlearned.append(len(out))
        out.append(token)
        starts_line = token in tokenizer.newline_ids
    return Example(out, len(prompt_ids), tuple(unlearned))


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume = from_main(lambda: resuming(init_from, out_dir))

    # 0. everything that can be wrong with the input, before anything is written
    for name, allowed in (('granularity', ('step', 'solution')), ('label_tokens', ('new', 'text'))):
        if settings[name] not in allowed:
            raise UserError(f'{name} is one of {allowed}, not {settings[name]!r}')
    if min(k, rollouts, eval_problems) < 1 or temperature <= 0 or not 0 < threshold <= 1:
        raise UserError('k, rollouts and eval_problems must be at least 1, temperature above 0, threshold above 0 and at most 1')
    if not (0 <= right_share <= 1 and 0 <= good_share <= 1 and 0 <= unlabelled < 1):
        raise UserError('right_share and good_share are from 0 (all there is) to 1, unlabelled is from 0 to below 1')
    if min(batch_size, micro_tokens) < 1 or epochs <= 0 or keep_states < 0:
        raise UserError('batch_size and micro_tokens must be at least 1, epochs above 0, keep_states 0 or more')
    if granularity == 'solution' and good_share:
        raise UserError("with granularity = 'solution' there are no labels of steps: right_share sets the mix")
    if lora_rank and label_tokens == 'new':
        raise UserError("lora_rank leaves the embedding as it is, so that new labels would not be learned; take label_tokens = 'text'")
    if not base:
        raise UserError('fine-tuning needs the checkpoint to start from: --base=out/demo_base')
    problems = rewards.load_problems(task, 'train')
    if not all(0 <= n <= len(problems) for n in (n_questions, n_worked)):
        raise UserError(f'n_questions and n_worked are from 0 (all) to {len(problems)}, the rows of {task} to train on')
    val_problems = rewards.load_problems(task, 'val')[:eval_problems]
    worked, questions = problems[:n_worked or None] if include_sft else [], problems[:n_questions or None]
    policy_from = read_run(out_dir)['init_from'] if resume else init_from
    tok = load_tokenizer(policy_from, conditioned=False)
    base_config = config_from_hf(read_json(os.path.join(find_checkpoint(base), 'config.json')), base)
    base_tok = load_tokenizer(base, conditioned=False)
    check_same_tokenizer(base_tok, tok, f'{base} and {policy_from}')
    base_tok.add_labels(granularity, label_tokens == 'new')  # can they be added? Not after hours of sampling
    sampler = Sampler(Transformer.from_pretrained(policy_from, device, dtype).requires_grad_(False), tok, max_rows, dtype)
    prompts, val_prompts = ([tok.encode_prompt(rewards.prompt(p.question)) for p in some] for some in (questions, val_problems))
    check_room(prompts, max_new_tokens, sampler.model.config.block_size)
    check_room(val_prompts, max_new_tokens, base_config.block_size, len(base_tok.labels.good))
    start_run(settings, resume, overwrite)
    listen_for_stop()
    log = Log(out_dir, resume)
    print(memory_needed([sampler.model], dtype, 0, 0, max_rows, max(map(len, prompts)), max_new_tokens))
    print(disk_needed(base_config, 2 + (label_tokens == 'new'), keep_states, lora_rank))

    # 1. solutions: right ones and wrong ones
    found = evaluation.explore(sampler, questions, os.path.join(out_dir, 'samples.jsonl'), k, max_new_tokens, temperature, seed, 'sample')
    groups = rewards.responses_of(questions, found, tok)

    # 2. is a step good? A line a question, written as it comes: of each of its solutions the labels of the steps
    path = os.path.join(out_dir, 'labels.jsonl')
    rows = from_main(lambda: read_rows(path))
    if granularity == 'step':
        chunk = world_size() * max(1, 4 * max_rows // (2 * k))  # questions a time: enough rollouts to fill some batches
        progress = bar(desc='label', total=len(questions))
        progress.update(len(rows))
        with open(path if rank() == 0 else os.devnull, 'a') as f:
            for start in range(len(rows), len(questions), chunk):
                todo = groups[start:start + chunk]
                judged, drawn = step_labels(sampler, [r for group in todo for r in group], rollouts, threshold, max_new_tokens,
                                            temperature, seed * 1000 + 1)
                judged = iter(judged)
                rows += [{'labels': [next(judged) for _ in group], 'rollouts': drawn[p]} for p, group in zip(questions[start:], todo)]
                f.writelines(json.dumps(row) + '\n' for row in rows[start:])
                f.flush()
                progress.update(len(todo))
                if asked_to_stop():
                    progress.close()
                    leave(f' after the labels of {len(rows):,} of {len(questions):,} questions')
        progress.close()
    else:
        rows = [{'labels': [[r.correct] * len(r.lines) for r in group], 'rollouts': 0} for group in groups]
    del sampler  # and the policy with it: its memory is needed now

    # 3. the data set: each solution once, in the wanted mix of right and wrong ones and of good and bad steps
    solutions = {}  # (question, ids) -> (the response, its labels)
    for p, e in zip(worked, solution_examples(worked, tok)):
        ids = e.ids[e.n_prompt:]
        solutions[p.question, tuple(ids)] = rewards.Response(p, '', ids, rewards.step_lines(ids, tok), True, True), None
    for group, row in zip(groups, rows):
        for r, labels in zip(group, row['labels']):
            solutions.setdefault((r.problem.question, tuple(r.ids)), (r, labels))
    tok.add_labels(granularity, label_tokens == 'new')
    start_from = base
    if label_tokens == 'new':  # the base with two more rows
        start_from = os.path.join(out_dir, 'start')
        if rank() == 0:
            Transformer.from_pretrained(base).add_tokens(tok.vocab_size, 2).save_pretrained(start_from, tok)
        wait_for_main()
    model = Transformer.from_pretrained(start_from, device, dtype if lora_rank else torch.float32, lora_rank=lora_rank,
                                        lora_alpha=lora_alpha, shard=shard, product_dtype=dtype)

    def example(r, labels, learned):
        return labelled_example(tok.encode_prompt(rewards.prompt(r.problem.question)), r.ids, rewards.step_ends(r), labels, tok, learned)

    fits = [(r, labels or [True] * len(r.lines)) for r, labels in solutions.values()]
    fits = [(r, labels) for r, labels in fits if len(example(r, labels, None).ids) <= model.config.block_size + 1]
    if len(fits) < len(solutions):
        print(f'left out: {len(solutions) - len(fits)} of {len(solutions)} solutions, with their labels longer than the context of '
              f'{model.config.block_size}')
    rng = random.Random(seed)
    chosen = [fits[i] for i in with_share([r.correct for r, _ in fits], right_share, rng)]
    steps = [(i, step, good) for i, (_, labels) in enumerate(chosen) for step, good in enumerate(labels)]
    learned = [set() for _ in chosen]
    for n in with_share([good for _, _, good in steps], good_share, rng):
        learned[steps[n][0]].add(steps[n][1])
    for (_, labels), which in zip(chosen, learned):
        if not which:  # a solution of which nothing would be left keeps its last step: else right_share would no longer hold
            which.add(len(labels) - 1)
    dataset = [example(r, labels if rng.random() >= unlabelled else None, which) for (r, labels), which in zip(chosen, learned)]
    if not dataset:
        raise UserError(f'nothing to learn from: of {len(fits):,} solutions {sum(r.correct for r, _ in fits):,} are right, and '
                        f'right_share = {right_share} leaves none (0 takes all there is)')
    taken = [labels[step] for (_, labels), which in zip(chosen, learned) for step in which]
    log(0, solutions=len(fits), solutions_right=sum(r.correct for r, _ in fits) / len(fits), dataset=len(dataset),
        dataset_right=sum(r.correct for r, _ in chosen) / len(chosen), steps=len(steps), steps_good=sum(good for _, _, good in steps) / len(steps),
        learned_steps=len(taken), learned_good=sum(taken) / len(taken), learned_tokens=n_learned(dataset),
        rollouts_drawn=sum(row['rollouts'] for row in rows))

    # 4. fine-tune the base on them, labels read and not learned
    model.grad_checkpointing, state = grad_checkpointing, {'best': -1.0}
    print(memory_needed([model], dtype, micro_tokens, max(len(e.ids) for e in dataset), max_rows,
                        max(e.n_prompt for e in dataset), max_new_tokens))

    def maj1(policy, condition):
        return evaluation.greedy_accuracy(Sampler(policy, tok, max_rows, dtype, condition), val_problems, max_new_tokens)

    def validate(step):
        """maj@1 after [GOOD]; keeps the best policy. Ties go to the later step."""
        good, error = maj1(model.for_sampling(dtype), 'good')
        log(step, val_maj1=good, val_maj1_error=error)
        if good >= state['best']:
            state['best'] = good
            model.save_pretrained(os.path.join(out_dir, 'best'), tok)

    finetune(model, dataset, epochs=epochs, max_steps=max_steps, batch_size=batch_size, micro_tokens=micro_tokens, lr=lr, min_lr=min_lr,
             warmup=warmup, weight_decay=weight_decay, grad_clip=grad_clip, seed=seed, dtype=dtype,
             compile=compile == 'on' or compile == 'auto' and device.type == 'cuda', eval_interval=eval_interval, evaluate=validate,
             log=log, out_dir=out_dir, save_interval=save_interval, state=state, resume=resume, desc='rcrl')
    model.save_pretrained(os.path.join(out_dir, 'last'), tok)

    # 5. do the labels mean anything?
    del model
    wait_for_main()
    best = Transformer.from_pretrained(os.path.join(out_dir, 'best'), device, dtype)
    after = {condition: maj1(best, condition)[0] for condition in ('good', 'bad', 'none')}
    log(state['step'], **{f'val_maj1_{condition}': accuracy for condition, accuracy in after.items()})
    if rank() == 0:
        shutil.rmtree(os.path.join(out_dir, 'start'), ignore_errors=True)
    Checkpoints(out_dir).keep(keep_states)
    print(f'maj@1 on the validation slice after [GOOD] {after["good"]:.3f}, after [BAD] {after["bad"]:.3f}, without a label {after["none"]:.3f}: '
          f'{out_dir}/best')
