"""The Transformer against transformers' own models, and its life on disk."""
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import torch._dynamo
import transformers
from conftest import GPT2, ROOT, loud, real_data, run_script, tiny_config
from safetensors.torch import load_file, save_file

import ppo
from config import UserError
from model import (Checkpoints, KVCache, ModelConfig, Transformer, autocast, config_from_hf, config_to_hf, fast_cpu_matmul,
                   find_checkpoint, make_optimizer, setup)
from sample import Example, Sampler, action_logprobs, real_cells

BF16 = torch.bfloat16
V = 130
LLAMA = dict(vocab_size=V, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=64)
LLAMA3_ROPE = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
HF_CONFIGS = {
    'gpt2': lambda: transformers.GPT2Config(vocab_size=V, n_embd=48, n_layer=3, n_head=4, n_positions=64),
    'gpt2, exact gelu, n_inner': lambda: transformers.GPT2Config(vocab_size=V, n_embd=48, n_layer=2, n_head=4, n_positions=64, n_inner=80,
                                                                 activation_function='gelu'),
    'llama, grouped queries, tied': lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    'llama 1': lambda: transformers.LlamaConfig(**(LLAMA | {'num_key_value_heads': 6}), rms_norm_eps=1e-6),
    'llama, biases': lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    'llama 3.1': lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE),
    'llama, linear rope scaling': lambda: transformers.LlamaConfig(**LLAMA, rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.0)),
    'mistral': lambda: transformers.MistralConfig(**LLAMA, sliding_window=None),
    'mistral, wide heads, window': lambda: transformers.MistralConfig(**LLAMA, head_dim=16, sliding_window=60),
    'qwen2': lambda: transformers.Qwen2Config(**LLAMA),
    'qwen2, tied': lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    'qwen3': lambda: transformers.Qwen3Config(**LLAMA, head_dim=16),
}


def hf_model(config):
    return loud(transformers.AutoModelForCausalLM.from_config(config).eval())


def test_logits_equal_transformers_and_export_returns_them(tmp_path):
    ids = torch.randint(0, V, (2, 50), generator=torch.Generator().manual_seed(1))
    for name, config in HF_CONFIGS.items():
        theirs = hf_model(config())
        theirs.save_pretrained(tmp_path / 'theirs', max_shard_size='100KB' if name == 'qwen2' else '5GB')
        assert (len([n for n in os.listdir(tmp_path / 'theirs') if n.endswith('.safetensors')]) > 1) == (name == 'qwen2')
        ours = Transformer.from_pretrained(str(tmp_path / 'theirs'))
        with torch.no_grad():
            expected = theirs(ids).logits
            assert expected.std() > 0.5  # logits that would show a fault
            torch.testing.assert_close(ours(ids), expected, atol=5e-5, rtol=1e-5, msg=lambda text: f'{name}: {text}')
            ours.save_pretrained(str(tmp_path / 'ours'))
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
            torch.testing.assert_close(again(ids).logits, expected, atol=5e-5, rtol=1e-5, msg=lambda text: f'{name}: {text}')
            assert torch.equal(Transformer.from_pretrained(str(tmp_path / 'ours'))(ids), ours(ids))
        shutil.rmtree(tmp_path / 'theirs')


def shard(state, folder, name):
    """Two files and their index, as older versions of transformers wrote them."""
    names, files, save = sorted(state), {}, torch.save if name.endswith('.bin') else save_file
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = name.replace('.', f'-0000{i}-of-00002.')
        save({n: state[n].contiguous() for n in part}, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f'{name}.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': files}))


