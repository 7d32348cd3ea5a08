"""
Text to token ids and back, and the batched sampler.

A prompt is prefilled once, and its keys and values are read once a step for all of its samples. Samples that started together, a
cohort, are equally long at every step, which spares padding and masks; those that ended leave, and as rows become free the next
cohort starts, so that the batch stays full to the end. Every row draws from a random stream of its own, a hash of (seed, prompt,
number of the sample): its tokens depend neither on its batch-mates nor on the order of the work, so that an exploration
that was stopped half-way, or spread over machines, gives the same samples as one that was not.

$ python sample.py --init_from=out/demo_sft --start="Tom has 3 apples. He buys 4 more. How many apples does he have?"
$ python sample.py --init_from=HuggingFaceTB/SmolLM2-135M --raw --start="Once upon a time" --k=3
"""
import base64
import hashlib
import json
import math
import os
import random
import sys
from collections import Counter, deque
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import UserError, bar, override, read_run
from model import (KVCache, Transformer, autocast, cache_bytes, download, enough_memory, find_checkpoint, first_line, from_all, rank,
                   read_json, setup, size_text, world_size)

# -----------------------------------------------------------------------------
# settings, for running this file as a script
init_from = ''        # a checkpoint: a run's folder, a Hugging Face folder or a hub name
start = ''            # the question (or with --raw the text to continue); empty: read from the terminal, one a line
raw = False           # feed `start` as it is, without "Question: ... Answer:" around it
k = 1                 # samples of each prompt
max_new_tokens = 256  # budget of every sample, or what the model's context leaves
temperature = 0.7     # 0: greedy
top_k = 0             # draw among the k likeliest tokens only; 0: all
top_p = 1.0           # draw among the likeliest tokens that hold this share of the mass; 1: all
stop = ()             # strings that end a sample, e.g. --stop='["\n\n"]'
seed = 0
condition = 'good'    # what a return-conditioned policy (rcrl.py) is told before its lines: 'good', 'bad' or 'none'
device = 'auto'       # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'        # of the matrix products: 'auto', 'float32', 'bfloat16'
# -----------------------------------------------------------------------------


# -----------------------------------------------------------------------------
# tokenizers: encode(text) -> ids, decode(ids) -> text, bos (list of ids), eos (the id that training appends),
# ends (list of ids, each of which ends a sample), vocab_size (the largest id + 1), save(folder)

LABELS = ('[GOOD]', '[BAD]')


class Labels(NamedTuple):
    """What a return-conditioned policy (rcrl.py) is told before a line of its solution. A label is read, and never drawn."""
    good: list        # ids of [GOOD]
    bad: list         # ids of [BAD]
    granularity: str  # 'step': a label before every line; 'solution': one before the first
    new: bool         # two ids of their own, from vocab_size on; or the ids of the plain text


class PromptEncoding:
    """What both kinds of tokenizer do alike."""
    labels = None  # Labels, for a return-conditioned policy

    def add_labels(self, granularity, new):
        good, bad = ([self.vocab_size], [self.vocab_size + 1]) if new else map(self.encode, LABELS)
        self.labels = Labels(good, bad, granularity, new)

    def save_labels(self, folder):
        if self.labels:
            with open(os.path.join(folder, 'labels.json'), 'w') as f:
                json.dump(self.labels._asdict(), f)

    def encode_prompt(self, text):
        return self.bos + self.encode(text)

    @cached_property
    def newline_ids(self):
        """The tokens whose text holds a line break."""
        return frozenset(i for i in range(self.vocab_size) if '\n' in self.decode([i]))

    def encode_pair(self, prompt, completion):
        """(prompt ids, completion ids). The completion is what follows the prompt in the whole text's encoding, since the
        first token of a text on its own may differ (sentencepiece puts a space before it); on its own if the border falls
        within a token."""
        whole, head = self.encode_prompt(prompt + completion), self.encode_prompt(prompt)
        if whole[:len(head)] == head:
            return head, whole[len(head):]
        return head, self.encode(completion)


