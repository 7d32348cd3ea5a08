"""The Transformer against transformers' own models, and its life on disk."""
import json
import os
import shutil

import pytest
import torch
import transformers
from conftest import GPT2, loud, real_data, run_script, tiny, tiny_config
from safetensors.torch import load_file, save_file

from config import UserError
from config.run import bit_sum, setup
from model import (ModelConfig, Transformer, attend, autocast, config_from_hf, find_checkpoint,
                   make_optimizer)
from sample import Example, Sampler, action_logprobs, load_tokenizer, token_logprobs
from sft import finetune

CPU, BF16, V = torch.device('cpu'), torch.bfloat16, 130
IDS = torch.randint(0, V, (2, 50), generator=torch.Generator().manual_seed(1))
LLAMA = dict(vocab_size=V, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
GPT2_SHAPE = dict(vocab_size=V, n_embd=48, n_layer=3, n_head=4, n_positions=64)
ROPE = dict(rope_theta=5e5, original_max_position_embeddings=32)
HF_CONFIGS = {
    'gpt2': ('gpt2', {}), 'gpt2, exact gelu': ('gpt2', dict(n_inner=80, activation_function='gelu')),
    'llama, tied': ('llama', dict(tie_word_embeddings=True)),
    'llama 1': ('llama', dict(num_key_value_heads=6, rms_norm_eps=1e-6)),
    'llama, biases': ('llama', dict(attention_bias=True, mlp_bias=True)),
    'llama 3.1': ('llama', dict(rope_parameters=LLAMA3 | ROPE)),
    'llama, linear': ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.0))),
    'mistral': ('mistral', dict(sliding_window=None)),
    'mistral, window': ('mistral', dict(head_dim=16, sliding_window=60)),
    'qwen2': ('qwen2', {}), 'qwen2, tied': ('qwen2', dict(tie_word_embeddings=True)),
    'qwen3': ('qwen3', dict(head_dim=16))}

def hf_model(name, seed=0):
    family, changes = HF_CONFIGS[name]
    shape = GPT2_SHAPE if family == 'gpt2' else LLAMA
    config = transformers.AutoConfig.for_model(family, **(shape | changes))
    return loud(transformers.AutoModelForCausalLM.from_config(config).eval(), seed)

