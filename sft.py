"""
Supervised fine-tuning (Havrilla et al. 2024, section 3): maximise the log-likelihood of worked solutions given their
questions. The loss is cross-entropy on the solution's tokens and the EOS after it; the question is read, not learned. The
same loop trains a base model from scratch, as a plain language model on all tokens of a file of texts (text_file), and
finetune() is what Expert Iteration distils with. An update's loss is the mean over all of its loss tokens, whatever the
micro-batches into which memory forces it.

$ python sft.py config/demo_sft.py                      # CPU: the demo's SFT, from out/demo_base
$ python sft.py config/demo_sft.py --init_from=resume   # goes on with a run that was stopped
$ python sft.py --task=gsm8k --init_from=HuggingFaceTB/SmolLM2-135M --out_dir=out/gsm8k_sft   # one GPU
$ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_7b_sft.py                            # eight
"""
import json
import math
import os
import time

import torch

import eval as evaluation
import rewards
from config import Log, UserError, bar, leave, listen_for_stop, override, read_run, resuming, start_run
from model import (Checkpoints, ModelConfig, Transformer, asked_to_stop, autocast, backward, disk_needed, enough_memory, finish_gradients, from_main,
                   learning_rate, make_optimizer, memory_needed, peak_flops, setup, sharding, sum_over_processes, world_size)
from sample import (Example, Sampler, action_logprobs, check_room, collate, epoch_order, learn_bpe, load_tokenizer, my_micro_batches, n_computed,
                    padded_length, real_cells)

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_worked = 0              # rows of train to learn from, the first ones; 0: all of them
text_file = ''            # instead: a file of {"text": ...} rows, e.g. data/arithmetic/base.jsonl; loss on all tokens
texts_per_row = 1         # of text_file, joined by blank lines: a base model that is to be shown worked examples has to have seen several
# model
init_from = 'scratch'     # 'scratch', 'resume', or a checkpoint: a run's folder, a Hugging Face folder, a hub name
tokenizer = 'bpe'         # of a scratch model: 'bpe' (learned from the training texts), 'gpt2', a folder or a hub name
n_merges = 500            # size of the learned BPE beyond its 256 bytes
family = 'llama'          # of a scratch model: 'llama' or 'gpt2'
n_layer = 4
n_head = 4
n_kv_head = 4             # < n_head: grouped-query attention
n_embd = 128
block_size = 512          # longest sequence of a scratch model, in tokens: a question and max_new_tokens
# optimisation
epochs = 4.0              # paper: 4 (as recalled)
max_steps = 0             # updates; 0: as many as `epochs` takes
batch_size = 128          # solutions an update; paper: 128 (as recalled)
micro_tokens = 16384      # tokens a micro-batch of a process, padding included: what memory allows; the result does not depend on it
grad_checkpointing = False  # compute activations again in backward: about a third more time, and memory for one block's alone
shard = 'auto'            # over processes: 'ddp' (each has all weights), 'fsdp' (each has a part), or 'auto', by what fits
lora_rank = 0             # above 0: adapters of that rank learn and all else is frozen; the export has them merged, and beside
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
lr = 2e-5                 # paper: 2e-5 cosine to 2e-7 (as recalled); a scratch model wants about 1e-3
min_lr = 2e-7
warmup = 0.03             # share of the updates over which the rate rises from 0
weight_decay = 0.0
grad_clip = 1.0           # on the global norm; 0: none
# evaluation
eval_interval = 0         # updates between validations; 0: once an epoch
save_interval = 0         # updates between states that a stopped run goes on from; 0: at every validation
keep_epochs = 0.0         # e.g. 0.5: validate twice an epoch instead, and keep every checkpoint, in out_dir/epoch_*
eval_problems = 256       # problems of the validation slice (at most its 256) for maj@1 and the loss; as many texts of text_file
max_new_tokens = 256      # budget of a greedy solution
max_rows = 256            # samples decoded at a time
# run
keep_states = 1           # states that stay when the run has finished, e.g. to go on with more epochs; 0: none
out_dir = 'out/sft'
overwrite = False         # replace the run that out_dir holds
seed = 0
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'            # of the matrix products: 'auto', 'float32', 'bfloat16'; weights are fp32
compile = 'auto'          # 'on', 'off', or 'auto': on CUDA only, since on a CPU a short run is over before it pays back
# -----------------------------------------------------------------------------


