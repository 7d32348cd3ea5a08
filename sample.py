"""
Text to token ids and back, batches of token sequences and their log-probs, and the sampler.

A prompt is prefilled once, and its keys and values are read once a step for all of its samples. Samples that
start together, a cohort, stay equally long and need no padding; finished ones leave, and the next cohort
starts in the free rows. Every sample draws from its own random stream, a hash of (seed, prompt, number of the
sample), so a resumed exploration, or one spread over machines, gives the same samples.

$ python sample.py --init_from=out/demo_sft --start="Tom has 3 apples. He buys 4 more. How many has he?"
$ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --raw --start="Once upon a time" --k=3
"""
import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from functools import cached_property, partial
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import data
from config import UserError, override
from config.run import (bar, enough_memory, first_line, from_all, rank, read_json, read_run, setup,
                        sum_over_processes, world_size, write_json)
from model import LoRALinear, Transformer, attend, autocast, download, find_checkpoint

# -----------------------------------------------------------------------------
# settings, for running this file as a script
init_from = ''        # a checkpoint: a run's folder, a Hugging Face folder or a hub name
start = ''            # the question (with --raw the text to continue); '': read from stdin, one a line
raw = False           # without "Question: ... Answer:" or a chat template around it
prompt_form = 'auto'  # 'auto' | 'plain' | 'chat'; 'auto': as the checkpoint learned, else plain
system = ''           # first message of chat prompts; '': the checkpoint's, or the template's own
k = 1                 # samples of each prompt (at least 1)
max_new_tokens = 256  # of a sample, or what the context leaves (at least 1)
temperature = 0.7     # 0: greedy (at least 0)
top_k = 0             # draw among the k likeliest tokens; 0: all (at least 0)
top_p = 1.0           # draw among the likeliest tokens that hold this share of the mass; 1: all
stop = ()             # strings that end a sample, e.g. --stop='["\n\n"]'
seed = 0
condition = 'good'    # 'good' | 'bad' | 'none': what a policy of rcrl.py is told before its lines
device = 'auto'       # 'auto' | 'cpu' | 'cuda' | 'mps'
dtype = 'auto'        # 'auto' | 'float32' | 'bfloat16': of the matrix products
# -----------------------------------------------------------------------------
# tokenizers

LABELS, EOS = ['[GOOD]', '[BAD]'], '<|endoftext|>'
MESSAGE = '\ue000'  # where a message stands in a rendered chat template
# Digits one by one, words with the space before them, runs of signs: '<<12+3=15>>' is << 1 2 + 3 = 1 5 >>.
PATTERN = r"""\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"""
# GPT-2's printable character of each byte: itself where it can be seen, else the next one from 256 on.
HIDDEN = [*range(33), *range(127, 161), 173]
CHAR_OF_BYTE = [chr(256 + HIDDEN.index(b)) if b in HIDDEN else chr(b) for b in range(256)]

class Labels(NamedTuple):
    """What a policy of rcrl.py is told before a line of its solution. Labels are never drawn."""
    good: list        # ids of [GOOD]
    bad: list         # ids of [BAD]
    granularity: str  # 'step': before every line; 'solution': before the first
    new: bool         # the two ids from vocab_size on; or those of the plain text

class Tokenizer:
    """A fast tokenizer of transformers. bos: ids before a text; eos: the id that training appends; ends: ids
    that end a sample; vocab_size: the largest id that is drawn, + 1."""
    labels = None                                    # of a policy of rcrl.py
    form, system, learned_form = 'plain', '', False  # see in_form; learned: a checkpoint was trained so

    def __init__(self, hf, ends=()):
        """ends: the model's end tokens, of which the first serves where the tokenizer has none."""
        if hf.eos_token_id is None and ends:
            hf.eos_token = hf.convert_ids_to_tokens(ends[0])
        if hf.eos_token_id is None:
            raise ValueError('it has no end-of-text token')
        self.hf, self.eos, self.ends = hf, hf.eos_token_id, [hf.eos_token_id]
        self.vocab_size = max(hf.get_vocab().values()) + 1  # ids may have holes
        whole, text = hf('a')['input_ids'], self.encode('a')
        # <s> for Llama. hf(...) also turns off a truncation that its file may ask for.
        self.bos = next((whole[:i] for i in range(len(whole)) if whole[i:i + len(text)] == text), [])

    def encode(self, text):
        """Special tokens that a text spells are text."""
        self.hf.backend_tokenizer.encode_special_tokens = True
        return self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Leaves out special tokens."""
        ids = [i for i in ids if i not in self.ends]
        return self.hf.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def encode_prompt(self, text):
        return self.bos + self.encode(text)

    def encode_pair(self, prompt, completion):
        """(prompt ids, completion ids), encoded as one text if a token ends at the border: on its own a text
        may begin otherwise (in sentencepiece with a space)."""
        whole, head = self.encode_prompt(prompt + completion), self.encode_prompt(prompt)
        return head, whole[len(head):] if whole[:len(head)] == head else self.encode(completion)

    def in_form(self, form='auto', system=''):
        """Sets what its prompts look like, and returns itself. form: 'plain', data.prompt; 'chat', the chat
        template, whose last token becomes the eos; 'auto': the checkpoint's. system: a chat's first message;
        '': the checkpoint's, or the template's own. UserError for another form than a checkpoint learned."""
        asked = self.form if form == 'auto' else form, system or self.system
        if self.learned_form and asked != (self.form, self.system) or asked[0] == 'plain' and asked[1]:
            raise UserError(f'{self.hf.name_or_path} has prompt_form {self.form, self.system}, not {asked}')
        self.form, self.system = asked
        if self.form == 'chat':
            try:
                *_, self.eos, after = self.chat_parts(['', ''])
                assert not after.strip(), 'it ends a turn without a token'
            except Exception as error:  # of many types: no template, one that takes no system message, ...
                raise UserError(f"prompt_form = 'chat' needs a chat template: {first_line(error)}") from None
            self.ends = sorted({*self.ends, self.eos})
        return self

    def chat_parts(self, turns):
        """A chat, user first, as texts and the ids of control tokens between them: messages hold none."""
        texts = [self.system] * (self.system != '') + turns
        roles = ['system'] * (self.system != '') + ['user', 'assistant'] * len(turns)
        rendered = self.hf.apply_chat_template(
            [{'role': role, 'content': MESSAGE} for role, _ in zip(roles, texts)], tokenize=False,
            add_generation_prompt=len(turns) % 2 == 1, date_string='26 Jul 2024')  # Llama 3.2 says today's
        assert rendered.count(MESSAGE) == len(texts), 'it leaves a message out'
        ids, left = {token.content: i for i, token in self.hf.added_tokens_decoder.items()}, iter(texts)
        tokens = '|'.join(map(re.escape, sorted(ids, key=len, reverse=True)))
        return [ids[part] if part in ids else re.sub(MESSAGE, lambda _: next(left), part)
                for part in re.split(f'({tokens})', rendered)]

    def encode_question(self, question, shown=(), solution=''):
        """(prompt ids, ids of the solution or its beginning). shown: worked Problems, a chat's turns."""
        if self.form == 'plain':
            return self.encode_pair(data.prompt(question, shown), data.completion(solution))
        parts = self.chat_parts([*itertools.chain(*((p.question, p.solution) for p in shown)), question])
        ids = [[part] if isinstance(part, int) else self.encode(part) for part in parts]
        return [*itertools.chain(*ids)], self.encode(solution)

    @cached_property
    def newline_ids(self):
        """The tokens that hold a line break."""
        return frozenset(i for i in range(self.vocab_size) if '\n' in self.decode([i]))

    def add_labels(self, granularity, new):
        if new and self.vocab_size != len(self.hf):
            raise UserError("[GOOD] and [BAD] can't be this tokenizer's next ids: set label_tokens = 'text'")
        good, bad = ([self.vocab_size], [self.vocab_size + 1]) if new else map(self.encode, LABELS)
        self.labels = Labels(good, bad, granularity, new)

    def save(self, folder):
        """For AutoTokenizer, and prompt.json and labels.json."""
        write_json(os.path.join(folder, 'prompt.json'), {'form': self.form, 'system': self.system})
        hf = copy.deepcopy(self.hf)
        if self.labels:
            hf.add_tokens(LABELS if self.labels.new else [], special_tokens=True)
            with open(os.path.join(folder, 'labels.json'), 'w') as f:
                json.dump(self.labels._asdict(), f)
        hf.save_pretrained(folder)

