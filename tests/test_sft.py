"""SFT: which tokens are learned, that batching does not matter, and what a run keeps."""
import math

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from conftest import loud, tiny_config, write_task
from test_ei import weights
from test_rewards import log_of

import data
import sft
from config import UserError
from data import Problem
from model import Transformer, learning_rate
from sample import n_learned
from sft import cross_entropy, finetune, load_texts, mean_loss, solution_examples, text_examples

def problem(a, b):
    return Problem(f'Tom has {a} apples and buys {b} more. How many?',
                   f'Tom has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}', str(a + b))

def new_model(bpe):
    return loud(Transformer(tiny_config(bpe.vocab_size)))

def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

@pytest.fixture
def examples(bpe):
    pairs = ((3, 14), (1, 2), (30, 4), (114, 300), (5, 5), (17, 3), (2, 2), (9, 90))
    return solution_examples([problem(a, b) for a, b in pairs], bpe)

def test_what_is_learned(bpe, examples):
    """A solution and its EOS, or a text whole: transformers' loss, the rest labelled -100, padded or not."""
    e, p = examples[0], problem(3, 14)
    assert bpe.decode(e.ids[:e.n_prompt]) == data.prompt(p.question)
    assert bpe.decode(e.ids[e.n_prompt:]) == ' ' + p.solution and e.ids[-1] == bpe.eos
    text, = text_examples(['Tom has 3'], bpe)
    assert text == ([bpe.eos] + bpe.encode('Tom has 3') + [bpe.eos], 1, None)
    model, total = new_model(bpe), 0.0
    partly = e._replace(labels=[math.nan if i % 3 else 1.0 for i in range(len(e.ids) - e.n_prompt)])
    for x in [text, partly, *examples]:
        kept = [i >= x.n_prompt and (x.labels is None or i % 3 == x.n_prompt % 3) for i in range(len(x.ids))]
        labels = torch.tensor([[i if k else -100 for i, k in zip(x.ids, kept)]])
        expected = ForCausalLMLoss(model(torch.tensor([x.ids])), labels, model.config.vocab_size)
        torch.testing.assert_close(cross_entropy(model, [x]) / sum(kept), expected)
        assert n_learned([x]) == sum(kept)
        total += expected * sum(kept)
    found = cross_entropy(model, [text, partly, *examples])
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-4)

def test_the_split_into_micro_batches_does_not_matter(bpe, examples):
    """For weights and the logged loss, a mean over the update's tokens; one solution is learned in part."""
    n = len(examples[3].ids) - examples[3].n_prompt
    examples[3] = examples[3]._replace(labels=[1.0] * 4 + [math.nan] * (n - 4))

    def trained(max_steps=3, **changes):
        model, logged = new_model(bpe), []
        finetune(model, examples, max_steps=max_steps, batch_size=8, lr=1e-3, warmup=0.0, **changes,
                 log=lambda step, **m: logged.append(m['loss']))
        return flat(model), logged
    full, losses = trained()  # rounding makes up to 2e-6 of the three updates of up to lr = 1e-3 a weight
    for micro_tokens in (1, 60, 130):
        weights, logged = trained(micro_tokens=micro_tokens)
        torch.testing.assert_close(weights, full, rtol=0, atol=5e-5)
        assert logged == pytest.approx(losses, rel=1e-4)
    assert not torch.allclose(trained(max_steps=2)[0], full, rtol=0, atol=1e-4)  # the tolerance can tell
    by_hand = cross_entropy(new_model(bpe), examples).item() / n_learned(examples)
    by_parts = mean_loss(new_model(bpe), examples, 100, torch.device('cpu'), torch.float32)
    assert [by_hand, by_parts] == pytest.approx([losses[0]] * 2, rel=1e-5)

def test_gradients_are_clipped_on_the_global_norm_and_padding_is_counted(bpe, examples, monkeypatch):
    """With SGD's step in place of Adam's, the distance walked is lr * clip."""
    model, computed, logged = new_model(bpe), [], []
    before = flat(model)
    model.blocks[0].mlp.up.register_forward_hook(lambda layer, x, y: computed.append(y.shape[:-1].numel()))
    monkeypatch.setattr(sft, 'make_optimizer', lambda m, lr, _: torch.optim.SGD(m.parameters(), lr=lr))
    finetune(model, examples, max_steps=1, batch_size=8, lr=0.1, warmup=0.0, grad_clip=0.5, micro_tokens=100,
             log=lambda step, **m: logged.append(m['padding']))
    assert (flat(model) - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-3)
    real = sum(len(e.ids) - 1 for e in examples)
    assert logged == [pytest.approx(1 - real / sum(computed))] and logged[0] > 0

