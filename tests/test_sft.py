"""SFT: which tokens are learned, that batching does not matter, and that a run can be stopped and resumed."""
import json
import math
import random

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from conftest import Killed, dies_after, loud, tiny_config, write_task

import rewards
import sft
from config import UserError
from model import Checkpoints, Transformer, learning_rate
from rewards import Problem
from sample import Example, Sampler, micro_batches, n_computed, token_logprobs
from sft import finetune, load_texts, loss_sum, mean_loss, n_learned, solution_examples, text_examples


def new_model(bpe, seed=0):
    return loud(Transformer(tiny_config(bpe.vocab_size)), seed)


def problem(a, b):
    return Problem(f'Tom has {a} apples and buys {b} more. How many?', f'Tom has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}', str(a + b))


@pytest.fixture
def examples(bpe):
    return solution_examples([problem(a, b) for a, b in ((3, 14), (1, 2), (30, 4), (114, 300), (5, 5), (17, 3), (2, 2), (9, 90))], bpe)


def test_solution_and_eos_are_learned_and_the_question_is_not(bpe, examples):
    e, p = examples[0], problem(3, 14)
    assert bpe.decode(e.ids[:e.n_prompt]) == rewards.prompt(p.question)
    assert bpe.decode(e.ids[e.n_prompt:]) == ' ' + p.solution and e.ids[-1] == bpe.eos
    # transformers' loss with the prompt labelled -100 is the oracle
    model = new_model(bpe)
    labels = torch.tensor([[-100] * e.n_prompt + e.ids[e.n_prompt:]])
    expected = ForCausalLMLoss(model(torch.tensor([e.ids])), labels, model.config.vocab_size)
    torch.testing.assert_close(loss_sum(model, [e]) / n_learned([e]), expected)


def test_texts_are_learned_whole(bpe):
    e, = text_examples(['Tom has 3'], bpe)
    assert e.ids == [bpe.eos] + bpe.encode('Tom has 3') + [bpe.eos] and e.n_prompt == 1 and n_learned([e]) == len(e.ids) - 1


def test_padding_does_not_matter(bpe, examples):
    model = new_model(bpe)
    torch.testing.assert_close(loss_sum(model, examples), sum(loss_sum(model, [e]) for e in examples), rtol=1e-5, atol=1e-4)


def test_micro_batches_keep_every_example_and_the_limit(examples):
    for limit in (1, 50, 120, 10_000):
        micros = micro_batches(examples, limit)
        assert sorted(e for m in micros for e in m) == sorted(examples)
        assert all(len(m) * max(len(e.ids) for e in m) <= limit or len(m) == 1 for m in micros)


def weights_after(bpe, examples, **changes):
    model = new_model(bpe)
    finetune(model, examples, **(dict(max_steps=3, batch_size=8, lr=1e-3, warmup=0.0) | changes))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_equals_the_full_batch(bpe, examples):
    full = weights_after(bpe, examples)  # three updates of up to lr = 1e-3 a weight; rounding makes 2e-7 of it on some CPUs, 2e-6 on others
    for micro_tokens in (1, 60, 130):
        torch.testing.assert_close(weights_after(bpe, examples, micro_tokens=micro_tokens), full, rtol=0, atol=5e-5)
    assert not torch.allclose(weights_after(bpe, examples, max_steps=2), full, rtol=0, atol=1e-4)  # the tolerance can tell


def test_the_loss_is_a_mean_over_tokens_not_over_micro_batches(bpe, examples):
    logged = []
    finetune(new_model(bpe), examples, max_steps=1, batch_size=8, lr=0.0, micro_tokens=1, log=lambda step, **m: logged.append(m['loss']))
    model = new_model(bpe)
    assert logged[0] == pytest.approx(loss_sum(model, examples).item() / n_learned(examples), rel=1e-5)
    assert mean_loss(model, examples, 100, torch.device('cpu'), torch.float32) == pytest.approx(logged[0], rel=1e-5)


def test_gradients_are_clipped_on_the_global_norm(bpe, examples, monkeypatch):
    """With SGD's step in place of Adam's, the distance walked is lr * clip."""
    model = new_model(bpe)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    monkeypatch.setattr(sft, 'make_optimizer', lambda model, lr, decay: torch.optim.SGD(model.parameters(), lr=lr))
    finetune(model, examples, max_steps=1, batch_size=8, lr=0.1, warmup=0.0, grad_clip=0.5, micro_tokens=60)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)