class BPETokenizer(PromptEncoding):
    """A byte-level BPE held in a tiktoken.Encoding; its only special token is the end of text."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.bos, self.eos, self.ends = [], encoding.eot_token, [encoding.eot_token]
        self.vocab_size = encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        ids = [i for i in ids if i < self.eos and i not in self.ends]  # ids above EOS pad the embedding
        return self.encoding.decode(ids)

    def save(self, folder):
        """bpe.json, from which we load, and the files from which AutoTokenizer makes the same ids."""
        ranks = self.encoding._mergeable_ranks
        tokens = sorted(ranks, key=ranks.get)
        with open(os.path.join(folder, 'bpe.json'), 'w') as f:
            json.dump({'pattern': self.encoding._pat_str, 'tokens': [base64.b64encode(t).decode() for t in tokens]}, f)

        # Hugging Face writes bytes as printable characters and lists merges as pairs; tiktoken merges any two neighbours
        # whose concatenation is a token, so that every such pair is a merge, in the order of the tokens.
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        text = {t: ''.join(BYTE_TO_CHAR[b] for b in t) for t in tokens}
        merges = []
        for token in tokens:
            pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
            merges += [(text[a], text[b]) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
        hf = Tokenizer(models.BPE(vocab={text[t]: ranks[t] for t in tokens}, merges=merges))
        hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.encoding._pat_str), 'isolated'),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        hf.decoder = decoders.ByteLevel()
        hf = PreTrainedTokenizerFast(tokenizer_object=hf, eos_token=EOS, clean_up_tokenization_spaces=False)
        if self.labels and self.labels.new:
            hf.add_tokens(list(LABELS), special_tokens=True)  # the next two ids
        hf.save_pretrained(folder)
        self.save_labels(folder)


class HFTokenizer(PromptEncoding):
    """Any fast tokenizer that AutoTokenizer loads."""

    def __init__(self, hf, name, ends=()):
        """ends: the model's end tokens, the first of which serves where the tokenizer has none."""
        if hf.eos_token_id is None and ends:
            hf.eos_token = hf.convert_ids_to_tokens(ends[0])
        if hf.eos_token_id is None:
            raise UserError(f'{name}: the tokenizer has no end-of-text token')
        self.hf, self.eos, self.ends = hf, hf.eos_token_id, [hf.eos_token_id]
        self.vocab_size = max(hf.get_vocab().values()) + 1  # more than there are tokens, if ids are left out
        text, whole = self.encode('a'), hf('a')['input_ids']
        start = next((i for i in range(len(whole)) if whole[i:i + len(text)] == text), 0)
        self.bos = whole[:start]  # <s> for Llama

    def encode(self, text):
        """Text that spells a special token is text: no question holds an end token."""
        return self.hf(text, add_special_tokens=False, split_special_tokens=True)['input_ids']

    def decode(self, ids):
        ids = [i for i in ids if i not in self.ends]
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add_labels(self, granularity, new):
        super().add_labels(granularity, new)
        if new:
            self.hf.add_tokens(list(LABELS), special_tokens=True)
            if self.hf.convert_tokens_to_ids(list(LABELS)) != self.labels.good + self.labels.bad:
                raise UserError(f"this tokenizer gives {' and '.join(LABELS)} other ids than its next two; take label_tokens = 'text'")

    def save(self, folder):
        self.hf.save_pretrained(folder)
        self.save_labels(folder)


EOS = '<|endoftext|>'
# Digits one by one, words with the space before them, runs of signs, white space: '<<12+3=15>>' is << 1 2 + 3 = 1 5 >>.
PATTERN = r"""\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"""
# GPT-2's printable character for each byte: itself where it can be seen, else the next one from 256 on.
VISIBLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
BYTE_TO_CHAR = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def bpe_tokenizer(tokens, pattern=PATTERN):
    """A BPETokenizer from its tokens (bytes), in the order in which they merge."""
    return BPETokenizer(tiktoken.Encoding('bpe', pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                          special_tokens={EOS: len(tokens)}))


