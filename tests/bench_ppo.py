"""
How fast is an iteration of PPO, rollouts and update? `ppo.py --advantage=group`, as it is, against TRL's
GRPOTrainer: the same model, number of rollouts, lengths, epochs and minibatch. A run by hand, not a test.

Both take a sample's reward against its mates' as the advantage of its tokens, and do `epochs` passes of the
clipped surrogate with a KL penalty. Rewards cost nothing. Prompts have one length, and responses too; with
--spread every token ends its response with a chance of 1 / 96, in both. TRL gets our fp32 products, unless
--fast_matmul=False. Each round is a fresh start of either, whose last iteration is timed.

$ python tests/bench_ppo.py                                    # the Llama shape in fp32, one thread
$ python tests/bench_ppo.py --trl_python=envs/trl/bin/python   # trl in an environment of its own
$ python tests/bench_ppo.py --spread
"""
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types

from bench_sample import ROOT, SHAPES, pin, set_up

# -----------------------------------------------------------------------------
shape = 'llama'       # see SHAPES in bench_sample.py
n_rollouts = 64       # an iteration
n_per_question = 4
prompt_tokens = 64
max_new_tokens = 128  # and not one less, without spread
spread = False        # responses of different lengths
epochs = 4
minibatch = 32        # rollouts an update
micro_tokens = 4096   # ours: tokens a micro-batch
micro_rows = 16       # TRL: rollouts a micro-batch
fast_matmul = True    # TRL: the fp32 products that our scripts use
n_iterations = 2      # of a round, of which the last is timed (at least 2)
engines = 'ours,trl'
trl_python = ''       # the interpreter of an environment with TRL; '': this one
dtype = 'float32'     # 'float32' | 'bfloat16'
threads = 1
rounds = 3
device = 'cpu'
seed = 0
# -----------------------------------------------------------------------------

def trl(folder, work):
    """Trains for work.n_iterations -> the seconds of the last one."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    if work.fast_matmul:
        set_up(work)
    torch.set_num_threads(work.threads)
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if work.device == 'cuda':
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side='left')
    prompts = [tokenizer(text)['input_ids'] for text in work.texts]
    assert {len(ids) for ids in prompts} == {work.prompt_tokens}
    updates = work.epochs * work.n_rollouts // work.minibatch  # of an iteration
    config = GRPOConfig(
        output_dir=folder + '/trl', use_cpu=work.device == 'cpu', bf16=work.dtype == 'bfloat16',
        learning_rate=1e-6, seed=work.seed, per_device_train_batch_size=work.micro_rows, temperature=0.7,
        report_to='none', logging_steps=10 ** 6, save_strategy='no', disable_tqdm=True,
        gradient_checkpointing=False, optim='adamw_torch_fused', max_steps=updates * work.n_iterations,
        steps_per_generation=work.n_rollouts // work.micro_rows,
        gradient_accumulation_steps=work.minibatch // work.micro_rows, num_iterations=work.epochs,
        num_generations=work.n_per_question, max_completion_length=work.max_new_tokens, beta=0.05,
        generation_kwargs={} if work.spread else {'min_new_tokens': work.max_new_tokens},
        epsilon=0.2, scale_rewards='batch', loss_type='dapo', log_completions=False)

    def reward(completion_ids, **_):
        assert work.spread or {len(ids) for ids in completion_ids} == {work.max_new_tokens}
        return [random.random() for _ in completion_ids]

    rows = Dataset.from_list([{'prompt': text} for text in work.texts])
    trainer = GRPOTrainer(folder, reward, config, rows, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    assert len(ends) == updates * work.n_iterations
    return ends[-1] - ends[-1 - updates]

def ours(folder, settings):
    """The arguments of ppo.py, and what tells its seconds from the run's log."""
    shared = ('n_iterations n_rollouts n_per_question max_new_tokens epochs minibatch micro_tokens '
              'device dtype seed').split()
    flags = {name: settings[name] for name in shared} | dict(
        init_from=folder, ref=folder + '/ref', task=folder + '/task', out_dir=folder + '/run', overwrite=True,
        max_rows=n_rollouts, advantage='group', eval_interval=10 ** 6, eval_problems=1, show=0)

    def seconds(_):
        with open(folder + '/run/log.jsonl') as f:
            rows = [row for row in map(json.loads, f) if 'rollout_tokens_per_second' in row]
        # Nothing ended early, and no row was left out of the update for an advantage of 0.
        assert all(row['learning_rows'] == 1 for row in rows)
        assert spread or all(row['response_tokens'] == max_new_tokens for row in rows)
        return rows[-1]['time'] - rows[-2]['time']
    return [ROOT + '/ppo.py', *(f'--{name}={value}' for name, value in flags.items())], seconds

def theirs(folder, settings):
    return [os.path.abspath(__file__), '--trl', folder], lambda output: float(output.split()[-1])