def test_the_files_that_transformers_would_read(tmp_path):
    """In each folder the weights of the first of the seeds are those to be read; what was left beside them has other ones."""
    def save(kind, folder, state):
        if kind == 'single':
            save_file({n: t.contiguous() for n, t in state.items()}, folder / 'model.safetensors', metadata={'format': 'pt'})
        elif kind in ('bin', 'old bin'):
            torch.save(state, folder / 'pytorch_model.bin', _use_new_zipfile_serialization=kind == 'bin')
        else:
            shard(state, folder, 'model.safetensors' if kind == 'shards' else 'pytorch_model.bin')

    ids = torch.arange(40)[None]
    for name, kinds in (('qwen2', ['single', 'shards']), ('qwen2', ['shards', 'bin']), ('qwen2', ['bin', 'bin shards']),
                        ('qwen2', ['bin shards']), ('gpt2', ['old bin'])):
        folder = tmp_path / f'{name} {kinds}'
        for seed, kind in reversed(list(enumerate(kinds))):
            theirs = loud(transformers.AutoModelForCausalLM.from_config(HF_CONFIGS[name]()).eval(), seed)
            theirs.config.save_pretrained(folder)
            save(kind, folder, (theirs.transformer if name == 'gpt2' else theirs).state_dict())  # without the prefix, as on the hub
        again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            for expected in (theirs(ids).logits, again(ids).logits):
                torch.testing.assert_close(Transformer.from_pretrained(str(folder))(ids), expected, atol=1e-5, rtol=1e-5)


def test_a_hub_is_asked_for_torch_files_where_it_has_no_others(tmp_path, monkeypatch):
    Transformer(tiny_config(V)).init_weights().save_pretrained(str(tmp_path / 'm'))
    asked = []

    def fetch(path, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path / 'm')
    monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
    assert find_checkpoint('someone/something') == str(tmp_path / 'm')
    os.rename(tmp_path / 'm' / 'model.safetensors', tmp_path / 'm' / 'pytorch_model.bin')
    find_checkpoint('someone/something')
    assert ['pytorch_model*.bin' in patterns for patterns in asked] == [False, False, True]
    assert all('*.safetensors' in patterns for patterns in asked[:2])


def test_whether_the_output_is_the_embedding_is_read_from_the_file(tmp_path):
    """Where the config says tied: with a copy of the embedding it is, with other weights it is not, with an output projection alone
    that is the embedding; as in transformers, and after an export, too."""
    ids = torch.arange(40)[None]
    for name in ('llama, grouped queries, tied', 'gpt2'):
        theirs = hf_model(HF_CONFIGS[name]())
        embedding = 'transformer.wte.weight' if name == 'gpt2' else 'model.embed_tokens.weight'
        state = theirs.state_dict()
        other = {'lm_head.weight': torch.randn(V, 48, generator=torch.Generator().manual_seed(5))}
        for tied, wanted in ((True, state | {'lm_head.weight': state[embedding].clone()}), (False, state | other),
                             (True, {n: t for n, t in state.items() if n != embedding})):
            folder = tmp_path / 'm'
            theirs.config.save_pretrained(folder)
            save_file(wanted, folder / 'model.safetensors', metadata={'format': 'pt'})
            ours, again = Transformer.from_pretrained(str(folder)), transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            assert ours.config.tied == tied == (ours.head.weight is ours.embed.weight)
            ours.save_pretrained(str(tmp_path / 'ours'))
            exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours').eval()
            with torch.no_grad():
                for expected in (again(ids).logits, exported(ids).logits):
                    torch.testing.assert_close(ours(ids), expected, atol=5e-5, rtol=1e-5)
                assert ((ours(ids) - theirs(ids).logits).abs().max() < 1e-3) == tied