def load_hf(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

def load(folder, **arguments):
    return Transformer.from_pretrained(str(folder), **arguments)

@torch.no_grad()
def assert_same_logits(*models):
    found, *expected = (getattr(logits, 'logits', logits) for logits in (model(IDS) for model in models))
    assert found.std() > 0.5  # a fault would show
    for logits in expected:
        torch.testing.assert_close(found, logits, atol=5e-5, rtol=1e-5)

@pytest.mark.parametrize('name', HF_CONFIGS)
def test_logits_equal_transformers_and_export_returns_them(tmp_path, name):
    theirs = hf_model(name)
    theirs.config.unknown_here = [1, {'a': None}]
    theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB' if name == 'qwen2' else '5GB')
    assert (len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1) == (name == 'qwen2')
    ours = load(tmp_path / 'theirs')
    ours.save_pretrained(str(tmp_path / 'ours'))
    assert_same_logits(ours, theirs, load_hf(tmp_path / 'ours'))
    assert torch.equal(load(tmp_path / 'ours')(IDS), ours(IDS))
    # An export says what its source said, and what has changed since.
    source, export = (json.loads((tmp_path / x / 'config.json').read_text()) for x in ('theirs', 'ours'))
    assert export == source | {'torch_dtype': 'float32', 'dtype': 'float32'}
    ours.add_tokens(V, 3).save_pretrained(str(tmp_path / 'grown'))
    grown = json.loads((tmp_path / 'grown' / 'config.json').read_text())
    assert grown == export | {'vocab_size': 192} and load(tmp_path / 'grown').config == ours.config
    with pytest.raises(UserError, match='tokens exceed the context'):
        ours(torch.zeros(1, ours.config.block_size + 1, dtype=torch.long))

@torch.no_grad()
def test_real_checkpoint():
    folder = real_data('weights', 'stories260K')
    ours, theirs = load(folder), load_hf(folder)
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert ours.n_params() == 260_032
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    prompts = ['Once upon a time', 'Tim and Sue went to the park. They', 'One day']
    for s in Sampler(ours, load_tokenizer(folder)).generate(prompts, 1, 80, temperature=0):
        whole = theirs.generate(torch.tensor([s.prompt_ids]), max_new_tokens=80, do_sample=False)[0].tolist()
        assert s.prompt_ids[0] == 1 and whole == s.prompt_ids + s.ids  # with its <s>

@pytest.mark.parametrize('name, kinds', [('qwen2', ['single', 'shards']), ('qwen2', ['shards', 'bin']),
                                         ('qwen2', ['bin', 'bin shards']), ('qwen2', ['bin shards']),
                                         ('gpt2', ['old bin'])])
def test_the_files_that_transformers_would_read(tmp_path, name, kinds):
    """The first kind is to be read; the others, left beside it, hold other weights."""
    for seed, kind in reversed(list(enumerate(kinds))):
        theirs = hf_model(name, seed)
        theirs.config.save_pretrained(tmp_path)
        state = (theirs.transformer if name == 'gpt2' else theirs).state_dict()  # no prefix, as on the hub
        stem, end = ('pytorch_model', 'bin') if 'bin' in kind else ('model', 'safetensors')
        parts = {f'{stem}.{end}': sorted(state)}
        if 'shards' in kind:
            parts = {f'{stem}-0000{i + 1}-of-00002.{end}': sorted(state)[i::2] for i in range(2)}
            index = {'metadata': {}, 'weight_map': {n: file for file, names in parts.items() for n in names}}
            (tmp_path / f'{stem}.{end}.index.json').write_text(json.dumps(index))
        for file, names in parts.items():
            part = {n: state[n].contiguous() for n in names}
            if 'bin' in kind:
                torch.save(part, tmp_path / file, _use_new_zipfile_serialization=kind != 'old bin')
            else:
                save_file(part, tmp_path / file, metadata={'format': 'pt'})
    assert_same_logits(load(tmp_path), theirs, load_hf(tmp_path))

def test_a_hub_is_asked_for_torch_files_where_it_has_no_others(tmp_path, monkeypatch):
    tiny(V).save_pretrained(str(tmp_path))
    asked = []
    monkeypatch.setattr('huggingface_hub.snapshot_download',
                        lambda path, allow_patterns: asked.append(allow_patterns) or str(tmp_path))
    assert find_checkpoint('someone/something') == str(tmp_path)
    os.rename(tmp_path / 'model.safetensors', tmp_path / 'pytorch_model.bin')
    find_checkpoint('someone/something')
    torch_files = ['pytorch_model*.bin' in patterns for patterns in asked]
    assert torch_files == ['*.safetensors' not in patterns for patterns in asked] == [False, False, True]

@pytest.mark.parametrize('name', ['llama, tied', 'gpt2'])
def test_whether_the_output_is_the_embedding_is_read_from_the_file(tmp_path, name):
    """With a copy of the embedding it is, with other weights it is not, with only an output projection it is;
    as in transformers, and after an export, too."""
    theirs = hf_model(name)
    embedding = 'transformer.wte.weight' if name == 'gpt2' else 'model.embed_tokens.weight'
    state = theirs.state_dict()
    other = {'lm_head.weight': torch.randn(V, 48, generator=torch.Generator().manual_seed(5))}
    for tied, weights in ((True, state | {'lm_head.weight': state[embedding].clone()}),
                          (False, state | other), (True, {n: t for n, t in state.items() if n != embedding})):
        theirs.config.save_pretrained(tmp_path / 'm')
        save_file(weights, tmp_path / 'm' / 'model.safetensors', metadata={'format': 'pt'})
        ours = load(tmp_path / 'm')
        assert ours.config.tied == tied == (ours.head.weight is ours.embed.weight)
        ours.save_pretrained(str(tmp_path / 'ours'))
        assert_same_logits(ours, load_hf(tmp_path / 'm'), load_hf(tmp_path / 'ours'))
        assert ((ours(IDS) - theirs(IDS).logits).abs().max() < 1e-3) == tied

@pytest.mark.parametrize('family, key, value, message', [
    ('llama', 'model_type', 'gemma2', "architecture 'gemma2'"),
    ('llama', 'hidden_act', 'gelu', "hidden_act 'gelu'"),
    ('llama', 'rope_scaling', {'type': 'yarn', 'factor': 4.0}, "rope scaling 'yarn'"),
    ('llama', 'rope_scaling', {'type': 'linear'}, "rope scaling 'linear' without 'factor'"),
    ('llama', 'rope_parameters', LLAMA3 | {'low_freq_factor': None}, "'llama3' without 'low_freq_factor'"),
    ('llama', 'partial_rotary_factor', 0.5, 'partial_rotary_factor 0.5'),
    ('llama', 'quantization_config', {'bits': 4}, 'quantization_config'),
    ('llama', 'nanoreason', {'family': 'llama', 'softcap': 30.0}, "setting 'softcap'"),
    ('llama', 'hidden_size', None, "without 'hidden_size'"), ('gpt2', 'n_embd', None, "without 'n_embd'"),
    ('gpt2', 'activation_function', 'relu', "activation_function 'relu'"),
    ('gpt2', 'add_cross_attention', True, 'add_cross_attention True')])
def test_what_is_not_covered_is_refused_by_name(family, key, value, message):
    with pytest.raises(UserError, match=message):
        config_from_hf((GPT2_SHAPE if family == 'gpt2' else LLAMA) | {'model_type': family, key: value})

def test_contexts_and_angles_as_transformers_4_writes_them():
    scaling, window = LLAMA3 | {'original_max_position_embeddings': 64}, {'sliding_window': 51}
    for family, said, expected in (
            ('mistral', window, (51, 1e4, None)), ('qwen2', window, (64, 1e4, None)),
            ('qwen2', window | {'use_sliding_window': True}, (51, 1e4, None)),
            ('llama', {'rope_theta': 5e5, 'rope_scaling': LLAMA3}, (64, 5e5, scaling))):
        c = config_from_hf(LLAMA | {'model_type': family} | said)
        assert (c.block_size, c.rope_theta, c.rope_scaling) == expected

FORMS = {'llama': {}, 'gpt2': GPT2, 'mistral': {}, 'qwen2': {'qkv_bias': True}, 'qwen3': {'qk_norm': True}}
CHANGES = dict(vocab_size=140, block_size=64, n_layer=1, n_head=8, n_kv_head=1, n_embd=48, head_dim=16,
               n_inner=40, norm_eps=1e-4, activation='gelu', norm='layer', rope_theta=5e4,
               rope_scaling=dict(rope_type='linear', factor=2.0), qkv_bias=True, out_bias=True, mlp_bias=True,
               qk_norm=True, tied=False)

@pytest.mark.parametrize('family', FORMS)
def test_every_field_of_a_config_survives_and_is_not_taken_for_a_plain_model(tmp_path, family):
    """Each changed: transformers loads the same model or refuses it, and what has no name can't be made."""
    assert set(CHANGES) | {'family'} == set(vars(ModelConfig()))
    form, path = FORMS[family], tmp_path / 'm'
    for field, value in (CHANGES | ({'norm': 'rms'} if family == 'gpt2' else {})).items():
        value = not (form | {'tied': True}).get(field, False) if isinstance(value, bool) else value
        config = tiny_config(**({'vocab_size': V, 'family': family} | form | {field: value}))
        if (family, field) == ('gpt2', 'qk_norm'):
            with pytest.raises(UserError, match='a gpt2 checkpoint cannot hold this model, for its .*q_norm'):
                Transformer(config)
            continue
        model = again = loud(Transformer(config))
        for _ in range(2):
            again.save_pretrained(str(path))
            again = load(path)
            assert again.config == config and torch.equal(again(IDS), model(IDS))
        if json.loads((path / 'config.json').read_text())['model_type'] == family:
            assert_same_logits(model, load_hf(path))
        else:
            with pytest.raises(ValueError, match='nanoreason'):
                load_hf(path)

def weights(change):
    def breaks(folder):
        changed = change(load_file(folder / 'model.safetensors'))
        save_file({name: w for name, w in changed.items() if w is not None}, folder / 'model.safetensors')
    return breaks

def index_without_files(folder):
    os.rename(folder / 'model.safetensors', folder / 'x.bin')
    (folder / 'pytorch_model.bin.index.json').write_text('{"weight_map": {"a": "no.bin"}}')

@pytest.mark.parametrize('breaks, match', [
    (lambda folder: os.truncate(folder / 'model.safetensors', 5000),
     'model.safetensors: the checkpoint is missing or broken'),
    (weights(lambda w: w | {'model.layers.1.mlp.up_proj.weight': None}), 'no layers.1.mlp.up_proj.weight'),
    (weights(lambda w: w | {'model.embed_tokens.weight': None}), 'has no embed_tokens.weight'),
    (weights(lambda w: w | {'model.layers.0.self_attn.q_proj.bias': torch.zeros(32)}),
     'no place for: layers.0.self_attn.q_proj.bias'),
    (weights(lambda w: {name: t[:9] for name, t in w.items()}),
     f'embed.weight has shape .9, 32., its config says .{V}, 32.'),
    (lambda folder: (folder / 'config.json').write_text('{"a": '), 'config.json: not readable as JSON'),
    (index_without_files, 'no.bin: the checkpoint is missing or broken'),
    (lambda folder: os.remove(folder / 'config.json'), 'no checkpoint there'),
    (shutil.rmtree, 'no such checkpoint')])
def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path, breaks, match):
    tiny(V).save_pretrained(str(tmp_path / 'm'))
    breaks(tmp_path / 'm')
    with pytest.raises(UserError, match=match) as error:
        load(tmp_path / 'm')
    assert '\n' not in str(error.value)

