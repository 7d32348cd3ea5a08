"""Tokenizers and the sampler: exact where it can be exact, against transformers, the model's own forward, and statistics."""
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import random
import runpy
import shutil
import sys
import weakref

import pytest
import torch
import transformers
from conftest import GPT2, ROOT, TEXTS, loud, real_data, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from config import UserError, start_run
from model import KVCache, Transformer, cache_bytes
from sample import (BPETokenizer, Example, HFTokenizer, Sampler, action_logprobs, bpe_tokenizer, check_same_tokenizer, collate, draw,
                    epoch_order, learn_bpe, least_kept, load_tokenizer, micro_batches, random_stream, rows_that_fit, token_logprobs, uniform)

PROMPTS = ['Question: Tom', 'A', 'Question: Ann sells 4 pens for 5 dollars each. How much', 'Question: Tom has']  # unequal lengths


# -----------------------------------------------------------------------------
# tokenizers

ODD_TEXT = 'Tom has  3+14=<<3+14=17>>17\n\n#### 17 é漢🙂 \t x'


def test_bpe_round_trip_and_digits(bpe):
    for text in TEXTS + [ODD_TEXT, '', ' ', '<|endoftext|>']:
        assert bpe.decode(bpe.encode(text)) == text
        assert bpe.eos not in bpe.encode(text)  # text cannot spell the special token
    assert len(bpe.encode('1234567')) == 7
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2  # it did learn merges
    assert bpe.vocab_size == bpe.eos + 1 <= 256 + 120 + 1


def test_bpe_is_the_same_every_time_and_from_disk(bpe, tmp_path):
    assert learn_bpe(TEXTS, 120).encode(TEXTS[1]) == bpe.encode(TEXTS[1])
    bpe.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert isinstance(again, BPETokenizer)
    assert (again.encode(ODD_TEXT), again.eos, again.vocab_size) == (bpe.encode(ODD_TEXT), bpe.eos, bpe.vocab_size)


def test_auto_tokenizer_makes_the_same_ids(bpe, tmp_path):
    model = loud(Transformer(tiny_config(bpe.vocab_size)))
    model.save_pretrained(str(tmp_path / 'm'), bpe)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'm')
    for text in TEXTS + [ODD_TEXT]:
        assert theirs(text)['input_ids'] == bpe.encode(text)
        assert theirs.decode(bpe.encode(text)) == text
    assert theirs.eos_token_id == bpe.eos
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm').config.eos_token_id == bpe.eos


def test_learned_bpe_exports_exactly_on_real_text(tmp_path):
    with open(real_data('gsm8k', 'train.jsonl'), encoding='utf-8') as f:
        text = f.read(300_000)
    tokenizer = learn_bpe([text], 800)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)['input_ids'] == tokenizer.encode(text)


def test_tiktoken_gpt2(tmp_path, monkeypatch):
    """tiktoken keeps downloads under the SHA-1 of their address; with the two files of GPT-2 there, it needs no network."""
    folder = real_data('tokenizers', 'gpt2')
    for name, file in (('vocab.bpe', 'vocab.bpe'), ('encoder.json', 'vocab.json')):
        address = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        shutil.copy(os.path.join(folder, file), tmp_path / hashlib.sha1(address.encode()).hexdigest())
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    ours, theirs = load_tokenizer('gpt2'), transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, BPETokenizer) and (ours.vocab_size, ours.eos) == (50257, 50256)
    for text in TEXTS + [ODD_TEXT]:
        assert ours.encode(text) == theirs(text)['input_ids']
    (tmp_path / 'saved').mkdir()
    ours.save(tmp_path / 'saved')
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / 'saved')
    for text in TEXTS + [ODD_TEXT]:
        assert exported(text)['input_ids'] == ours.encode(text) == load_tokenizer(str(tmp_path / 'saved')).encode(text)


def test_hugging_face_folders(tmp_path):
    for name, bos in (('gpt2', []), ('pythia_neox', []), ('mistral', [1])):
        tokenizer = load_tokenizer(real_data('tokenizers', name))
        assert isinstance(tokenizer, HFTokenizer) and tokenizer.bos == bos
        prompt, completion = 'Question: Tom has 3.\nAnswer:', ' Tom has 3+14=17.\n#### 17'
        prompt_ids, completion_ids = tokenizer.encode_pair(prompt, completion)
        assert prompt_ids == tokenizer.encode_prompt(prompt)
        assert tokenizer.hf(prompt + completion)['input_ids'] == prompt_ids + completion_ids  # nothing is lost at the border
        assert tokenizer.decode(completion_ids + [tokenizer.eos]).strip() == completion.strip()
        for text in ('a <|endoftext|> b', 'a </s><s> b', 'a <unk> b'):  # which spells special tokens
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.hf.all_special_ids)
        tokenizer.save(tmp_path)
        again = load_tokenizer(str(tmp_path))
        assert again.encode(ODD_TEXT) == tokenizer.encode(ODD_TEXT) and again.vocab_size == tokenizer.vocab_size


def test_pair_whose_border_falls_within_a_token(bpe):
    assert len(bpe.encode(' apples')) == 1
    prompt, completion = bpe.encode_pair('3 app', 'les')
    assert prompt == bpe.encode('3 app') and completion == bpe.encode('les')


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    start_run({'out_dir': str(tmp_path / 'run'), 'dtype': 'auto'})
    with pytest.raises(UserError, match='no checkpoint yet'):
        load_tokenizer(str(tmp_path / 'run'))