def bpe_tokenizer(tokens, pattern=PATTERN):
    """A byte-level BPE. tokens: bytes. Neighbours that form a token merge, earlier tokens first."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, Tokenizer as Pipeline
    from transformers import PreTrainedTokenizerFast  # here, as it takes seconds
    vocab = {''.join(CHAR_OF_BYTE[b] for b in token): i for i, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    merges.sort(key=lambda pair: (vocab[pair[0] + pair[1]], vocab[pair[0]], vocab[pair[1]]))
    bpe = Pipeline(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(Regex(pattern), 'isolated')
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS,
                                             clean_up_tokenization_spaces=False))

def learn_bpe(texts, n_merges):
    """A byte-level BPE of at most n_merges merges."""
    from tokenizers import trainers
    every_byte = [bytes([b]) for b in range(256)]
    learner = bpe_tokenizer(every_byte).hf.backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, show_progress=False, min_frequency=2,
                                  initial_alphabet=sorted(CHAR_OF_BYTE))
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab(with_added_tokens=False)
    learned = [bytes(map(CHAR_OF_BYTE.index, t)) for t in sorted(vocab, key=vocab.get) if len(t) > 1]
    return bpe_tokenizer(every_byte + learned)

def load_tokenizer(path, conditioned=True):
    """The tokenizer of a checkpoint, run, folder or hub name; 'gpt2' is tiktoken's. UserError if there is
    none, or if it has the labels of rcrl.py and conditioned is False."""
    for folder in [os.path.join(path, name) for name in ('best', 'best.old', 'last', 'last.old', '')]:
        if os.path.exists(os.path.join(folder, 'tokenizer_config.json')):
            break
    else:
        if read_run(path):
            raise UserError(f'{path}: the run has no checkpoint yet')
        folder = path if os.path.isdir(path) or path == 'gpt2' else download(path)
    names = ('labels', 'prompt', 'generation_config', 'config', 'tokenizer_config')
    files = [os.path.join(folder, f'{name}.json') for name in names]
    labels, said, generation, config, kept = (read_json(f) if os.path.exists(f) else {} for f in files)
    if labels and not conditioned:
        raise UserError(f'{path} is a return-conditioned policy (rcrl.py), for eval.py and sample.py only')
    named = [file.get('eos_token_id') for file in (generation, config)]  # each a list, a number or nothing
    ends = [i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
    try:
        if folder == 'gpt2' and not os.path.isdir(folder):  # from tiktoken's cache or downloaded
            encoding = tiktoken.get_encoding('gpt2')
            ranks = encoding._mergeable_ranks
            tok = bpe_tokenizer(sorted(ranks, key=ranks.get), encoding._pat_str)
        else:
            from transformers import PreTrainedTokenizerFast as Kind
            if kept.get('tokenizer_class') != Kind.__name__:
                from transformers import AutoTokenizer as Kind  # only here, as it takes a second more
            tok = Tokenizer(Kind.from_pretrained(folder), ends)
    except Exception as error:  # of many types: offline, no such name, a broken file
        raise UserError(f'{path}: no tokenizer could be loaded ({first_line(error)})') from None
    n_rows = config.get('vocab_size', tok.vocab_size)
    largest = max(tok.hf.vocab_size - 1, tok.eos, *tok.bos)
    if largest >= n_rows:
        raise UserError(f'{path}: token {largest} of the tokenizer is outside the embedding of {n_rows} rows')
    # Ids outside of the embedding, as a config's default end token may be, are never drawn.
    tok.ends = sorted({tok.eos} | {i for i in ends if 0 <= i < n_rows})
    tok.in_form(**said).learned_form = bool(said)
    tok.labels = Labels(**labels) if labels else None
    tok.vocab_size = tok.labels.good[0] if labels and tok.labels.new else min(tok.vocab_size, n_rows)
    return tok

def check_same_tokenizer(a, b, whose):
    """UserError if they make different ids, a in b's form. whose: whose they are."""
    probe = 'Question: Tom has 3.5 apples, Ann 1,200. Why?\nAnswer: 3.5+1200=<<3.5+1200=1203.5>>\n#### 1203.5'
    a.in_form(b.form, b.system)
    if (a.encode_question(probe), a.eos, a.vocab_size) != (b.encode_question(probe), b.eos, b.vocab_size):
        raise UserError(f'{whose} have different tokenizers')


