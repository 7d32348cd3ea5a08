"""
Expert Iteration (Anthony et al. 2017; Havrilla et al. 2024, section 3), the paper's best algorithm. In round
i the policy draws K solutions of every training question. Those with the right answer are kept, one for each
sequence of equations, and join what earlier rounds found: D_i = R_i + D_{i-1}, with the human solutions as
D_0. The pretrained base is fine-tuned on D_i from the start again, and draws the next round's solutions.
There is no gradient of a reward: it is a filter, and learning is SFT on what passes. With reward = 'orm' the
filter is an outcome reward model's score, and answers are not looked at; 'random' is the filter's control.

From a pretrained model without SFT, few_shot = 2 shows it worked examples in the first round. Later the
policy reads only the question. Not in the paper: solutions are the same if their annotated equations are; the
first one is kept.

$ python ei.py config/demo_ei.py                     # CPU, after config/demo_sft.py
$ python ei.py config/demo_ei.py --init_from=resume  # goes on where it stopped, within samples too
$ python ei.py config/gsm8k_smollm2_ei.py            # one GPU
$ torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_7b_ei.py    # eight
"""
import os
import shutil
from collections import Counter
from itertools import chain, islice
from random import Random

from config import UserError, override
from config.run import first_line, from_main, origin, rank, replace_folder, setup, start_run, wait_for_main
from data import equations, first_rows, load_problems, validation_rows
from eval import (diagnose, encode_prompts, explore, final_scores, greedy_accuracy, load_reward_model,
                  print_diagnosis, unique_equations)
from model import Transformer
from sample import Sampler, check_room, disk_needed, load_tokenizer, memory_needed, n_learned
from sft import base_config, finetune, fitting, load_learner, solution_examples, training

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # first rows of train to explore, by their answers only; 0: all
n_worked = 0              # first rows of train whose human solutions are known (D_0); 0: all
include_sft = True        # whether D_0 holds them, or is empty
# policy
init_from = 'out/sft'     # the policy that draws the first round's samples, or 'resume'
base = ''                 # the pretrained checkpoint that reset = 'base' starts from
reset = 'base'            # 'base' | 'previous'; what a round fine-tunes: the base (paper) or the last policy
prompt_form = 'auto'      # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
system = ''               # first message of chat prompts; '': the checkpoint's, or the template's own
few_shot = 0              # worked examples before a question in round 1; for a base model, 2 (paper)
# exploration
n_rounds = 2              # paper: 2 after SFT (as recalled), 4 to 5 without (at least 1)
k = 96                    # samples a question and round; paper: 96; 4 works too (as recalled) (at least 1)
temperature = 1.0         # paper: 1.0 (as recalled) (above 0)
max_new_tokens = 256      # budget of a sample, which has to finish (at least 1)
reward = 'sparse'         # 'sparse' | 'orm' | 'random'; by the answer, a model's score, or (control) neither
reward_model = ''         # an outcome reward model: python rewards.py config/demo_orm.py
tau = 1.0                 # the least return that is kept; with 'orm' below 1, e.g. 0.8 (above 0)
max_per_question = 0      # kept over all rounds; 0: no cap (at least 0)
max_rows = 256            # samples decoded at a time (at least 1)
# fine-tuning, as in sft.py
epochs = 4.0              # (above 0)
max_steps = 0             # updates a round; 0: as many as `epochs` takes (at least 0)
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
save_interval = 500       # updates between states to resume from; 0: once an epoch (at least 0)
# evaluation
eval_problems = 256       # of the validation slice, for maj@1 after each round (at least 1)
# run
out_dir = 'out/ei'
overwrite = False         # replace the run in out_dir
seed = 0
tracker = 'none'          # 'none' | 'tensorboard' | 'trackio' | 'wandb'; where the log also goes
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16'; of products; what learns is fp32
compile = 'auto'          # 'auto' | 'on' | 'off'; 'auto': on CUDA
# -----------------------------------------------------------------------------

def solution_key(text):
    """What makes two solutions the same: their equations, or where there are none their text."""
    return equations(text) or (text.strip(),)

def returns_of(solutions, scorer, max_tokens, dtype):
    """What each solution is filtered by: whether it is right, or finished, or the reward model's score."""
    if scorer is None:
        return [float(s.finished if reward == 'random' else s.correct) for s in solutions]
    return final_scores(scorer, solutions, max_tokens, dtype)

