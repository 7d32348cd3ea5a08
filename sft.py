"""
Supervised fine-tuning (Havrilla et al. 2024, section 3): maximise the log-likelihood of worked solutions
given their questions. The loss is cross-entropy on the solution's tokens and the EOS after it, the mean over
an update's learned tokens, whatever the micro-batches into which memory splits it. The same loop trains a
base model from scratch on all tokens of a file of texts (text_file), distils in Expert Iteration, and trains
return-conditioned policies and, with another loss, reward models.

$ python sft.py config/demo_sft.py                      # CPU: the demo's SFT, from out/demo_base
$ python sft.py config/demo_sft.py --init_from=resume   # goes on with a run that was stopped
$ python sft.py --task=gsm8k --init_from=HuggingFaceTB/SmolLM2-135M --out_dir=out/gsm8k_sft   # one GPU
$ torchrun --nproc_per_node=8 sft.py config/gsm8k_llama2_7b_sft.py                            # eight
"""
import functools
import json
import math
import os
import time

import torch

from config import UserError, override
from config.run import (Checkpoints, asked_to_stop, bar, enough_memory, leave, origin, read_json, setup,
                        start_run, sum_over_processes, world_size)
from data import completion, first_rows, load_problems, prompt
from eval import encode_prompts, greedy_accuracy
from model import (ModelConfig, Transformer, autocast, backward, config_from_hf, find_checkpoint,
                   finish_gradients, learning_rate, make_optimizer, peak_flops, sharding)
from sample import (Example, Sampler, check_room, check_same_tokenizer, disk_needed, epoch_order, learn_bpe,
                    load_tokenizer, memory_needed, my_micro_batches, n_learned, padded_length,
                    response_logprobs)

# -----------------------------------------------------------------------------
# data
task = 'arithmetic'       # data/<task>/, or a folder with train.jsonl and test.jsonl
n_worked = 0              # rows of train to learn from, the first ones; 0: all
text_file = ''            # instead: a file of {"text": ...} rows (data/arithmetic/base.jsonl), learned whole
texts_per_row = 1         # of text_file, joined by blank lines (at least 1)
# model
init_from = 'scratch'     # 'scratch', 'resume', or a run's folder, a Hugging Face folder, a hub name
prompt_form = 'auto'      # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
system = ''               # first message of chat prompts; '': the checkpoint's, or the template's own
tokenizer = 'bpe'         # of a scratch model: 'bpe' (learned here), 'gpt2', a folder or a hub name
n_merges = 500            # size of the learned BPE beyond its 256 bytes (at least 0)
family = 'llama'          # 'llama' | 'gpt2'; of a scratch model
n_layer = 4               # (at least 1)
n_head = 4                # (at least 1)
n_kv_head = 4             # < n_head: grouped-query attention (at least 1)
n_embd = 128              # (at least 1)
block_size = 512          # of a scratch model: longest question and max_new_tokens, in tokens (at least 1)
# optimisation
epochs = 4.0              # paper: 4 (as recalled) (above 0)
max_steps = 0             # updates; 0: as many as `epochs` takes (at least 0)
batch_size = 128          # solutions an update; paper: 128 (as recalled) (at least 1)
micro_tokens = 16384      # tokens a micro-batch, padding included: what memory allows (at least 1)
grad_checkpointing = False  # recompute activations in backward: a third more time, memory for one block only
shard = 'auto'            # 'auto' | 'none' | 'ddp' | 'fsdp'; each process holds all weights (ddp) or a part
lora_rank = 0             # above 0: only adapters of that rank learn; exported merged, and beside
lora_alpha = 32.0         # an adapter's output counts lora_alpha / lora_rank
lr = 2e-5                 # paper: 2e-5, cosine to 2e-7 (as recalled); a scratch model wants about 1e-3
min_lr = 2e-7
warmup = 0.03             # share of the updates over which the rate rises from 0
weight_decay = 0.0
grad_clip = 1.0           # on the global norm; 0: none
# evaluation
eval_interval = 0         # updates between validations; 0: once an epoch (at least 0)
save_interval = 0         # updates between states to resume from; 0: at every validation (at least 0)
keep_epochs = 0.0         # e.g. 0.5: validate twice an epoch and keep each checkpoint, epoch_* (at least 0)
eval_problems = 256       # problems of the validation slice, or texts of text_file (at least 1)
max_new_tokens = 256      # budget of a greedy solution (at least 1)
max_rows = 256            # samples decoded at a time (at least 1)
# run
keep_states = 1           # states that stay when the run has finished, e.g. for more epochs (at least 0)
out_dir = 'out/sft'
overwrite = False         # replace the run that out_dir holds
seed = 0
tracker = 'none'          # 'none' | 'tensorboard' | 'trackio' | 'wandb'; where the log also goes
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16'; of the matrix products; weights are fp32
compile = 'auto'          # 'auto' | 'on' | 'off'; 'auto': on CUDA
# -----------------------------------------------------------------------------

