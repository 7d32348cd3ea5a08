"""Tokenizers, token batches and the sampler: against transformers, whole forward passes, and statistics."""
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXTS, loud, real_data, run_script, tiny, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from config import UserError
from config.run import start_run
from sample import (Example, KVCache, Sample, Sampler, action_logprobs, bpe_tokenizer, cache_bytes,
                    check_same_tokenizer, collate, draw, epoch_order, hidden_at, learn_bpe, load_tokenizer,
                    micro_batches, n_learned, random_stream, response_logprobs, uniform)

PROMPTS = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each. How much',
           'Question: Tom has']
UNEVEN = PROMPTS * 2, 2, [30, 5, 41, 60, 17, 33, 1, 24]  # prompts, samples of each, budgets
ODD_TEXT = 'Tom has  3+14=<<3+14=17>>17\n\n#### 17 é漢🙂 \t x'
TURN, OTHER = '<|turn|>', '<|other|>'  # end tokens beside <|endoftext|>, as chat models have them
NAN = float('nan')

# -----------------------------------------------------------------------------
# tokenizers

def test_bpe_round_trip_digits_and_export(bpe, tmp_path):
    tiny(bpe.vocab_size).save_pretrained(str(tmp_path), bpe)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))
    for text in TEXTS + [ODD_TEXT, '', ' ', '<|endoftext|>', 'What is [GOOD]?']:
        ids = bpe.encode(text)
        assert bpe.decode(ids) == text and again.encode(text) == ids
        assert max(ids, default=0) < bpe.eos  # text cannot spell the special token
        if '|' not in text:
            assert theirs(text)['input_ids'] == ids and theirs.decode(ids) == text
    assert len(bpe.encode('1234567')) == 7 and len(bpe.encode(' apples')) == 1  # it did learn merges
    # the border is within a token
    assert bpe.encode_pair('3 app', 'les') == (bpe.encode('3 app'), bpe.encode('les'))
    assert theirs.eos_token_id == again.eos == bpe.eos and again.vocab_size == bpe.vocab_size == bpe.eos + 1
    # the first token that two neighbours make is theirs
    tok = bpe_tokenizer([b'a', b'b', b'ab', b'abb', b'bb', b'ba'])
    assert tok.encode('abb') == [3] and tok.encode('aba') == [2, 0] and tok.encode('aabbb') == [0, 3, 1]
    check_same_tokenizer(again, bpe, 'a and b')
    with pytest.raises(UserError, match='a and b have different tokenizers'):
        check_same_tokenizer(bpe, learn_bpe(TEXTS, 10), 'a and b')

def tiktokens_cache(monkeypatch, tmp_path, folder):
    """tiktoken keeps downloads under the SHA-1 of their address: with these it needs no network."""
    for name, file in (('vocab.bpe', 'vocab.bpe'), ('encoder.json', 'vocab.json')):
        address = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copy(os.path.join(folder, file), tmp_path / hashlib.sha1(address.encode()).hexdigest())
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))

@pytest.mark.parametrize('name, bos', [
    ('tiktoken', []), ('gpt2', []), ('pythia_neox', []), ('mistral', [1])])
def test_real_tokenizers_encode_as_transformers_does(name, bos, tmp_path, monkeypatch):
    path = folder = real_data('tokenizers', name.replace('tiktoken', 'gpt2'))
    if name == 'tiktoken':
        tiktokens_cache(monkeypatch, tmp_path, folder)
        path = 'gpt2'
    tokenizer, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos, tokenizer.vocab_size, tokenizer.eos) == (bos, len(theirs), theirs.eos_token_id)
    prompt, completion = 'Tom has 3.\nAnswer:', f' Tom has 3+14=17.\n{ODD_TEXT}'
    prompt_ids, completion_ids = tokenizer.encode_pair(prompt, completion)  # nothing is lost at the border
    assert theirs(prompt + completion)['input_ids'] == prompt_ids + completion_ids
    assert prompt_ids == tokenizer.encode_prompt(prompt)
    assert tokenizer.decode(completion_ids + [tokenizer.eos]).strip() == completion.strip()
    for text in ('a <|endoftext|> b', 'a </s><s> b', 'a <unk> b'):  # which spells special tokens
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(theirs.all_special_ids)
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode(ODD_TEXT) == tokenizer.encode(ODD_TEXT) and again.vocab_size == tokenizer.vocab_size