def test_missing_tokenizer_is_one_line(tmp_path):
    for path, match in (('nobody/nothing', 'from the hub'), ('/no/such/folder', 'no such checkpoint'), ('out/nothing', 'no such checkpoint'),
                        (str(tmp_path), 'no tokenizer could be loaded')):
        with pytest.raises(UserError, match=match) as error:
            load_tokenizer(path)
        assert '\n' not in str(error.value)


# -----------------------------------------------------------------------------
# what is loaded from elsewhere

TURN, OTHER = '<|turn|>', '<|other|>'  # end tokens beside <|endoftext|>, as chat models have them


@pytest.fixture
def elsewhere(bpe, tmp_path):
    """elsewhere(edit, config, generation, **changes) -> a folder with config.json, generation_config.json and a tokenizer that
    AutoTokenizer loads: bpe's ids, of which <|endoftext|> is the last, and then <|turn|> and <|other|>. edit(tokenizer.json's
    dictionary) and `changes` of tokenizer_config.json make it another one."""
    def make(edit=lambda made: None, config=None, generation=None, **changes):
        folder = tmp_path / 'elsewhere'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        bpe.save(folder)
        hf = transformers.AutoTokenizer.from_pretrained(folder)
        hf.add_tokens([TURN, OTHER], special_tokens=True)
        hf.save_pretrained(folder)
        os.remove(folder / 'bpe.json')
        made, settings = (json.loads((folder / name).read_text()) for name in ('tokenizer.json', 'tokenizer_config.json'))
        edit(made)
        settings |= changes
        for name, content in (('tokenizer.json', made), ('tokenizer_config.json', settings), ('config.json', config),
                              ('generation_config.json', generation)):
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return str(folder)
    return make


def test_every_end_token_that_the_files_name_ends_a_sample(bpe, elsewhere, tmp_path, monkeypatch):
    """The tokenizer's own, config.json's and generation_config.json's; decoded they are nothing, transformers ends on the same ones, and
    an export keeps them."""
    turn, other, V = bpe.eos + 1, bpe.eos + 2, bpe.eos + 3
    for config, generation, ends in (({}, None, []), ({'eos_token_id': turn}, {}, [turn]),
                                     ({}, {'eos_token_id': [other, turn]}, [turn, other]),
                                     ({'eos_token_id': None}, {'eos_token_id': [65, bpe.eos]}, [65]),
                                     ({'eos_token_id': [turn]}, {'eos_token_id': 65}, [65, turn]),
                                     ({'eos_token_id': 50256}, {'eos_token_id': -1}, [])):  # defaults, which no sample can reach
        tokenizer = load_tokenizer(elsewhere(config={'vocab_size': V} | config, generation=generation))
        assert tokenizer.ends == sorted([bpe.eos] + ends) and tokenizer.eos == bpe.eos
        assert tokenizer.decode([66, *tokenizer.ends, 67]) == bpe.decode([66, 67])

    model, prompts = loud(Transformer(tiny_config(V))), [[i] for i in range(40, 48)]
    plain = Sampler(model, tokenizer).generate(prompts, 1, 12, temperature=0)
    ends = sorted({plain[0].ids[4], plain[1].ids[6]})
    tokenizer = load_tokenizer(elsewhere(config={'vocab_size': V, 'eos_token_id': ends[0]}, generation={'eos_token_id': ends}))
    model.save_pretrained(str(tmp_path / 'm'), tokenizer)
    again, theirs = load_tokenizer(str(tmp_path / 'm')), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval()
    assert again.ends == tokenizer.ends == sorted(ends + [bpe.eos])
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'm').eos_token_id == again.eos == bpe.eos
    samples = Sampler(model, again).generate(prompts, 1, 12, temperature=0)
    for prompt, sample in zip(prompts, samples):
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 1), max_new_tokens=12, do_sample=False,
                              pad_token_id=0)
        assert out[0, 1:].tolist() == sample.ids
        assert sample.finished == (sample.ids[-1] in again.ends)
    assert all(s.finished and len(s.ids) <= n for s, n in zip(samples, (5, 7)))
    monkeypatch.setattr('huggingface_hub.snapshot_download', lambda path, allow_patterns: elsewhere(generation={'eos_token_id': turn}))
    assert load_tokenizer('someone/something').ends == [bpe.eos, turn]  # the hub's files, too


def test_an_end_token_is_the_tokenizers_or_else_the_models(elsewhere, bpe, tmp_path):
    """One that no sample could draw is refused; a tokenizer without any takes the model's first, and keeps it."""
    V = bpe.eos + 3
    for rows, match in ((bpe.eos, f'the end token {bpe.eos} is outside of the embedding of {bpe.eos} rows'), (200, 'end token')):
        with pytest.raises(UserError, match=match):
            load_tokenizer(elsewhere(config={'vocab_size': rows}))
    with pytest.raises(UserError, match=f'has {bpe.eos} tokens, the embedding 200 rows'):
        load_tokenizer(elsewhere(config={'vocab_size': 200}, eos_token='A'))
    with pytest.raises(UserError, match='no end-of-text token'):
        load_tokenizer(elsewhere(config={'vocab_size': V}, eos_token=None))
    tokenizer = load_tokenizer(elsewhere(config={'vocab_size': V, 'eos_token_id': [V - 1, V - 2]}, eos_token=None))
    loud(Transformer(tiny_config(V))).save_pretrained(str(tmp_path / 'm'), tokenizer)
    again = load_tokenizer(str(tmp_path / 'm'))
    assert again.eos == tokenizer.eos == V - 1 and again.ends == tokenizer.ends == [V - 2, V - 1]
    assert load_tokenizer(elsewhere(config={'vocab_size': V - 1})).vocab_size == V - 1  # <|other|> was never learned