def test_every_epoch_sees_every_example_once(bpe, examples, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, 'loss_sum', lambda model, micro, trunk: seen.extend(micro) or sum(p.sum() for p in model.parameters()) * 0)
    steps = finetune(new_model(bpe), examples, epochs=3, batch_size=3, seed=1)
    assert steps == 8 and len(seen) == 24
    assert all(seen.count(e) == 3 for e in examples)  # updates straddle the epochs and still lose nothing


def test_overfits_eight_solutions_and_says_them_greedily(bpe, examples):
    torch.manual_seed(0)
    model = Transformer(tiny_config(bpe.vocab_size, n_embd=64, head_dim=16, n_inner=128)).init_weights()
    finetune(model, examples, max_steps=150, batch_size=8, lr=5e-3, min_lr=1e-4, seed=0)
    for e in examples:  # above a half greedy decoding has no choice; 0.99 and more was seen
        with torch.no_grad():
            probabilities = token_logprobs(model(torch.tensor([e.ids]))[0, e.n_prompt - 1:-1], torch.tensor(e.ids[e.n_prompt:])).exp()
        assert probabilities.min() > 0.6
    prompts = [e.ids[:e.n_prompt] for e in examples]
    for e, s in zip(examples, Sampler(model, bpe).generate(prompts, 1, 40, temperature=0)):
        assert s.ids == e.ids[e.n_prompt:] and s.finished


def test_next_to_no_padding_is_computed(bpe):
    """Rows of 3 to 60 tokens in one micro-batch: the log's padding share is that of the rows that go through the linear layers."""
    model, rng, rows, logged = new_model(bpe), random.Random(0), [], []
    examples = [Example([1] * rng.randint(3, 60), 2) for _ in range(64)]
    model.blocks[0].mlp.up.register_forward_hook(lambda layer, x, y: rows.append(y.shape[:-1].numel()))
    finetune(model, examples, max_steps=1, batch_size=64, micro_tokens=3000, log=lambda step, **m: logged.append(m['padding']))
    assert logged[0] == pytest.approx(1 - sum(len(e.ids) - 1 for e in examples) / sum(rows)) and 0 <= logged[0] < 0.05
    for n in range(1, 20_000, 7):
        assert n <= n_computed(n, 30_000) <= n * 17 / 16 and n_computed(n, n + 1) <= n + 1