def test_missing_tokenizers_are_one_line(tmp_path):
    start_run({'out_dir': str(tmp_path / 'run'), 'dtype': 'auto'})
    (tmp_path / 'empty').mkdir()
    for path, match in (('nobody/nothing', 'from the hub'), ('out/nothing', 'no such checkpoint'),
                        (f'{tmp_path}/run', 'no checkpoint yet'),
                        (f'{tmp_path}/empty', 'no tokenizer could be loaded')):
        with pytest.raises(UserError, match=match) as error:
            load_tokenizer(path)
        assert '\n' not in str(error.value)

@pytest.fixture
def elsewhere(bpe, tmp_path):
    """elsewhere(edit, config, generation, **changes) -> the tokenizer of a folder with these config.json and
    generation_config.json: bpe's ids, then <|turn|> and <|other|>; edit(tokenizer.json's dictionary) and
    `changes` of tokenizer_config.json make it another one."""
    def make(edit=lambda made: None, config={}, generation={}, **changes):
        hf = copy.deepcopy(bpe.hf)
        hf.add_tokens([TURN, OTHER], special_tokens=True)
        hf.save_pretrained(tmp_path)
        files = [tmp_path / f'{name}.json' for name in
                 ('tokenizer', 'tokenizer_config', 'config', 'generation_config')]
        made, settings = (json.loads(file.read_text()) for file in files[:2])
        edit(made)
        for file, content in zip(files, (made, settings | changes, config, generation)):
            file.write_text(json.dumps(content))
        return load_tokenizer(str(tmp_path))
    return make

def test_every_end_token_that_the_files_name_ends_a_sample(bpe, elsewhere):
    """Decoded they are nothing. The greedy samples below end on what an export names."""
    turn, other = bpe.eos + 1, bpe.eos + 2
    for config, generation, ends in (({}, {}, []), ({'eos_token_id': turn}, {}, [turn]),
                                     ({}, {'eos_token_id': [other, turn]}, [turn, other]),
                                     ({'eos_token_id': [turn]}, {'eos_token_id': 65}, [65, turn]),
                                     ({'eos_token_id': 50256}, {'eos_token_id': -1}, [])):  # out of reach
        tokenizer = elsewhere(config={'vocab_size': bpe.eos + 3} | config, generation=generation)
        assert tokenizer.ends == sorted([bpe.eos] + ends) and tokenizer.eos == bpe.eos
        assert tokenizer.decode([66, *tokenizer.ends, 67]) == bpe.decode([66, 67])

def test_ids_that_no_sample_could_draw_are_refused_an_end_may_be_the_models(elsewhere, bpe, tmp_path):
    V = bpe.eos + 3
    for rows, eos, match in ((bpe.eos, '<|endoftext|>', f'token {bpe.eos} of the tokenizer'),
                             (200, 'A', 'outside the embedding of 200 rows'),
                             (V, None, 'no end-of-text token')):
        with pytest.raises(UserError, match=match):
            elsewhere(config={'vocab_size': rows}, eos_token=eos)
    assert elsewhere(config={'vocab_size': V - 1}).vocab_size == V - 1  # <|other|> was never learned
    tokenizer = elsewhere(config={'vocab_size': V, 'eos_token_id': [V - 1, V - 2]}, eos_token=None)
    tiny(V).save_pretrained(str(tmp_path / 'm'), tokenizer)
    again = load_tokenizer(str(tmp_path / 'm'))
    assert again.eos == tokenizer.eos == V - 1 and again.ends == tokenizer.ends == [V - 2, V - 1]