def learn_bpe(texts, n_merges):
    """A byte-level BPE of at most n_merges merges (fewer if the texts have no more pairs) learned from texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), 'isolated'),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=256 + n_merges, show_progress=False, min_frequency=2,
                                  initial_alphabet=sorted(BYTE_TO_CHAR.values()))
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    learned = [bytes(CHAR_TO_BYTE[char] for char in token) for token in sorted(vocab, key=vocab.get)]
    return bpe_tokenizer([bytes([b]) for b in range(256)] + [t for t in learned if len(t) > 1])


def load_tokenizer(path, conditioned=True):
    """The tokenizer of a checkpoint, a run's folder or a tokenizer's folder; 'gpt2' for tiktoken's; else a hub name. UserError
    if there is none, and unless `conditioned` for that of a return-conditioned policy, which most training cannot start from."""
    for folder in [os.path.join(path, name) for name in ('best', 'best.old', 'last', 'last.old')] + [path]:
        if any(os.path.exists(os.path.join(folder, name)) for name in ('bpe.json', 'tokenizer_config.json')):
            break
    else:
        if read_run(path):
            raise UserError(f'{path}: the run has no checkpoint yet')
        folder = path if os.path.isdir(path) or path == 'gpt2' else download(path)
    labels = os.path.join(folder, 'labels.json')
    labels = Labels(**read_json(labels)) if os.path.exists(labels) else None
    if labels and not conditioned:
        raise UserError(f'{path} is a return-conditioned policy (rcrl.py): eval.py and sample.py know what to tell it, this script does not')
    files = [os.path.join(folder, name) for name in ('generation_config.json', 'config.json')]
    generation, config = (read_json(file) if os.path.exists(file) else {} for file in files)
    ends = []
    for ids in (generation.get('eos_token_id'), config.get('eos_token_id')):
        ends += ids if isinstance(ids, list) else [] if ids is None else [ids]
    try:
        if os.path.exists(os.path.join(folder, 'bpe.json')):
            saved = read_json(os.path.join(folder, 'bpe.json'))
            tokenizer = bpe_tokenizer([base64.b64decode(t) for t in saved['tokens']], saved['pattern'])
        elif folder == 'gpt2' and not os.path.isdir(folder):
            tokenizer = BPETokenizer(tiktoken.get_encoding('gpt2'))  # from tiktoken's cache, or downloaded
        else:
            from transformers import AutoTokenizer  # seconds to import, so only when it is needed
            tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(folder), path, ends)
    except UserError:
        raise
    except Exception as error:  # offline, no such name, a broken file: many types, all of them the user's to mend
        reason = str(error).strip().split('\n')[0]
        raise UserError(f'{path}: no tokenizer could be loaded ({type(error).__name__}: {reason})') from None
    rows = config.get('vocab_size', tokenizer.vocab_size)
    text_ids = tokenizer.hf.vocab_size if isinstance(tokenizer, HFTokenizer) else tokenizer.eos
    if tokenizer.eos >= rows:
        raise UserError(f'{path}: the end token {tokenizer.eos} is outside of the embedding of {rows} rows: '
                        'no sample would ever end')
    if max(tokenizer.bos, default=0) >= rows:
        raise UserError(f'{path}: the begin token {max(tokenizer.bos)} is outside of the embedding of {rows} rows')
    if text_ids > rows:
        raise UserError(f'{path}: the tokenizer has {text_ids} tokens, the embedding {rows} rows')
    # Ids outside of the embedding are never drawn: an end token that is a config's default, padding that was added.
    tokenizer.ends = sorted({tokenizer.eos} | {i for i in ends if 0 <= i < rows})
    tokenizer.vocab_size = min(tokenizer.vocab_size, rows)
    if labels:
        tokenizer.labels = labels
        tokenizer.vocab_size = labels.good[0] if labels.new else tokenizer.vocab_size  # what is drawn ends where labels begin
    return tokenizer


def check_same_tokenizer(a, b, whose):
    """UserError, naming `whose` tokenizers they are, if they make different ids."""
    probe = 'Question: Tom has 3.5 apples, Ann 1,200. Why?\nAnswer: 3.5+1200=<<3.5+1200=1203.5>>1203.5 apples.\n#### 1203.5'
    if (a.encode_prompt(probe), a.eos, a.vocab_size) != (b.encode_prompt(probe), b.eos, b.vocab_size):
        raise UserError(f'{whose} have different tokenizers: the same ids would mean other texts')


# -----------------------------------------------------------------------------
# random numbers and log-probabilities

def random_stream(seed, prompt_ids, number):
    """The state (int64) of the random stream of a prompt's number-th sample."""
    digest = hashlib.blake2b(f'{seed}:{number}:{prompt_ids}'.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little', signed=True)


def uniform(stream, step):
    """One number in (0, 1) a row: SplitMix64 (Steele, Lea and Flood 2014) at position `step` of each stream.

    stream: (R,) int64; step: a number, or int64 of one element. Returns (R,) fp32. int64 products wrap around in torch, as the algorithm
    wants; its shifts are arithmetic, so that the copies of the sign bit have to be masked away."""
    x = stream + (torch.as_tensor(step, device=stream.device) + 1) * -7046029254386353131
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * -4658895280553007687
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * -7723592293110705685
    x = x ^ ((x >> 31) & (1 << 33) - 1)
    return ((x >> 41) & (1 << 23) - 1).float() * 2 ** -23 + 2 ** -24


def token_logprobs(logits, ids, temperature=1.0):
    """log p(ids) under softmax(logits / temperature), as gather minus logsumexp: no (.., V) log-softmax is kept.

    logits: (..., V) fp32. ids: (...). Returns (...) fp32. The one definition that sampler and trainers share."""
    logits = logits if temperature == 1 else logits / temperature  # spares a copy of the largest tensor there is
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def action_logprobs(model, hidden, ids, temperature=1.0, with_entropy=False, chunk=1024, kept=2 ** 27):
    """Log-probs of ids (N,) predicted from hidden (N, C), and the entropies of the same distributions (None unless asked
    for); each (N,) fp32. Where autograd would keep more than `kept` logits for backward (half a GiB), in chunks whose logits are
    computed again in backward: (chunk, V) numbers live and never (N, V)."""
    def part(hidden, ids):
        logits = model.logits(hidden)
        logprobs = token_logprobs(logits, ids, temperature)
        if not with_entropy:
            return logprobs, None
        logp = (logits / temperature).log_softmax(-1)
        return logprobs, -(logp.exp() * logp).sum(-1)

    again = torch.is_grad_enabled() and len(ids) * model.config.vocab_size > kept
    if torch.is_grad_enabled() and not again:
        chunk = len(ids)  # at once: each chunk would add a gradient of its own to that of the output projection
    parts = [checkpoint(part, h, i, use_reentrant=False) if again else part(h, i)
             for h, i in zip(hidden.split(chunk), ids.split(chunk))]
    return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts]) if with_entropy else None


def least_kept(p, top_p, most=512):
    """The probability (R, 1) down to which tokens stay in nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the likeliest ones
    that together hold at least top_p of the mass, and all that are as likely as the last of these. p: (R, V), not normalised. Nearly always few tokens do, so that the `most` likeliest
    are looked at first, and only in rows where they do not suffice all are sorted. (On a GPU all at once: to ask it whether they
    suffice would be to wait for it.)"""
    V, mass = p.shape[-1], top_p * p.sum(-1, keepdim=True)
    n = min(most, V) if p.device.type == 'cpu' else V
    ordered = p.topk(n).values if n < V else p.sort(dim=-1, descending=True).values
    likelier = ordered.cumsum(-1) - ordered  # the mass of the likelier tokens: the first one always stays
    least = ordered.gather(-1, (likelier < mass).sum(-1, keepdim=True).clamp(min=1) - 1)
    if n < V:
        short = (ordered.sum(-1, keepdim=True) < mass)[:, 0].nonzero()[:, 0]
        if len(short):
            least[short] = least_kept(p[short], top_p, V)
    return least