def test_a_run_means_its_best_checkpoint_and_saving_again_replaces_it(tmp_path):
    for name, seed in (('last', 3), ('best', 1), ('best', 2)):
        tiny(V, seed).save_pretrained(str(tmp_path / name))
    (tmp_path / 'config.json').write_text('{}')  # the run's own settings are no model's config
    assert sorted(os.listdir(tmp_path)) == ['best', 'config.json', 'last']
    assert torch.equal(load(tmp_path)(IDS), tiny(V, 2)(IDS))
    os.rename(tmp_path / 'best', tmp_path / 'best.old')  # killed between the renamings of a replacement
    assert torch.equal(load(tmp_path)(IDS), tiny(V, 2)(IDS))


# -----------------------------------------------------------------------------
# the network

@torch.no_grad()
def test_value_head_starts_at_zero_leaves_the_logits_and_is_saved(tmp_path):
    model = tiny(V)
    before = model(IDS)
    model.add_value_head()
    assert torch.equal(model(IDS), before) and not model.values(model.trunk(IDS)).any()
    model.value_head.weight.fill_(0.5)
    model.save_pretrained(str(tmp_path / 'm'))
    again = load(tmp_path / 'm')
    assert torch.equal(again.values(again.trunk(IDS)), model.values(model.trunk(IDS)))
    assert_same_logits(model, load_hf(tmp_path / 'm'))