def test_a_begin_token_is_for_prompts_an_end_behind_texts_is_not_and_ids_may_have_holes(elsewhere, bpe):
    """The last token of the text moves behind the special ones; its old id means nothing and does no harm."""
    last, word, new = bpe.eos - 1, bpe.decode([bpe.eos - 1]), bpe.eos + 20

    def edit(made):
        vocab = made['model']['vocab']
        vocab[next(t for t, i in vocab.items() if i == last)] = new
        special, text = {'SpecialToken': {'id': TURN, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}
        made['post_processor'] = {'type': 'TemplateProcessing', 'single': [special, text, special],
                                  'pair': [special, text, {'Sequence': {'id': 'B', 'type_id': 1}}],
                                  'special_tokens': {TURN: dict(id=TURN, ids=[bpe.eos + 1], tokens=[TURN])}}
    tokenizer = elsewhere(edit)
    assert tokenizer.encode_prompt('Tom has 3') == tokenizer.hf('Tom has 3')['input_ids'][:-1]
    assert tokenizer.bos == [bpe.eos + 1] and tokenizer.encode(word) == [new]
    assert tokenizer.decode([last, new]) == word and new not in tokenizer.newline_ids
    assert tokenizer.vocab_size == new + 1 > len(tokenizer.hf)
    drawn = Sampler(Uniform(new + 5), tokenizer).generate([[0]], 20, 200, 1.0)
    assert new - 5 < max(i for s in drawn for i in s.ids) <= new
    with pytest.raises(UserError, match='next ids'):  # they are those of other tokens
        tokenizer.add_labels('step', new=True)


# -----------------------------------------------------------------------------
# random numbers, log-probabilities and batches

def test_splitmix64_reference():
    mask = (1 << 64) - 1
    for state, step in ((0, 0), (12345, 7), (-98765432123456789, 1000)):
        x = (state + (step + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        assert uniform(torch.tensor([state]), step).item() == ((x >> 41) & (1 << 23) - 1) / 2 ** 23 + 2 ** -24

def assert_drawn_from(p, tokens):
    """By chi-square, within four standard deviations; what is drawn at p = 0 fails at once."""
    counts, possible = torch.bincount(tokens, minlength=len(p)).double(), p > 0
    assert counts[~possible].sum() == 0
    expected, freedom = p.double()[possible] * len(tokens), possible.sum().item() - 1
    assert ((counts[possible] - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5

@pytest.mark.parametrize('temperature, top_k, top_p, V', [
    (0.5, 0, 1.0, 12), (2.0, 5, 1.0, 12), (1.0, 0, 0.7, 12), (0.8, 6, 0.9, 12), (1.5, 90, 0.95, 201)])
def test_draws_follow_the_softmax(temperature, top_k, top_p, V):
    u = uniform(torch.tensor([random_stream(0, [1], j) for j in range(30000)]), 0)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
    logits[64:128] = -torch.inf  # a stretch without any mass
    p = (logits / temperature).softmax(-1)
    order = p.argsort(descending=True)
    p[order[top_k or V:]] = 0
    mass = p[order].cumsum(0) / p.sum() - p[order] / p.sum()  # of the likelier ones
    p[order[mass >= top_p]] = 0
    tokens, logprobs = draw(logits.expand(30000, V).contiguous(), u, temperature, top_k, top_p)
    # of the whole distribution
    torch.testing.assert_close(logprobs, (logits / temperature).log_softmax(-1)[tokens])
    assert_drawn_from(p / p.sum(), tokens)

def test_draw_never_takes_padding_or_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0, 0, 0, -torch.inf, 0, 0, 0]])
    for u in (2 ** -24, 0.5, 1 - 2 ** -24):
        assert 0 < draw(logits, torch.tensor([u]), 1.0, vocab_size=5)[0] < 4
    # however likely the padding is
    for far, temperature in itertools.product((9.0, 200.0, 1e30), (0.0, 1.0)):
        logits = torch.tensor([[0.0, 1.0, far]])
        token, logprob = draw(logits, torch.tensor([0.9]), temperature, vocab_size=2)
        assert token == 1 and logprob.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())

def test_logprobs_in_chunks_equal_those_at_once_and_so_do_their_gradients(model):
    V, C = model.config.vocab_size, model.config.n_embd
    hidden = torch.randn(23, C, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, of = torch.arange(23) % V, [hidden, model.embed.weight]
    plain = torch.distributions.Categorical(logits=model.logits(hidden) / 0.7)
    expected = plain.log_prob(ids), plain.entropy()
    slopes = torch.autograd.grad(expected[0].sum() + 2 * expected[1].sum(), of)
    for kept in (5 * V, 23 * V):
        sizes = []  # of what autograd keeps for backward
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            found = action_logprobs(model, hidden, ids, 0.7, True, kept)
        assert (max(sizes) >= 23 * V) == (kept == 23 * V)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found[0].sum() + 2 * found[1].sum(), of), slopes,
                                   atol=1e-4, rtol=1e-5)