def test_ids_may_have_holes(elsewhere, bpe):
    """The last token of the text moves behind the special ones. Where it was, an id means nothing, and does no harm."""
    last = bpe.eos - 1

    def move(made):
        vocab = made['model']['vocab']
        vocab[next(t for t, i in vocab.items() if i == last)] = bpe.eos + 20
    tokenizer = load_tokenizer(elsewhere(move))
    word = bpe.decode([last])
    assert tokenizer.encode(word) == [bpe.eos + 20] and tokenizer.decode([bpe.eos + 20]) == word and tokenizer.decode([last]) == ''
    assert tokenizer.vocab_size == bpe.eos + 21 > len(tokenizer.hf)
    assert bpe.eos + 20 not in tokenizer.newline_ids
    drawn = Sampler(Uniform(bpe.eos + 25), tokenizer).generate([[0]], 20, 200, 1.0)
    assert bpe.eos + 15 < max(i for s in drawn for i in s.ids) < tokenizer.vocab_size and all(tokenizer.decode(s.ids) for s in drawn)
    with pytest.raises(UserError, match='other ids than its next two'):  # the library would give them the ids of other tokens
        tokenizer.add_labels('step', new=True)


def test_the_begin_token_is_what_transformers_puts_before_a_text(elsewhere, bpe):
    for bos in (bpe.eos, bpe.eos + 1):
        for after in (False, True):  # an end token behind every text is not for prompts
            def edit(made):
                token = {bpe.eos: '<|endoftext|>', bpe.eos + 1: TURN}[bos]
                single = [{'SpecialToken': {'id': token, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
                single += [{'SpecialToken': {'id': token, 'type_id': 0}}] * after
                pair = single + [{'Sequence': {'id': 'B', 'type_id': 1}}]
                made['post_processor'] = {'type': 'TemplateProcessing', 'single': single, 'pair': pair,
                                          'special_tokens': {token: {'id': token, 'ids': [bos], 'tokens': [token]}}}
            tokenizer = load_tokenizer(elsewhere(edit))
            assert tokenizer.bos == [bos]
            theirs = tokenizer.hf('Tom has 3')['input_ids']
            assert tokenizer.encode_prompt('Tom has 3') == (theirs[:-1] if after else theirs)


def test_text_that_spells_a_special_token_is_text(elsewhere, bpe):
    text = f'What is <|endoftext|>? {TURN}x [GOOD] '
    tokenizer = load_tokenizer(elsewhere())
    tokenizer.add_labels('step', new=True)
    for tok in (tokenizer, bpe):
        assert max(tok.encode(text)) < bpe.eos and tok.decode(tok.encode(text)) == text


# -----------------------------------------------------------------------------
# random numbers and the draw

def test_uniform_is_uniform_within_and_across_streams():
    across = uniform(torch.tensor([random_stream(0, [1, 2], j) for j in range(20000)]), 3)
    within = uniform(torch.tensor([random_stream(5, [1, 2], 7)]), torch.arange(20000))
    for u in (across, within):
        assert 0 < u.min() and u.max() < 1
        counts = torch.histc(u, bins=20, min=0, max=1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square of 19 degrees of freedom, p = .001
        assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 0.03  # 4 standard errors


def test_splitmix64_reference():
    """Against the algorithm in Python's own integers."""
    mask = (1 << 64) - 1
    for state, step in ((0, 0), (12345, 7), (-98765432123456789, 1000)):
        x = (state + (step + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
        assert uniform(torch.tensor([state]), step).item() == ((x >> 41) & (1 << 23) - 1) / 2 ** 23 + 2 ** -24


def chi_square(tokens, p):
    """The statistic over the tokens with p > 0, and its degrees of freedom; anything drawn at p = 0 fails at once."""
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    expected = p.double()[p > 0] * len(tokens)
    return ((counts[p > 0] - expected) ** 2 / expected).sum().item(), len(expected) - 1


def test_draws_follow_the_softmax():
    """V = 64 is one block of the draw, 201 are four, the last of them padded."""
    u = uniform(torch.tensor([random_stream(0, [1], j) for j in range(30000)]), 0)
    for temperature, top_k, top_p, V in ((1.0, 0, 1.0, 12), (0.5, 0, 1.0, 12), (2.0, 5, 1.0, 12), (1.0, 0, 0.7, 12), (0.8, 6, 0.9, 12),
                                         (1.0, 0, 1.0, 64), (1.0, 0, 1.0, 201), (1.5, 90, 0.95, 201)):
        logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 1.5
        if V == 201:
            logits[64:128] = -torch.inf  # a block without any mass
        p = (logits / temperature).softmax(-1)
        if top_k:
            p[p.argsort(descending=True)[top_k:]] = 0
            p /= p.sum()
        if top_p < 1:
            order, mass = p.argsort(descending=True), 0.0
            for i in order:
                p[i], mass = (0, mass) if mass >= top_p else (p[i], mass + p[i])
            p /= p.sum()
        tokens, logprobs = draw(logits.expand(30000, V).contiguous(), u, temperature, top_k, top_p)
        torch.testing.assert_close(logprobs, (logits / temperature).log_softmax(-1)[tokens])  # of the whole distribution
        statistic, freedom = chi_square(tokens, p)
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5, (temperature, top_k, top_p, V)  # mean and four standard deviations


def test_the_nucleus_is_the_smallest_set_with_the_mass():
    """Rows where a few tokens hold it, beside flat ones where more are needed than are looked at first."""
    p = torch.cat([(torch.randn(4, 1500, generator=torch.Generator().manual_seed(0)) * scale).exp() for scale in (0.1, 4.0)])
    for top_p in (0.01, 0.6, 0.95):
        least = least_kept(p, top_p)
        assert ((p[:4] >= least[:4]).sum(-1) > 512).all() == (top_p > 0.5) and ((p[4:] >= least[4:]).sum(-1) < 512).all()
        for row, cut in zip(p.double(), least[:, 0].double()):
            kept = row >= cut
            assert row[kept].sum() >= top_p * row.sum() > row[kept].sum() - row[kept].min()
        assert all(torch.equal(least_kept(row[None], top_p), cut[None]) for row, cut in zip(p, least))


def test_draw_never_takes_padding_or_an_impossible_token():
    logits = torch.zeros(3, 8)
    logits[:, 0] = -torch.inf
    logits[:, 4] = -torch.inf
    for u in (2 ** -24, 0.5, 1 - 2 ** -24):
        token, _ = draw(logits, torch.full((3,), u), 1.0, vocab_size=5)
        assert ((token > 0) & (token < 4)).all()
    for far in (9.0, 200.0, 1e30):  # however likely the padding is; greedy too
        logits = torch.tensor([[0.0, 1.0, far]])
        assert draw(logits, torch.tensor([0.5]), 0.0, vocab_size=2)[0].item() == 1
        token, logprob = draw(logits, torch.tensor([0.9]), 1.0, vocab_size=2)
        assert token.item() == 1 and logprob.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item())


def test_token_logprobs_against_log_softmax():
    logits, ids = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    expected = (logits / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, ids, 0.7), expected)


# -----------------------------------------------------------------------------
# the sampler

def alone(model, tokenizer, ids, n, temperature=0):
    """The unbatched, uncached reference: n greedy tokens, each from a full forward pass of one row."""
    ids, start = list(ids), len(ids)
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        logits[tokenizer.vocab_size:] = -torch.inf
        ids.append(logits.argmax().item())
        if ids[-1] == tokenizer.eos:
            break
    return ids[start:]


def test_logprobs_in_chunks_equal_those_at_once_and_so_do_their_gradients(model):
    hidden = torch.randn(23, model.config.n_embd, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(23) % model.config.vocab_size
    plain = torch.distributions.Categorical(logits=model.logits(hidden) / 0.7)
    expected = torch.autograd.grad(plain.log_prob(ids).sum() + 2 * plain.entropy().sum(), [hidden, model.embed.weight])
    for chunk, most in ((5, 0), (5, 2 ** 27), (100, 0)):
        logprobs, entropy = action_logprobs(model, hidden, ids, 0.7, True, chunk, most)
        assert torch.allclose(logprobs, plain.log_prob(ids), atol=1e-5) and torch.allclose(entropy, plain.entropy(), atol=1e-5)
        found = torch.autograd.grad(logprobs.sum() + 2 * entropy.sum(), [hidden, model.embed.weight])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    assert action_logprobs(model, hidden, ids, 0.7)[1] is None


def test_long_batches_of_logprobs_never_hold_all_logits(model):
    """What autograd keeps for backward: the logits of all rows where that is allowed, and else none."""
    V = model.config.vocab_size

    def kept(most):
        sizes = []
        hidden = torch.randn(64, model.config.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            action_logprobs(model, hidden, torch.zeros(64, dtype=torch.long), chunk=8, kept=most)
        return max(sizes)
    assert kept(64 * V) >= 64 * V > kept(64 * V - 1)


def test_batches_from_lengths():
    rows = [Example([7, 7, 7, 7], 2), Example([7], 1), Example([0, 0, 7], 1)]
    ids, learned = collate(rows, 'cpu', 4)
    assert ids.tolist() == [[7, 7, 7, 7], [7, 0, 0, 0], [0, 0, 7, 0]]
    assert learned.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 0]]  # an id of 0 is as real as any
    for longest, most, T in ((4, 100, 9), (9, 100, 9), (10, 100, 17), (10, 12, 12), (12, 12, 12), (13, 12, 13)):
        assert collate([Example([7] * longest, 1)], 'cpu', most)[0].shape == (1, T)  # few lengths, within the context
    assert micro_batches(range(3), 8, lambda i: len(rows[i].ids)) == [[0, 2], [1]]


def test_other_tokenizers_are_told_apart(bpe):
    check_same_tokenizer(bpe, bpe_tokenizer(sorted(bpe.encoding._mergeable_ranks, key=bpe.encoding._mergeable_ranks.get)), 'a and b')
    with pytest.raises(UserError, match='a and b have different tokenizers'):
        check_same_tokenizer(bpe, learn_bpe(TEXTS, 10), 'a and b')


def test_greedy_equals_the_plain_loop(model, bpe):
    for max_rows in (1, 3, 64):
        samples = Sampler(model, bpe, max_rows).generate(PROMPTS, 1, 30, temperature=0)
        for prompt, sample in zip(PROMPTS, samples):
            assert sample.prompt_ids == bpe.encode(prompt)
            assert sample.ids == alone(model, bpe, bpe.encode(prompt), 30)
            assert sample.finished == (sample.ids[-1] == bpe.eos)


@pytest.mark.parametrize('changes', [{}, GPT2])
def test_greedy_equals_transformers_generate(changes, bpe, tmp_path):
    model = loud(Transformer(tiny_config(bpe.vocab_size, **changes)))
    model.save_pretrained(str(tmp_path / 'm'), bpe)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'm').eval()
    for prompt, sample in zip(PROMPTS, Sampler(model, bpe).generate(PROMPTS, 1, 40, temperature=0)):
        ids = torch.tensor([bpe.encode(prompt)])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert out[0, ids.shape[1]:].tolist() == sample.ids


def test_greedy_on_the_real_checkpoint():
    folder = real_data('weights', 'stories260K')
    model, tokenizer = Transformer.from_pretrained(folder), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ['Once upon a time', 'Tim and Sue went to the park. They', 'One day']
    for prompt, sample in zip(prompts, Sampler(model, tokenizer).generate(prompts, 1, 80, temperature=0)):
        ids = torch.tensor([[1] + tokenizer.encode(prompt)])
        assert sample.prompt_ids == ids[0].tolist()  # with its <s>
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        assert out[0, ids.shape[1]:].tolist() == sample.ids


def test_logprobs_equal_the_trainers_forward(model, bpe):
    for temperature in (0, 0.7, 1.3):
        for s in Sampler(model, bpe).generate(PROMPTS, 5, 25, temperature):
            with torch.no_grad():
                logits = model(torch.tensor([s.prompt_ids + s.ids]))[0, len(s.prompt_ids) - 1:-1]
            expected = token_logprobs(logits, torch.tensor(s.ids), temperature or 1.0)
            torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_batch_mates_or_order(model, bpe):
    together = Sampler(model, bpe, 64).generate(PROMPTS, 3, 20, 1.0, seed=3)
    backwards = Sampler(model, bpe, 5).generate(PROMPTS[::-1], 3, 20, 1.0, seed=3)  # batches that split a prompt's samples
    for i, prompt in enumerate(PROMPTS):
        one = Sampler(model, bpe, 2).generate([prompt], 3, 20, 1.0, seed=3)
        assert [s.ids for s in one] == [s.ids for s in together[3 * i:3 * i + 3]]
        assert [s.ids for s in one] == [s.ids for s in backwards[3 * (3 - i):3 * (3 - i) + 3]]


def test_whole_updates_are_of_similar_length_in_every_epoch():
    """103 rows of as many lengths, updates of 10 rows: the epochs do not begin where updates do."""
    rows = [Example([0] * n, 1) for n in random.Random(0).sample(range(1, 104), 103)]
    endless = [(epoch, len(rows[i].ids)) for epoch in range(5) for i in epoch_order(rows, 10, 0, epoch)]
    assert all(sorted(n for e, n in endless if e == epoch) == list(range(1, 104)) for epoch in range(5))
    whole = {}
    for i in range(0, len(endless) - 9, 10):
        update = endless[i:i + 10]
        if update[0][0] == update[-1][0]:
            whole.setdefault(update[0][0], []).append((min(n for _, n in update), max(n for _, n in update)))
    for updates in whole.values():  # in a window the lengths of two updates do not overlap; an epoch has 9 or 10 of them, windows have 8
        assert len(updates) >= 9
        assert sum(a < c <= b or c < a <= d for (a, b), (c, d) in itertools.combinations(updates, 2)) <= 8 * 2


def test_prompts_with_unequal_numbers_of_samples(model, bpe, monkeypatch):
    """One prompt 40 times beside others once: taken as several prompts, whose samples are those of one."""
    tables, place = [], KVCache._place
    monkeypatch.setattr(KVCache, '_place', lambda cache, source: place(cache, source) or tables.append((len(cache.lengths) * cache.width, len(source))))
    prompts = [PROMPTS[0]] * 40 + PROMPTS[1:]
    together = Sampler(model, bpe, 64).generate(prompts, 1, 20, 1.0, seed=3)
    assert tables[0][1] == 43 and tables[0][0] < 3 * 43  # else four prompts * 40
    alone = Sampler(model, bpe, 64).generate([PROMPTS[0]], 40, 20, 1.0, seed=3)
    assert [s.ids for s in together[:40]] == [s.ids for s in alone]
    assert [s.ids for s in together[40:]] == [s.ids for s in Sampler(model, bpe).generate(PROMPTS[1:], 1, 20, 1.0, seed=3)]


def test_a_prompt_is_prefilled_once_and_rows_are_refilled(model, bpe, monkeypatch):
    prefilled, rows = [], []
    trunk = Transformer.trunk

    def spy(self, ids, positions=None, cache=None):
        (prefilled if positions is None else rows).append(len(ids))
        return trunk(self, ids, positions, cache)
    monkeypatch.setattr(Transformer, 'trunk', spy)
    Sampler(model, bpe, 64).generate(PROMPTS, 16, 5, 1.5)
    assert sum(prefilled) == 4
    rows.clear()
    samples = Sampler(model, bpe, 8).generate(PROMPTS * 3, 8, [5, 9, 20, 30] * 3, 1.5)
    longest = max(len(s.ids) for s in samples)
    assert max(rows) == 8 and sum(r >= 6 for r in rows) > len(rows) - longest  # at most a quarter is free, but in the end


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_cache_takes_what_its_formula_says(model, bpe, dtype, monkeypatch):
    """Exactly that with one batch; in many small ones never more, though rows of several start, and their prompts wait for others."""
    caches, held, attend = weakref.WeakSet(), [], KVCache.attend

    def spy(cache, layer, *qkv):
        caches.add(cache)
        out = attend(cache, layer, *qkv)
        held.append(sum(t.nbytes for c in caches for t in [*c.prompt_k, *c.prompt_v, *sum(getattr(c, 'k', []) + getattr(c, 'v', []), [])]))
        return out
    monkeypatch.setattr(KVCache, 'attend', spy)

    class Endless:
        """No id ends a sample."""
        ends, vocab_size, labels, newline_ids = (), bpe.vocab_size, None, ()

    prompts = [bpe.encode(p) for p in PROMPTS]
    longest = max(map(len, prompts))
    for budget in (20, 40):
        Sampler(model, Endless, 64, dtype).generate(prompts, 4, budget)
        assert max(held) == cache_bytes(model.config, 4, longest, 16, budget, dtype)
        held.clear()
    Sampler(model, Endless, 4, dtype).generate([[i] * 20 for i in range(8)], 1, 30)  # all end at once, and others start
    assert max(held) == cache_bytes(model.config, 4, 20, 4, 30, dtype)
    held.clear()
    Sampler(model, Endless, 8, dtype).generate(prompts * 8, 2, [5, 9, 20, 30] * 8)
    assert cache_bytes(model.config, 4, longest, 8, 30, dtype) / 2 < max(held) <= cache_bytes(model.config, 12, longest, 8, 30, dtype)


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, for a CPU: keeps what is computed, and computes the same again with the same tensors at the same places,
    whatever Python would do by now. What no graph can hold is an error: to wait for a number, or to bring one from Python."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        assert not any(bad in name for bad in ('aten.item', '_local_scalar_dense', 'nonzero', 'unique', 'where.default', 'lift_fresh',
                                               'masked_select')), f'{name} in a graph'
        assert not any(isinstance(a, torch.Tensor) and a.dtype == torch.bool for index in args if isinstance(index, list) for a in index), name
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, old in self.operations:
            new = operation(*args, **kwargs)
            for a, b in zip(old, new) if isinstance(old, (tuple, list)) else [(old, new)]:
                if a.data_ptr() != b.data_ptr():  # else a view, or written in place
                    a.copy_(b)


class RecordedReplay(sample.Replay):
    """As on a GPU: the first call warms up, the second is recorded, the others replay."""
    recorded = replayed = 0

    def __call__(self):
        self.n_calls += 1
        if self.n_calls == 2:
            RecordedReplay.recorded += 1
            with Recorder() as self.graph, pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(torch.Tensor, 'tolist', None, raising=False)  # which no operation stands for
                self.f()
        elif self.graph:
            RecordedReplay.replayed += 1
            self.graph.replay()
        else:
            self.f()


@pytest.mark.parametrize('arguments, labels', [(dict(temperature=1.3), True), (dict(temperature=0), False), (dict(temperature=1.0, top_k=7), False),
                                               (dict(temperature=1.0, top_p=0.9), True), (dict(temperature=1.0, stop=('e', '1')), False),
                                               (dict(temperature=1.0, stop=('e', '1')), True)], ids=str)
def test_a_decoding_step_can_be_replayed(model, bpe, monkeypatch, arguments, labels):
    """On a GPU a step is a CUDA graph, samples are looked at every eight tokens, and a part of the cache's last block is read. Whatever of
    it does not depend on the device is done here as it is there, and gives the samples that a CPU's way gives."""
    model, tok = copy.deepcopy(model), copy.copy(bpe)
    tok.ends = [bpe.eos, *bpe.encode('e')]  # one that comes often, too
    if labels:
        tok.add_labels('step', new=True)
        loud(model.add_tokens(bpe.vocab_size, 2), seed=3)
    prompts, budgets = PROMPTS * 2, [30, 5, 41, 60, 17, 33, 1, 24]
    expected = Sampler(model, tok, 12).generate(prompts, 2, budgets, **arguments)
    monkeypatch.setattr(sample, 'Replay', RecordedReplay)
    monkeypatch.setattr('model.cache_block', lambda device: (32, 8))
    start = KVCache.start

    def start_as_on_a_gpu(cache, source):
        start(cache, source)
        cache.bags = cache.keys_first = cache.values_turned = cache.slices = False
    monkeypatch.setattr(KVCache, 'start', start_as_on_a_gpu)
    monkeypatch.setattr(RecordedReplay, 'recorded', 0)
    monkeypatch.setattr(RecordedReplay, 'replayed', 0)
    sampler = Sampler(model, tok, 12)
    sampler.patience, sampler.stay_above = 8, 0.75
    found = sampler.generate(prompts, 2, budgets, **arguments)
    assert RecordedReplay.recorded > 2 and RecordedReplay.replayed > 2
    for a, b in zip(expected, found):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('arguments', [dict(temperature=1.3), dict(temperature=0), dict(temperature=1.0, top_k=7, top_p=0.9),
                                       dict(temperature=1.0, stop=('e', '1'))], ids=str)
def test_on_a_gpu_graphs_draw_what_steps_one_by_one_draw(model, bpe, monkeypatch, arguments, dtype):
    model, prompts, budgets = copy.deepcopy(model).cuda(), PROMPTS * 2, [30, 5, 41, 60, 17, 33, 1, 24]
    drawn = []
    for works in (True, False):
        monkeypatch.setattr(sample.Replay, 'works', works)
        drawn.append(Sampler(model, bpe, 12, dtype).generate(prompts, 4, budgets, **arguments))
        assert sample.Replay.works == works  # no recording failed
    for a, b in zip(*drawn):
        assert (a.ids, a.finished) == (b.ids, b.finished)
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)