def draw(logits, u, temperature, top_k=0, top_p=1.0, vocab_size=None):
    """Next tokens (R,) from logits (R, V), by the inverse of the cumulative distribution at u (R,), or the likeliest if temperature
    is 0; and their log-probs (R,), as token_logprobs gives them (greedy: at temperature 1), whatever top_k and top_p leave out. Ids
    from vocab_size on, which pad the embedding, are never drawn."""
    R, V = logits.shape
    x = logits if temperature in (0, 1) else logits / temperature
    real = V if vocab_size is None else vocab_size
    top = x[:, :real].max(-1, keepdim=True).values
    p = (x - top).exp_()
    p[:, real:].zero_()
    log_total = p.sum(-1).log_() + top[:, 0]
    if real < V:
        log_total = torch.logaddexp(log_total, x[:, real:].logsumexp(-1))
    if temperature == 0:
        token = p.argmax(-1)
        return token, x.gather(-1, token[:, None])[:, 0] - log_total
    if top_k:
        p = p * (p >= p.topk(min(top_k, V)).values[:, -1:])
    if top_p < 1:
        p = p * (p >= least_kept(p, top_p))

    def below(cdf, target):  # strictly below the total, so that what is found is a place at which the sum still grows
        total = cdf[:, -1:]
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1), target

    # In two steps, a block of 64 tokens and a token of the block: a running sum over the whole vocabulary takes three times as long.
    blocks = F.pad(p, (0, -V % 64)).view(R, -1, 64)
    cdf = blocks.sum(-1).cumsum(-1)
    block, target = below(cdf, u[:, None] * cdf[:, -1:])
    before = F.pad(cdf, (1, 0)).gather(-1, block)
    inside, _ = below(blocks[torch.arange(R, device=p.device), block[:, 0]].cumsum(-1), target - before)
    token = (block * 64 + inside)[:, 0].clamp(max=real - 1)
    return token, x.gather(-1, token[:, None])[:, 0] - log_total


# -----------------------------------------------------------------------------
# token sequences in batches

class Example(NamedTuple):
    """A token sequence of which the ids from n_prompt on are learned, but for those at the positions `unlearned` (from n_prompt
    on). n_prompt is at least 1: nothing predicts the first."""
    ids: list
    n_prompt: int
    unlearned: tuple = ()