def test_batches_from_lengths_and_labels():
    rows = [Example([7, 7, 7, 7], 2), Example([7], 1), Example([0, 0, 7], 1, [0.25, NAN])]
    ids, labels = collate(rows, 'cpu', 4)
    assert ids.tolist() == [[7, 7, 7, 7], [7, 0, 0, 0], [0, 0, 7, 0]]
    expected = torch.tensor([[NAN, NAN, 1, 1], [NAN] * 4, [NAN, 0.25, NAN, NAN]])
    torch.testing.assert_close(labels, expected, equal_nan=True)  # an id of 0 is as real as any
    assert n_learned(rows) == 3
    # few lengths, within the context
    for longest, most, T in ((4, 100, 9), (9, 100, 9), (10, 100, 17), (10, 12, 12), (13, 12, 13)):
        assert collate([Example([7] * longest, 1)], 'cpu', most)[0].shape == (1, T)

def test_micro_batches_keep_to_their_size():
    for lengths, most, expected in (([1, 4, 3], 8, [[4, 3], [1]]), ([9, 9], 8, [[9], [9]])):
        assert micro_batches(lengths, most, int) == expected
    lengths = random.Random(0).choices(range(1, 200), k=300)
    micros = micro_batches(lengths, 4096, int)
    assert sorted(itertools.chain(*micros)) == sorted(lengths)
    assert all(len(m) * m[0] <= 4096 and m[0] == max(m) for m in micros)
    assert len(micros) < 1.2 * sum(lengths) / 4096 + 1

def test_whole_updates_are_of_similar_length_in_every_epoch():
    """103 rows of as many lengths, updates of 10 rows: the epochs do not begin where updates do."""
    rows = [Example([0] * n, 1) for n in random.Random(0).sample(range(1, 104), 103)]
    for epoch in range(5):
        lengths = [len(rows[i].ids) for i in epoch_order(rows, 10, 0, epoch)]
        updates = [lengths[i:i + 10] for i in range(-103 * epoch % 10, 94, 10)]
        assert sorted(lengths) == list(range(1, 104)) and len(updates) >= 9
        overlaps = [max(min(a), min(b)) <= min(max(a), max(b)) for a, b in itertools.combinations(updates, 2)]
        assert sum(overlaps) <= 8 * 2  # in a window of 8 the lengths of two updates do not overlap

def test_padding_is_left_out_and_changes_neither_states_nor_gradients(model):
    ids, mask = torch.randint(300, (4, 64)), torch.zeros(4, 64, dtype=torch.bool)
    for row, n in enumerate((64, 21, 3, 9)):  # 97 tokens
        mask[row, [0, n - 2, n - 1]] = True
    params, shapes = list(model.parameters()), []

    def trunk(ids, *args):
        shapes.append(ids.shape)
        return model.trunk(ids, *args)

    def states_and_gradients(hidden):
        return hidden, torch.autograd.grad(hidden.square().mean(), params, allow_unused=True)

    expected = states_and_gradients(model.trunk(ids)[mask])
    for model.grad_checkpointing in (True, False):
        found = states_and_gradients(hidden_at(model, ids, mask, trunk))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert hidden_at(model, ids, mask & False, trunk).shape == (0, 32)
    assert shapes[:2] == [(1, 128)] * 2

@torch.no_grad()
def test_responses_have_the_plain_passes_logprobs_and_values(model):
    model = loud(copy.deepcopy(model).add_value_head())
    rows = [Example(list(range(9)), 5, [NAN, 1.0, NAN, 0.0]), Example(list(range(30, 50)), 19),
            Example([7] * 5, 1)]
    expected = []
    for e, learned in zip(rows, ([6, 8], [19], [1, 2, 3, 4])):
        ids, before = torch.tensor(e.ids), torch.tensor(learned) - 1
        logp = (model(ids[None])[0] / 0.7).log_softmax(-1)
        expected.append((logp[before, ids[learned]], model.values(model.trunk(ids[None]))[0, before]))
    found = response_logprobs(model, rows, 0.7, critic=model)
    assert response_logprobs(model, rows, 0.7)[1] is None and found[2] is None
    for flat, parts in zip(found, zip(*expected)):
        torch.testing.assert_close(flat, torch.cat(parts), atol=1e-5, rtol=1e-5)


