"""
How fast is an iteration of PPO, rollouts and update? `ppo.py`, as it is, against TRL's trainer: the same model, number of rollouts,
lengths, epochs and minibatch. A run by hand, not a test.

What is compared: --advantage=group with TRL's GRPOTrainer (its only trainers with a clipped ratio in current releases are GRPO's kin).
Both draw K samples of each question, take a sample's reward against its mates' as the advantage of all its tokens, and do `epochs`
passes of the token-wise clipped surrogate with a KL penalty against a reference model, so that both also compute the log-probs of
the old policy and of the reference. --advantage=gae, with a critic of its own, against the PPOTrainer of trl.experimental, which
is in TRL 1.9 and gone by 1.14. Rewards cost nothing on either side. Prompts have one length, and responses too, so that nothing ends early;
or with --spread every token ends its response with a chance of 1 / 96, in a model whose vocabulary is that small, so that lengths
are geometric: then TRL decodes to the longest and pads. Both draw their own lengths, of the same distribution.

On some CPUs our scripts compute fp32 products another way than torch does by itself (model.fast_cpu_matmul). TRL gets that here, too,
unless --fast_matmul=False.

In each round either one makes a fresh start and times its last iteration, the ones before being its warm-up.

$ python tests/bench_ppo.py                                    # the Llama shape in fp32, one thread; trl beside torch
$ python tests/bench_ppo.py --pythons=trl=envs/trl/bin/python  # trl in an environment of its own
$ python tests/bench_ppo.py --spread
$ python tests/bench_ppo.py --advantage=gae --pythons=trl=envs/trl1.9/bin/python
"""
import json
import os
import subprocess
import sys
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# -----------------------------------------------------------------------------
shape = 'llama'       # see SHAPES in bench_sample.py
advantage = 'group'   # or 'gae'
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
trl_cache = 'dynamic' # TRL: 'dynamic', 'static', or 'paged' for transformers' continuous batching
n_iterations = 2      # of a round, of which the last is timed
engines = 'ours,trl'
pythons = ''          # 'trl=PYTHON': the interpreter of an engine that is not installed beside this one
dtype = 'float32'     # or 'bfloat16'
threads = 1
rounds = 3
device = 'cpu'
seed = 0
# -----------------------------------------------------------------------------


def trl(folder, work):
    """Trains for work.n_iterations -> the seconds of the last one."""
    import random

    import torch
    import transformers

    from model import setup
    if work.fast_matmul:
        setup(work.device, work.dtype, work.seed)
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
    common = dict(output_dir=folder + '/trl', use_cpu=work.device == 'cpu', bf16=work.dtype == 'bfloat16', learning_rate=1e-6, seed=work.seed,
                  per_device_train_batch_size=work.micro_rows, temperature=0.7, report_to='none', logging_steps=10 ** 6, save_strategy='no',
                  disable_tqdm=True, gradient_checkpointing=False, optim='adamw_torch_fused')
    if work.advantage == 'group':
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        updates = work.epochs * work.n_rollouts // work.minibatch  # of an iteration
        cache = dict(use_transformers_continuous_batching=True) if work.trl_cache == 'paged' else dict(cache_implementation=work.trl_cache)
        config = GRPOConfig(
            **common, **cache, max_steps=updates * work.n_iterations, gradient_accumulation_steps=work.minibatch // work.micro_rows,
            steps_per_generation=work.n_rollouts // work.micro_rows, num_iterations=work.epochs, num_generations=work.n_per_question,
            max_completion_length=work.max_new_tokens, generation_kwargs={} if work.spread else {'min_new_tokens': work.max_new_tokens},
            beta=0.05, epsilon=0.2,
            scale_rewards='batch', loss_type='dapo', log_completions=False)

        def reward(completion_ids, **_):
            assert work.spread or {len(ids) for ids in completion_ids} == {work.max_new_tokens}
            return [random.random() for _ in completion_ids]

        trainer = GRPOTrainer(folder, reward, config, Dataset.from_list([{'prompt': text} for text in work.texts]),
                              processing_class=tokenizer, callbacks=[Clock()])
    else:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        updates = 1  # its steps are iterations
        config = PPOConfig(
            **common, gradient_accumulation_steps=work.n_rollouts // work.micro_rows, num_mini_batches=work.n_rollouts // work.minibatch,
            total_episodes=work.n_rollouts * work.n_iterations, num_ppo_epochs=work.epochs, response_length=work.max_new_tokens,
            local_rollout_forward_batch_size=work.n_rollouts, num_sample_generations=0, kl_coef=0.05)
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
        value_model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        reward_model = AutoModelForSequenceClassification.from_config(LlamaConfig(  # it must have one; this costs next to nothing
            vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_labels=1))
        rows = [{'input_ids': ids} for ids in prompts for _ in range(work.n_per_question)]
        trainer = PPOTrainer(config, tokenizer, policy, reference, reward_model, Dataset.from_list(rows), value_model, callbacks=[Clock()])
    trainer.train()
    assert len(ends) == updates * work.n_iterations, f'{len(ends)} updates, not {work.n_iterations} * {updates}'
    return ends[-1] - ends[-1 - updates]