def test_checkpointed_gradients_are_the_same_and_keep_less(family):
    model, found = tiny(V, n_layer=4, **family), []
    for model.grad_checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(IDS[:, :30]).square().mean()
        found.append((sum(kept), [loss, *torch.autograd.grad(loss, list(model.parameters()))]))
    (before, plain), (after, again) = found
    assert all(map(torch.equal, plain, again)) and after < before / 3

def test_attention_is_causal_and_groups_queries_in_short_rows_and_long_ones():
    for T, S in ((7, 7), (520, 520), (7, 20), (520, 540)):  # long, and all on a GPU, are torch's kernel
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, n_heads, n, 8) for n_heads, n in ((4, T), (2, S), (2, S)))
        scores = q @ k.repeat_interleave(2, 1).mT / 8 ** 0.5
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1)[-T:], -torch.inf)
        torch.testing.assert_close(attend(q, k, v), scores.softmax(-1) @ v.repeat_interleave(2, 1))

def test_weight_decay_is_for_matrices_and_the_first_loss_is_near_uniform():
    decayed, others = make_optimizer(Transformer(tiny_config(V, **GPT2)), 1e-3, 0.1).param_groups
    for group, dim, decay in ((decayed, 2, 0.1), (others, 1, 0.0)):
        assert {p.dim() for p in group['params']} == {dim} and group['weight_decay'] == decay
    torch.manual_seed(0)
    logprobs = Transformer(ModelConfig()).init_weights()(torch.randint(0, 512, (4, 64))).log_softmax(-1)
    assert abs(logprobs.mean() + torch.tensor(512.0).log()) < 0.3