def solution_examples(problems, tokenizer):
    """Question -> worked solution and EOS."""
    examples = []
    for p in problems:
        prompt_ids, ids = tokenizer.encode_question(p.question, solution=p.solution)
        examples.append(Example(prompt_ids + ids + [tokenizer.eos], len(prompt_ids)))
    return examples

def text_examples(texts, tokenizer):
    """Plain texts between BOS (or EOS) and EOS, so that a text's first token and its end are learned too."""
    start = tokenizer.bos or [tokenizer.eos]
    return [Example(start + tokenizer.encode(text) + [tokenizer.eos], len(start)) for text in texts]

def load_texts(path):
    """The texts of a file of {"text": ...} rows."""
    if not os.path.exists(path):
        raise UserError(f'{path}: no such file (data/arithmetic/prepare.py makes base.jsonl)')
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

def fitting(examples, block_size, what='examples', n_predicted=1):
    """The examples that fit the context; prints how many do not. n_predicted: last ids that are not read."""
    fits = [e for e in examples if len(e.ids) <= block_size + n_predicted]
    if len(fits) < len(examples):
        n_out = len(examples) - len(fits)
        print(f'left out: {n_out:,} of {len(examples):,} {what}, longer than the context of {block_size}')
    return fits

def cross_entropy(model, examples, trunk=None):
    """Summed cross-entropy of the learned tokens, a scalar. trunk: model.trunk, or its compiled form."""
    logprobs, _, _ = response_logprobs(model, examples, trunk=trunk)
    return -logprobs.sum()

@torch.no_grad()
def mean_loss(model, examples, max_tokens, device, dtype):
    """Validation loss: nats a learned token."""
    micros = my_micro_batches(examples, max_tokens)
    with autocast(device, dtype):
        total = sum(weight * model.run(cross_entropy, micro).item() for micro, weight in micros)
    return sum_over_processes(torch.tensor(total, dtype=torch.float64)).item() / n_learned(examples)

def load_learner(path, settings, device, dtype, **more):
    """A checkpoint as a model that learns: in fp32, or in dtype where only LoRA adapters learn."""
    more = {name: settings[name] for name in ('lora_rank', 'lora_alpha', 'shard')} | more
    weights = dtype if settings['lora_rank'] else torch.float32
    model = Transformer.from_pretrained(path, device, weights, product_dtype=dtype, **more)
    model.grad_checkpointing = settings['grad_checkpointing']
    return model

def base_config(base, tok, policy_from):
    """The ModelConfig of the checkpoint that fine-tuning starts from. UserError, before hours of sampling, if
    its tokenizer is not the policy's."""
    config = config_from_hf(read_json(os.path.join(find_checkpoint(base), 'config.json')), base)
    check_same_tokenizer(load_tokenizer(base, conditioned=False), tok, f'{base} and {policy_from}')
    return config

def training(settings, device, dtype):
    """finetune's arguments among a script's settings."""
    given = {name: settings[name] for name in finetune.__kwdefaults__ if name in settings}
    return given | {'dtype': dtype, 'compile': compiles(settings.get('compile', 'off'), device)}

def compiles(setting, device):
    return setting == 'on' or setting == 'auto' and device.type == 'cuda'