def prepare(folder, model, settings):
    """Writes the model, another as the reference, a tokenizer of one word an id, and a task of random
    questions."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from data import VALIDATION_ROWS, prompt
    model.save_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    model.save_pretrained(folder + '/ref')
    # The end of text is the last id. Without spread the id before it is no word: ids from there on are never
    # drawn.
    V, rng = model.config.vocab_size, random.Random(seed)
    vocabulary = {f't{i}': i for i in range(V - 1 if spread else V - 2)} | {'end': V - 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token='t0'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token='t0', eos_token='end', pad_token='end')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    for path in (folder, folder + '/ref'):
        tokenizer.save_pretrained(path)
    n_words = prompt_tokens - len(prompt('').split())
    n_questions = n_iterations * n_rollouts // n_per_question
    questions = [' '.join(f't{rng.randrange(V - 2)}' for _ in range(n_words))
                 for _ in range(n_questions + VALIDATION_ROWS)]
    os.makedirs(folder + '/task')
    with open(folder + '/task/train.jsonl', 'w') as f:
        f.writelines(json.dumps({'question': q, 'answer': '#### 1'}) + '\n' for q in questions)
    with open(folder + '/work.json', 'w') as f:
        json.dump(settings | {'texts': [prompt(q) for q in questions[:n_questions]]}, f)

def measure(command, folder):
    """-> (its output, peak GiB)"""
    with open(folder + '/output', 'w+') as output:
        offline = os.environ | {'HF_HUB_OFFLINE': '1'}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=offline)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        said = output.read()
    if status:
        raise UserError(f'{said}\n{command} failed; its output stands above')
    return said, usage.ru_maxrss / 2 ** 20

def iteration_flops(model):
    """Rollouts, old policy and reference once each, and epochs of forward and backward passes."""
    V = model.config.vocab_size
    length = round(V * (1 - (1 - 1 / V) ** max_new_tokens)) if spread else max_new_tokens  # on average
    rows = [prompt_tokens + length - 1] * n_rollouts
    forward = model.flops(rows, n_rollouts * length)
    drawing = forward - model.flops([prompt_tokens] * (n_rollouts - n_rollouts // n_per_question), 0)
    return drawing + (2 + 3 * epochs) * forward


if __name__ == '__main__':
    if sys.argv[1:2] == ['--trl']:  # its process
        with open(sys.argv[2] + '/work.json') as f:
            print(trl(sys.argv[2], types.SimpleNamespace(**json.load(f))))
        raise SystemExit
    from config import UserError, override
    settings = override(globals())
    runs = {'ours': (ours, ''), 'trl': (theirs, trl_python)}
    names = engines.split(',')
    for wrong, said in (
            (not set(names) <= set(runs), f'engines are a list of {", ".join(runs)}'),
            (shape not in SHAPES, f'shape is one of {", ".join(SHAPES)}'),
            (minibatch % micro_rows or minibatch % n_per_question or n_rollouts % minibatch,
             'minibatch must be a multiple of micro_rows and n_per_question, n_rollouts of minibatch')):
        if wrong:
            raise UserError(said)
    pin(threads, device)
    from model import ModelConfig, Transformer, memory_bandwidth, peak_flops
    torch_device, torch_dtype = set_up(types.SimpleNamespace(**settings))
    vocabulary = {'vocab_size': 96} if spread else {}
    model = Transformer(ModelConfig(block_size=512, **SHAPES[shape] | vocabulary)).init_weights()
    found = {name: [] for name in names}  # (seconds, peak GiB) of each round
    with tempfile.TemporaryDirectory() as folder:
        folder += '/model'
        prepare(folder, model, settings)
        for _ in range(rounds):
            for name in names:
                run, python = runs[name]
                command, seconds = run(folder, settings)
                said, peak = measure([python or sys.executable, *command], folder)
                found[name].append((seconds(said), peak))

    rate, flops = peak_flops(torch_device, torch_dtype, seconds=1.0), iteration_flops(model)
    print(f'{shape}, {dtype}, {device}, {threads} threads: {n_rollouts} rollouts of {prompt_tokens} + '
          f'{max_new_tokens} tokens{" at most" if spread else ""}, {n_per_question} a question; '
          f'{epochs} epochs, minibatches of {minibatch}')
    print(f'peak {rate / 1e9:,.0f} GFLOP/s, {memory_bandwidth(torch_device) / 1e9:,.0f} GB/s')
    print('| engine | seconds an iteration (median) | to ours (median of pairs) | MFU | peak GiB |')
    print('|---|---|---|---|---|')
    for name in names:
        seconds, peaks = zip(*found[name])
        median = statistics.median(seconds)
        pairs = [a[0] / b for a, b in zip(found.get('ours', []), seconds)] or [float('nan')]
        mfu = 100 * flops / median / rate
        print(f'| {name} | {median:.1f} | {statistics.median(pairs):.2f} | {mfu:.0f}% | {max(peaks):.2f} |')