@pytest.mark.slow
def test_the_benchmark_says_what_kind_of_cpu_it_is():
    assert torch.backends.cpu.get_cpu_capability() in run_script('model.py', '--bench', '--device=cpu').stdout

@torch.no_grad()
def test_bf16_weights_compute_with_and_without_autocast(family):
    model = tiny(V, **family)
    half, exact = model.for_sampling(BF16), model(IDS)
    with autocast(CPU, BF16):
        cast = half(IDS), model(IDS)
    for logits in (half(IDS), *cast):
        assert logits.dtype == torch.float32 and (logits - exact).abs().mean() < 0.05 * exact.abs().mean()

@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_logits_and_values_are_fp32_under_bf16(device):
    """Against fp64 products of the rounded factors. Between 16 and 32 numbers in bf16 are 0.125 apart."""
    setup(device)  # on a GPU, TF32 for what stays fp32
    model = loud(Transformer(tiny_config(V)).add_value_head()).to(device)
    hidden = 4 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).to(device)
    exact = hidden.to(BF16).double() @ model.head.weight.to(BF16).double().t()
    ids = torch.arange(200, device=device) % 50
    assert exact.abs().max() > 16
    for copy in (model, model.for_sampling(BF16)):
        with torch.no_grad(), autocast(hidden.device, BF16), copy.packed(BF16):
            logits = copy.logits(hidden)
        assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-3
    with autocast(hidden.device, BF16):
        logprobs, values = action_logprobs(model, hidden, ids)[0], model.values(hidden)
    expected, head = exact.log_softmax(-1).gather(-1, ids[:, None])[:, 0], model.value_head
    assert (logprobs - expected).abs().max() < 1e-3
    exact = (hidden.double() @ head.weight.double().t() + head.bias.double())[:, 0]
    assert (values - exact).abs().max() < 1e-4
    logprobs.sum().backward()
    assert model.head.weight.grad.abs().sum() > 0


# -----------------------------------------------------------------------------
# adapters

@torch.no_grad()
def move(model, std):
    for name, p in model.named_parameters():
        if name.endswith('lora_b'):
            p.normal_(std=std, generator=torch.Generator().manual_seed(1))

@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, BF16])
def test_an_adapter_starts_at_nothing_can_be_left_out_is_sampled_and_merges(bpe, tmp_path, family, dtype):
    """Bit for bit nothing: the first KL is exactly 0. Sampler and trainer differ by bf16's rounding, and from
    the model without the adapter by more."""
    model, ids = tiny(bpe.vocab_size, **family).to(dtype).finish_loading(), torch.arange(20)

    def logits(ids):
        with autocast(CPU, dtype):
            return model(ids[None])[0]
    plain = logits(ids)
    fresh = model.add_lora(4) and logits(ids)
    assert torch.equal(fresh, plain) or dtype == BF16  # there the sum with an adapter is kept wider
    move(model, 0.1)
    sampler = Sampler(model.for_sampling(dtype), bpe, dtype=dtype)
    samples = sampler.generate([[i, i + 1] for i in range(12)], 2, 20, 1.0)

    def gap():
        gaps = [token_logprobs(logits(torch.tensor(s.prompt_ids + s.ids))[1:-1], torch.tensor(s.ids))
                - torch.tensor(s.logprobs) for s in samples]
        return torch.cat(gaps).abs().mean()
    assert gap() < (0.1 if dtype == BF16 else 1e-5)
    with model.without_adapter():  # the reference
        assert torch.equal(logits(ids), fresh) and gap() > 0.3
    if dtype != BF16:
        model.save_pretrained(str(tmp_path))
        merged = load(tmp_path)
        assert not any('lora_' in name or 'fixed_' in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(ids[None])[0], logits(ids), rtol=1e-4, atol=1e-4)

