import math
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, loud, tiny_config

import ppo
from model import ModelConfig, Transformer, autocast, make_optimizer
from sample import Example, Sampler, action_logprobs

BF16 = torch.bfloat16


@pytest.fixture(scope='module')
def adapting():
    """A model with weights in bf16, an adapter after 16 updates at lr 1e-5, token ids, and the change of their log-probs as the trainer sees it."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=256, head_dim=64, n_inner=256)
    model = Transformer(ModelConfig(**shape)).init_weights().to(BF16).finish_loading().add_lora(16)
    ids, advantages = torch.randint(256, (4, 25)), torch.randn(4, 24)
    examples = [Example(row.tolist(), 1) for row in ids]

    def logprobs(model, grad=False, dtype=BF16):
        with torch.set_grad_enabled(grad):
            return ppo.evaluate_actions(model, None, examples, 1.0, dtype)[0].view(4, 24)
    before, optimizer = logprobs(model), make_optimizer(model, 1e-5, 0.0)
    for _ in range(16):
        (-advantages * logprobs(model, True)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, logprobs, before


def slope(y, x):
    return ((y * x).sum() / (x * x).sum()).item()


def test_what_an_adapter_learned_in_bf16_is_sampled_validated_and_exported(adapting, tmp_path):
    """The merged copy in bf16 has lost most of it: that is what must not be sampled from."""
    model, logprobs, before = adapting
    change = logprobs(model) - before
    merged = Transformer(model.config).to(BF16).finish_loading()
    with torch.no_grad():
        for name, p in merged.named_parameters():
            p.copy_(model.get_parameter(name))
        for name, (a, b) in model.adapters().items():
            weight = merged.get_parameter(f'{name}.weight')
            weight.copy_(weight.float() + b @ a)
    assert slope(logprobs(merged) - before, change) < 0.8
    model.save_pretrained(str(tmp_path / 'a'))
    loaded = Transformer.from_pretrained(str(tmp_path / 'a'), dtype=BF16)
    loaded.save_pretrained(str(tmp_path / 'b'))
    for policy in (model.for_sampling(BF16), loaded, Transformer.from_pretrained(str(tmp_path / 'b'), dtype=BF16)):
        assert slope(logprobs(policy) - before, change) > 0.95
    assert all(torch.equal(model.get_parameter(name), p) for name, p in loaded.named_parameters() if 'fixed_' not in name)
    # what others read, computed in fp32, has changed likewise: little is lost where the trainer adds up
    exact = Transformer.from_pretrained(str(tmp_path / 'a'))
    after = logprobs(exact, dtype=torch.float32)
    with torch.no_grad():
        for name, (a, b) in model.adapters().items():
            exact.get_parameter(f'{name}.weight').sub_(b @ a)
    change_in_fp32 = after - logprobs(exact, dtype=torch.float32)
    assert slope(change, change_in_fp32) > 0.75


def test_a_second_adapter_learns_beside_the_first(adapting, tmp_path):
    model, logprobs, before = adapting
    now = logprobs(model)
    model.save_pretrained(str(tmp_path / 'a'))
    again = Transformer.from_pretrained(str(tmp_path / 'a'), dtype=BF16, lora_rank=4)
    assert slope(logprobs(again) - before, now - before) > 0.95
    assert all(p.requires_grad == ('lora_' in name) for name, p in again.named_parameters())
    with torch.no_grad():
        for name, p in again.named_parameters():
            if name.endswith('lora_b'):
                p.normal_(std=0.01)
    moved = logprobs(again)
    with again.without_adapter():
        assert torch.equal(logprobs(again), logprobs(Transformer.from_pretrained(str(tmp_path / 'a'), dtype=BF16)))
    again.save_pretrained(str(tmp_path / 'b'))
    both = Transformer.from_pretrained(str(tmp_path / 'b'), dtype=BF16)
    assert both.blocks[0].mlp.up.fixed_a.shape == (20, 256)
    assert slope(logprobs(both) - now, moved - now) > 0.95


def test_a_sampler_draws_with_the_adapter_that_learns(bpe):
    """Through its cache and its laid-out weights: as the trainer says within bf16's rounding, and not as the model without the adapter."""
    model = loud(Transformer(tiny_config(bpe.vocab_size)).to(BF16).finish_loading()).add_lora(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith('lora_b'):
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    samples = Sampler(model.for_sampling(BF16), bpe, dtype=BF16).generate([[i, i + 1] for i in range(12)], 2, 20, 1.0)
    examples = [Example(s.prompt_ids + s.ids, len(s.prompt_ids)) for s in samples]

    def gap():
        found = ppo.evaluate_batch(model, None, examples, 1.0, BF16, 4096)[0]
        gaps = [abs(x - found[row, t].item()) for row, s in enumerate(samples) for t, x in enumerate(s.logprobs)]
        return sum(gaps) / len(gaps)
    with model.without_adapter():
        without = gap()
    assert gap() < 0.1 < 0.3 < without


def test_logits_and_values_are_fp32_under_bf16(bpe):
    """Against fp64 products of the rounded factors. At a size of 16 to 32 numbers in bf16 are 0.125 apart."""
    model = loud(Transformer(tiny_config(bpe.vocab_size)).add_value_head())
    hidden = 4 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    exact = hidden.to(BF16).double() @ model.head.weight.to(BF16).double().t()
    assert exact.abs().max() > 16
    for copy in (model, model.for_sampling(BF16)):
        with torch.no_grad(), autocast(torch.device('cpu'), BF16), model.packed(BF16):
            logits = copy.logits(hidden)
        assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-3
    with autocast(torch.device('cpu'), BF16):
        logprobs, _ = action_logprobs(model, hidden, torch.arange(200) % 50)
        values = model.values(hidden)
    expected = exact.log_softmax(-1)[torch.arange(200), torch.arange(200) % 50]
    assert (logprobs - expected).abs().max() < 1e-3
    head = model.value_head
    assert (values - (hidden.double() @ head.weight.double().t() + head.bias.double())[:, 0]).abs().max() < 1e-4
    logprobs.sum().backward()  # and there is a gradient
    assert model.head.weight.grad.abs().sum() > 0


# ---- ppo

def test_samples_that_tie_have_no_advantage_and_move_nothing():
    mask = torch.ones(8, 5, dtype=torch.bool)
    rewards = torch.zeros(8, 5)
    rewards[torch.arange(8), torch.arange(8) % 5] = 0.35  # no binary fraction, at different places
    assert not ppo.group_advantages(rewards, mask, 8).any()
    for step in range(3):  # the same steps in another order
        rewards[:, step] = 1 / 3
    parts = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.7])
    shuffled = torch.stack([parts[torch.randperm(5, generator=torch.Generator().manual_seed(i))] for i in range(8)])
    assert not ppo.group_advantages(shuffled, mask, 8).any()
    noise = 1e-8 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))  # of a KL that is 0 but for rounding
    assert not ppo.group_advantages(shuffled + noise, mask, 8).any()
    shuffled[3, 2] += 1e-3  # and what does not tie has one
    assert ppo.group_advantages(shuffled, mask, 8).all()
    for shift_mean in (True, False):
        assert not ppo.whiten(torch.full((8, 5), 0.35) + noise, mask, shift_mean).any()
    assert ppo.whiten(shuffled, mask).any()


def test_importance_weights():
    new, sampled = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -3.0, -1.0])
    assert ppo.importance_weights(new, sampled, 2.0).tolist() == pytest.approx([1, 2, math.exp(-2)])
    # with them the mean over what q drew is the mean under p, as long as nothing reaches the cap
    p, q, f = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2]), torch.tensor([1.0, 5.0, -2.0])
    assert (q * ppo.importance_weights(p.log(), q.log(), 2.0) * f).sum().item() == pytest.approx((p * f).sum().item())