def test_real_checkpoint():
    folder = real_data('weights', 'stories260K')
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), Transformer.from_pretrained(folder)
    assert ours.n_params() == 260_032
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('changes', [{}, GPT2, {'qk_norm': True, 'family': 'qwen3'}, {'n_kv_head': 4}, {'n_kv_head': 1}])
def test_cached_equals_full_forward(changes):
    """Three prompts of different lengths with 2, 1 and 3 samples; after some steps, and again after more, some of the rows leave,
    among them all of a prompt. Enough tokens for several blocks of the cache."""
    model = loud(Transformer(tiny_config(V, **changes)))
    generator = torch.Generator().manual_seed(0)
    lengths, source = torch.tensor([7, 3, 5]), torch.tensor([0, 0, 1, 2, 2, 2])
    prompts = [torch.randint(0, V, (n,), generator=generator) for n in lengths]
    own = torch.randint(0, V, (6, 80), generator=generator)
    with torch.no_grad():
        full = [model(torch.cat([prompts[p], own[r]])[None])[0] for r, p in enumerate(source)]
        cache = KVCache(model.config, lengths, 'cpu', torch.float32)
        for part in (slice(0, 2), slice(2, 3)):  # padded on the right, some prompts at a time
            cache.filling = part
            ids = torch.stack([torch.cat([p, torch.zeros(7 - len(p), dtype=torch.long)]) for p in prompts[part]])
            for row, p in zip(model(ids, cache=cache), range(3)[part]):
                torch.testing.assert_close(row[:lengths[p]], full[source.tolist().index(p)][:lengths[p]], atol=1e-5, rtol=1e-5)
        cache.start(source)
        rows = torch.arange(6)
        for t in range(80):
            for at, keep in ((20, [0, 1, 2, 4, 5]), (40, [1, 3, 4]), (70, [2])):
                if t == at:
                    keep = torch.tensor(keep)
                    cache.select(keep)
                    rows = rows[keep]
            cache.next_token()
            logits = model(own[rows, t][:, None], (lengths[source[rows]] + t)[:, None], cache)
            for row, found in zip(rows, logits[:, 0]):
                torch.testing.assert_close(found, full[row][lengths[source[row]] + t], atol=2e-5, rtol=1e-5)
    assert rows.tolist() == [5] and len(cache.lengths) == 1 and len(cache.k[0]) == 3


@pytest.mark.parametrize('changes', [{}, GPT2])
def test_checkpointed_gradients_are_the_same_and_keep_less(changes):
    model = loud(Transformer(tiny_config(V, n_layer=4, **changes)))
    ids = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for model.grad_checkpointing in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(ids).square().mean()
        found.append((sum(kept), loss, torch.autograd.grad(loss, list(model.parameters()))))
    (before, loss, grads), (after, loss2, grads2) = found
    assert loss == loss2 and all(torch.equal(a, b) for a, b in zip(grads, grads2))
    assert after < before / 3


def test_bf16_is_close():
    model = loud(Transformer(tiny_config(V)))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        reference = model(ids)
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(ids)
    assert logits.dtype == torch.float32
    assert (logits - reference).abs().mean() < 0.05 * reference.std()


def test_context_is_a_limit():
    model = Transformer(tiny_config(V, block_size=16))
    model(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(UserError, match='17 tokens exceed the context of 16'):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_value_head_starts_at_zero_leaves_the_logits_and_is_saved(tmp_path):
    model = loud(Transformer(tiny_config(V)))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        model.add_value_head()
        assert torch.equal(model(ids), before)
        assert torch.equal(model.values(model.trunk(ids)), torch.zeros(1, 20))
        model.value_head.weight.fill_(0.5)
        model.save_pretrained(str(tmp_path / 'm'))
        again = Transformer.from_pretrained(str(tmp_path / 'm'))
        assert torch.equal(again.values(again.trunk(ids)), model.values(model.trunk(ids)))
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')  # which does not know it, and need not


def test_what_is_not_covered_is_refused_by_name():
    llama3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
    for change, message in (
            ({'model_type': 'gemma2'}, "architecture 'gemma2'"),
            ({'hidden_act': 'gelu'}, "hidden_act 'gelu'"),
            ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "rope scaling 'yarn'"),
            ({'rope_scaling': {'type': 'linear'}}, "rope scaling 'linear' without 'factor'"),
            ({'rope_scaling': llama3 | {'factor': None}}, "rope scaling 'llama3' without 'factor'"),
            ({'rope_parameters': llama3 | {'low_freq_factor': None}}, "rope scaling 'llama3' without 'low_freq_factor'"),
            ({'rope_parameters': {n: x for n, x in llama3.items() if n != 'high_freq_factor'}}, "'llama3' without 'high_freq_factor'"),
            ({'partial_rotary_factor': 0.5}, 'partial rotary'),
            ({'quantization_config': {'bits': 4}}, 'quantized'),
            ({'model_type': 'nanoreason', 'nanoreason': {'family': 'llama', 'softcap': 30.0}}, "setting 'softcap'"),
            ({'hidden_size': None}, "no 'hidden_size'")):
        hf = config_to_hf(tiny_config(V), 'float32')
        hf.pop('rope_parameters')
        with pytest.raises(UserError, match=message):
            config_from_hf(hf | change)