def test_only_adapters_and_the_value_head_learn(tmp_path):
    tiny(V).save_pretrained(str(tmp_path))
    model, again = (load(tmp_path, lora_rank=2, value_head=True) for _ in range(2))
    assert bit_sum(model.parameters()) == bit_sum(again.parameters())  # A is random, but seeded
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if 'lora' in name or 'value_head' in name}
    assert len(learns) == 2 * 4 * 2 + 2  # layers * matrices * (A, B), and the head
    finetune(model, [Example(list(range(12)), 4)] * 4, max_steps=3, batch_size=2, lr=1e-2)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)) == (name not in learns or 'value_head' in name), name
    with pytest.raises(UserError, match='lora_rank'):
        load(tmp_path, lora_rank=-1)

def slope(y, x):
    return ((y * x).sum() / (x * x).sum()).item()

@torch.no_grad()
def add(model, adapters, sign=1):
    for name in model.matrices():
        weight = model.get_parameter(f'{name}.weight')
        weight.copy_(weight.float() + sign * adapters[f'{name}.fixed_b'] @ adapters[f'{name}.fixed_a'])

def test_what_an_adapter_learned_in_bf16_is_sampled_validated_and_exported(tmp_path):
    """16 updates at lr 1e-5. A copy merged in bf16 has lost most of it: that must not be sampled from."""
    torch.manual_seed(0)
    shape = dict(vocab_size=256, block_size=64, n_layer=2, n_kv_head=4, n_embd=256, head_dim=64, n_inner=256)
    model = Transformer(ModelConfig(**shape)).init_weights().to(BF16).finish_loading().add_lora(16)
    ids, advantages = torch.randint(256, (4, 25)), torch.randn(4, 24)

    def logprobs(model, dtype=BF16, grad=False):
        with torch.set_grad_enabled(grad), autocast(CPU, dtype):
            return token_logprobs(model(ids[:, :-1]), ids[:, 1:])

    def kept(model):
        """How much of the change."""
        return slope(logprobs(model) - before, change)
    before, optimizer = logprobs(model), make_optimizer(model, 1e-5, 0.0)
    for _ in range(16):
        (-advantages * logprobs(model, grad=True)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    change = logprobs(model) - before
    merged = Transformer(model.config).to(BF16).finish_loading()
    merged.load_state_dict({n: p for n, p in model.state_dict().items() if 'lora' not in n})
    add(merged, model.adapters())
    assert kept(merged) < 0.8
    model.save_pretrained(str(tmp_path / 'a'))
    loaded = load(tmp_path / 'a', dtype=BF16)
    loaded.save_pretrained(str(tmp_path / 'b'))
    for policy in (model.for_sampling(BF16), loaded, load(tmp_path / 'b', dtype=BF16)):
        assert kept(policy) > 0.95
    assert all('fixed_' in n or torch.equal(model.get_parameter(n), p) for n, p in loaded.named_parameters())
    taken_in = load(tmp_path / 'a', dtype=BF16, merge=True)
    assert not taken_in.adapters() and torch.equal(logprobs(taken_in), logprobs(merged))
    exact = load(tmp_path / 'a')  # what others read, in fp32, has changed likewise
    after = logprobs(exact, torch.float32)
    add(exact, model.adapters(), -1)
    assert slope(change, after - logprobs(exact, torch.float32)) > 0.75
    # A second adapter learns beside the first.
    again = load(tmp_path / 'a', dtype=BF16, lora_rank=4)
    assert kept(again) > 0.95
    assert all(p.requires_grad == ('lora_' in name) for name, p in again.named_parameters())
    move(again, 0.01)
    moved = logprobs(again)
    with again.without_adapter():
        assert torch.equal(logprobs(again), logprobs(loaded))
    again.save_pretrained(str(tmp_path / 'b'))
    both = load(tmp_path / 'b', dtype=BF16)
    assert both.blocks[0].mlp.up.fixed_a.shape == (20, 256)
    assert slope(logprobs(both) - logprobs(model), moved - logprobs(model)) > 0.95
    save_file({'blocks.0.mlp.up.fixed_a': torch.zeros(4, 99)}, tmp_path / 'b' / 'adapter.safetensors')
    with pytest.raises(UserError, match='has shape .4, 99.'):
        load(tmp_path / 'b', dtype=BF16)