def test_learning_rate():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and max(rates) == 1.0
    assert rates[10] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1)
    assert rates[10 + 89 // 2] == pytest.approx(0.55, abs=0.01)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, 1, 1.0, 0.1, 0.5) > 0  # a run of one update does learn


def test_nothing_to_learn_from_and_divergence(bpe, examples):
    with pytest.raises(UserError, match='nothing to fine-tune on'):
        finetune(new_model(bpe), [])
    with pytest.raises(UserError, match='update 2: loss nan'):
        finetune(new_model(bpe), examples, max_steps=5, batch_size=8, lr=1e38, warmup=0.0)


def test_bad_texts(tmp_path):
    path = tmp_path / 'x.jsonl'
    with pytest.raises(UserError, match='no such file'):
        load_texts(str(path))
    for content, match in (('{"text": "a"}\n{"txt": "b"}\n', 'x.jsonl:2: not a'), ('{"text": 3}\n', 'x.jsonl:1: not a')):
        path.write_text(content)
        with pytest.raises(UserError, match=match):
            load_texts(str(path))


# -----------------------------------------------------------------------------
# the script

TINY = ['--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=16', '--n_merges=60', '--batch_size=8', '--max_steps=6', '--eval_interval=3',
        '--eval_problems=4', '--max_new_tokens=20', '--lr=1e-3', '--device=cpu']


@pytest.fixture
def task(tmp_path):
    rows = [problem(a, b) for a in range(1, 21) for b in range(1, 16)]
    write_task(tmp_path, {'train': rows, 'test': rows})
    return f'--task={tmp_path}/task'


def log_of(folder):
    return [{k: v for k, v in json.loads(line).items() if k not in ('time', 'tokens_per_second')} for line in open(folder / 'log.jsonl')]


def test_resume_equals_uninterrupted(script, task, tmp_path, monkeypatch):
    script('sft.py', task, *TINY, f'--out_dir={tmp_path}/whole')
    with monkeypatch.context() as patch, pytest.raises(Killed):  # at its second validation: what is on disk is the first one's state
        patch.setattr(Checkpoints, 'save', dies_after(1, Checkpoints.save))
        script('sft.py', task, *TINY, f'--out_dir={tmp_path}/parts')
    script('sft.py', task, *TINY, f'--out_dir={tmp_path}/parts', '--init_from=resume')
    for checkpoint in ('best', 'last'):
        whole, parts = ((tmp_path / run / checkpoint / 'model.safetensors').read_bytes() for run in ('whole', 'parts'))
        assert whole == parts
    assert log_of(tmp_path / 'whole')[-1] == log_of(tmp_path / 'parts')[-1]


def test_bad_input_is_one_line_and_loses_nothing(script, task, tmp_path):
    def refused(*flags, match):
        done = script('sft.py', task, *TINY, f'--out_dir={tmp_path}/run', *flags, code=2)
        assert match in done.stderr and done.stderr.count('\n') == 1, done.stderr

    script('sft.py', task, *TINY, f'--out_dir={tmp_path}/run')
    before = (tmp_path / 'run' / 'last' / 'model.safetensors').read_bytes()
    refused(match='--overwrite')                                         # another run is there
    refused('--overwrite', '--task=nowhere', match='nowhere')            # and stays there when --overwrite comes with a mistake
    refused('--overwrite', '--init_from=nowhere/at/all', match='nowhere/at/all')
    refused('--overwrite', '--n_worked=100000', match='n_worked')
    refused('--learning_rate=1', match='learning_rate')
    refused('--overwrite', '--n_embd=17', match='n_embd')
    refused('--out_dir=' + str(tmp_path / 'new'), '--init_from=resume', match='new')
    assert (tmp_path / 'run' / 'last' / 'model.safetensors').read_bytes() == before
    script('sft.py', task, *TINY, f'--out_dir={tmp_path}/run', '--overwrite', '--seed=1')
    assert (tmp_path / 'run' / 'last' / 'model.safetensors').read_bytes() != before


def test_another_family_and_fewer_examples(script, task, tmp_path):
    out = script('sft.py', task, *TINY, '--family=gpt2', '--n_worked=10', f'--out_dir={tmp_path}/run').stdout
    assert Transformer.from_pretrained(str(tmp_path / 'run')).config.family == 'gpt2' and '10 examples' in out


def test_checkpoints_that_stay(script, task, tmp_path):
    script('sft.py', task, *TINY, '--n_worked=40', '--batch_size=8', '--max_steps=0', '--epochs=1.5', '--keep_epochs=0.5', f'--out_dir={tmp_path}/run')
    kept = sorted(p.name for p in (tmp_path / 'run').glob('epoch_*'))
    assert kept == ['epoch_000.40', 'epoch_000.80', 'epoch_001.20', 'epoch_001.60']  # of 5 updates an epoch every second, and the last
    weights = [(tmp_path / 'run' / name / 'model.safetensors').read_bytes() for name in kept]
    assert len(set(weights)) == 4 and weights[-1] == (tmp_path / 'run' / 'last' / 'model.safetensors').read_bytes()
    script('eval.py', f'--init_from={tmp_path}/run/{kept[0]}', task, '--k=2', '--max_new_tokens=8', '--n_problems=2', '--device=cpu')
    assert f'{tmp_path}/run/{kept[0]}' in script('eval.py', '--compare', f'{tmp_path}/run/{kept[0]}').stdout


def test_plain_language_model(script, task, tmp_path):
    (tmp_path / 'base.jsonl').write_text('{"text": "3+14=17"}\n{"text": "Tom has 3 apples."}\n' * 20)
    script('sft.py', task, *TINY, f'--text_file={tmp_path}/base.jsonl', f'--out_dir={tmp_path}/base')
    script('sft.py', task, *TINY, f'--init_from={tmp_path}/base', f'--out_dir={tmp_path}/sft')
    assert math.isfinite(log_of(tmp_path / 'sft')[-1]['val_loss'])


def test_example_is_a_plain_tuple():
    assert Example([1, 2], 1) == ([1, 2], 1, ())


def test_what_does_not_fit_the_context_is_left_out_of_training_and_of_validation(script, task, tmp_path):
    """A context that is no multiple of 8, which some of the rows just fit and some do not."""
    rows = [json.loads(line) for line in open(tmp_path / 'task' / 'train.jsonl')]
    for i in range(0, len(rows), 3):
        rows[i]['answer'] = 'so ' * (i % 30) + rows[i]['answer']
    (tmp_path / 'task' / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    flags = [task, *TINY, '--max_steps=3', '--eval_problems=256', f'--out_dir={tmp_path}/run', '--overwrite']
    done = script('sft.py', *flags, '--block_size=61')
    assert 'left out: ' in done.stdout and math.isfinite(log_of(tmp_path / 'run')[-1]['val_loss'])
    assert 'fits the context of 5 tokens' in script('sft.py', *flags, '--block_size=5', code=2).stderr