def test_the_context_before_scaling_is_what_transformers_takes_it_for():
    rope = {name: x for name, x in LLAMA3_ROPE.items() if name != 'original_max_position_embeddings'}
    theirs = transformers.LlamaConfig(**LLAMA, rope_parameters=dict(rope)).rope_parameters
    ours = config_from_hf(LLAMA | {'model_type': 'llama', 'rope_parameters': rope})
    assert ours.rope_scaling | {'rope_theta': ours.rope_theta} == theirs


def test_a_sliding_window_bounds_the_context():
    hf = config_to_hf(tiny_config(V, family='mistral', block_size=4096), 'float32')
    assert config_from_hf(hf).block_size == 4096
    assert config_from_hf(hf | {'sliding_window': 512}).block_size == 512
    qwen = config_to_hf(tiny_config(V, family='qwen2', block_size=4096, qkv_bias=True), 'float32') | {'sliding_window': 512}
    assert config_from_hf(qwen | {'use_sliding_window': False}).block_size == 4096
    assert config_from_hf(qwen | {'use_sliding_window': True}).block_size == 512


def test_every_field_of_a_config_survives_or_the_model_is_refused_at_once(tmp_path):
    """Each field changed in each family: what cannot be saved cannot be made. What Hugging Face's form has no room for is not taken
    for a plain model of the family by transformers."""
    forms = {'llama': {}, 'gpt2': GPT2, 'mistral': {}, 'qwen2': {'qkv_bias': True}, 'qwen3': {'qk_norm': True}}
    changes = dict(vocab_size=140, block_size=64, n_layer=1, n_head=8, n_kv_head=1, n_embd=48, head_dim=16, n_inner=40, norm_eps=1e-4,
                   activation='gelu', rope_theta=5e4, rope_scaling=dict(rope_type='linear', factor=2.0), norm='layer', qkv_bias=True,
                   out_bias=True, mlp_bias=True, qk_norm=True, tied=False)
    assert set(changes) | {'family'} == set(asdict(ModelConfig()))
    own, refused = set(), set()
    for family, form in forms.items():
        for field, value in ({'family': family} | changes).items():
            if isinstance(value, bool):
                value = not (form | {'tied': True}).get(field, False)
            elif field == 'norm' and family == 'gpt2':
                value = 'rms'
            config = tiny_config(**({'vocab_size': V, 'family': family} | form | {field: value}))
            hf = json.loads(json.dumps(config_to_hf(config, 'float32')))
            assert config_from_hf(hf) == config, (family, field)
            try:
                model = loud(Transformer(config))
            except UserError as error:
                assert f'a {family} checkpoint cannot hold this model, for its ' in str(error)
                refused.add((family, field))
                continue
            if hf['model_type'] == 'nanoreason':
                own.add((family, field))
                model.save_pretrained(str(tmp_path / 'm'))
                again, ids = Transformer.from_pretrained(str(tmp_path / 'm')), torch.arange(9)[None]
                with torch.no_grad():
                    assert torch.equal(again(ids), model(ids))
                with pytest.raises(ValueError, match='nanoreason'):
                    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm')
    parts = ('qkv_bias', 'out_bias', 'mlp_bias', 'qk_norm')
    assert refused == {(family, 'norm') for family in forms} | {('gpt2', field) for field in ('rope_theta', *parts)}
    assert own == {(family, field) for family in forms for field in ('activation', *parts) if family != 'gpt2'} \
        - {('llama', 'mlp_bias')} | {('gpt2', field) for field in ('n_head', 'n_kv_head', 'n_embd', 'head_dim', 'rope_scaling')}