def test_rows_are_as_many_as_a_gpu_has_room_for(monkeypatch, capsys):
    GB, gpu = 2 ** 30, torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (7 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 9 * GB)   # by torch, of which
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 8 * GB)  # is used: so 8 GiB are free
    c = tiny_config(50_000, block_size=4096, n_layer=32, n_embd=4096, n_inner=11008, n_kv_head=32, head_dim=128)
    rows = rows_that_fit(c, 100, 400, 1, 256, torch.bfloat16, gpu)
    a_token = 2 * 32 * 32 * 128 * 2  # bytes: keys and values of 32 layers
    needed = rows * ((1.5 * 112 + 512) * a_token + 50 * 50_000) + 16384 * 2 * (8 * 4096 + 3 * 11008)
    assert 10 < rows < 256 and 0.85 * 8 * GB < needed < 8 * GB
    assert capsys.readouterr().out == f'8.0 GiB are free: {rows} rows at a time instead of 256\n'
    assert rows_that_fit(c, 100, 400, 96, 256, torch.bfloat16, gpu) > rows  # which share their prompts
    assert rows_that_fit(c, 100, 400, 1, 3, torch.bfloat16, gpu) == 3
    assert rows_that_fit(c, 4000, 4000, 1, 256, torch.float32, gpu) == 1
    assert rows_that_fit(c, 100, 400, 1, 256, torch.bfloat16, torch.device('cpu')) == 256