def solution_examples(problems, tokenizer):
    """Question -> worked solution and EOS."""
    examples = []
    for p in problems:
        prompt, completion = tokenizer.encode_pair(rewards.prompt(p.question), rewards.completion(p.solution))
        examples.append(Example(prompt + completion + [tokenizer.eos], len(prompt)))
    return examples


def text_examples(texts, tokenizer):
    """Plain texts between BOS (EOS where a tokenizer has none) and EOS, so that a text's first token and its end are learned."""
    start = tokenizer.bos or [tokenizer.eos]
    return [Example(start + tokenizer.encode(text) + [tokenizer.eos], len(start)) for text in texts]


def load_texts(path):
    """The texts of a file of {"text": ...} rows."""
    if not os.path.exists(path):
        raise UserError(f'{path}: no such file (python data/arithmetic/prepare.py makes data/arithmetic/base.jsonl)')
    texts = []
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            try:
                texts.append(json.loads(line)['text'] + '')
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path}:{number}: not a {{"text": ...}} row') from None
    return texts


def join(texts, n):
    """n texts a row (fewer in the last), with a blank line between them."""
    return ['\n\n'.join(texts[i:i + n]) for i in range(0, len(texts), n)]


def loss_sum(model, examples, trunk=None):
    """Summed cross-entropy of the learned tokens, a scalar. Padding stands on the right, where causal attention keeps it
    from the real tokens; beyond attention next to none of it is computed, and the output projection for the positions with a loss
    alone. trunk: model.trunk, or a compiled form of it."""
    ids, learned = collate(examples, model.embed.weight.device, model.config.block_size + 1)
    cells = real_cells([len(e.ids) - 1 for e in examples], ids.shape[1] - 1, ids.device)
    hidden = (trunk or model.trunk)(ids[:, :-1], cells=cells)  # (B, T - 1, C): position t predicts token t + 1
    logprobs, _ = action_logprobs(model, hidden[learned[:, 1:]], ids[:, 1:][learned[:, 1:]])
    return -logprobs.sum()


def n_learned(examples):
    return sum(len(e.ids) - e.n_prompt - len(e.unlearned) for e in examples)


@torch.no_grad()
def mean_loss(model, examples, max_tokens, device, dtype):
    """Validation loss: nats a learned token."""
    with autocast(device, dtype):
        total = sum(weight * model.run(loss_sum, micro).item() for micro, weight in my_micro_batches(examples, max_tokens))
    return sum_over_processes(torch.tensor(total, dtype=torch.float64)).item() / n_learned(examples)