def test_a_broken_checkpoint_is_refused_in_one_line(tmp_path):
    def edit_weights(folder, change):
        save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors')

    def truncate(folder):
        data = (folder / 'model.safetensors').read_bytes()
        (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])

    def widen(folder):
        hf = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(hf | {'vocab_size': V + 1}))

    def index(folder, text):
        os.remove(folder / 'model.safetensors')
        (folder / 'pytorch_model.bin').rename(folder / 'other.bin')
        (folder / 'pytorch_model.bin.index.json').write_text(text)

    def without(part):
        return lambda folder: edit_weights(folder, lambda w: {name: t for name, t in w.items() if part not in name})

    for breaks, match in (
            (truncate, 'model.safetensors: the checkpoint is missing or broken'),
            (without('layers.1.mlp.up_proj'), 'has no layers.1.mlp.up_proj.weight'),
            (lambda folder: edit_weights(folder, lambda w: w | {'model.layers.0.self_attn.q_proj.bias': torch.zeros(32)}),
             'no place for: layers.0.self_attn.q_proj.bias'),
            (without('embed_tokens'), 'has no embed_tokens.weight'),
            (widen, f'shape \\({V}, 32\\), the config asks for \\({V + 1}, 32\\)'),
            (lambda folder: (folder / 'config.json').write_text('{"model_type": '), 'config.json: not readable as JSON'),
            (lambda folder: index(folder, '{"weight_map": {"a": "absent.bin"}}'), 'absent.bin: the checkpoint is missing or broken'),
            (lambda folder: index(folder, '{}'), 'pytorch_model.bin.index.json: has no weight_map'),
            (lambda folder: os.remove(folder / 'config.json'), 'no checkpoint there'),
            (lambda folder: shutil.rmtree(folder), 'no such checkpoint')):
        folder = tmp_path / 'm'
        Transformer(tiny_config(V)).init_weights().save_pretrained(str(folder))
        (folder / 'pytorch_model.bin').write_bytes(b'never read')
        breaks(folder)
        with pytest.raises(UserError, match=match) as error:
            Transformer.from_pretrained(str(folder))
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='neither a folder nor to be had from the hub'):
        Transformer.from_pretrained('nobody/nothing')


def test_run_folder_means_its_best_checkpoint(tmp_path):
    for name, seed in (('best', 1), ('last', 2)):
        loud(Transformer(tiny_config(V)), seed).save_pretrained(str(tmp_path / name))
    ids = torch.arange(9)[None]
    (tmp_path / 'config.json').write_text('{}')  # the run's own settings are no model's config
    assert torch.equal(Transformer.from_pretrained(str(tmp_path))(ids), loud(Transformer(tiny_config(V)), 1)(ids))


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    for seed in (1, 2):
        loud(Transformer(tiny_config(V)), seed).save_pretrained(str(tmp_path / 'm'))
    assert os.listdir(tmp_path) == ['m']
    ids = torch.arange(9)[None]
    assert torch.equal(Transformer.from_pretrained(str(tmp_path / 'm'))(ids), loud(Transformer(tiny_config(V)), 2)(ids))