def micro_batches(rows, max_tokens, length=lambda e: len(e.ids)):
    """Cuts an update's rows (examples, or whatever `length` gives a length of) into lists of similar length, the longest first,
    with rows * longest <= max_tokens (one row at the least)."""
    micros, ordered = [], sorted(rows, key=lambda row: -length(row))
    while ordered:
        n = max(1, max_tokens // length(ordered[0]))
        micros.append(ordered[:n])
        ordered = ordered[n:]
    return micros


def my_micro_batches(rows, max_tokens, length=lambda e: len(e.ids)):
    """This process's share of an update's micro-batches: [(rows, weight)]. All processes have equally many, since FSDP gathers weights
    in each: where there are too few, one is computed again with weight 0."""
    if world_size() == 1:
        return [(micro, 1.0) for micro in micro_batches(rows, max_tokens, length)]
    ordered = sorted(rows, key=lambda row: -length(row))  # dealt by length, so that each gets as much to do
    shares = [micro_batches(ordered[r::world_size()], max_tokens, length) for r in range(world_size())]
    mine, most = shares[rank()], max(map(len, shares))
    return [(micro, 1.0) for micro in mine] + [(ordered[-1:], 0.0)] * (most - len(mine))


def padded_length(examples, most):
    """The T to which collate pads."""
    longest = max(len(e.ids) for e in examples)
    return max(longest, min(math.ceil((longest - 1) / 8) * 8 + 1, most))


def collate(examples, device, most):
    """-> ids (B, T), padded with 0 on the right, and learned (B, T) bool, True from n_prompt to a row's end: by position, since
    an id says nothing about padding. Causal attention keeps what stands on the right from the real tokens.

    T - 1 is a multiple of 8 where it can, up to T = most: a CPU's matrix kernels are made anew for each shape, and with fewer
    shapes the demo's SFT ran 13% faster. (- 1: the last token is only predicted.)"""
    longest = padded_length(examples, most)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    learned = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, e in enumerate(examples):
        ids[row, :len(e.ids)] = torch.tensor(e.ids)
        learned[row, e.n_prompt:len(e.ids)] = True
        if e.unlearned:
            learned[row, list(e.unlearned)] = False
    return ids.to(device), learned.to(device)


def n_computed(n, n_cells):
    """How many of a padded table's n_cells are computed for its n tokens: up to a sixteenth more, in steps of a power of two. A
    CPU's matrix kernels are made anew for each shape, and the demo's SFT is 3% faster with few of them than with each n as it is."""
    step = 2 ** max(0, n.bit_length() - 5)
    return min(-(-n // step) * step, n_cells)


def real_cells(lengths, T, device):
    """What Transformer.trunk has to compute of a padded (B, T) table: the numbers of its cells that hold tokens, the first lengths[b]
    of row b, ascending, with some padding (see n_computed). None if that is the whole table."""
    real = (torch.arange(T) < torch.tensor(lengths)[:, None]).flatten()
    n = max(1, sum(lengths))
    padding = (~real).nonzero().squeeze(-1)
    real[padding[:n_computed(n, len(real)) - n]] = True
    return None if real.all() else real.nonzero().squeeze(-1).to(device)


def epoch_order(examples, batch_size, seed, epoch):
    """The numbers of the examples in the order of an epoch: a permutation by (seed, epoch), in which every window of eight
    updates is sorted by length and its updates are shuffled, so that an update's examples are of similar length. (Windows of 32
    halve the padding, but the demo's base model learned less at three seeds of three, at one so much less that nothing came of it.)
    The first ones complete the update that the epochs before began; what is no whole update comes last."""
    rng = random.Random(f'{seed}:{epoch}')
    shuffled = rng.sample(range(len(examples)), len(examples))
    lead = -epoch * len(examples) % batch_size
    order, whole = shuffled[:lead], len(examples) - (len(examples) - lead) % batch_size
    for start in range(lead, whole, 8 * batch_size):
        window = sorted(shuffled[start:min(start + 8 * batch_size, whole)], key=lambda i: len(examples[i].ids))
        updates = [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(updates)
        order += [i for update in updates for i in update]
    return order + shuffled[max(whole, lead):]


# -----------------------------------------------------------------------------
# the sampler

class Sample(NamedTuple):
    """One completion. A sampled end token is its last id: an action like the others. With stop strings the ids go up to the token
    that completed the string. finished: it ended by an end token or a stop string and not because the budget ran out. Labels that a
    return-conditioned policy was told stand neither in prompt_ids nor in ids."""
    prompt_ids: list
    ids: list
    logprobs: list  # of each id under the whole softmax at the sampling temperature (greedy: at 1), before top-k and top-p
    finished: bool


class Cohort:
    """Samples that started together, and so are equally long at every step. rows: their names, (number of prompt, of sample);
    row (R,): the numbers, within the cohort, of those that go on. A sample is done once it has as many tokens as its length says, which
    is its budget until it ends; what it may draw beyond is not looked at."""

    def __init__(self, sampler, rows, prompts, stream, budget, settings):
        """Prefills the prompts (lists of ids; equal neighbours once) and draws every sample's first token."""
        self.sampler, self.rows, self.t, self.settings = sampler, rows, 0, settings
        model, device = sampler.model, sampler.device
        # Equal neighbours are one prompt; but the cache has a table of prompts * the most samples of one, so that a prompt with
        # many more samples than the others is taken as several.
        most_samples = 2 * math.ceil(len(prompts) / sum(a != b for a, b in zip(prompts, [[]] + prompts)))
        unique, source, n = [], [], 0  # source: row -> its prompt's number in unique
        for p in prompts:
            if not unique or p != unique[-1] or n == most_samples:
                unique.append(p)
                n = 0
            source.append(len(unique) - 1)
            n += 1
        length = torch.tensor([len(p) for p in unique])
        longest = int(length.max())
        self.cache = KVCache(model.config, length, device, sampler.dtype)
        # Padding stands on the right, where causal attention keeps it from the real tokens. Some prompts at a time: that bounds the
        # memory of activations, and what stays in a CPU's caches is prefilled 3 times as fast.
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in unique], device=device)
        last, step = [], max(1, PREFILL_TOKENS.get(device.type, 16384) // longest)
        for i in range(0, len(unique), step):
            self.cache.filling = slice(i, i + step)
            hidden = model.trunk(ids[i:i + step], cache=self.cache)
            last.append(hidden[torch.arange(len(hidden)), length[i:i + step] - 1])
        source = torch.tensor(source, device=device)
        self.cache.start(source)
        self.stream, self.row = torch.tensor(stream, device=device), torch.arange(len(rows), device=device)

        R, self.most = len(rows), max(budget)
        self.ids = torch.zeros(R, self.most, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(R, self.most, device=device)
        self.length = torch.tensor(budget, device=device)
        self.finished = torch.zeros(R, dtype=torch.bool, device=device)
        # A return-conditioned policy reads its label again after every line break: for as many steps as the label has ids, they
        # take the place of what the row draws, while the others go on.
        labels = sampler.tokenizer.labels
        self.label = torch.tensor(sampler.label if labels and labels.granularity == 'step' else [], dtype=torch.long, device=device)
        self.to_read = torch.zeros(R, dtype=torch.long, device=device)  # ids of the label that a row has still to read
        self.read = torch.zeros(R, self.most, dtype=torch.bool, device=device)  # which ids were read so

        self.step = torch.zeros(1, dtype=torch.long, device=device)         # t, where kernels find it
        self.token = torch.zeros(R, dtype=torch.long, device=device)        # each row's last one
        self.positions = length.to(device)[source] - 1                      # its place in the whole text
        self.take(model.logits(torch.cat(last))[source])

    def take(self, logits):
        """Draws a token for every row from logits (R, V). Nothing here waits for the device, or depends on t but through step."""
        row, step, tokenizer = self.row, self.step, self.sampler.tokenizer
        temperature, top_k, top_p, _ = self.settings
        token, logprob = draw(logits, uniform(self.stream, step), temperature, top_k, top_p, tokenizer.vocab_size)
        if len(self.label):
            to_read = self.to_read[row]
            token = torch.where(to_read > 0, self.label[-to_read.clamp(min=1)], token)
            self.read[row, step] = to_read > 0
            self.to_read[row] = torch.where(to_read > 0, to_read - 1, len(self.label) * self.sampler.ends_line[token])
        self.ids[row, step], self.logprobs[row, step] = token, logprob
        self.end(self.sampler.ends[token])
        self.token.copy_(token)
        # A sample that is done may wait some steps for others to leave with it: not beyond the context.
        self.positions.add_(1).clamp_(max=self.sampler.model.config.block_size - 1)

    def end(self, ended):
        """The rows where `ended` (R,) are finished with the token they just drew, if they were not done before."""
        length = self.length[self.row]
        ended = ended & (length > self.step)
        self.finished[self.row] |= ended
        self.length[self.row] = torch.where(ended, self.step + 1, length)

    def go_on(self):
        """After every token: looks, now and then, who is done, and lets them leave. Returns whether rows left."""
        row, stop, sampler = self.row, self.settings[-1], self.sampler
        if stop:
            self.end(sampler._stopped(self.ids[row, :self.t + 1], self.read[row, :self.t + 1], stop))
        self.t += 1
        looks = bool(stop) or self.t % sampler.patience == 0 or self.t == self.most
        alive = self.length[row] > self.t if looks else None
        n_alive = int(alive.sum()) if looks else len(row)
        self.step.fill_(self.t)
        if n_alive > sampler.stay_above * len(row):
            return False
        keep = alive.nonzero().squeeze(-1)
        self.row, self.stream, self.token, self.positions = row[keep], self.stream[keep], self.token[keep], self.positions[keep]
        if n_alive:
            self.cache.select(keep)
        else:
            self.cache = None  # at once: the next cohort needs the room
        return True

    def results(self):
        """[(name, ids, log-probs, finished)] of all rows, without the labels that they read."""
        found = []
        columns = (self.ids, self.logprobs, self.read, self.length, self.finished)
        for name, ids, logprobs, read, n, finished in zip(self.rows, *(x.tolist() for x in columns)):
            drawn = [t for t in range(n) if not read[t]]
            found.append((name, [ids[t] for t in drawn], [logprobs[t] for t in drawn], finished))
        return found


class Together:
    """The caches of several cohorts as one."""

    def __init__(self, caches):
        self.caches = caches

    def attend(self, layer, q, k, v):
        parts = zip(self.caches, *(x.split([len(c.source) for c in self.caches]) for x in (q, k, v)))
        return torch.cat([cache.attend(layer, *part) for cache, *part in parts])


PREFILL_TOKENS = {'cpu': 2048, 'cuda': 16384}  # that are read at a time, of some prompts


def rows_that_fit(config, longest, max_new_tokens, k, max_rows, dtype, device):
    """max_rows, or as many rows as a GPU's free memory has room for: prompts of `longest` tokens, half as many more as have rows, since they
    wait for each other; max_new_tokens of each row's own; its logits, with what is needed to sort them; and the activations of a prefill.
    (Other numbers of rows draw the same samples but for rounding, which in bf16 may show.)"""
    if device.type != 'cuda':
        return max_rows
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    prefill = PREFILL_TOKENS['cuda'] * dtype.itemsize * (8 * config.n_embd + 3 * config.n_inner)
    prompt, own = (cache_bytes(config, *sizes, dtype, device) for sizes in ((1, longest, 0, 0), (0, 0, 1, max_new_tokens)))
    a_row = 1.5 / k * prompt + own + 50 * config.vocab_size
    rows = max(1, min(max_rows, int(0.9 * (free - prefill) / a_row)))
    if rows < max_rows:
        print(f'{size_text(free)} are free: {rows} rows at a time instead of {max_rows}')
    return rows


class Replay:
    """replay.start(f), and then replay() again and again: f(), with all that it reads and writes at the same places. On a GPU its kernels are
    recorded at the second call as a CUDA graph, which then starts them all at once: a decoding step has some thirty a layer, and starting
    them one by one takes longer than a small model's step itself."""
    works = True  # until a recording fails

    def __init__(self, device):
        self.records, self.graph, self.before = device.type == 'cuda', None, None
        if self.records:
            # One stream, since libraries keep memory for each, and one pool of memory, which goes from a graph to the next.
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def start(self, f):
        self.f, self.n_calls = f, 0
        self.before, self.graph = self.graph or self.before, None  # kept for a while: a pool that no graph holds would be given up

    def __call__(self):
        self.n_calls += 1
        if self.n_calls == 2 and self.records and Replay.works:  # not at once: libraries set themselves up at a first call
            self.record()
        if self.graph:
            self.graph.replay()
        else:
            self.f()

    def record(self):
        """What torch.cuda.graph does, without giving all unused memory back to the driver first, since we record often."""
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(now)
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool, capture_error_mode='thread_local')  # other threads, NCCL's say, may go on
                try:
                    self.f()  # is recorded, not computed
                finally:
                    graph.capture_end()
            now.wait_stream(self.stream)
            self.graph, self.before = graph, None
        except RuntimeError as error:
            with suppress(AttributeError, RuntimeError, TypeError):  # else the allocator goes on as if we still recorded
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self.pool)
            if not self.before:
                self.pool = torch.cuda.graph_pool_handle()
            if not isinstance(error.__context__ or error, torch.OutOfMemoryError):  # with fewer rows there may be room
                Replay.works = False
                print(f'decoding goes without CUDA graphs, more slowly: {first_line(error.__context__ or error)}')


class Sampler:
    """Sampler(model, tokenizer).generate(prompts) -> list of Sample.

    max_rows: samples decoded at a time, fewer where a GPU's memory has no room for as many (rows_that_fit). Their cache takes at most
    model.cache_bytes(config, prompts, longest prompt, max_rows, max_new_tokens, dtype, device), and for a moment, when rows leave, a
    layer's part of that again; prompts: those of max_rows samples, at most 1.5 * max_rows. On a CPU the linear layers' weights are there
    a second time (Transformer.packed). dtype: of the matrix products. condition: 'good', 'bad' or 'none', what a return-conditioned
    policy is told before its lines; others are told nothing."""

    def __init__(self, model, tokenizer, max_rows=256, dtype=torch.float32, condition='good'):
        self.model, self.tokenizer, self.max_rows, self.dtype = model, tokenizer, max_rows, dtype
        self.device = model.embed.weight.device
        if condition not in ('good', 'bad', 'none') or condition == 'bad' and not tokenizer.labels:
            raise UserError(f"condition is 'good', 'bad' or 'none', and other than 'good' for return-conditioned policies alone (rcrl.py); "
                            f'not {condition!r}')
        if max_rows < 1:
            raise UserError('max_rows must be at least 1')
        self.label = getattr(tokenizer.labels, condition) if tokenizer.labels and condition != 'none' else []
        # How often, in tokens, a cohort looks who is done: a GPU that is asked has to compute all that it was given first. And the share of
        # its rows above which none leave: that copies what the cache holds of the samples, and a GPU's graph is recorded again.
        self.patience, self.stay_above = (1, 0.9) if self.device.type == 'cpu' else (8, 0.75)
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        self.ends[list(tokenizer.ends)] = True
        self.ends_line = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self.device)
        if self.label:
            self.ends_line[list(tokenizer.newline_ids)] = True

    @torch.inference_mode()
    def generate(self, prompts, k=1, max_new_tokens=256, temperature=1.0, top_k=0, top_p=1.0, stop=(), seed=0, desc=None, first=None):
        """k samples of each prompt, prompt after prompt: sample j of prompt i is result[i * k + j].

        prompts: texts, or lists of ids. max_new_tokens: every row's own budget, one number or one a prompt; labels within a solution
        count. temperature 0 is greedy. stop: strings that end a sample. desc: a title for the progress bar. first: for each prompt the number
        of its first sample, where some of its samples are drawn by another call; by default those given twice here count on. UserError for a bad
        argument, an empty prompt, and a prompt that leaves no room for the budget within the model's context."""
        budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if len(budgets) != len(prompts):
            raise UserError(f'{len(budgets)} budgets for {len(prompts)} prompts')
        for name, bad, rule in (('k', k < 1, 'at least 1'), ('max_new_tokens', any(b < 1 for b in budgets), 'at least 1'),
                                ('temperature', not 0 <= temperature < float('inf'), '0 (greedy) or more'),
                                ('top_k', top_k < 0, '0 (all) or more'), ('top_p', not 0 < top_p <= 1, 'above 0 and at most 1')):
            if bad:
                raise UserError(f'{name} must be {rule}')
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        prompts = [self.tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts]
        given = [p + self.label for p in prompts]
        for p, whole, budget in zip(prompts, given, budgets):
            if not p:
                raise UserError('a prompt is empty')
            if len(whole) + budget > self.model.config.block_size:
                raise UserError(f'a prompt of {len(whole)} tokens and max_new_tokens = {budget} exceed the context of '
                                f'{self.model.config.block_size} tokens')

        # Rows are (number of the prompt, number of its sample), in the order of the prompts' lengths, so that prompts that are read
        # together need little padding; the longest come first, so that what is too large for the memory fails at once.
        streams = [[random_stream(seed, p, n + j) for j in range(k)] for p, n in zip(prompts, first or first_numbers(prompts, k))]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        waiting = deque((i, j) for i in order for j in range(k))
        if not waiting:
            return []
        samples, cohorts, moved, decode = [None] * len(waiting), [], True, Replay(self.device)
        max_rows = rows_that_fit(self.model.config, max(map(len, given)), max(budgets), k, min(self.max_rows, len(waiting)), self.dtype,
                                 self.device)
        progress = bar(desc=desc, total=len(waiting)) if desc else None
        with autocast(self.device, self.dtype), self.model.packed(self.dtype):
            while waiting or cohorts:
                # As soon as a quarter of the rows are free, the next samples start. Cohorts of different age share the linear layers.
                n_rows = sum(len(c.row) for c in cohorts)
                if waiting and n_rows <= 0.75 * max_rows:
                    rows = [waiting.popleft() for _ in range(min(len(waiting), max_rows - n_rows))]
                    cohorts.append(Cohort(self, rows, [given[i] for i, j in rows], [streams[i][j] for i, j in rows],
                                          [budgets[i] for i, j in rows], (temperature, top_k, top_p, stop)))
                    moved, stepped = True, cohorts[-1:]
                else:
                    # not any(... for ...), which would leave the others without room
                    changed = any([c.cache.next_token() for c in cohorts])
                    if changed or moved:
                        decode.start(lambda now=tuple(cohorts): self._decode(now))
                    decode()
                    moved, stepped = False, cohorts
                for c in stepped:
                    moved |= c.go_on()
                for c in [c for c in cohorts if not len(c.row)]:
                    cohorts.remove(c)
                    for (i, j), ids, logprobs, finished in c.results():
                        samples[i * k + j] = Sample(prompts[i], ids, logprobs, finished)
                    if progress is not None:
                        progress.update(len(c.rows))
        if progress is not None:
            progress.close()
        return samples

    def _decode(self, cohorts):
        """Reads the last token of every row, and draws its next one."""
        token, positions = (torch.cat(x)[:, None] for x in zip(*[(c.token, c.positions) for c in cohorts]))
        cache = cohorts[0].cache if len(cohorts) == 1 else Together([c.cache for c in cohorts])
        logits = self.model.logits(self.model.trunk(token, positions, cache)[:, 0])
        for c, part in zip(cohorts, logits.split([len(c.row) for c in cohorts])):
            c.take(part)

    def _stopped(self, ids, read, stop):
        """Whether each row of ids (R, t + 1) has just completed a stop string, labels (where `read`) left out: looks at the text of
        its last tokens, as many as the longest string has characters (a token has at least one byte), and some for a character of
        many bytes."""
        tail = max(map(len, stop)) + 4
        texts = [self.tokenizer.decode([i for i, label in zip(row, labels) if not label][-tail:]) if not labels[-1] else ''
                 for row, labels in zip(ids.tolist(), read.tolist())]
        return torch.tensor([any(s in text for s in stop) for text in texts], device=self.device)


def first_numbers(prompts, k):
    """The number of each prompt's first sample: 0, but for prompts that were given before, which get fresh samples."""
    seen, first = Counter(), []
    for p in map(tuple, prompts):
        first.append(seen[p])
        seen[p] += k
    return first


def refuse_too_long(sampler, prompts, max_new_tokens):
    """UserError if none of the prompts (lists of ids) leaves room for the budget in the model's context."""
    check_room(prompts, max_new_tokens, sampler.model.config.block_size, len(sampler.label))


def check_room(prompts, max_new_tokens, block_size, n_label=0):
    """refuse_too_long before there is a sampler. n_label: tokens of the label that it will put behind a prompt."""
    shortest = min(map(len, prompts)) + n_label
    if shortest + max_new_tokens > block_size:
        raise UserError(f'the shortest prompt, of {shortest} tokens, and max_new_tokens = {max_new_tokens} exceed the context of {block_size} tokens')


def answer(sampler, prompts, k, max_new_tokens, temperature, first=None, **arguments):
    """Sampler.generate on all processes: each draws the samples of its share of the prompts (lists of ids or texts), and gets all
    of them. And a prompt without room for its budget in the model's context gets empty samples, which count as wrong, instead of
    ending the run."""
    prompts = [sampler.tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in prompts]
    budgets = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    first = first or first_numbers(prompts, k)
    fits = [len(p) + len(sampler.label) + budget <= sampler.model.config.block_size for p, budget in zip(prompts, budgets)]
    which = [i for i, fit in enumerate(fits) if fit]
    mine = which[rank()::world_size()]
    with enough_memory('sampling', 'lower max_rows'):
        drawn = sampler.generate([prompts[i] for i in mine], k, [budgets[i] for i in mine], temperature, first=[first[i] for i in mine],
                                 **arguments)
    samples = [Sample(p, [], [], False) for p in prompts for _ in range(k)]
    for r, part in enumerate(from_all([tuple(s) for s in drawn])):
        for n, i in enumerate(which[r::world_size()]):
            samples[i * k:(i + 1) * k] = [Sample(*s) for s in part[n * k:(n + 1) * k]]
    return samples


if __name__ == '__main__':
    import rewards  # here alone, for the prompt: rewards.py imports this module
    override(globals())
    if not init_from:
        raise UserError('which checkpoint? --init_from=out/demo_sft')
    device, dtype = setup(device, dtype, seed)
    folder = find_checkpoint(init_from)
    sampler = Sampler(Transformer.from_pretrained(folder, device, dtype), load_tokenizer(folder), dtype=dtype, condition=condition)
    if not start and sys.stdin.isatty():
        print('a question a line; Ctrl-D ends')
    for text in [start] if start else (line.strip() for line in sys.stdin):
        if text:
            prompt = text if raw else rewards.prompt(text)
            room = sampler.model.config.block_size - len(sampler.tokenizer.encode_prompt(prompt)) - len(sampler.label)
            for sample in sampler.generate([prompt], k, min(max_new_tokens, max(1, room)), temperature, top_k, top_p, stop, seed):
                print((text if raw else '') + sampler.tokenizer.decode(sample.ids) + ('' if sample.finished else ' [budget ended]'))
                print('-' * 20)