@pytest.mark.parametrize('error, works', [(RuntimeError('no such thing when capturing\nand more'), False), (torch.OutOfMemoryError('full'), True)])
def test_a_step_that_cannot_be_recorded_is_computed_all_the_same(monkeypatch, capsys, error, works):
    """With a stand-in for CUDA, whose end of a recording fails, too, as it does there."""
    calls, recording, streams = [], [], ['mine']

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            recording.append(1)

        def capture_end(self):
            recording.clear()
            raise RuntimeError('the recording was not valid')

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        try:
            yield
        finally:
            streams.pop()

    def step():
        calls.append(1)
        if recording:
            raise error
    for name, stand_in in dict(CUDAGraph=Graph, Stream=Stream, current_stream=Stream, stream=on, graph_pool_handle=lambda: 0,
                               current_device=lambda: 0).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(sample.Replay, 'works', True)
    replay = sample.Replay(torch.device('cuda'))
    for _ in range(2):
        replay.start(step)
        replay(), replay(), replay()
    assert streams == ['mine'] and sample.Replay.works == works
    assert len(calls) == 2 * 3 + (2 if works else 1)  # and each try to record
    said = capsys.readouterr().out
    assert said == ('' if works else 'decoding goes without CUDA graphs, more slowly: RuntimeError: no such thing when capturing\n')