def finetune(model, examples, *, loss=cross_entropy, epochs=4.0, max_steps=0, batch_size=128,
             micro_tokens=16384, lr=2e-5, min_lr=2e-7, warmup=0.03, weight_decay=0.0, grad_clip=1.0, seed=0,
             dtype=torch.float32, compile=False, eval_interval=0, evaluate=None, log=None, out_dir='',
             save_interval=0, state=None, resume=False, desc='sft'):
    """Trains model in place on a list of Example and returns the number of updates.

    loss(model, examples, trunk) sums over the examples' labels; an update divides the sum by their number.
    evaluate(step) is called every eval_interval updates (0: an epoch) and after the last one, log(step,
    **metrics) some forty times. mfu: the share of the measured peak of matrix products that the real tokens
    needed, a backward pass counted as two forward passes. out_dir gets states at every evaluation, every
    save_interval updates and at a stop, with the dictionary `state`, where evaluate may keep what it needs;
    resume goes on from the newest. Each epoch is a fresh permutation (epoch_order), an update may straddle
    two, and nothing else is random. UserError for a loss that is not finite."""
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    if compile and model.shard == 'fsdp':
        print('compile goes without fsdp: not compiled')
    trunk = torch.compile(model.trunk, dynamic=True) if compile and model.shard != 'fsdp' else None
    peak = world_size() * peak_flops(device, dtype) if log is not None else None
    order = functools.lru_cache(1)(functools.partial(epoch_order, examples, batch_size, seed))
    for step in bar(range(state.get('step', 0) + 1, steps + 1), desc=desc):
        # 1. the update's examples: the next ones of the endless sequence of permuted epochs
        places = [divmod(i, len(examples)) for i in range((step - 1) * batch_size, step * batch_size)]
        batch = [examples[order(epoch)[i]] for epoch, i in places]
        # 2. gradients, divided by the whole update's labels before it is split: the split does not matter
        n_labels, started, total, n_padded = n_learned(batch), time.time(), 0.0, 0
        for micro, weight in my_micro_batches(batch, micro_tokens):
            padded = len(micro) * (padded_length(micro, model.config.block_size + 1) - 1)
            doing = f'update {step}, a micro-batch of {len(micro)} rows and {padded} tokens'
            advice = f'lower micro_tokens = {micro_tokens}, or set grad_checkpointing'
            with enough_memory(doing, advice), autocast(device, dtype):
                part = weight * model.run(loss, micro, trunk) / n_labels
                backward(part, model)
            total, n_padded = total + part.item(), n_padded + weight * padded
        # 3. the update
        norm = finish_gradients(parameters, model.shard, grad_clip)
        total, n_padded = sum_over_processes(torch.tensor([total, n_padded], dtype=torch.float64)).tolist()
        if not (math.isfinite(total) and math.isfinite(norm)):
            kept = f'. {checkpoints.keep_batch(step, batch)}' if out_dir else ''
            raise UserError(f'update {step}: loss {total}, gradient norm {norm} (a lower lr may help){kept}')
        lr_now = learning_rate(step - 1, steps, lr, min_lr, warmup)
        for group in optimizer.param_groups:
            group['lr'] = lr_now
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state['step'], is_last = step, step == steps
        if log is not None and (step % max(1, steps // 40) == 0 or is_last):
            lengths, seconds = [len(e.ids) - 1 for e in batch], time.time() - started
            log(step, loss=total, lr=lr_now, grad_norm=norm, epoch=step * batch_size / len(examples),
                tokens_per_second=sum(lengths) / seconds, padding=1 - sum(lengths) / n_padded,
                mfu=3 * model.flops(lengths, n_labels) / seconds / peak)
        # 4. validation, and states
        evaluates = step % eval_interval == 0 or is_last
        if evaluate is not None and evaluates:
            evaluate(step)
        if out_dir:
            stops = asked_to_stop() and not is_last
            if stops or evaluates or save_interval and step % save_interval == 0:
                checkpoints.save(step, {'model': model}, optimizer, state)
            if stops:
                leave(f' after update {step} of {steps}')
    return steps

def scratch_config(settings, vocab_size):
    """The ModelConfig of a model that starts from random weights."""
    n_head, n_kv_head, n_embd = settings['n_head'], settings['n_kv_head'], settings['n_embd']
    if n_head % n_kv_head or n_embd % (2 * n_head):
        raise UserError('n_embd must be a multiple of 2 * n_head, and n_head of n_kv_head')
    if settings['lora_rank']:
        raise UserError('lora_rank adapts a model that has learned something: not one from scratch')
    shape = {name: settings[name] for name in ('family', 'block_size', 'n_layer', 'n_head', 'n_embd')}
    shape |= {'vocab_size': -(-vocab_size // 64) * 64, 'head_dim': n_embd // n_head}  # 64: aligned rows
    if settings['family'] == 'llama':  # a gated mlp has three matrices: as large as two at 4 * n_embd
        return ModelConfig(**shape, n_kv_head=n_kv_head, n_inner=-(-8 * n_embd // 3 // 32) * 32)
    return ModelConfig(**shape, n_kv_head=n_head, n_inner=4 * n_embd, norm='layer', activation='gelu_tanh',
                       rope_theta=0.0, qkv_bias=True, out_bias=True, mlp_bias=True)


if __name__ == '__main__':
    settings = override(globals())
    device, dtype = setup(device, dtype, seed)
    resume, init_from = origin(init_from, out_dir)

    # 1. data and tokenizer, before anything is written
    val_problems = load_problems(task, 'val')[:eval_problems]
    if text_file:
        texts = join(load_texts(text_file), texts_per_row)
        if len(texts) <= eval_problems:
            raise UserError(f'{text_file}: {len(texts)} rows are too few to hold {eval_problems} out')
        texts, val_texts = texts[:-eval_problems], texts[-eval_problems:]
    else:
        problems = first_rows(load_problems(task, 'train'), n_worked, 'n_worked')
        texts = [prompt(p.question) + completion(p.solution) for p in problems]
    if (init_from, tokenizer) == ('scratch', 'bpe'):
        tok = learn_bpe(texts, n_merges)
    else:
        tok = load_tokenizer(tokenizer if init_from == 'scratch' else init_from, conditioned=False)
    tok.in_form(prompt_form, system)

    # 2. model
    if init_from == 'scratch':
        model = Transformer(scratch_config(settings, tok.vocab_size)).init_weights().to(device)
        model.distribute(sharding(shard, model, device), dtype, device)
        model.grad_checkpointing = grad_checkpointing
    else:
        model = load_learner(init_from, settings, device, dtype)

    # 3. examples; what does not fit the context is left out
    context = model.config.block_size
    examples = text_examples(texts, tok) if text_file else solution_examples(problems, tok)
    val_examples = text_examples(val_texts, tok) if text_file else solution_examples(val_problems, tok)
    examples, val_examples = fitting(examples, context), fitting(val_examples, context, 'held out')
    if not examples or not val_examples:
        raise UserError(f'no example, or none of those held out, fits the context of {context} tokens')
    check_room(encode_prompts(val_problems, tok), max_new_tokens, context)
    log = start_run(settings, resume)
    n_steps = max_steps or math.ceil(epochs * len(examples) / batch_size)
    n_seen = n_steps * batch_size
    print(f'{model.n_params():,} parameters, vocabulary {tok.vocab_size}; {len(examples):,} examples with '
          f'{n_learned(examples):,} learned tokens; {n_steps} updates * {batch_size} = {n_seen:,} examples, '
          f'{n_seen / len(examples):.1f} epochs')
    print(memory_needed([model], dtype, micro_tokens, max(len(e.ids) for e in examples), max_rows,
                        max(e.n_prompt for e in examples), max_new_tokens))
    if keep_epochs:
        eval_interval = max(1, round(keep_epochs * len(examples) / batch_size))
    n_kept = math.ceil(n_steps / eval_interval) if keep_epochs else 0
    print(disk_needed(model.config, 2 + n_kept, keep_states, lora_rank))
    state = {'best': None}

    def validate(step):
        """Validation loss and maj@1; keeps best/, of texts by the loss. Ties go to the later step."""
        val_loss = mean_loss(model, val_examples, micro_tokens, device, dtype)
        sampler = Sampler(model.for_sampling(dtype), tok, max_rows, dtype)
        maj1, error = greedy_accuracy(sampler, val_problems, max_new_tokens)
        log(step, val_loss=val_loss, val_maj1=maj1, val_maj1_error=error)
        quality = -val_loss if text_file else maj1
        if state['best'] is None or quality >= state['best']:
            state['best'] = quality
            model.save_pretrained(os.path.join(out_dir, 'best'), tok)
        if keep_epochs:
            name = f'epoch_{step * batch_size / len(examples):06.2f}'
            model.save_pretrained(os.path.join(out_dir, name), tok)

    # 4. train
    finetune(model, examples, **training(settings, device, dtype) | {'eval_interval': eval_interval}, log=log,
             evaluate=validate, state=state, resume=resume)
    model.save_pretrained(os.path.join(out_dir, 'last'), tok)
    Checkpoints(out_dir).keep(keep_states)
    print(f'best checkpoint: {out_dir}/best, last: {out_dir}/last')