# -----------------------------------------------------------------------------
# the sampler

def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.prompt_ids, a.ids, a.finished) == (b.prompt_ids, b.ids, b.finished)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5, rel=1e-5)

class Uniform(torch.nn.Module):
    """A stand-in for the model with uniform logits: what comes out is the sampler's own."""

    def __init__(self, vocab_size):
        super().__init__()
        self.config = tiny_config(vocab_size, block_size=100_000)
        self.embed = torch.nn.Embedding(vocab_size, 1)

    def trunk(self, ids, positions=None, cache=None):
        return torch.zeros(*ids.shape, self.config.vocab_size)

    def logits(self, hidden):
        return hidden

    def packed(self, dtype):
        return contextlib.nullcontext(self)

def with_ends(tokenizer, *ends):
    """One with these end tokens, too."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.ends = sorted({tokenizer.eos, *ends})
    return tokenizer

def test_greedy_equals_transformers_generate(family, bpe, tmp_path):
    """Also where it ends: an export names all end tokens."""
    model, path = tiny(bpe.vocab_size, **family), str(tmp_path)
    common = Sampler(model, bpe).generate(PROMPTS, 1, 40, temperature=0)[0].ids[4]
    model.save_pretrained(path, with_ends(bpe, common))
    tokenizer, theirs, expected = load_tokenizer(path), AutoModelForCausalLM.from_pretrained(path).eval(), []
    assert tokenizer.ends == sorted([common, bpe.eos])
    for prompt in PROMPTS:
        ids = torch.tensor([bpe.encode(prompt)])
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                                pad_token_id=0)
        expected.append(whole[0, ids.shape[1]:].tolist())
    for max_rows in (1, 3, 64):
        samples = Sampler(model, tokenizer, max_rows).generate(PROMPTS, 1, 40, temperature=0)
        assert [s.ids for s in samples] == expected and samples[0].finished
        assert all(s.finished == (s.ids[-1] in tokenizer.ends) for s in samples)

def alone(model, tokenizer, prompt, number, budget, seed=0, stop=(), **arguments):
    """A sample by whole forward passes over its row."""
    ids, logprobs, finished = [], [], False
    stream = torch.tensor([random_stream(seed, prompt, number)])
    while len(ids) < budget and not finished:
        logits, u = model(torch.tensor([prompt + ids]))[:, -1], uniform(stream, len(ids))
        token, logprob = draw(logits, u, vocab_size=tokenizer.vocab_size, **arguments)
        ids, logprobs = ids + [token.item()], logprobs + [logprob.item()]
        finished = ids[-1] in tokenizer.ends or any(s in tokenizer.decode(ids) for s in stop)
    return Sample(prompt, ids, logprobs, finished)

@torch.no_grad()
@pytest.mark.parametrize('max_rows, arguments', [
    (64, dict(temperature=1.0)), (5, dict(temperature=1.3, seed=3)), (12, dict(temperature=0)),
    (2, dict(temperature=0.7, top_k=20, top_p=0.9, stop=('e', '17')))])
def test_samples_are_what_whole_passes_draw(model, bpe, max_rows, arguments):
    """Whatever the batch-mates; an end is an action; no row of the embedding beyond the tokenizer's is drawn;
    a prompt that is given again gets fresh samples."""
    (prompts, k, budgets), tokenizer = UNEVEN, with_ends(bpe, *range(5))
    expected = [alone(model, tokenizer, bpe.encode(prompt), k * (i // 4) + j, budget, **arguments)
                for i, (prompt, budget) in enumerate(zip(prompts, budgets)) for j in range(k)]
    same(Sampler(model, tokenizer, max_rows).generate(*UNEVEN, **arguments), expected)
    assert arguments['temperature'] == 0 or {s.finished for s in expected} == {True, False}

@torch.no_grad()
@pytest.mark.parametrize('max_rows', [64, 6])
def test_what_prompts_begin_with_is_read_once(model, bpe, monkeypatch, max_rows):
    """By every cohort, in whole 16s; ids and log-probs are those of whole passes."""
    start, tokenizer = (bpe.encode(TEXTS[0]) * 2)[:50], with_ends(bpe, *range(5))
    prompts = [start + bpe.encode(p) for p in PROMPTS] + [start]  # of the last one a token is left to read
    expected = [alone(model, tokenizer, p, j, 9, temperature=1.0) for p in prompts for j in range(2)]
    n_read, trunk = [], model.trunk
    monkeypatch.setattr(model, 'trunk', lambda ids, *given, **named: (
        n_read.append(ids.shape), trunk(ids, *given, **named))[1])
    same(Sampler(model, tokenizer, max_rows).generate(prompts, 2, 9), expected)
    assert n_read[:2] == [(1, 48), (5 if max_rows == 64 else 3, max(map(len, prompts)) - 48)]

@pytest.mark.parametrize('slots', [32, 256])  # a CPU's, a GPU's
def test_the_cache_takes_what_its_formula_says_and_rows_are_refilled(model, bpe, monkeypatch, slots):
    """Exactly that with one batch; in small ones never more, though several start and prompts wait."""
    monkeypatch.setitem(sample.SLOTS, 'cpu', slots)
    caches, n_bytes, n_rows, attend = weakref.WeakSet(), [], [], KVCache.attend
    tokenizer = SimpleNamespace(ends=(), labels=None, newline_ids=(), vocab_size=bpe.vocab_size)

    def spy(cache, *arguments):
        caches.add(cache)
        out = attend(cache, *arguments)
        n_bytes.append(sum(table.nbytes for c in caches for table in c.prompts + c.own))
        n_rows.append(sum(len(c.source) for c in caches))
        return out

    def most(max_rows, *arguments):
        for found in (n_bytes, n_rows):
            found.clear()
        Sampler(model, tokenizer, max_rows).generate(*arguments)
        return max(n_bytes)

    def need(*sizes):
        return cache_bytes(model.config, *sizes, torch.float32)
    monkeypatch.setattr(KVCache, 'attend', spy)
    prompts = [bpe.encode(p) for p in PROMPTS]
    longest = max(map(len, prompts))
    assert need(0, longest, 16, 20) == need(0, longest, 16, 32) == need(0, longest, 8, 64)  # whole 32s
    for budget in (20, 40):
        assert most(64, prompts, 4, budget) == need(4, longest, 16, budget)
    assert most(4, [[i] * 20 for i in range(8)], 1, 30) == need(4, 20, 4, 30)  # all end at once
    found = most(8, prompts * 8, 2, [5, 9, 20, 30] * 8)
    assert need(4, longest, 8, 30) / 2 < found <= need(12, longest, 8, 30)
    # at most a quarter is free, but for the last rows
    assert max(n_rows) == 8 and sum(n > 6 for n in n_rows) > 0.8 * len(n_rows)

@pytest.mark.cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('arguments', [dict(temperature=1.3), dict(temperature=0), dict(top_k=7, top_p=0.9),
                                       dict(stop=('e', '1'))], ids=str)
def test_on_a_gpu_graphs_draw_what_steps_one_by_one_draw(model, bpe, monkeypatch, arguments, dtype):
    model, drawn = copy.deepcopy(model).cuda(), []
    for works in (True, False):
        monkeypatch.setattr(sample.Replay, 'works', works)
        drawn.append(Sampler(model, bpe, 12, dtype).generate(*UNEVEN, **arguments))
        assert sample.Replay.works == works  # no recording failed
    same(*drawn)

@pytest.mark.parametrize('fails', [False, True])
def test_steps_are_recorded_once_and_else_computed(monkeypatch, capsys, fails):
    """With stand-ins for CUDA's: the second call with a key is recorded; what failed is not tried again."""
    calls, replayed = [], []

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        yield
        if fails:
            raise RuntimeError('no such thing when capturing\nand more')
    graph = SimpleNamespace(replay=lambda: replayed.append(1))
    for name, stand_in in dict(CUDAGraph=lambda: graph, graph=record, current_stream=lambda: None,
                               stream=contextlib.nullcontext).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(sample.Replay, 'works', True)
    replay = sample.Replay(torch.device('cuda'))
    for key in 'aaabbb':
        replay(key, lambda: calls.append(1))
    assert (len(calls), len(replayed)) == ((7, 0) if fails else (4, 4)) and sample.Replay.works != fails
    said = 'decoding without CUDA graphs, more slowly: RuntimeError: no such thing when capturing\n'
    assert capsys.readouterr().out == said * fails