def test_seeds_and_repeated_prompts(model, bpe):
    sampler = Sampler(model, bpe)
    draw_ids = lambda prompts, k, seed: [tuple(s.ids) for s in sampler.generate(prompts, k, 20, 1.5, seed=seed)]  # noqa: E731
    assert draw_ids(PROMPTS, 3, 1) == draw_ids(PROMPTS, 3, 1)
    assert not set(draw_ids(PROMPTS, 3, 1)) & set(draw_ids(PROMPTS, 3, 2))
    assert draw_ids([PROMPTS[0]] * 3, 2, 1) == draw_ids([PROMPTS[0]], 6, 1)  # given again, a prompt gets fresh samples
    assert draw_ids([PROMPTS[0]], 6, 1)[:3] == draw_ids([PROMPTS[0]], 3, 1)  # more samples leave the first ones as they are


class Uniform(torch.nn.Module):
    """A stand-in for the model with uniform logits: what comes out is the sampler's alone."""

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


def test_samples_are_independent_from_the_first_token_on(bpe):
    V = bpe.vocab_size
    samples = Sampler(Uniform(V), bpe, 10_000).generate(['A', 'B'], 4000, 2, 1.0)
    first = torch.tensor([s.ids[0] for s in samples])
    statistic, freedom = chi_square(first, torch.full((V,), 1 / V))
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    # of 4000 pairs (same number, other prompt) and (neighbours, same prompt), one in V should agree
    for same in ((first[:4000] == first[4000:]).sum().item(), (first[:4000:2] == first[1:4000:2]).sum().item() * 2):
        assert abs(same - 4000 / V) < 5 * (4000 / V) ** 0.5 + 5