def test_optimizer_state_round_trip_is_exact(tmp_path, bpe):
    def step(model, optimizer):
        model(torch.arange(12)[None]).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = loud(Transformer(tiny_config(bpe.vocab_size)))
    optimizer = make_optimizer(model, 1e-2, 0.1)
    step(model, optimizer)
    Checkpoints(str(tmp_path)).save(1, {'model': model}, optimizer, {'step': 1, 'best': None})
    again = Transformer(model.config)
    optimizer2 = make_optimizer(again, 1e-2, 0.1)
    assert Checkpoints(str(tmp_path)).load({'model': again}, optimizer2) == {'step': 1, 'best': None}
    for _ in range(2):
        step(model, optimizer)
        step(again, optimizer2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert Checkpoints(str(tmp_path / 'elsewhere')).load({'model': again}, optimizer2) is None
    small = Transformer(tiny_config(bpe.vocab_size, n_layer=1))
    with pytest.raises(UserError, match='of another model'):
        Checkpoints(str(tmp_path)).load({'model': small}, make_optimizer(small, 1e-2, 0.1))


def test_weight_decay_is_for_matrices():
    groups = make_optimizer(Transformer(tiny_config(V)), 1e-3, 0.1).param_groups
    assert all(group['params'] for group in groups)
    assert all(p.dim() >= 2 for p in groups[0]['params']) and groups[0]['weight_decay'] == 0.1
    assert all(p.dim() < 2 for p in groups[1]['params']) and groups[1]['weight_decay'] == 0.0


def test_initialisation_keeps_the_first_loss_near_uniform():
    torch.manual_seed(0)
    logits = Transformer(ModelConfig()).init_weights()(torch.randint(0, 512, (4, 64)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 512, (256,)))
    assert abs(loss.item() - torch.log(torch.tensor(512.0)).item()) < 0.3


@pytest.mark.parametrize('changes', [{}, GPT2, dict(family='qwen3', qk_norm=True)])
@pytest.mark.parametrize('again', [False, True])
def test_padding_is_not_computed_and_does_not_matter(changes, again):
    """Packed against padded: the same hidden states and gradients at the tokens, from as many rows in each linear layer as there are
    tokens (14 of 30), whatever ids stand in the padding."""
    model, lengths = loud(Transformer(tiny_config(V, **changes))), (10, 1, 3)
    model.grad_checkpointing = again
    ids, real = torch.randint(0, V, (3, 10)), torch.arange(10) < torch.tensor(lengths)[:, None]
    weight, rows = torch.randn(14, model.config.n_embd), []
    for block in model.blocks:
        for layer in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.out):
            layer.register_forward_hook(lambda layer, x, y: rows.append(y.shape[:-1].numel()))

    def hidden_and_gradients(cells):
        hidden = model.trunk(ids, cells=cells)[real]
        return hidden, *torch.autograd.grad((hidden * weight).sum(), [p for name, p in model.named_parameters() if not name.startswith('head')])

    padded = hidden_and_gradients(None)
    assert set(rows) == {30}
    rows.clear()
    for a, b in zip(hidden_and_gradients(real_cells(lengths, 10, 'cpu')), padded):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert set(rows) == {14}