def ours(folder, work, python):
    """The command, and what tells its seconds from the run's log."""
    out = folder + '/run'
    flags = dict(init_from=folder, ref=folder + '/ref', task=folder + '/task', out_dir=out, overwrite=True, n_iterations=work.n_iterations,
                 n_rollouts=work.n_rollouts, n_per_question=work.n_per_question, max_new_tokens=work.max_new_tokens, max_rows=work.n_rollouts,
                 advantage=work.advantage, critic='separate', epochs=work.epochs, minibatch=work.minibatch, micro_tokens=work.micro_tokens,
                 kl_coef=0.05, eval_interval=10 ** 6, eval_problems=1, show=0, device=work.device, dtype=work.dtype, seed=work.seed)

    def seconds():
        with open(out + '/log.jsonl') as f:
            rows = [row for row in map(json.loads, f) if 'rollout_tokens_per_second' in row]
        # Nothing ended early, and no row was left out of the update for an advantage of 0.
        assert all((work.spread or row['response_tokens'] == work.max_new_tokens) and row['learning_rows'] == 1 for row in rows)
        return rows[-1]['time'] - rows[-2]['time']
    return [python, ROOT + '/ppo.py', *(f'--{name}={value}' for name, value in flags.items())], lambda _: seconds()


def theirs(folder, work, python):
    return [python, os.path.abspath(__file__), '--worker', folder], lambda output: float(output.split()[-1])


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:  # TRL's process
        with open(sys.argv[2] + '/work.json') as f:
            print(trl(sys.argv[2], types.SimpleNamespace(**json.load(f))))
        raise SystemExit
    from bench_sample import SHAPES, pin

    from config import UserError, override
    settings = override(globals())
    runs = {'ours': ours, 'trl': theirs}
    names, interpreters = engines.split(','), dict(item.partition('=')[::2] for item in pythons.split(',') if item)
    for name in names + list(interpreters):
        if name not in runs:
            raise UserError(f'engines are a list of {", ".join(runs)}; not {name!r}')
    if shape not in SHAPES:
        raise UserError(f'shape is one of {", ".join(SHAPES)}')
    if spread and advantage == 'gae':
        raise UserError("spread goes with advantage = 'group'")
    if n_iterations < 2:
        raise UserError('n_iterations must be at least 2: the first is the warm-up')
    if minibatch % micro_rows or n_rollouts % minibatch or n_rollouts % n_per_question or minibatch % n_per_question:
        raise UserError('minibatch must be a multiple of micro_rows and n_per_question, n_rollouts of minibatch and n_per_question')
    if 'trl' in names and subprocess.run([interpreters.get('trl', sys.executable), '-c', 'import importlib.util as u, sys; '
                                          'sys.exit(u.find_spec("trl") is None)']).returncode:
        raise UserError('trl is not installed for this python; --pythons=trl=PYTHON names another one')
    pin(threads, device)
    import random
    import statistics
    import tempfile

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import rewards
    from model import ModelConfig, Transformer, memory_bandwidth, peak_flops, setup

    torch.set_num_threads(threads)
    torch_device, torch_dtype = setup(device, dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        folder += '/model'
        model = Transformer(ModelConfig(block_size=512, **SHAPES[shape] | ({'vocab_size': 96} if spread else {}))).init_weights()
        V, rng = model.config.vocab_size, random.Random(seed)
        model.save_pretrained(folder)
        # The reference must be another model: without it nothing would have been rewarded yet, and ppo.py leaves out of the update
        # what has no advantage.
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        model.save_pretrained(folder + '/ref')
        # A tokenizer of one word an id. The end of text is the last id, and with one id before it that is no word the number of words
        # is that id: the sampler draws ids below the number of words alone, and so never the end of text (unless spread).
        words = Tokenizer(models.WordLevel({f't{i}': i for i in range(V - 1 if spread else V - 2)} | {'end': V - 1}, unk_token='t0'))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        for path in (folder, folder + '/ref'):
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token='t0', eos_token='end', pad_token='end').save_pretrained(path)
        n_words = prompt_tokens - len(rewards.prompt('').split())
        n_questions = n_iterations * n_rollouts // n_per_question
        questions = [' '.join(f't{rng.randrange(V - 2)}' for _ in range(n_words)) for _ in range(n_questions + rewards.VALIDATION_ROWS)]
        os.makedirs(folder + '/task')
        with open(folder + '/task/train.jsonl', 'w') as f:
            f.writelines(json.dumps({'question': q, 'answer': '#### 1'}) + '\n' for q in questions)
        names_of_work = ('advantage', 'n_rollouts', 'n_per_question', 'prompt_tokens', 'max_new_tokens', 'epochs', 'minibatch', 'micro_tokens',
                         'micro_rows', 'spread', 'fast_matmul', 'trl_cache', 'n_iterations', 'dtype', 'threads', 'device', 'seed')
        work = {name: settings[name] for name in names_of_work} | {'texts': [rewards.prompt(q) for q in questions[:n_questions]]}
        with open(folder + '/work.json', 'w') as f:
            json.dump(work, f)
        seconds, busy, peak = {name: [] for name in names}, {name: [] for name in names}, dict.fromkeys(names, 0)
        for _ in range(rounds):
            for name in names:
                command, read = runs[name](folder, types.SimpleNamespace(**work), interpreters.get(name, sys.executable))
                start = time.perf_counter()
                with open(folder + '/output', 'w+') as output:
                    process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {'HF_HUB_OFFLINE': '1'})
                    _, status, usage = os.wait4(process.pid, 0)
                    output.seek(0)
                    said = output.read()
                if status:
                    print(said)
                    raise UserError(f'{name} failed; its output stands above')
                seconds[name].append(read(said))
                busy[name].append((usage.ru_utime + usage.ru_stime) / (time.perf_counter() - start))
                peak[name] = max(peak[name], usage.ru_maxrss * 1024)

    # The operations of an iteration: rollouts, old policy and reference once each, and epochs of forward and backward passes.
    length = round(V * (1 - (1 - 1 / V) ** max_new_tokens)) if spread else max_new_tokens  # on average
    whole, n = prompt_tokens + length, n_rollouts * length
    forward = model.flops([whole - 1] * n_rollouts, n)
    drawing = model.flops([prompt_tokens] * (n_rollouts // n_per_question), 0) + forward - model.flops([prompt_tokens] * n_rollouts, 0)
    flops = drawing + (2 + 3 * epochs) * forward
    if advantage == 'gae':
        flops += (1 + 3 * epochs) * model.flops([whole - 1] * n_rollouts, 0)
    rate = peak_flops(torch_device, torch_dtype, seconds=1.0)
    trainer = {'group': 'GRPOTrainer', 'gae': 'PPOTrainer'}[advantage]
    print(f'{shape}, {dtype}, {device}, {threads} threads: {n_rollouts} rollouts of {prompt_tokens} + {max_new_tokens} tokens'
          f'{" at most" if spread else ""}, {n_per_question} a question; {epochs} epochs, minibatches of {minibatch}; advantage {advantage}, TRL: {trainer}')
    print(f'peak {rate / 1e9:,.0f} GFLOP/s, {memory_bandwidth(torch_device) / 1e9:,.0f} GB/s')
    print('| engine | seconds an iteration (median) | to ours (median of pairs) | MFU | cores busy | peak GiB |\n|---|---|---|---|---|---|')
    for name in names:
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds['ours'], seconds[name])) if 'ours' in names else float('nan')
        print(f'| {name} | {median:.1f} | {ratio:.2f} | {100 * flops / median / rate:.0f}% '
              f'| {statistics.median(busy[name]):.2f} | {peak[name] / 2 ** 30:.2f} |')