def finetune(model, examples, *, epochs=4.0, max_steps=0, batch_size=128, micro_tokens=16384, lr=2e-5, min_lr=2e-7, warmup=0.03,
             weight_decay=0.0, grad_clip=1.0, seed=0, dtype=torch.float32, compile=False, eval_interval=0, evaluate=None, log=None,
             out_dir='', save_interval=0, state=None, resume=False, desc='sft'):
    """Fine-tunes model in place on a list of Example and returns the number of updates.

    evaluate(step), if given, is called every eval_interval updates (0: an epoch) and after the last one.
    log(step, **metrics), if given, gets every so often the loss (nats a learned token), lr, gradient norm, speed and padding share,
    that of the tokens for which everything but attention is computed; mfu is the share of the measured peak of matrix products that
    the real tokens needed, backward as two forward passes.
    out_dir, if given, gets states (Checkpoints) every save_interval updates (0: eval_interval) and when a stop is asked for, with the
    dictionary `state`, in which evaluate may keep what it needs; resume goes on from the newest one.
    Each epoch is a fresh permutation of the examples (epoch_order), and an update may straddle two epochs; nothing else is random,
    so that a state needs no generator's. UserError if the loss is not finite."""
    if not examples:
        raise UserError('there is nothing to fine-tune on')
    if batch_size < 1 or micro_tokens < 1:
        raise UserError('batch_size and micro_tokens must be at least 1')
    device, checkpoints = model.embed.weight.device, Checkpoints(out_dir)
    steps = max_steps or math.ceil(epochs * len(examples) / batch_size)
    eval_interval = eval_interval or math.ceil(len(examples) / batch_size)
    optimizer, state = make_optimizer(model, lr, weight_decay), {} if state is None else state
    if resume:
        state.update(checkpoints.load({'model': model}, optimizer) or {})
    start_step = state.get('step', 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if compile and model.shard == 'fsdp':
        print('compile goes without fsdp: not compiled')
    trunk = torch.compile(model.trunk, dynamic=True) if compile and model.shard != 'fsdp' else None
    peak = world_size() * peak_flops(device, dtype) if log is not None else None
    order, epoch = [], -1
    for step in bar(range(start_step, steps), desc=desc):
        # 1. the update's examples: row i of the endless sequence of permuted epochs
        batch = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            if i // len(examples) != epoch:
                epoch = i // len(examples)
                order = epoch_order(examples, batch_size, seed, epoch)
            batch.append(examples[order[i % len(examples)]])
        # 2. gradients, divided by the whole update's tokens before it is split: the split cannot matter
        started, total, n_tokens, n_padded = time.time(), 0.0, n_learned(batch), 0
        for micro, weight in my_micro_batches(batch, micro_tokens):
            padded = len(micro) * (padded_length(micro, model.config.block_size + 1) - 1)
            with enough_memory(f'update {step + 1}, a micro-batch of {len(micro)} rows and {padded} tokens',
                               f'lower micro_tokens = {micro_tokens}, or set grad_checkpointing'), autocast(device, dtype):
                loss = weight * model.run(loss_sum, micro, trunk) / n_tokens
                backward(loss, model)
            total += loss.item()
            n_padded += weight * n_computed(sum(len(e.ids) - 1 for e in micro), padded)
        # 3. the update
        norm = finish_gradients(parameters, model.shard, grad_clip)
        total, n_padded = sum_over_processes(torch.tensor([total, n_padded], dtype=torch.float64)).tolist()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(f'update {step + 1}: loss {total}, gradient norm {norm}; stopped (a lower lr helps most often)'
                            + (f'. {checkpoints.keep_batch(step + 1, batch)}' if out_dir else ''))
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(step, steps, lr, min_lr, warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state['step'] = step + 1
        if log is not None and ((step + 1) % max(1, steps // 40) == 0 or step + 1 == steps):  # some 40 lines a run
            n_real, seconds = sum(len(e.ids) - 1 for e in batch), time.time() - started
            log(step + 1, loss=total, lr=optimizer.param_groups[0]['lr'], grad_norm=norm, epoch=(step + 1) * batch_size / len(examples),
                tokens_per_second=n_real / seconds, padding=1 - n_real / n_padded,
                mfu=3 * sum(model.flops([len(e.ids) - 1], n_learned([e])) for e in batch) / seconds / peak)
        evaluates = (step + 1) % eval_interval == 0 or step + 1 == steps
        if evaluate is not None and evaluates:
            evaluate(step + 1)
        if out_dir:
            stops = asked_to_stop() and step + 1 < steps
            if stops or evaluates or save_interval and (step + 1) % save_interval == 0:
                checkpoints.save(step + 1, {'model': model}, optimizer, state)
            if stops:
                leave(f' after update {step + 1} of {steps}')
    return steps


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume = from_main(lambda: resuming(init_from, out_dir))
    init_from = read_run(out_dir)['init_from'] if resume else init_from

    # 1. data and tokenizer, before anything is written
    problems = rewards.load_problems(task, 'train') if not text_file else []
    val_problems = rewards.load_problems(task, 'val')[:eval_problems]
    if not (text_file or 0 <= n_worked <= len(problems)):
        raise UserError(f'n_worked is from 0 (all) to {len(problems)}, the rows of {task} to train on')
    if min(eval_problems, texts_per_row) < 1 or min(keep_epochs, keep_states) < 0:
        raise UserError('eval_problems and texts_per_row must be at least 1, keep_epochs and keep_states 0 or more')
    problems = problems[:n_worked or None]
    texts = [rewards.prompt(p.question) + rewards.completion(p.solution) for p in problems]
    if text_file:
        texts = join(load_texts(text_file), texts_per_row)
    if len(texts) <= (eval_problems if text_file else 0):
        raise UserError(f'{text_file or task}: {len(texts)} rows are too few to hold {eval_problems} out')
    texts, val_texts = (texts[:-eval_problems], texts[-eval_problems:]) if text_file else (texts, [])
    if init_from != 'scratch':
        tok = load_tokenizer(init_from, conditioned=False)
    else:
        tok = learn_bpe(texts, n_merges) if tokenizer == 'bpe' else load_tokenizer(tokenizer, conditioned=False)

    # 2. model
    if init_from == 'scratch':
        if family not in ('llama', 'gpt2') or n_head % n_kv_head or n_embd % (2 * n_head):
            raise UserError("a scratch model is of family 'llama' or 'gpt2', with n_embd a multiple of 2 * n_head and n_head of n_kv_head")
        shape = dict(vocab_size=-(-tok.vocab_size // 64) * 64, block_size=block_size, n_layer=n_layer, n_head=n_head,  # 64: aligned rows
                     n_embd=n_embd, head_dim=n_embd // n_head)
        if family == 'llama':  # a gated mlp has three matrices: 8/3 of the width costs what 4 costs with two
            shape |= dict(n_kv_head=n_kv_head, n_inner=-(-8 * n_embd // 3 // 32) * 32)
        else:
            shape |= dict(n_kv_head=n_head, n_inner=4 * n_embd, norm='layer', activation='gelu_tanh', rope_theta=0.0,
                          qkv_bias=True, out_bias=True, mlp_bias=True)
        if lora_rank:
            raise UserError('lora_rank adapts a model that has learned something: not one from scratch')
        model = Transformer(ModelConfig(family=family, **shape)).init_weights().to(device)
        model.distribute(sharding(shard, model, device), dtype, device)
    else:
        model = Transformer.from_pretrained(init_from, device, dtype if lora_rank else torch.float32, lora_rank=lora_rank,
                                            lora_alpha=lora_alpha, shard=shard, product_dtype=dtype)
    model.grad_checkpointing, state = grad_checkpointing, {'best': None}

    # 3. examples; what does not fit the context is left out, and said
    examples = text_examples(texts, tok) if text_file else solution_examples(problems, tok)
    fits = [e for e in examples if len(e.ids) <= model.config.block_size + 1]
    if len(fits) < len(examples):
        print(f'left out: {len(examples) - len(fits)} of {len(examples)} examples, longer than the context of {model.config.block_size}')
    val_examples = text_examples(val_texts, tok) if text_file else solution_examples(val_problems, tok)
    val_examples = [e for e in val_examples if len(e.ids) <= model.config.block_size + 1]
    if not fits or not val_examples:
        raise UserError(f'no example, or none of those held out, fits the context of {model.config.block_size} tokens')
    check_room([tok.encode_prompt(rewards.prompt(p.question)) for p in val_problems], max_new_tokens, model.config.block_size)
    start_run(settings, resume, overwrite)
    listen_for_stop()
    log = Log(out_dir, resume)
    n_steps = max_steps or math.ceil(epochs * len(fits) / batch_size)
    print(f'{model.n_params():,} parameters, vocabulary {tok.vocab_size}; {len(fits):,} examples with {n_learned(fits):,} learned tokens; '
          f'{n_steps} updates * {batch_size} = {n_steps * batch_size:,} examples, {n_steps * batch_size / max(1, len(fits)):.1f} epochs')
    print(memory_needed([model], dtype, micro_tokens, max(len(e.ids) for e in fits), max_rows,
                        max(e.n_prompt for e in fits), max_new_tokens))
    interval = max(1, round(keep_epochs * len(fits) / batch_size)) if keep_epochs else eval_interval  # updates
    print(disk_needed(model.config, 2 + (math.ceil(n_steps / interval) if keep_epochs else 0), keep_states, lora_rank))

    def validate(step):
        """Validation loss and maj@1; keeps best/."""
        val_loss = mean_loss(model, val_examples, micro_tokens, device, dtype)
        sampler = Sampler(model.for_sampling(dtype), tok, max_rows, dtype)
        maj1, error = evaluation.greedy_accuracy(sampler, val_problems, max_new_tokens)
        log(step, val_loss=val_loss, val_maj1=maj1, val_maj1_error=error)
        # A language model of plain texts is judged by its loss on the last of them. Ties go to the later step.
        score = -val_loss if text_file else maj1
        if state['best'] is None or score >= state['best']:
            state['best'] = score
            model.save_pretrained(os.path.join(out_dir, 'best'), tok)
        if keep_epochs:
            model.save_pretrained(os.path.join(out_dir, f'epoch_{step * batch_size / len(fits):06.2f}'), tok)

    # 4. train
    finetune(model, fits, epochs=epochs, max_steps=max_steps, batch_size=batch_size, micro_tokens=micro_tokens, lr=lr, min_lr=min_lr,
             warmup=warmup, weight_decay=weight_decay, grad_clip=grad_clip, seed=seed, dtype=dtype,
             compile=compile == 'on' or compile == 'auto' and device.type == 'cuda', log=log, evaluate=validate,
             eval_interval=interval, out_dir=out_dir, save_interval=save_interval, state=state, resume=resume)
    model.save_pretrained(os.path.join(out_dir, 'last'), tok)
    Checkpoints(out_dir).keep(keep_states)
    print(f'best checkpoint: {out_dir}/best, last: {out_dir}/last')