def test_looking_seldom_draws_the_same(model, bpe, monkeypatch):
    """As on a GPU: rows that are done wait, what they draw is ignored, and no draw waits for a number."""
    model, tokenizer, drawn = copy.deepcopy(model), with_ends(bpe, *bpe.encode('e')), sample.Cohort.draw
    tokenizer.add_labels('step', new=True)
    loud(model.add_tokens(bpe.vocab_size, 2), seed=3)
    sampler = Sampler(model, tokenizer, 12)
    expected = sampler.generate(*UNEVEN)

    def draw_without_waiting(cohort, logits):
        with monkeypatch.context() as patch:
            for name in ('tolist', 'item', '__bool__', '__int__', 'nonzero'):
                patch.setattr(torch.Tensor, name, None)
            drawn(cohort, logits)
    monkeypatch.setattr(sample.Cohort, 'draw', draw_without_waiting)
    sampler.look_every, sampler.leave_share = 8, 0.5
    same(sampler.generate(*UNEVEN), expected)

def test_samples_are_independent_from_the_first_token_on(bpe):
    V = bpe.vocab_size
    samples = Sampler(Uniform(V), bpe, 10_000).generate(['A', 'B'], 4000, 2, 1.0)
    first = torch.tensor([s.ids[0] for s in samples])
    assert_drawn_from(torch.full((V,), 1 / V), first)
    # of 4000 pairs (same number, other prompt) and (neighbours, same prompt), one in V should agree
    for agree in ((first[:4000] == first[4000:]).sum(), (first[:4000:2] == first[1:4000:2]).sum() * 2):
        assert abs(agree - 4000 / V) < 5 * (4000 / V) ** 0.5 + 5