def select(solutions, seen, n_kept, cap):
    """Those of one question's solutions that are new by their equations, within the cap (0: none). seen: the
    question's keys so far, extended in place. n_kept: how many earlier rounds kept."""
    kept = []
    for solution in solutions:
        key = solution_key(solution.text)
        if key not in seen and not (cap and n_kept + len(kept) >= cap):
            seen.add(key)
            kept.append(solution)
    return kept

def at_random(finished, seen, rng):
    """The control of the filter: of one question's finished solutions, right or wrong, that are new by their
    equations, as many as are right and new. seen: the question's keys so far. rng: a random.Random."""
    n = len(select([s for s in finished if s.correct], set(seen), 0, 0))
    return rng.sample(select(finished, set(seen), 0, 0), n)

def filtered(found, scorer, seen, n_kept, context, round_seed):
    """Filters and de-duplicates a round's solutions (found: a list a question) -> (those that join, the
    round's counts). seen, n_kept: as in select, for each question; updated in place."""
    joined, counts, question = [], Counter(), 0
    while groups := list(islice(found, max(1, 4 * max_rows // k))):  # some questions at a time
        returns = iter(returns_of(list(chain(*groups)), scorer, micro_tokens, dtype))
        for group in groups:
            passed = [s for s, value in zip(group, returns) if value >= tau]
            fits = [s for s in passed if len(s.example.ids) <= context + 1]
            rng = Random(f'{round_seed} {question}')
            chosen = at_random(fits, seen[question], rng) if reward == 'random' else fits
            kept = select(chosen, seen[question], n_kept[question], max_per_question)
            joined += kept
            n_kept[question] += len(kept)
            question += 1
            n_right = sum(s.correct for s in group)
            counts.update(samples=len(group), correct=n_right, solved=n_right > 0,
                          truncated=sum(not s.finished for s in group), too_long=len(passed) - len(fits),
                          equations=unique_equations(s.text for s in group),
                          new_right=sum(s.correct for s in kept))
    return joined, counts

def keep_round(round_dir, best_dir):
    """Copies a round's checkpoint, as it has learned, to best/, whole or not at all."""
    tmp = best_dir + '.tmp'
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        shutil.copytree(round_dir, tmp)
        replace_folder(tmp, best_dir)
    except OSError as error:  # a full disk, most often
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f'{best_dir}: not written ({first_line(error)}); the old one is whole') from None

def check_settings():
    """UserError for settings that don't go together."""
    if reset == 'base' and not base:
        raise UserError("reset = 'base' needs the checkpoint to start from: --base=..., or --reset=previous")
    if (reward == 'orm') != bool(reward_model):
        raise UserError("reward is 'sparse' or 'random', or 'orm' with a reward_model")
    if reward == 'orm' and tau >= 1:
        raise UserError(f"{tau = } with reward = 'orm' keeps nothing: a score is below 1")


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume, policy_from = origin(init_from, out_dir)

    # everything that can be wrong with the input, before anything is written
    check_settings()
    problems = load_problems(task, 'train')
    questions = first_rows(problems, n_questions, 'n_questions')
    worked = first_rows(problems, n_worked, 'n_worked') if include_sft else []
    shown, val_problems = validation_rows(task, few_shot, eval_problems)
    tok = load_tokenizer(policy_from, conditioned=False).in_form(prompt_form, system)
    policy, scorer = Transformer.from_pretrained(policy_from, device, dtype), None
    context, learner = policy.config.block_size, policy.config  # learner: the shape of what is fine-tuned
    if reset == 'base':
        learner = base_config(base, tok, policy_from)
    if reward == 'orm':
        scorer = load_reward_model(reward_model, policy.config, tok, device, dtype, kinds=('orm',))
    prompts, room = encode_prompts(questions, tok), context - max_new_tokens
    too_long = sum(len(ids) > room for ids in encode_prompts(questions, tok, shown)) if few_shot else 0
    if too_long == len(questions):
        raise UserError(f'{few_shot = } and {max_new_tokens = }: no question fits the context of {context}')
    check_room(prompts, max_new_tokens, min(context, learner.block_size))
    check_room(encode_prompts(val_problems, tok, shown), max_new_tokens, context)
    check_room(encode_prompts(val_problems, tok), max_new_tokens, learner.block_size)
    log, n_round = start_run(settings, resume), len(questions) * k
    print(f'{len(questions):,} questions * {k} samples * {n_rounds} rounds = {n_round * n_rounds:,} samples; '
          f'D_0 has {len(worked):,} worked solutions')
    print(disk_needed(learner, n_rounds + 1, 0, lora_rank))
    if too_long:
        print(f'{too_long:,} questions are too long with {few_shot} examples, and wait for round 2')
    if few_shot:
        sampler = Sampler(policy, tok, max_rows, dtype)
        maj1, error = greedy_accuracy(sampler, val_problems, max_new_tokens, shown)
        log(0, prompted_maj1=maj1, prompted_maj1_error=error)

    # D_0. A sampled solution joins as the ids that were drawn, never decoded and encoded again.
    examples = solution_examples(worked, tok)
    dataset, seen = fitting(examples, learner.block_size, 'worked solutions'), [set() for _ in questions]
    for p, e, keys in zip(worked, examples, seen):
        keys |= {solution_key(p.solution)} if len(e.ids) <= learner.block_size + 1 else set()
    n_kept, updates, best, previous = [0] * len(questions), 0, -1.0, policy_from
    judges = [scorer] if scorer else []

    for round_number in range(1, n_rounds + 1):
        round_dir, name = f'{out_dir}/round{round_number}', f'round {round_number}'
        # 1. explore: K samples of every question
        print(memory_needed([policy.requires_grad_(False), *judges], dtype, 0, 0, max_rows,
                            max(map(len, prompts)), max_new_tokens))
        sampler, round_seed = Sampler(policy, tok, max_rows, dtype), seed * 1000 + round_number
        found = explore(sampler, questions, f'{out_dir}/samples_round{round_number}.jsonl', k, max_new_tokens,
                        temperature, round_seed, f'{name}: explore', shown if round_number == 1 else ())
        first = list(islice(found, 256))
        print_diagnosis(diagnose(list(chain(*first)), k, max_new_tokens, 'train questions'),
                        round_number == 1)
        # 2. filter by the return, 3. de-duplicate and 4. accumulate: D_i = R_i + D_{i-1}
        joined, counts = filtered(chain(first, found), scorer, seen, n_kept, learner.block_size, round_seed)
        dataset += [s.example for s in joined]
        n_samples, share_truncated = counts['samples'], counts['truncated'] / counts['samples']
        if counts['too_long']:
            print(f'left out: {counts["too_long"]:,} of {n_samples:,} samples, longer than the context')
        if not joined:
            print(f'{name}: no new solution has a return of {tau} or more')
        if not dataset:
            passed = f'scores {tau}' if reward == 'orm' else 'is right'
            raise UserError(f'{name}: none of {n_samples:,} samples {passed}: nothing to learn from')
        log(updates, round=round_number, samples_drawn=round_number * n_round,
            share_correct=counts['correct'] / n_samples, share_truncated=share_truncated,
            unique_equations=counts['equations'] / len(questions), solved=counts['solved'] / len(questions),
            new_solutions=len(joined), new_right=counts['new_right'] / max(1, len(joined)),
            dataset=len(dataset), dataset_tokens=n_learned(dataset))

        # 5. distil: fine-tune from the base again, unless a stopped run had done it
        if from_main(lambda: os.path.exists(f'{round_dir}/config.json')):
            updates += max_steps or -int(-epochs * len(dataset) // batch_size)
        else:
            del policy, sampler  # their memory is needed now
            policy = load_learner(base if reset == 'base' else previous, settings, device, dtype)
            print(memory_needed([policy, *judges], dtype, micro_tokens, max(len(e.ids) for e in dataset)))
            start = updates
            updates += finetune(policy, dataset, resume=resume, desc=f'{name}: fine-tune',
                                log=lambda step, **metrics: log(start + step, round=round_number, **metrics),
                                **training(settings, device, dtype) | {
                                    'seed': round_seed, 'out_dir': f'{round_dir}_training'})
            policy.save_pretrained(round_dir, tok)
            del policy
        if rank() == 0:
            shutil.rmtree(f'{round_dir}_training', ignore_errors=True)
        wait_for_main()

        # 6. how good is it? The best round is the result. Ties go to the later one.
        policy, previous = Transformer.from_pretrained(round_dir, device, dtype), round_dir
        maj1, error = greedy_accuracy(Sampler(policy, tok, max_rows, dtype), val_problems, max_new_tokens)
        log(updates, round=round_number, val_maj1=maj1, val_maj1_error=error)
        if maj1 >= best:
            best = maj1
            from_main(lambda: keep_round(round_dir, f'{out_dir}/best'))
    print(f'best round by validation maj@1 ({best:.3f}): {out_dir}/best')