def test_eos_is_an_action_and_ends_the_row(bpe):
    class Likes(Uniform):
        def logits(self, hidden):
            out = hidden.clone()
            out[..., bpe.eos] = 3.0  # EOS at random times, about once in V / e^3 tokens
            return out

    samples = Sampler(Likes(bpe.vocab_size), bpe, 64).generate(['A', 'Question: Tom'], 200, 40, 1.0)
    assert any(s.finished for s in samples) and not all(s.finished for s in samples)
    p = (torch.tensor([0.0, 3.0]) - torch.tensor([0.0] * (bpe.vocab_size - 1) + [3.0]).logsumexp(-1)).tolist()
    for s in samples:
        assert len(s.ids) == len(s.logprobs)
        assert bpe.eos not in s.ids[:-1]
        assert s.finished == (s.ids[-1] == bpe.eos)
        assert s.finished or len(s.ids) == 40  # every row has the whole budget
        assert s.logprobs[-1] == pytest.approx(p[1] if s.finished else p[0], abs=1e-5)


def test_stop_strings(bpe):
    order = bpe.encode(' Tom has 14 apples. How many\nQuestion: Ann')

    class Counts(Uniform):
        """Says `order`, whatever the prompt."""
        def trunk(self, ids, positions=None, mask=None, cache=None):
            t = 0 if positions is None else positions[0, 0].item()  # prompts are of one token
            return torch.nn.functional.one_hot(torch.tensor(order[t % len(order)]), self.config.vocab_size).float().expand(
                *ids.shape, -1) * 50

    sampler = Sampler(Counts(bpe.vocab_size), bpe)
    text = bpe.decode(order)
    for stop in ('.', '\nQuestion:', 'many\nQ', '14 a'):
        sample, = sampler.generate([[0]], 1, len(order), 0, stop=stop)
        said = bpe.decode(sample.ids)
        assert sample.finished and stop in said and text.startswith(said)
        assert stop not in bpe.decode(sample.ids[:-1])  # up to the token that completed it and no further
    sample, = sampler.generate([[0]], 1, len(order), 0, stop=('never said', 'nor this'))
    assert not sample.finished and sample.ids == order


