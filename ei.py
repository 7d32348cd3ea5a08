"""
Expert Iteration (Anthony et al. 2017; Havrilla et al. 2024, section 3), the paper's best algorithm. In round i the policy
draws K solutions of every training question; those with the right final answer are kept, one for each distinct sequence of
equations; they join all that earlier rounds found, D_i = R_i + D_{i-1}, with the human solutions as D_0; and the pretrained
base is fine-tuned on D_i from the start again. The round's model draws the next round's solutions. There is no gradient of
a reward anywhere: the reward is a filter, and learning is SFT on what passes it. With reward = 'orm' the filter is an outcome
reward model's score, and no final answer is looked at.

From a pretrained model without any SFT, few_shot = 2 shows it worked examples in the first round; from the second on the policy
has learned the form from its own right solutions, and reads the question alone.

What differs from the paper: de-duplication by the exact sequence of annotated equations per question, the first one kept.

$ python ei.py config/demo_ei.py                     # CPU, after config/demo_sft.py
$ python ei.py config/demo_ei.py --init_from=resume  # goes on where a stopped run was, within a round's samples too
$ python ei.py config/gsm8k_smollm2_ei.py            # one GPU
$ torchrun --nproc_per_node=8 ei.py config/gsm8k_llama2_7b_ei.py    # eight
"""
import os
import shutil
from collections import Counter
from itertools import islice

import torch

import eval as evaluation
import rewards
from config import Log, UserError, listen_for_stop, override, read_run, resuming, start_run
from model import (Transformer, config_from_hf, disk_needed, find_checkpoint, first_line, from_main, memory_needed, rank, read_json,
                   replace_folder, setup, wait_for_main)
from sample import Example, Sampler, check_room, check_same_tokenizer, load_tokenizer
from sft import finetune, n_learned, solution_examples

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_questions = 0           # rows of train to explore, the first ones, by their final answers alone; 0: all
n_worked = 0              # rows of train whose human solutions are known (D_0), the first ones; 0: all
include_sft = True        # whether D_0 holds them; without, D_0 is empty
# policy
init_from = 'out/sft'     # the policy that draws the first round's samples, or 'resume'
base = ''                 # the pretrained checkpoint that fine-tuning starts from; needed with reset = 'base'
reset = 'base'            # every round fine-tunes from 'base' (paper) or from the 'previous' round's policy
few_shot = 0              # worked examples before a question in the first round: for a base model without SFT, 2 (paper)
# exploration
n_rounds = 2              # paper: 2 from an SFT checkpoint (as recalled), 4 to 5 from a pretrained one
k = 96                    # samples a question and round; paper: 96; 4 is a cheap choice that works too (as recalled)
temperature = 1.0         # paper: 1.0 (as recalled); no top-k, no top-p: what is learned is what the policy draws
max_new_tokens = 256      # budget of a sample; one that does not finish is not kept
reward = 'sparse'         # the return that filters: 'sparse', 1 for the right answer, or 'orm', the score of reward_model
reward_model = ''         # an outcome reward model's run (python rewards.py config/demo_orm.py), for reward = 'orm'
tau = 1.0                 # solutions with a return of at least this are kept; with 'orm' below 1, which no score reaches, e.g. 0.8
max_per_question = 0      # solutions kept for a question over all rounds, the first ones; 0: no cap
max_rows = 256            # samples decoded at a time
# fine-tuning, as in sft.py
epochs = 4.0
max_steps = 0             # updates a round; 0: as many as `epochs` takes
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
save_interval = 500       # updates between states that a stopped run goes on from; 0: none within a round
# evaluation
eval_problems = 256       # problems of the validation slice for maj@1 after each round
# run
out_dir = 'out/ei'
overwrite = False         # replace the run that out_dir holds
seed = 0
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'            # of the matrix products: 'auto', 'float32', 'bfloat16'; weights are fp32 when they learn
compile = 'auto'          # 'on', 'off', or 'auto': on CUDA only
# -----------------------------------------------------------------------------