def test_every_epoch_sees_every_example_once(bpe, examples):
    for batch_size in (3, 1):  # of 3, updates straddle the epochs and still lose nothing
        seen = []

        def loss(model, micro, trunk):
            seen.extend(e.ids for e in micro)
            return 0 * model.embed.weight.sum()
        n = finetune(new_model(bpe), examples, loss=loss, epochs=3, batch_size=batch_size, seed=1)
        assert n * batch_size == len(seen) == 24 and all(seen.count(e.ids) == 3 for e in examples)
    assert seen[:8] != seen[8:16] != seen[16:]  # each epoch in an order of its own

def test_learning_rate():
    rates = [learning_rate(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert [rates[i] for i in (0, 9, 10, 99)] == pytest.approx([0.1, 1.0, 1.0, 0.1]) and max(rates) == 1.0
    assert rates[54] == pytest.approx(0.55, abs=0.01) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 1, 1.0, 0.1, 0.5) > 0  # a run of one update does learn

def test_bad_input(bpe, tmp_path):
    with pytest.raises(UserError, match='nothing to fine-tune on'):
        finetune(new_model(bpe), [])
    for text, match in ((None, 'no such file'), ('{"text": "a"}\n{"txt": "b"}\n', 'a:2: not a'),
                        ('{"text": 3}\n', 'a:1: not')):
        if text:
            (tmp_path / 'a').write_text(text)
        with pytest.raises(UserError, match=match):
            load_texts(str(tmp_path / 'a'))

# ---- the script ----
TINY = ('--n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=16 --n_merges=60 --batch_size=8 --max_steps=6 '
        '--lr=1e-3 --eval_interval=3 --eval_problems=4 --max_new_tokens=20 --device=cpu').split()

@pytest.fixture
def train(script, tmp_path):
    """train('a', flags ...) runs sft.py into the folder a."""
    rows = [problem(a, b) for a in range(1, 21) for b in range(1, 16)]
    write_task(tmp_path, {'train': rows, 'test': rows})
    return lambda name, *flags, code=0: script('sft.py', f'--task={tmp_path}/task', *TINY,
                                               f'--out_dir={tmp_path}/{name}', *flags, code=code)

def test_checkpoints_that_stay(train, tmp_path):
    flags = '--family=gpt2 --n_worked=40 --max_steps=0 --epochs=1.5 --keep_epochs=0.5'.split()
    run, said = tmp_path / 'run', train('run', *flags).stdout
    assert Transformer.from_pretrained(str(run)).config.family == 'gpt2' and '40 examples' in said
    kept = sorted(p.name for p in run.glob('epoch_*'))  # every second of 5 updates an epoch, and the last
    assert kept == ['epoch_000.40', 'epoch_000.80', 'epoch_001.20', 'epoch_001.60']
    found = [(run / name / 'model.safetensors').read_bytes() for name in kept + ['last', 'best']]
    assert len(set(found)) == 4 and found[3] == found[4] == found[5]  # all have maj@1 = 0

def test_texts_then_solutions_of_which_some_do_not_fit_the_context(train, tmp_path):
    """A context that is no multiple of 8, which some of the rows just fit."""
    held_out = '{"text": "? * ?"}\n' * 4  # training makes them less likely: the first one is the best
    texts = '{"text": "3+14=17"}\n{"text": "Tom has 3 apples."}\n' * 20 + held_out
    (tmp_path / 'texts').write_text(texts)
    base, rows = tmp_path / 'base', tmp_path / 'task' / 'train.jsonl'
    flags = '--block_size=97 --max_steps=12 --lr=0.1 --min_lr=0.1'.split()
    train('base', f'--text_file={tmp_path}/texts', *flags)
    losses = [row['val_loss'] for row in log_of(base, 'val_loss')]
    assert losses[-1] > min(losses) + 0.1 and not torch.equal(weights(base / 'best'), weights(base / 'last'))
    lines = rows.read_text().split('\n')
    for i in range(0, len(lines) - 1, 3):
        lines[i] = lines[i].replace('"answer": "', '"answer": "' + 'so ' * (i % 30))
    rows.write_text('\n'.join(lines))
    said = train('run', f'--init_from={base}', '--eval_problems=256', '--max_steps=3').stdout
    assert said.count('left out: ') == 2 and math.isfinite(log_of(tmp_path / 'run')[-1]['val_loss'])