def test_stopped_and_ended_rows_leave_the_others_as_they_were(model, bpe):
    plain = Sampler(model, bpe, 64).generate(PROMPTS, 8, 30, 1.2)
    stopped = Sampler(model, bpe, 64).generate(PROMPTS, 8, 30, 1.2, stop=('e', '1'))
    assert any(len(a.ids) < len(b.ids) for a, b in zip(stopped, plain))
    for a, b in zip(stopped, plain):
        assert a.ids == b.ids[:len(a.ids)]
        assert len(a.ids) == len(b.ids) or a.finished


def test_padded_vocabulary_is_never_sampled(model, bpe):
    assert model.config.vocab_size > bpe.vocab_size
    samples = Sampler(model, bpe).generate(PROMPTS, 50, 20, 3.0)
    assert max(i for s in samples for i in s.ids) < bpe.vocab_size


def test_bf16_samples_have_the_forward_passes_logprobs(model, bpe):
    for s in Sampler(model, bpe, dtype=torch.bfloat16).generate(PROMPTS, 4, 20, 1.0):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            logits = model(torch.tensor([s.prompt_ids + s.ids]))[0, len(s.prompt_ids) - 1:-1]
        error = (torch.tensor(s.logprobs) - token_logprobs(logits, torch.tensor(s.ids))).abs()
        assert error.mean() < 0.1  # weights this large turn bf16's 3 digits into a tenth of a nat


def test_bad_arguments(model, bpe):
    for arguments, match in ((dict(k=0), 'k must be at least 1'), (dict(max_new_tokens=0), 'max_new_tokens must be'),
                             (dict(temperature=-1), 'temperature must'), (dict(temperature=float('nan')), 'temperature must'),
                             (dict(top_p=0), 'top_p must'), (dict(top_k=-1), 'top_k must'),
                             (dict(max_new_tokens=95), 'exceed the context of 96 tokens')):
        with pytest.raises(UserError, match=match):
            Sampler(model, bpe).generate(['Question: Tom'], **(dict(max_new_tokens=5) | arguments))
    with pytest.raises(UserError, match='a prompt is empty'):
        Sampler(model, bpe).generate([''], 1, 5)


def test_no_prompts_no_samples(model, bpe):
    assert Sampler(model, bpe).generate([], 3, 5) == []


def test_command_line(bpe, tmp_path, monkeypatch, capsys):
    loud(Transformer(tiny_config(bpe.vocab_size))).save_pretrained(str(tmp_path / 'm'), bpe)
    monkeypatch.setattr('model.setup', lambda device, dtype, seed: (torch.device('cpu'), torch.float32))  # whose settings are the process's
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)

    def run(*flags, typed=''):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--init_from={tmp_path}/m', *flags])
        runpy.run_path(os.path.join(ROOT, 'sample.py'), run_name='__main__')
        return capsys.readouterr().out.count('-' * 20)
    assert run('--start=Tom has', '--max_new_tokens=8', '--k=2') == 2
    assert run('--max_new_tokens=8', '--k=2', typed='Tom has\nAnn\n') == 4
    assert run('--start=Tom has') == 1  # a context of 96 tokens
    for flag, said in (('--start=' + 'Tom has ' * 90, 'exceed the context of 96 tokens'), ('--max_new_tokens=0', 'must be at least 1')):
        with pytest.raises(UserError, match=said) as error:
            run('--start=Tom has', flag)
        assert '\n' not in str(error.value)