def solution_key(text):
    """What makes two solutions the same: their equations, or where there are none their text."""
    return rewards.equations(text) or (text.strip(),)


def select(records, seen, n_kept, cap, tau=1.0):
    """The records of one question that join the data set: of return tau or more, new by their equations, within the cap (0: none).

    seen: the question's keys in the data set so far, extended in place. n_kept: its solutions kept in earlier rounds."""
    kept = []
    for record in records:
        key = solution_key(record['text'])
        if record['return'] >= tau and key not in seen and not (cap and n_kept + len(kept) >= cap):
            seen.add(key)
            kept.append(record)
    return kept


def with_returns(found, prompt_ids, chunk, scorer=None, micro_tokens=16384, dtype=torch.float32):
    """Adds its return to every record: whether the answer is right, or with a scorer its score, for `chunk` questions at a time.

    found: yields the records of each question (eval.explore); prompt_ids: the questions' ids. Yields as found does."""
    pairs = zip(prompt_ids, found)
    while some := list(islice(pairs, chunk)):
        flat = [record for _, records in some for record in records]
        for record in flat:
            record['return'] = float(record['correct'])
        if scorer is not None:
            rows = [Example(ids + r['ids'], len(ids)) for ids, records in some for r in records]
            for record, scored in zip(flat, evaluation.with_scores(flat, rewards.score(scorer, rows, micro_tokens, dtype))):
                record['return'] = scored['score']
        for _, records in some:
            yield records


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume = from_main(lambda: resuming(init_from, out_dir))

    # 0. everything that can be wrong with the input, before anything is written
    if reset not in ('base', 'previous'):
        raise UserError(f"reset is 'base' or 'previous', not {reset!r}")
    if min(k, n_rounds, eval_problems) < 1 or max_per_question < 0:
        raise UserError('k, n_rounds and eval_problems must be at least 1, max_per_question at least 0')
    if temperature <= 0:
        raise UserError('temperature must be above 0: greedy samples of a question are all the same')
    if reset == 'base' and not base:
        raise UserError("reset = 'base' needs the checkpoint to start from: --base=out/demo_base, or --reset=previous")
    problems = rewards.load_problems(task, 'train')
    if not all(0 <= n <= len(problems) for n in (n_questions, n_worked)):
        raise UserError(f'n_questions and n_worked are from 0 (all) to {len(problems)}, the rows of {task} to train on')
    val_problems = rewards.load_problems(task, 'val')
    if not 0 <= few_shot < len(val_problems):
        raise UserError(f'few_shot is from 0 to {len(val_problems) - 1}: the examples are the first rows of the validation slice')
    demonstrations, val_problems = val_problems[:few_shot], val_problems[few_shot:][:eval_problems]
    worked = problems[:n_worked or None] if include_sft else []
    questions = problems[:n_questions or None]
    policy_from = read_run(out_dir)['init_from'] if resume else init_from
    tok = load_tokenizer(policy_from, conditioned=False)
    policy = Transformer.from_pretrained(policy_from, device, dtype)
    learner = policy.config  # the shape of what is fine-tuned, and draws from the second round on
    if reset == 'base':
        learner = config_from_hf(read_json(os.path.join(find_checkpoint(base), 'config.json')), base)  # not after hours of sampling
        check_same_tokenizer(load_tokenizer(base, conditioned=False), tok, f'{base} and {policy_from}')
    if reward not in ('sparse', 'orm') or (reward == 'orm') != bool(reward_model):
        raise UserError("reward is 'sparse', or 'orm' with a reward_model")
    if tau <= 0:
        raise UserError('tau must be above 0: wrong solutions have a return of 0')
    if reward == 'orm' and tau >= 1:
        raise UserError(f"tau = {tau} with reward = 'orm' keeps nothing: a score is below 1")
    scorer = None
    if reward == 'orm':
        scorer = rewards.load_reward_model(reward_model, policy.config, tok, device, dtype, kinds=('orm',))
    room = policy.config.block_size - max_new_tokens
    too_long = sum(len(tok.encode_prompt(rewards.prompt(p.question, demonstrations))) > room for p in questions) if few_shot else 0
    if too_long == len(questions):
        raise UserError(f'few_shot = {few_shot} and max_new_tokens = {max_new_tokens}: no question fits the context of {policy.config.block_size}')
    prompt_ids = [tok.encode_prompt(rewards.prompt(p.question)) for p in questions]
    check_room(prompt_ids, max_new_tokens, min(policy.config.block_size, learner.block_size))
    for shown, block_size in ((demonstrations, policy.config.block_size), ((), learner.block_size)):
        check_room([tok.encode_prompt(rewards.prompt(p.question, shown)) for p in val_problems], max_new_tokens, block_size)
    start_run(settings, resume, overwrite)
    listen_for_stop()
    log = Log(out_dir, resume)
    print(f'{len(questions):,} questions * {k} samples * {n_rounds} rounds = {len(questions) * k * n_rounds:,} samples; '
          f'D_0 has {len(worked):,} worked solutions')
    print(disk_needed(learner, n_rounds + 1, 0, lora_rank))

    if few_shot:
        if too_long:
            print(f'{too_long:,} of the questions are too long to be sampled with {few_shot} examples; they wait for the second round')
        maj1, error = evaluation.greedy_accuracy(Sampler(policy, tok, max_rows, dtype), val_problems, max_new_tokens, demonstrations)
        log(0, prompted_maj1=maj1, prompted_maj1_error=error)

    # D_0. The ids of a sampled solution go into the data set as they were drawn, never decoded and encoded again (but for those
    # after worked examples, which have to be cut where the next question begins).
    dataset, seen = [], [set() for _ in questions]
    for i, (p, e) in enumerate(zip(worked, solution_examples(worked, tok))):
        if len(e.ids) <= learner.block_size + 1:
            dataset.append(e)
            if i < len(questions):
                seen[i].add(solution_key(p.solution))
    if len(dataset) < len(worked):
        print(f'left out: {len(worked) - len(dataset)} of {len(worked)} worked solutions, longer than the context of {learner.block_size}')
    n_kept, updates, drawn, best, previous = [0] * len(questions), 0, 0, -1.0, policy_from

    for round in range(1, n_rounds + 1):
        round_dir, training_dir = os.path.join(out_dir, f'round{round}'), os.path.join(out_dir, f'round{round}_training')
        # 1. explore: K samples of every question
        print(memory_needed([policy.requires_grad_(False)] + ([scorer] if scorer else []), dtype, 0, 0, max_rows,
                            max(map(len, prompt_ids)), max_new_tokens))
        sampler = Sampler(policy, tok, max_rows, dtype)
        found = evaluation.explore(sampler, questions, os.path.join(out_dir, f'samples_round{round}.jsonl'), k, max_new_tokens,
                                   temperature, seed * 1000 + round, f'round {round}: explore',
                                   demonstrations if round == 1 else ())
        drawn += len(questions) * k
        # 2. filter by the return, by default that of the final answer, and 3. de-duplicate, a question at a time
        counts, chunk = Counter(), max(1, 4 * max_rows // k)
        for i, records in enumerate(with_returns(found, prompt_ids, chunk, scorer, micro_tokens, dtype)):
            fit = [r for r in records if r['return'] < tau or len(prompt_ids[i]) + len(r['ids']) <= learner.block_size + 1]
            kept = select(fit, seen[i], n_kept[i], max_per_question, tau)
            # 4. accumulate: D_i = R_i + D_{i-1}
            dataset += [Example(prompt_ids[i] + record['ids'], len(prompt_ids[i])) for record in kept]
            n_kept[i] += len(kept)
            counts.update(samples=len(records), correct=sum(r['correct'] for r in records), truncated=sum(not r['finished'] for r in records),
                          equations=evaluation.unique_equations(records), solved=any(r['correct'] for r in records),
                          too_long=len(records) - len(fit), new=len(kept), new_right=sum(r['correct'] for r in kept))
        share_truncated = counts['truncated'] / counts['samples']
        if share_truncated > 0.2:
            print(f'warning: {100 * share_truncated:.0f}% of the samples did not finish within max_new_tokens = {max_new_tokens}')
        if counts['too_long']:
            print(f'left out: {counts["too_long"]:,} of {counts["samples"]:,} samples, longer than the context of {learner.block_size}')
        if not counts['new']:
            print(f'round {round}: no new solution has a return of {tau} or more')
        if not dataset:
            raise UserError(f'round {round}: none of {counts["samples"]:,} samples {"is right" if reward == "sparse" else f"scores {tau}"}, so that there '
                            f'is nothing to learn from ({100 * share_truncated:.0f}% of them did not finish within {max_new_tokens} tokens)')
        log(updates, round=round, samples_drawn=drawn, share_correct=counts['correct'] / counts['samples'], share_truncated=share_truncated,
            unique_equations=counts['equations'] / len(questions), solved=counts['solved'] / len(questions), new_solutions=counts['new'],
            new_right=counts['new_right'] / max(1, counts['new']), dataset=len(dataset), dataset_tokens=n_learned(dataset))

        # 5. distil: fine-tune from the base again, unless a stopped run had done it
        if from_main(lambda: os.path.exists(os.path.join(round_dir, 'config.json'))):
            updates += max_steps or -int(-epochs * len(dataset) // batch_size)
        else:
            del policy, sampler  # their memory is needed now
            policy = Transformer.from_pretrained(base if reset == 'base' else previous, device, dtype if lora_rank else torch.float32,
                                                 lora_rank=lora_rank, lora_alpha=lora_alpha, shard=shard, product_dtype=dtype)
            policy.grad_checkpointing, start = grad_checkpointing, updates
            print(memory_needed([policy] + ([scorer] if scorer else []), dtype, micro_tokens, max(len(e.ids) for e in dataset)))
            updates += finetune(policy, dataset, epochs=epochs, max_steps=max_steps, batch_size=batch_size, micro_tokens=micro_tokens,
                                lr=lr, min_lr=min_lr, warmup=warmup, weight_decay=weight_decay, grad_clip=grad_clip,
                                seed=seed * 1000 + round, dtype=dtype,
                                compile=compile == 'on' or compile == 'auto' and device.type == 'cuda',
                                log=lambda step, **metrics: log(start + step, round=round, **metrics), desc=f'round {round}: fine-tune',
                                out_dir=training_dir, save_interval=save_interval, resume=resume)
            policy.save_pretrained(round_dir, tok)
            del policy
        if rank() == 0:
            shutil.rmtree(training_dir, ignore_errors=True)
        wait_for_main()
        policy = Transformer.from_pretrained(round_dir, device, dtype)
        # 6. how good is it? The best round by the validation slice is the result.
        maj1, error = evaluation.greedy_accuracy(Sampler(policy, tok, max_rows, dtype), val_problems, max_new_tokens)
        log(updates, round=round, val_maj1=maj1, val_maj1_error=error)
        if maj1 >= best:
            best = maj1
            if rank() == 0:  # as it has learned: what draws samples may be rounded to bf16
                new, target = os.path.join(out_dir, 'best.tmp'), os.path.join(out_dir, 'best')
                shutil.rmtree(new, ignore_errors=True)
                try:
                    shutil.copytree(round_dir, new)
                    replace_folder(new, target)
                except OSError as error:  # a full disk, most often, of which copytree makes an error without its number
                    shutil.rmtree(new, ignore_errors=True)
                    raise UserError(f'{target}: not written ({first_line(error)}); what was there is whole') from None
        previous = round_dir
    print(f'best round by validation maj@1 ({best:.3f}): {out_dir}/best')