@pytest.mark.slow
def test_a_compiled_trunk_is_not_compiled_again():
    """Three micro-batches of a PPO iteration, one of them without padding, make all the graphs there are; others only vary in sizes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, rng = loud(Transformer(tiny_config(V))), random.Random(0)
    trunk = torch.compile(model.trunk, dynamic=True, backend='eager')
    batches = [[30, 20, 7], [11, 12], [16, 16]] + [[rng.randint(1, 60) for _ in range(rng.randint(2, 9))] for _ in range(20)] + [[40, 40, 40]]
    for i, lengths in enumerate(batches):
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        with torch.compiler.set_stance('default' if i < 3 else 'fail_on_recompile'):
            trunk(ids, cells=real_cells(lengths, max(lengths), 'cpu')).sum().backward()
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0


def test_fast_matmul_is_true_fp32():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        fast_cpu_matmul()
        a, b = torch.randn(300, 200), torch.randn(100, 200)
        error = (torch.nn.functional.linear(a, b) - (a.double() @ b.double().T)).abs().max()
        assert error < 1e-4
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_kept():
    """A tensor of 64 MB is 16,384 pages, which it finds in place once the heap is large enough for it and its neighbours."""
    code = ('import resource, torch, model\nmodel.keep_freed_memory()\n'
            'for _ in range(12):\n    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n    torch.zeros(2 ** 24)\n'
            '    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert min(map(int, done.stdout.split())) < 1000


def test_setup_refuses():
    for arguments, match in ((('abacus',), "device 'abacus' cannot be used"), (('cpu', 'float8'), 'dtype is')):
        with pytest.raises(UserError, match=match):
            setup(*arguments)


# -----------------------------------------------------------------------------
# what bf16 must not lose

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
    with pytest.raises(UserError, match='adapters of another model'):
        shutil.copytree(tmp_path / 'a', tmp_path / 'other')
        save_file({'blocks.0.mlp.up.fixed_a': torch.zeros(4, 99)}, str(tmp_path / 'other' / 'adapter.safetensors'))
        Transformer.from_pretrained(str(tmp_path / 'other'), dtype=BF16)
    taken_in = Transformer.from_pretrained(str(tmp_path / 'a'), dtype=BF16, merge=True)
    assert not taken_in.adapters() and torch.equal(logprobs(taken_in), logprobs(merged))
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


def test_an_adapter_that_has_learned_nothing_changes_nothing_in_bf16(bpe):
    """Bit for bit: the reference of a KL penalty is the policy without its adapter, and the first KL is exactly 0."""
    ids = torch.arange(20)[None]
    for changes in ({}, GPT2):
        model = loud(Transformer(tiny_config(bpe.vocab_size, **changes)).to(BF16).finish_loading()).add_lora(4)
        with torch.no_grad(), autocast(torch.device('cpu'), BF16):
            logits = model(ids)
            with model.without_adapter():
                assert torch.equal(model(ids), logits)


def test_bf16_weights_compute_with_and_without_autocast(bpe):
    ids = torch.arange(20)[None]
    for changes in ({}, GPT2):
        model = loud(Transformer(tiny_config(bpe.vocab_size, **changes)))
        half = model.for_sampling(BF16)
        with torch.no_grad():
            exact, plain = model(ids), half(ids)
            with autocast(torch.device('cpu'), BF16):
                cast = half(ids)
        for logits in (plain, cast):
            assert logits.dtype == torch.float32 and (logits - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_logits_and_values_are_fp32_under_bf16(bpe, device):
    """Against fp64 products of the rounded factors. At a size of 16 to 32 numbers in bf16 are 0.125 apart."""
    setup(device)  # on a GPU, TF32 for what stays fp32
    model = loud(Transformer(tiny_config(bpe.vocab_size)).add_value_head()).to(device)
    hidden = 4 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).to(device)
    exact = hidden.to(BF16).double() @ model.head.weight.to(BF16).double().t()
    wanted = torch.arange(200, device=device) % 50
    assert exact.abs().max() > 16
    for copy in (model, model.for_sampling(BF16)):
        with torch.no_grad(), autocast(hidden.device, BF16), model.packed(BF16):
            logits = copy.logits(hidden)
        assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-3
    with autocast(hidden.device, BF16):
        logprobs, _ = action_logprobs(model, hidden, wanted)
        values = model.values(hidden)
    expected = exact.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    assert (logprobs - expected).abs().max() < 1e-3
    head = model.value_head
    assert (values - (hidden.double() @ head.weight.double().t() + head.bias.double())[:, 0]).abs().max() < 1e-4
    logprobs.sum().backward()  # and there is a gradient
    assert model.head.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_benchmark_says_what_kind_of_cpu_it_is():
    assert torch.backends.cpu.get_cpu_capability() in run_script('model.py', '--bench', '--device=cpu').stdout