# -----------------------------------------------------------------------------
# random numbers, log-probabilities and the draw

def random_stream(seed, prompt_ids, number):
    """The state (int64) of the random stream of a prompt's sample of this number."""
    digest = hashlib.blake2b(f'{seed}:{number}:{prompt_ids}'.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little', signed=True)

def uniform(stream, step):
    """SplitMix64 (Steele, Lea and Flood 2014): numbers in (0, 1) at position step (an int or int64 (1,)) of
    streams (R,). int64 wraps around; sign bits that arithmetic shifts bring are masked."""
    x = stream + (torch.as_tensor(step, device=stream.device) + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685
    x = x ^ ((x >> 31) & (1 << 33) - 1)
    return ((x >> 41) & (1 << 23) - 1).float() * 2 ** -23 + 2 ** -24

def token_logprobs(logits, ids, temperature=1.0):
    """log softmax(logits / temperature) at ids: (..., V) fp32, (...) -> (...). No log-softmax is kept."""
    logits = logits if temperature == 1 else logits / temperature  # a copy of a large tensor
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

def action_logprobs(model, hidden, ids, temperature=1.0, with_entropy=False, kept=2 ** 27):
    """Log-probs of ids (N,) predicted from hidden (N, C), and entropies or None: (N,) fp32. At most `kept`
    logits (half a GiB) live at a time: backward computes them again."""
    def part(hidden, ids):
        logits = model.logits(hidden)
        logprobs = token_logprobs(logits, ids, temperature)
        if not with_entropy:
            return logprobs, None
        logp = (logits / temperature).log_softmax(-1)
        return logprobs, -(logp.exp() * logp).sum(-1)

    n = max(1, kept // model.config.vocab_size)
    compute = part if len(ids) <= n else partial(checkpoint, part, use_reentrant=False)
    logprobs, entropies = zip(*map(compute, hidden.split(n), ids.split(n)))
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None

def draw(logits, u, temperature, top_k=0, top_p=1.0, vocab_size=None):
    """Next tokens (R,) from logits (R, V) by the inverse cumulative distribution at u (R,), at temperature 0
    the likeliest; and their log-probs (R,), before top_k and top_p (greedy: at temperature 1). Ids from
    vocab_size on are never drawn."""
    n_real = vocab_size or logits.shape[-1]
    x = logits if temperature in (0, 1) else logits / temperature
    top = x[:, :n_real].max(-1, keepdim=True).values
    p = (x[:, :n_real] - top).exp_()
    log_total = p.sum(-1).log_() + top[:, 0]
    if n_real < x.shape[-1]:
        log_total = torch.logaddexp(log_total, x[:, n_real:].logsumexp(-1))
    if top_k:
        p = p * (p >= p.topk(min(top_k, n_real)).values[:, -1:])
    if top_p < 1:  # nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751)
        ordered = p.sort(descending=True).values
        likelier = ordered.cumsum(-1) - ordered  # the mass of the likelier tokens
        n_kept = (likelier < top_p * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)
        p = p * (p >= ordered.gather(-1, n_kept - 1))
    if temperature == 0:
        token = p.argmax(-1)
    else:
        cdf = p.cumsum(-1)
        total = cdf[:, -1:]  # strictly below it the sum still grows at the place found
        below = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cdf, below, right=True)[:, 0]
    return token, x.gather(-1, token[:, None])[:, 0] - log_total


# -----------------------------------------------------------------------------
# batches of token sequences

class Example(NamedTuple):
    """A token sequence for a loss. labels: a float for each id from n_prompt (at least 1) on, nan where
    nothing is learned; None: 1.0 for all."""
    ids: list
    n_prompt: int
    labels: list | None = None

def n_learned(examples):
    return sum(len(e.ids) - e.n_prompt - sum(map(math.isnan, e.labels or ())) for e in examples)

def padded_length(examples, most):
    """The T of collate. T - 1 is a multiple of 8 where T < most: a CPU's kernels are made for each shape."""
    longest = max(len(e.ids) for e in examples)
    return max(longest, min(round_up(longest - 1, 8) + 1, most))

def collate(examples, device, most):
    """-> ids (B, T), padded with 0 on the right, and labels (B, T) fp32, nan where nothing is learned."""
    T = padded_length(examples, most)
    ids, labels = torch.zeros(len(examples), T, dtype=torch.long), torch.full((len(examples), T), math.nan)
    for row, e in enumerate(examples):
        ids[row, :len(e.ids)] = torch.tensor(e.ids)
        labels[row, e.n_prompt:len(e.ids)] = 1.0 if e.labels is None else torch.tensor(e.labels)
    return ids.to(device), labels.to(device)

def round_up(n, multiple):
    return -(-n // multiple) * multiple

def micro_batches(rows, max_tokens, length=lambda e: len(e.ids)):
    """Cuts rows (examples, or what `length` measures) into lists, the longest first, of at most max_tokens
    with padding, or one row."""
    micros = []
    for row in sorted(rows, key=length, reverse=True):
        if not micros or (len(micros[-1]) + 1) * length(micros[-1][0]) > max_tokens:
            micros.append([])
        micros[-1].append(row)
    return micros

def my_micro_batches(rows, max_tokens, length=lambda e: len(e.ids)):
    """This process's share of an update's micro-batches: [(rows, weight)]. All get equally many, since FSDP
    gathers weights in each; a missing one has weight 0."""
    ordered = sorted(rows, key=length, reverse=True)  # dealt by length, so that each gets as much to do
    shares = [micro_batches(ordered[r::world_size()], max_tokens, length) for r in range(world_size())]
    mine, most = shares[rank()], max(map(len, shares))
    return [(micro, 1.0) for micro in mine] + [(ordered[-1:], 0.0)] * (most - len(mine))

def epoch_order(examples, batch_size, seed, epoch):
    """Numbers of the examples: a permutation by (seed, epoch) that first completes the last epoch's update.
    Each update has examples of similar length within a window of eight updates (wider ones learn less)."""
    rng = random.Random(f'{seed}:{epoch}')
    shuffled = rng.sample(range(len(examples)), len(examples))
    lead = -epoch * len(examples) % batch_size
    order, whole = shuffled[:lead], len(examples) - (len(examples) - lead) % batch_size
    for begin in range(lead, whole, 8 * batch_size):
        window = shuffled[begin:min(begin + 8 * batch_size, whole)]
        window.sort(key=lambda i: len(examples[i].ids))
        updates = [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(updates)
        order += itertools.chain(*updates)
    return order + shuffled[max(whole, lead):]

class Packing(NamedTuple):
    """For Transformer.trunk in a cache's place: ids (1, N) are those of rows (B, T) without their padding,
    and attention is causal within each row."""
    cells: torch.Tensor   # (N,) the tokens' places among the B * T
    source: torch.Tensor  # (B, T) which token stands in a place; in padding, which nobody reads, any

    def attend(self, layer, q, k, v):
        """q, k, v (1, heads, N, D) -> (1, heads, N, D)"""
        tokens = (x[0].transpose(0, 1).index_select(0, self.source.flatten()) for x in (q, k, v))
        rows = (x.unflatten(0, self.source.shape).transpose(1, 2) for x in tokens)  # (B, heads, T, D)
        y = attend(*rows).transpose(1, 2).flatten(0, 1).index_select(0, self.cells)
        return y.transpose(0, 1)[None]

def hidden_at(model, ids, mask, trunk=None):
    """Hidden states (n, C) where mask (B, T) is True. On a CPU what follows a row's last True takes part in
    attention only, but for up to 63 tokens: its kernels are made for each shape."""
    trunk = trunk or model.trunk
    if ids.device.type != 'cpu':  # with padding a small model is up to twice as fast on an H100
        return trunk(ids)[mask]
    needed = (mask.flip(1).cumsum(1) > 0).flip(1).flatten()
    n_needed = max(1, int(needed.sum()))
    needed[(~needed).nonzero()[:round_up(n_needed, 64) - n_needed]] = True
    if needed.all():
        return trunk(ids)[mask]
    cells, source = needed.nonzero()[:, 0], (needed.cumsum(0) - 1).clamp(min=0).view_as(mask)
    hidden = trunk(ids.flatten()[cells][None], (cells % ids.shape[1])[None], Packing(cells, source))
    return hidden[0, source[mask]]

def response_logprobs(model, examples, temperature=1.0, *, critic=None, with_entropy=False, trunk=None):
    """(log-probs, values, entropies) of the learned ids, (N,) fp32 each, row after row, or None where not
    asked for. critic: the model itself, which shares the pass, or another. trunk: a compiled model.trunk.
    Call it through model.run, within autocast."""
    ids, labels = collate(examples, model.embed.weight.device, model.config.block_size + 1)
    ids, targets, mask = ids[:, :-1], ids[:, 1:], ~labels[:, 1:].isnan()  # position t predicts id t + 1
    hidden, values = hidden_at(model, ids, mask, trunk), None             # (N, C)
    logprobs, entropies = action_logprobs(model, hidden, targets[mask], temperature, with_entropy)
    if critic is not None:
        values = model.values(hidden) if critic is model else critic.run(values_at, ids, mask)
    return logprobs, values, entropies

def values_at(model, ids, mask):
    """The scalar head's outputs (N,) where mask is True. ids, mask: (B, T)."""
    return model.values(hidden_at(model, ids, mask))

@torch.no_grad()
def response_tables(model, examples, temperature, dtype, max_tokens, *, critic=None, with_entropy=False):
    """response_logprobs of many examples, learned from n_prompt on, shared by processes: (3, B, T), T the
    longest response, 0 after a row's end and for None."""
    n_ids, device = [len(e.ids) - e.n_prompt for e in examples], model.embed.weight.device
    tables = torch.zeros(3, len(examples), max(n_ids), device=device)
    for rows, weight in my_micro_batches(range(len(examples)), max_tokens, lambda i: len(examples[i].ids)):
        with autocast(device, dtype):
            found = model.run(response_logprobs, [examples[i] for i in rows], temperature, critic=critic,
                              with_entropy=with_entropy)
        for table, flat in zip(tables, found):
            if flat is not None and weight:
                for i, part in zip(rows, flat.split([n_ids[i] for i in rows])):
                    table[i, :n_ids[i]] = part
    return sum_over_processes(tables)  # a row was computed by one process, and is 0 in the others


# -----------------------------------------------------------------------------
# the key-value cache

SLOTS = {'cpu': 32}      # by which a cache grows at most, elsewhere 256
PREFILL = {'cpu': 2048}  # tokens read at a time, to stay in a CPU's own caches; elsewhere 16,384

def slots_at_a_time(device, budget):
    return min(SLOTS.get(device.type, 256), round_up(max(1, budget), 32))

class KVCache:
    """Keys and values of a cohort, for each layer. Two prompts with 3 rows and 2, before their third token:

        prompts (2, n_kv_head, P, longest, head_dim)          own (2, n_kv_head, R, slots, head_dim)
        How many legs have 3 cats and a man ?                 row 0  They have .  .
                                                              row 1  3    *    .  .
                                                              row 2  Cats have .  .
        Tom has 3 apples .  .   .  .  .   .                   row 3  Tom  has  .  .
                                                              row 4  He   has  .  .

    A prompt is read once a step for all of its rows, whose queries are stacked for one matrix product. All
    rows write to the same slot; padding is masked. `own` grows as it fills up, as a CPU is slow with slices
    of a larger tensor; on a GPU, which then records a step again, by what the budget needs or 256 slots."""

    def __init__(self, config, lengths, source, budget, dtype):
        """lengths: (P,) of the prompts. source: (R,) each row's prompt, ascending. budget: most tokens of a
        row. trunk(.., cache) reads prompts of the slice `filling` from n_read on, or one for all; once it is
        None, a token of all."""
        KV, D, longest = config.n_kv_head, config.head_dim, round_up(int(lengths.max()), 16)
        like, layers = dict(dtype=dtype, device=source.device), range(config.n_layer)
        self.prompts = [torch.zeros(2, KV, len(lengths), longest, D, **like) for _ in layers]
        self.own = [torch.zeros(2, KV, len(source), 0, D, **like) for _ in layers]
        padding = torch.arange(longest, device=source.device) >= lengths[source][:, None]
        self.mask = torch.where(padding, -torch.inf, 0.0)[:, None]
        self.n_prompts, self.filling, self.n_read, self.n_used = len(lengths), slice(None), 0, 0
        self.slot = source.new_zeros(1)  # a tensor, which a recorded step can read
        self.growth = slots_at_a_time(source.device, budget)
        self.stack(source)

    def stack(self, source):
        """Where rows stand in a table (prompts, most rows of one), and which row in each cell."""
        self.source, count = source, source.bincount(minlength=self.n_prompts)
        first, most = count.cumsum(0) - count, int(count.max())
        number = torch.arange(len(source), device=source.device)
        self.cell_of_row = source * most + number - first[source]
        row_of_cell = (first[:, None] + number[:most]).flatten()
        self.row_of_cell = row_of_cell.clamp(max=len(source) - 1)  # in a gap any row: nobody reads the result

    def next_token(self):
        """Makes room for a token of every row."""
        if self.n_used == self.own[0].shape[3]:
            for layer, table in enumerate(self.own):  # one after the other, which saves memory
                self.own[layer] = F.pad(table, (0, 0, 0, self.growth))
            self.mask = F.pad(self.mask, (0, self.growth), value=-torch.inf)
        self.slot.fill_(self.n_used)
        self.mask[:, :, self.n_used - self.own[0].shape[3]] = 0
        self.n_used += 1

    def select(self, rows):
        """Keeps the given rows (ascending), and now and then only the prompts that have some."""
        source, self.mask, kept = self.source[rows], self.mask[rows], [(self.own, rows)]
        prompts, renumbered = source.unique(return_inverse=True)
        if len(prompts) <= 0.7 * self.n_prompts:
            kept.append((self.prompts, prompts))
            self.n_prompts, source = len(prompts), renumbered
        for tables, index in kept:
            for layer, table in enumerate(tables):
                tables[layer] = table.index_select(2, index)
        self.stack(source)

    def attend(self, layer, q, k, v):
        """Adds keys and values (B, KV, T, D), attends to all: q (B, H, T, D) -> (B, H, T, D)."""
        (prompt_k, prompt_v), (own_k, own_v) = self.prompts[layer], self.own[layer]
        q, k, v = (x.to(own_k.dtype) for x in (q, k, v))  # adapters add in fp32
        if self.filling is not None:
            end = self.n_read + k.shape[2]
            prompt_k[:, self.filling, self.n_read:end] = k.transpose(0, 1)
            prompt_v[:, self.filling, self.n_read:end] = v.transpose(0, 1)
            return attend(q, *self.prompts[layer][:, :, self.filling, :end][:, :, :len(q)].transpose(1, 2))
        (R, H, _, D), (KV, P, longest, _) = q.shape, prompt_k.shape
        own_k[:, :, self.slot], own_v[:, :, self.slot] = k.transpose(0, 1), v.transpose(0, 1)

        def by_prompt(x):  # (KV, R, G, N) -> (KV, P, most rows of a prompt * G, N)
            return x.index_select(1, self.row_of_cell).view(KV, P, -1, x.shape[-1])

        def by_row(x):  # and back
            return x.view(KV, -1, H // KV, x.shape[-1]).index_select(1, self.cell_of_row)

        q = (q * D ** -0.5).view(R, KV, H // KV, D).transpose(0, 1).contiguous()
        scores = torch.cat((by_row(by_prompt(q) @ prompt_k.mT), q @ own_k.mT), -1)  # (KV, R, G, N)
        p = scores.add_(self.mask).softmax(-1).to(v.dtype)
        y = by_row(by_prompt(p[..., :longest]) @ prompt_v) + p[..., longest:] @ own_v
        return y.transpose(0, 1).reshape(R, H, 1, D)

class Together:
    """Caches of several cohorts as one, so that they share linear layers."""

    def __init__(self, caches):
        self.caches, self.sizes = caches, [len(cache.source) for cache in caches]

    def attend(self, layer, *qkv):
        parts = zip(self.caches, *(x.split(self.sizes) for x in qkv))
        return torch.cat([cache.attend(layer, *part) for cache, *part in parts])


# -----------------------------------------------------------------------------
# the sampler

class Sample(NamedTuple):
    """One completion, without labels."""
    prompt_ids: list
    ids: list       # the last is an end token, an action like the others, or completes a stop string
    logprobs: list  # of each id under the whole softmax at the sampling temperature (greedy: at 1)
    finished: bool  # ended so, not by its budget

class Cohort:
    """Samples that started together and have drawn t tokens each. limit: the tokens after which a row is
    done; what it draws then is ignored until it leaves."""
    TENSORS = ('stream', 'n_before', 'ids', 'logprobs', 'limit', 'finished', 'to_read', 'told')

    def __init__(self, sampler, rows, pick, stop):
        """rows: [(place in the result, prompt, random stream, budget)]. pick(logits, u): as draw."""
        self.sampler, self.rows, self.pick, self.stop = sampler, rows, pick, stop
        _, prompts, streams, budgets = zip(*rows)
        self.stream, self.limit = torch.tensor([streams, budgets], device=sampler.device)
        self.t, self.step = 0, self.limit.new_zeros(1)  # the same, where kernels find it
        self.ids = self.limit.new_zeros(len(rows), max(budgets))
        self.logprobs, self.told = self.ids.float(), self.ids.bool()  # told: which ids are labels
        self.to_read = torch.zeros_like(self.limit)                   # how many ids of a label are to come
        self.finished = self.to_read.bool()
        self.draw(self.prefill([prompt + sampler.label for prompt in prompts]))

    def prefill(self, prompts):
        """Reads prompts (lists of ids), equal neighbours and a common start once -> logits (R, V)."""
        model, device = self.sampler.model, self.sampler.device
        groups = [(prompt, len(list(same))) for prompt, same in itertools.groupby(prompts)]
        different, lengths = [p for p, _ in groups], torch.tensor([len(p) for p, _ in groups], device=device)
        source = torch.tensor([i for i, (_, n) in enumerate(groups) for _ in range(n)], device=device)
        self.cache = KVCache(model.config, lengths, source, self.ids.shape[1], self.sampler.dtype)
        hidden, start = [], min(len(os.path.commonprefix(different)), int(lengths.min()) - 1) // 16 * 16
        if start and len(different) > 1:  # worked examples, or a chat's system message
            model.trunk(torch.tensor([different[0][:start]], device=device), cache=self.cache)
            self.cache.n_read, lengths, different = start, lengths - start, [p[start:] for p in different]
        n = max(1, PREFILL.get(device.type, 16384) // max(map(len, different)))
        for i in range(0, len(different), n):
            self.cache.filling = slice(i, i + n)
            ids = pad_sequence(list(map(torch.tensor, different[i:i + n])), batch_first=True).to(device)
            positions = torch.arange(ids.shape[1], device=device)[None] + self.cache.n_read
            hidden.append(model.trunk(ids, positions, self.cache)[range(len(ids)), lengths[i:i + n] - 1])
        self.cache.filling, self.n_before = None, lengths[source] + self.cache.n_read
        return model.logits(torch.cat(hidden))[source]

    def draw(self, logits):
        """Draws every row's next token from logits (R, V). It is recorded, so nothing here waits for the
        device, or depends on t but through step."""
        sampler = self.sampler
        token, logprob = self.pick(logits, uniform(self.stream, self.step))
        if sampler.tells_steps:  # after a line break the label's ids take the place of what the row draws
            reads = self.to_read > 0
            token = torch.where(reads, sampler.label_ids[-self.to_read.clamp(min=1)], token)
            n_label = len(sampler.label) * sampler.ends_line[token]
            self.to_read.copy_(torch.where(reads, self.to_read - 1, n_label))
            self.told[:, self.step] = reads[:, None]
        self.ids[:, self.step], self.logprobs[:, self.step] = token[:, None], logprob[:, None]
        self.end(sampler.ends[token])

    def end(self, ended):
        """Rows where `ended` (R,) end with their last token, unless they were done before."""
        ended = ended & (self.limit > self.step)
        self.finished |= ended
        self.limit.copy_(torch.where(ended, self.step + 1, self.limit))

    def stopped(self):
        """(R,) whether a row's last tokens hold a stop string: as many as the longest has characters, since a
        token has at least a byte, and some for a character of many bytes."""
        found, n_last = [], max(map(len, self.stop)) + 4
        for ids, told in zip(self.ids[:, :self.t + 1].tolist(), self.told[:, :self.t + 1].tolist()):
            drawn = [i for i, label in zip(ids, told) if not label]
            text = self.sampler.tokenizer.decode(drawn[-n_last:])
            found.append(any(s in text for s in self.stop))
        return torch.tensor(found, device=self.step.device)

    def leave(self):
        """After every token: rows that are done leave -> [(place, Sample)]."""
        if self.stop:
            self.end(self.stopped())
        self.t += 1
        self.step.fill_(self.t)
        if self.t % self.sampler.look_every and self.t < self.ids.shape[1]:
            return []
        done, samples = self.limit <= self.t, []
        if done.sum() < self.sampler.leave_share * len(done):
            return []
        leaving, kept = done.nonzero()[:, 0], (~done).nonzero()[:, 0]
        tables = (self.ids, self.logprobs, self.told, self.limit, self.finished)
        columns = (table[leaving].tolist() for table in tables)  # five copies: a GPU waits for each
        for i, ids, logprobs, told, n, finished in zip(leaving.tolist(), *columns):
            (place, prompt, _, _), drawn = self.rows[i], [j for j in range(n) if not told[j]]
            ids, logprobs = ([row[j] for j in drawn] for row in (ids, logprobs))
            samples.append((place, Sample(prompt, ids, logprobs, finished)))
        self.rows = [self.rows[i] for i in kept.tolist()]
        for name in self.TENSORS:
            setattr(self, name, getattr(self, name)[kept])
        if self.rows:
            self.cache.select(kept)
        else:
            self.cache = None  # at once: the next cohort needs the room
        return samples

class Replay:
    """Calls f. On a GPU the second call with an equal key, with all tensors where they were, is recorded as a
    CUDA graph, which then starts all kernels at once."""
    works = True  # until a recording fails

    def __init__(self, device):
        self.on_gpu, self.key, self.graph = device.type == 'cuda', None, None

    def __call__(self, key, f):
        if key != self.key:  # a first call: libraries set themselves up
            self.key, self.graph = key, None
        elif self.on_gpu and Replay.works and not self.graph:
            graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:  # the outer context restores the stream even if the recording fails
                with torch.cuda.stream(now), torch.cuda.graph(graph, capture_error_mode='thread_local'):
                    f()  # is recorded, not computed
                self.graph = graph
            except RuntimeError as error:
                Replay.works = False
                print('decoding without CUDA graphs, more slowly:', first_line(error.__context__ or error))
        self.graph.replay() if self.graph else f()

class Sampler:
    """Sampler(model, tokenizer).generate(prompts) -> list of Sample.

    max_rows: samples decoded at a time. dtype: of matrix products. condition: 'good', 'bad' or 'none', what
    a policy of rcrl.py is told before its lines."""

    def __init__(self, model, tokenizer, max_rows=256, dtype=torch.float32, condition='good'):
        self.model, self.tokenizer, self.max_rows, self.dtype = model, tokenizer, max_rows, dtype
        self.device, labels = model.embed.weight.device, tokenizer.labels
        if condition not in ('good', 'bad', 'none') or condition == 'bad' and not labels or max_rows < 1:
            raise UserError("condition must be 'good', 'none' or, for policies of rcrl.py, 'bad', "
                            f'not {condition!r}; max_rows at least 1, not {max_rows}')
        self.label = getattr(labels, condition) if labels and condition != 'none' else []
        self.label_ids = torch.tensor(self.label, dtype=torch.long, device=self.device)
        self.tells_steps = bool(self.label) and labels.granularity == 'step'
        # A look at who is done forces a device sync; a row that leaves, a copy of the cache.
        self.look_every, self.leave_share = (1, 0.1) if self.device.type == 'cpu' else (8, 0.5)
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.ends_line = self.ends.clone()
        self.ends[list(tokenizer.ends)] = True
        self.ends_line[list(tokenizer.newline_ids) if self.tells_steps else []] = True

    @torch.inference_mode()
    def generate(self, prompts, k=1, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0,
                 desc=None, first=None):
        """k samples of each prompt: sample j of prompt i is result[i * k + j].

        prompts: texts or lists of ids. max_new_tokens: the budget, or each prompt's. temperature 0: greedy.
        stop: strings that end a sample. desc: of a progress bar. first: the number of each prompt's first
        sample. UserError for bad arguments, an empty prompt, and one without room for its budget."""
        prompts, budgets = ids_and_budgets(self.tokenizer, prompts, max_new_tokens)
        if min(k, *budgets, 1) < 1 or not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise UserError('k and max_new_tokens must be at least 1, temperature and top_k at least 0, '
                            'top_p above 0 and at most 1')
        first, waiting = first or first_numbers(prompts, k), []
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):  # to need little padding
            refuse_too_long(self, [prompts[i]], budgets[i])
            for j in range(k):
                stream = random_stream(seed, prompts[i], first[i] + j)
                waiting.append((i * k + j, prompts[i], stream, budgets[i]))
        pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p,
                       vocab_size=self.tokenizer.vocab_size)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        samples, cohorts, step = [None] * len(waiting), [], Replay(self.device)
        progress = bar(desc=desc, total=len(waiting)) if desc else None
        with autocast(self.device, self.dtype), self.model.packed(self.dtype):
            while waiting or cohorts:
                n_free = self.max_rows - sum(len(c.rows) for c in cohorts)
                if waiting and n_free >= 0.25 * self.max_rows:
                    drew, waiting = [Cohort(self, waiting[:n_free], pick, stop)], waiting[n_free:]
                    cohorts += drew
                else:
                    for c in cohorts:
                        c.cache.next_token()
                    step([(c, c.cache.own[0].shape) for c in cohorts], partial(self.decode, cohorts))
                    drew = cohorts
                for place, sample in itertools.chain(*[c.leave() for c in drew]):
                    samples[place] = sample
                    if progress:
                        progress.update()
                cohorts = [c for c in cohorts if c.rows]
        return samples

    def decode(self, cohorts):
        """Reads the last token of every row and draws the next one."""
        token = torch.cat([c.ids[:, c.step - 1] for c in cohorts])
        position = torch.cat([c.n_before + c.step - 1 for c in cohorts])[:, None]
        position = position.clamp(max=self.model.config.block_size - 1)  # a row that is done may go on
        cache = cohorts[0].cache if len(cohorts) == 1 else Together([c.cache for c in cohorts])
        logits = self.model.logits(self.model.trunk(token, position, cache)[:, 0])
        for c, part in zip(cohorts, logits.split([len(c.rows) for c in cohorts])):
            c.draw(part)

def ids_and_budgets(tokenizer, prompts, max_new_tokens):
    """Prompts as lists of ids, and each one's budget."""
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(budgets) != len(prompts):
        raise UserError(f'{len(budgets)} budgets for {len(prompts)} prompts')
    return [tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts], budgets

def first_numbers(prompts, k):
    """The number of each prompt's first sample: a prompt given again gets fresh samples."""
    seen, first = Counter(), []
    for p in map(tuple, prompts):
        first.append(seen[p])
        seen[p] += k
    return first

def refuse_too_long(sampler, prompts, max_new_tokens):
    """UserError if no prompt (list of ids) leaves room for the budget in the model's context."""
    check_room(prompts, max_new_tokens, sampler.model.config.block_size, len(sampler.label))

def check_room(prompts, max_new_tokens, block_size, n_label=0):
    """refuse_too_long before there is a sampler. n_label: tokens of the label behind a prompt."""
    n = min(map(len, prompts)) + n_label
    if n == n_label:
        raise UserError('a prompt is empty')
    if n + max_new_tokens > block_size:
        raise UserError(f'the shortest prompt, of {n} tokens, and max_new_tokens = {max_new_tokens} exceed '
                        f'the context of {block_size} tokens')

def draw_samples(sampler, prompts, k, max_new_tokens, temperature, first=None, **arguments):
    """Sampler.generate on all processes: each draws for its share of the prompts and gets all samples, empty
    ones of a prompt without room for its budget."""
    prompts, budgets = ids_and_budgets(sampler.tokenizer, prompts, max_new_tokens)
    first, room = first or first_numbers(prompts, k), sampler.model.config.block_size - len(sampler.label)
    fitting = [i for i, p in enumerate(prompts) if len(p) + budgets[i] <= room]
    mine = fitting[rank()::world_size()]
    with enough_memory('sampling', 'lower max_rows'):
        drawn = sampler.generate([prompts[i] for i in mine], k, [budgets[i] for i in mine], temperature,
                                 first=[first[i] for i in mine], **arguments)
    drawn = from_all([(i, [tuple(s) for s in drawn[n * k:n * k + k]]) for n, i in enumerate(mine)])
    found = dict(itertools.chain(*drawn))
    return [Sample(*s) for i, p in enumerate(prompts) for s in found.get(i, [(p, [], [], False)] * k)]


# -----------------------------------------------------------------------------
# memory and disk

def cache_bytes(config, n_prompts, longest, rows, max_new_tokens, dtype, device='cpu'):
    """What caches take at most, of n_prompts of `longest` tokens and rows of max_new_tokens."""
    own = round_up(max_new_tokens, slots_at_a_time(torch.device(device), max_new_tokens))
    slots = n_prompts * round_up(longest, 16) + rows * own
    return slots * 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize

def activation_bytes(config, n_tokens, longest, dtype, grad_checkpointing, device):
    """What a micro-batch keeps for backward: in fp32 residual inputs, norms and, twice, logits; in dtype what
    linear layers read and write, and on a CPU attention's probabilities."""
    C, mlp = config.n_embd, (4 if config.activation == 'silu' else 2) * config.n_inner
    scores = config.n_head * longest if device.type == 'cpu' and longest <= 512 else 0
    layer = 16 * C + dtype.itemsize * (6 * C + mlp + scores)
    layers = config.n_layer * 4 * C + layer if grad_checkpointing else config.n_layer * layer
    return n_tokens * layers + 8 * min(n_tokens * config.vocab_size, 2 ** 27)

def memory_needed(models, dtype, micro_tokens, longest, max_rows=0, longest_prompt=0, max_new_tokens=0):
    """A line: the bytes that a process's tensors take (all of a CPU's process half as much again). models:
    the policy first. longest: tokens of the longest row that is learned. max_rows: drawn from it, or 0."""
    policy, device, width = models[0], models[0].embed.weight.device, dtype.itemsize
    n_shares = {m: world_size() if m.shard == 'fsdp' else 1 for m in models}
    held = [(p, p.numel() / n_shares[m]) for m in models for p in m.parameters()]
    n_trained = sum(n for p, n in held if p.requires_grad)
    always = {'weights': sum(n * p.element_size() for p, n in held), 'gradients': 4 * n_trained,
              "Adam's averages": 8 * n_trained}
    if policy.shard == 'fsdp':  # all but the blocks; two blocks at a time, and a block's gradients
        block = sum(p.numel() for p in policy.blocks[0].parameters())
        always['gathered blocks'] = (policy.n_params() - (len(policy.blocks) - 3) * block) * width
    kept = torch.float32 if any(isinstance(m, LoRALinear) for m in policy.modules()) else dtype
    micro = activation_bytes(policy.config, micro_tokens, longest, kept, policy.grad_checkpointing, device)
    if dtype != torch.float32 and micro_tokens:  # the output projection in both types, and its gradient
        micro += (6 + 4 * policy.head.weight.requires_grad) * policy.head.weight.numel()
    copied = policy.shard == 'fsdp' or dtype != policy.embed.weight.dtype or device.type == 'cpu'
    cache = cache_bytes(policy.config, max_rows, longest_prompt, max_rows, max_new_tokens, dtype, device)
    drawing = {'samples: a copy of the weights': copied * width * policy.n_params(),
               f'{max_rows} rows of cache': cache} if max_rows else {}
    most = sum(always.values()) + max(micro, sum(drawing.values()))
    always, *beside = (', '.join(f'{what} {size_text(n)}' for what, n in part.items() if n)
                       for part in (always, {f'a micro-batch of {micro_tokens:,} tokens': micro}, drawing))
    beside = ', or for '.join(filter(None, beside))
    return f'memory of a process at most about {size_text(most)}: {always}; beside these {beside}'

def disk_needed(config, n_exports, keep_states=0, lora_rank=0, n_learners=1):
    """A line: a run's bytes on the disk. A state has the weights that learn and Adam's averages in fp32.
    n_exports: checkpoints, fp32 at most. n_learners: models of this shape."""
    with torch.device('meta'):
        model = Transformer(config)
        model = model.add_lora(lora_rank) if lora_rank else model
    state = 12 * n_learners * sum(p.numel() for p in model.parameters() if p.requires_grad)
    export, kept = 4 * model.n_params(), min(keep_states, 2)
    most, finished = (size_text(n * state + n_exports * export) for n in (3, kept))
    return (f'disk at most about {most}, {finished} when finished: up to 3 states of {size_text(state)}, '
            f'then {kept}, and {n_exports} checkpoints of {size_text(export)}')

def size_text(n_bytes):
    return f'{n_bytes / 2 ** 30:.1f} GiB' if n_bytes >= 2 ** 30 else f'{n_bytes / 2 ** 20:.0f} MiB'


if __name__ == '__main__':
    override(globals())
    if not init_from:
        raise UserError('which checkpoint? --init_from=out/demo_sft')
    device, dtype = setup(device, dtype, seed)
    folder = find_checkpoint(init_from)
    model, tok = Transformer.from_pretrained(folder, device, dtype), load_tokenizer(folder)
    tok.in_form(prompt_form, system)
    sampler = Sampler(model, tok, dtype=dtype, condition=condition)
    if not start and sys.stdin.isatty():
        print('a question a line; Ctrl-D ends')
    for text in [start] if start else filter(None, map(str.strip, sys.stdin)):
        prompt = tok.encode_prompt(text) if raw else tok.encode_question(text)[0]
        room = model.config.block_size - len(prompt) - len(sampler.label)
        budget = min(max_new_tokens, max(1, room))
        for sample in sampler.generate([prompt], k, budget, temperature, top_k, top_p, stop, seed):
            print(text * raw + tok.decode(sample.ids) + ' [budget ended]' * (not sample.finished))
            print('-' * 20)