def test_stop_strings(bpe):
    order = bpe.encode(' Tom has 14 apples. How many\nQuestion: Ann')

    class Says(Uniform):
        """`order`, whatever the prompt of one token."""
        def trunk(self, ids, positions=None, cache=None):
            hidden, place = super().trunk(ids), 0 if positions is None else positions[0, 0].item()
            hidden[..., order[place % len(order)]] = 50.0
            return hidden

    sampler, text = Sampler(Says(bpe.vocab_size), bpe), bpe.decode(order)
    for stop in ('.', '\nQuestion:', 'many\nQ', '14 a'):  # up to the token that completed it
        s, = sampler.generate([[0]], 1, len(order), 0, stop=stop)
        said = bpe.decode(s.ids)
        assert s.finished and stop in said and text.startswith(said) and stop not in bpe.decode(s.ids[:-1])

def test_bad_arguments(model, bpe):
    for arguments, match in ((dict(k=0), 'k and'), (dict(max_new_tokens=0), 'max_new_tokens must be'),
                             (dict(temperature=-1), 'temperature'), (dict(temperature=NAN), 'temperature'),
                             (dict(top_p=0), 'top_p'), (dict(top_k=-1), 'top_k'),
                             (dict(prompts=['']), 'a prompt is empty'),
                             (dict(max_new_tokens=[5, 5]), '2 budgets'),
                             (dict(max_new_tokens=95), 'exceed the context of 96 tokens')):
        with pytest.raises(UserError, match=match):
            Sampler(model, bpe).generate(**(dict(prompts=['Question: Tom'], max_new_tokens=5) | arguments))
    for name, value in (('max_rows', 0), ('condition', 'bad'), ('condition', 'fine')):
        with pytest.raises(UserError, match=name):
            Sampler(model, bpe, **{name: value})
    assert Sampler(model, bpe).generate([], 3, 5) == []

def test_command_line(bpe, tmp_path, monkeypatch):
    tiny(bpe.vocab_size).save_pretrained(str(tmp_path), bpe)
    monkeypatch.setattr('config.run.setup', lambda device, dtype, seed: (torch.device('cpu'), torch.float32))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Tom has\nAnn\n'))
    short = '--max_new_tokens=8', '--k=2'
    for flags, n in ((['--start=Tom has', *short], 2), (short, 4), (['--start=Tom has'], 1)):
        assert run_script('sample.py', f'--init_from={tmp_path}', *flags).stdout.count('-' * 20) == n
    error = run_script('sample.py', f'--init_from={tmp_path}', '--start=' + 'Tom has ' * 90, code=2).stderr
    assert 'exceed the context of 96' in error and error.count('\n') == 1
