"""
The Transformer and its life: one decoder that covers the GPT-2 and the Llama families, read from and written to Hugging
Face checkpoints, with its key-value cache, optimizer, device set-up and checkpoints.

A model is a list of blocks, each x + attention(norm(x)) followed by x + mlp(norm(x)); ModelConfig says which norm, which
mlp and which positions. Everything that differs between GPT-2, Llama, Mistral, Qwen2 and Qwen3 is one of its fields.

Under torchrun every process runs the same script in lockstep: each has the same numbers in hand (questions, samples, rewards) and does
its share of what is expensive, which is drawing samples and passing batches through models.

$ python model.py --init_from=out/demo_sft     # prints a checkpoint's shape and parameter count
$ python model.py --bench                      # what this machine's matrix products and memory reach
"""
import atexit
import ctypes
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
import uuid
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint

from config import RANK, SEVERAL, UserError, override, stop_asked

# -----------------------------------------------------------------------------
# settings, for running this file as a script
init_from = ''   # a checkpoint: a folder or a hub name
bench = False    # measure what this machine reaches: matrix products in fp32 and bf16, and copies
device = 'auto'  # of the measurement
# -----------------------------------------------------------------------------

FAMILIES = ('gpt2', 'llama', 'mistral', 'qwen2', 'qwen3')  # Hugging Face's model_type, which is also the form of export


@dataclass
class ModelConfig:
    """The shape of a Transformer. The defaults are a small Llama."""
    family: str = 'llama'        # one of FAMILIES
    vocab_size: int = 512        # rows of the embedding; may exceed the tokenizer's, the rest is never sampled
    block_size: int = 256        # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4           # < n_head: grouped-query attention
    n_embd: int = 128
    head_dim: int = 32
    n_inner: int = 384           # width of the mlp
    norm_eps: float = 1e-5
    activation: str = 'silu'     # 'silu': gated (SwiGLU); 'gelu' and 'gelu_tanh': the plain GPT-2 mlp
    rope_theta: float = 10000.0  # base of the rotary frequencies; 0: learned positions (GPT-2)
    rope_scaling: dict | None = None  # Hugging Face's dictionary, rope_type 'linear' or 'llama3'
    norm: str = 'rms'            # 'rms' or 'layer'
    qkv_bias: bool = False
    out_bias: bool = False       # bias of attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False        # RMSNorm over each head's query and key (Qwen3)
    tied: bool = True            # the output projection is the embedding


# -----------------------------------------------------------------------------
# processes. Each of these is a plain pass-through where there is but one.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_main(f):
    """f() of process 0, for all: what it reads from files that it also writes must not be read by others at another moment."""
    if world_size() == 1:
        return f()
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = f()
        except Exception as error:  # for all: else the others would wait for ever
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def wait_for_main():
    """Until process 0 has come here, too: what it has written before can be read then."""
    from_main(lambda: None)


def from_all(x):
    """[x of process 0, x of process 1, ...] for all."""
    if world_size() == 1:
        return [x]
    found = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


def sum_over_processes(tensor):
    """In place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def asked_to_stop():
    """Whether a signal has asked any of the processes to stop after the step at hand; then all of them do."""
    return bool(sum_over_processes(torch.tensor(float(stop_asked()))))


# -----------------------------------------------------------------------------
# the network

class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 as in Llama, whatever the autocast type."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """GPT-2's, in fp32 likewise."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def make_norm(config):
    return (RMSNorm if config.norm == 'rms' else LayerNorm)(config.n_embd, config.norm_eps)


def rope_tables(config):
    """cos and sin, each (block_size, head_dim) fp32, sin with the signs that `rotate` wants: the angles of Su et al. 2021 (arXiv
    2104.09864), in the half-split layout of Hugging Face checkpoints, with Llama 3.1's scaling of the long wavelengths where the
    config asks for it."""
    inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling and scaling['rope_type'] == 'linear':
        inv_freq = inv_freq / scaling['factor']
    if scaling and scaling['rope_type'] == 'llama3':
        # short wavelengths stay, long ones are stretched by `factor`, those between are mixed linearly in frequency
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        turns = scaling['original_max_position_embeddings'] * inv_freq / (2 * math.pi)  # turns within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling['factor']
    angle = torch.outer(torch.arange(config.block_size).float(), inv_freq).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(config.head_dim // 2)
    return angle.cos(), angle.sin() * sign


def rotate(x, cos, sin):
    """Rotary positions: the halves (a, b) of a head become (a cos - b sin, b cos + a sin). x (B, H, T, D); cos, sin (B or 1, 1, T, D),
    where sin is negative in the first half."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q, k, v):
    """Causal attention, softmax(q k' / sqrt(D)) v. q (B, H, T, D); k, v (B, KV, T, D)."""
    (B, H, T, D), KV = q.shape, k.shape[1]
    if q.device.type != 'cpu' or T > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=KV != H)
    # On a CPU SDPA is slow for few queries: at a length of 75 plain matrix products make a whole training step 2.5 times faster.
    # The heads of a group are stacked as queries of their key head.
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = (q * D ** -0.5).reshape(B, KV, H // KV * T, D) @ k.transpose(-1, -2)
    scores = (scores.view(B, KV, H // KV, T, T) + mask).view(B, KV, H // KV * T, T)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(B, H, T, D)


class Linear(nn.Linear):
    """A linear layer, whose weight can also stand in memory as a CPU's kernels want it: see Transformer.packed."""
    packed = None

    def forward(self, x):
        if self.packed is None:
            return super().forward(x if torch.is_autocast_enabled(x.device.type) else x.to(self.weight.dtype))
        bias = None if self.bias is None else self.bias.to(self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, bias, 'none', [], '')


class LoRALinear(Linear):
    """A linear layer that stays as it is beside an adapter of low rank that learns (Hu et al. 2021, arXiv 2106.09685):
    W x + b + alpha / r * B A x. A (r, in) starts random and B (out, r) at zero, so that nothing is changed at first. One adapter for
    a matrix, and where matrices are concatenated (qkv, gate and up) one for all of them.

    An adapter stays beside its matrix wherever that is bf16: merged into it, what is below half of its last bit would be lost, which
    is most of what some updates at 1e-5 add. The sum is fp32 for the same reason. An adapter that a checkpoint came with (fixed) does
    not learn, and a second one can."""

    def __init__(self, linear):
        with torch.device('meta'):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.adapting = True

    def add(self, r, alpha):
        """The adapter that learns."""
        device, self.scale = self.weight.device, alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, self.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, r, device=device))

    def fix(self, r):
        """Makes room for a checkpoint's adapter, whose B holds its scale."""
        for name, shape in (('fixed_a', (r, self.in_features)), ('fixed_b', (self.out_features, r))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=self.weight.device), requires_grad=False))

    def adapters(self):
        """[(A, B, scale)] of those that count."""
        fixed = [(self.fixed_a, self.fixed_b, 1.0)] if hasattr(self, 'fixed_a') else []
        return fixed + ([(self.lora_a, self.lora_b, self.scale)] if hasattr(self, 'lora_a') and self.adapting else [])

    def forward(self, x):
        y = super().forward(x).float()  # also where no adapter counts: a fresh one must change nothing
        for a, b, scale in self.adapters():
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).float() * scale
        return y


class ScalarHead(nn.Linear):
    """(..., C) -> (...) in fp32: a value function, or a reward model's score before the logistic function. No matrix product, which a
    GPU may compute in TF32."""

    def forward(self, x):
        return (x.float() * self.weight[0]).sum(-1) + self.bias


class Packing:
    """The tokens of a padded table without the padding: cells (N,) are their places in the (B, T) table, ascending. Everything
    but attention is computed for (N, C) packed tokens; attention spreads them out, since there they stand in rows."""

    def __init__(self, cells, B, T):
        self.cells, self.shape = cells, (B, T)
        # An empty cell gets the last token before it, whatever that is: it stands on the right of its row, where causal attention
        # keeps it from the others, and its own output is not packed again. (Copies into zeros take 2 to 5 times as long as this.)
        self.source = torch.searchsorted(cells, torch.arange(B * T, device=cells.device), right=True).sub_(1).clamp_(min=0)

    def pack(self, table):
        """(B, T, C) -> (N, C)"""
        return table.flatten(0, 1).index_select(0, self.cells)

    def unpack(self, x):
        """(N, C) -> (B, T, C)"""
        return x.index_select(0, self.source).view(*self.shape, -1)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; x (B, T, C) -> (B, T, C), or with a packing x (N, C) -> (N, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.split = (width, kv_width, kv_width)
        self.qkv = Linear(config.n_embd, width + 2 * kv_width, bias=config.qkv_bias)  # one matrix product for the three
        self.out = Linear(width, config.n_embd, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, cache, packing):
        x = self.qkv(x)
        if packing is not None:
            x = packing.unpack(x)
        B, T, _ = x.shape
        q, k, v = x.split(self.split, dim=-1)
        q = self.q_norm(q.view(B, T, self.n_head, self.head_dim)).transpose(1, 2)     # (B, H, T, D)
        k = self.k_norm(k.view(B, T, self.n_kv_head, self.head_dim)).transpose(1, 2)  # (B, KV, T, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim)
        return self.out(y if packing is None else packing.pack(y))


class MLP(nn.Module):
    """SwiGLU, out(silu(gate x) * up x), with gate and up in one matrix; or GPT-2's out(gelu(up x))."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        width = config.n_inner * (2 if config.activation == 'silu' else 1)
        self.up = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.out = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        x = self.up(x)
        if self.activation == 'silu':
            gate, x = x.chunk(2, dim=-1)
            return self.out(F.silu(gate) * x)
        return self.out(F.gelu(x, approximate='tanh' if self.activation == 'gelu_tanh' else 'none'))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1, self.attention = make_norm(config), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope, cache, packing):
        x = x + self.attention(self.norm1(x), rope, cache, packing)
        return x + self.mlp(self.norm2(x))


PROMPT_MULTIPLE = 16  # of tokens to which a cache pads its prompts


def round_up(n, multiple):
    return -(-n // multiple) * multiple


def cache_block(device):
    """(slots for tokens that a cache adds at a time, what the number of slots that are read of the last of these blocks is a multiple of).
    A GPU reads a part of a block as fast as a dense one, and each block costs it some launches more; a CPU is slow with parts."""
    return (32, 32) if torch.device(device).type == 'cpu' else (256, 64)


def cache_bytes(config, n_prompts, longest, rows, max_new_tokens, dtype, device='cpu'):
    """What KVCache takes at most: n_prompts of at most `longest` tokens, and rows samples of at most max_new_tokens."""
    slots = n_prompts * round_up(longest, PROMPT_MULTIPLE) + rows * round_up(max_new_tokens, cache_block(device)[0])
    return slots * 2 * config.n_layer * config.n_kv_head * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of samples that started together, so that all have equally many tokens of their own. First its prompts are
    read (filling), then a token of every sample at a time (start, and before each token next_token).

    Prompts are kept once, however many samples they have: prompt_k[layer] (P, n_kv_head, head_dim, longest), prompt_v[layer] (P,
    n_kv_head, longest, head_dim), padded on the right to a multiple of 16. In a decoding step a prompt's keys are read once for all of
    its samples, as one matrix product. The samples' own tokens are in blocks, k[layer][b] and v[layer][b] (rows, n_kv_head, block,
    head_dim), that are added as they are needed: dense tensors, since a CPU's matrix products read a slice of a longer one 2 to 10
    times slower. That the prompts' keys lie ready for the product halves its time.

    On a CPU batched products of a single query are slow: 20 GB/s in fp32, 12 in bf16. An embedding bag, the weighted sum of a table's
    rows, computes the same at 30 to 40, nearly what the memory gives. So where each query head has a key head of its own (bags), values are
    summed like that, and keys are once their block is full and is turned (rows, n_kv_head, head_dim, block). Where several queries read
    the same keys, products are as good; which of them depends on the type: in fp32 keys @ query takes 0.7 of the time of query @ keys',
    in bf16 weights @ values 0.4 of it if head_dim lies before the block's slots in memory (values_turned)."""

    def __init__(self, config, lengths, device, dtype):
        """lengths: (P,) of the prompts. They are filled by trunk(ids, cache=cache), some rows at a time: see `filling`."""
        P, KV, D, on_cpu = len(lengths), config.n_kv_head, config.head_dim, torch.device(device).type == 'cpu'
        longest = round_up(int(lengths.max()), PROMPT_MULTIPLE)
        self.lengths = lengths.to(device)
        self.block_size, self.read_multiple = cache_block(device)
        self.prompt_k = [torch.zeros(P, KV, D, longest, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.prompt_v = [torch.zeros(P, KV, longest, D, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.bags = on_cpu and config.n_head == KV
        self.keys_first = on_cpu and dtype == torch.float32
        self.values_turned = on_cpu and dtype != torch.float32 and not self.bags
        self.slices = on_cpu        # new tokens go into a slice, which takes half the time there; a recorded step needs the slot in a tensor
        self.filling = slice(None)  # the prompts that trunk reads now; None: it reads a token of every sample

    def start(self, source):
        """From now on trunk reads samples. source: (rows,) the number of each one's prompt, ascending."""
        self.filling, self.used = None, 0
        self.k, self.v = [[] for _ in self.prompt_k], [[] for _ in self.prompt_v]
        self.slot = torch.zeros(1, dtype=torch.long, device=source.device)  # in the last block, of the token that is read
        self._place(source)

    def next_token(self):
        """Makes room for one more token of every sample. Returns whether attend now computes with other tensors or shapes than before;
        if not, the same kernels on the same memory read the next token, since its slot stands in a tensor."""
        slot = self.used % self.block_size
        if slot == 0:  # zeros: what is not filled yet is multiplied by 0
            rows, (_, KV, D, _), like = len(self.source), self.prompt_k[0].shape, self.prompt_k[0]
            for k, v in zip(self.k, self.v):
                if self.bags and k:
                    k[-1] = k[-1].mT.contiguous()  # now that it is full
                k.append(like.new_zeros(rows, KV, self.block_size, D))
                v.append(like.new_zeros((rows, KV, D, self.block_size) if self.values_turned else (rows, KV, self.block_size, D)))
        self.slot.fill_(slot)
        self.next_slot = slice(slot, slot + 1) if self.slices else self.slot
        self.used += 1
        self.n_read = round_up(slot + 1, self.read_multiple)  # slots of the last block
        return slot % self.read_multiple == 0

    def select(self, rows):
        """Keeps the given rows (ascending): finished ones leave, and prompts without any."""
        for blocks in self.k + self.v:  # a layer's old ones go before the next layer's are copied
            blocks[:] = [block.index_select(0, rows) for block in blocks]
        source = self.source[rows]
        prompts, renumbered = source.unique(return_inverse=True)
        if len(prompts) <= 0.7 * len(self.lengths):  # not for each of them: it is a copy
            for tensors in (self.prompt_k, self.prompt_v):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = tensor.index_select(0, prompts)
            self.lengths, source = self.lengths[prompts], renumbered
        self._place(source)

    def _place(self, source):
        """Where each row's key heads stand in a (P, n_kv_head, width) table of the prompts' samples, and what stands in its cells."""
        device, P, KV, rows = source.device, len(self.lengths), self.prompt_k[0].shape[1], len(source)
        count = source.bincount(minlength=P)
        first = count.cumsum(0) - count
        self.source, self.width = source, int(count.max())
        heads = torch.arange(KV, device=device)
        number = torch.arange(rows, device=device) - first[source]                     # of a row among its prompt's
        self.place = ((source[:, None] * KV + heads) * self.width + number[:, None]).flatten()
        cells = (first[:, None] + torch.arange(self.width, device=device)).clamp_(max=rows - 1)  # in a gap any row: nobody reads the result
        self.cells = (cells[:, None] * KV + heads[:, None]).flatten()
        self.numbers = torch.arange(rows * KV * max(self.block_size, self.prompt_k[0].shape[2]) if self.bags else 0, dtype=torch.int32)
        padding = torch.arange(self.prompt_v[0].shape[2], device=device) >= self.lengths[source][:, None]
        self.prompt_mask = torch.zeros(padding.shape, device=device).masked_fill_(padding, -torch.inf)

    def _by_prompt(self, x):
        """(rows, KV, G, N) -> (P, KV, width * G, N)"""
        rows, KV, G, N = x.shape
        return x.reshape(rows * KV, G * N).index_select(0, self.cells).view(-1, KV, self.width * G, N)

    def _by_row(self, x, G):
        """(P, KV, width * G, N) -> (rows, KV, G, N)"""
        _, KV, _, N = x.shape
        return x.view(-1, G * N).index_select(0, self.place).view(-1, KV, G, N)

    def _scores(self, q, keys):
        """q @ keys'"""
        return (keys @ q.mT).mT if self.keys_first else q @ keys.mT

    def _bags(self, x, tables):
        """x @ tables: x (rows, KV, 1, N), tables (rows, KV, N, W), dense."""
        rows, KV, N, W = tables.shape
        every, starts = self.numbers[:rows * KV * N], self.numbers[:rows * KV] * N  # of the tables' rows
        return F.embedding_bag(every, tables.view(-1, W), starts, mode='sum', per_sample_weights=x.reshape(-1)).view(rows, KV, 1, W)

    def attend(self, layer, q, k, v):
        """Keeps the new keys and values, k and v (B, KV, T, D), and attends to all there are. q (B, H, T, D)."""
        q, k, v = (x.to(self.prompt_k[layer].dtype) for x in (q, k, v))  # adapters add in fp32
        if self.filling is not None:
            self.prompt_k[layer][self.filling, :, :, :k.shape[2]] = k.mT
            self.prompt_v[layer][self.filling, :, :k.shape[2]] = v
            return attend(q, k, v)
        (rows, H, _, D), KV = q.shape, k.shape[1]
        own_k, own_v = self.k[layer], [values.mT if self.values_turned else values for values in self.v[layer]]
        own_k[-1][:, :, self.next_slot] = k
        own_v[-1][:, :, self.next_slot] = v
        sizes = [self.prompt_mask.shape[1]] + [self.block_size] * (len(own_k) - 1) + [self.n_read]
        if layer == 0:
            used = torch.zeros(rows, sum(sizes[1:-1]), device=q.device)
            last = torch.zeros(rows, self.n_read, device=q.device)
            last.masked_fill_(torch.arange(self.n_read, device=q.device) > self.slot, -torch.inf)
            self.mask = torch.cat((self.prompt_mask, used, last), -1)[:, None, None]    # (rows, 1, 1, slots)
        q = (q * D ** -0.5).reshape(rows, KV, H // KV, D)                               # the heads of a group, as queries of their key head
        scores = [self._by_row(self._by_prompt(q) @ self.prompt_k[layer], H // KV)]
        scores += [self._bags(q, keys) if self.bags else self._scores(q, keys) for keys in own_k[:-1]]
        scores += [self._scores(q, own_k[-1][:, :, :self.n_read])]
        p = torch.cat(scores, -1).add_(self.mask).softmax(-1).to(v.dtype)               # (rows, KV, G, slots)
        p, *own_p = p.split(sizes, -1)
        y = self._by_row(self._by_prompt(p) @ self.prompt_v[layer], H // KV)
        for p, values in zip(own_p, own_v):
            y += self._bags(p, values) if self.bags else p @ values[:, :, :p.shape[-1]]
        return y.view(rows, H, 1, D)


class Transformer(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V) in fp32. Dropout does not exist: RL needs the same policy when it samples and
    when it learns."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rope_theta:
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rope_tables(config)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        unnamed = {name for name, _ in self.named_parameters()} ^ set(hf_names(config))
        if unnamed:  # before any training: it could not be saved
            raise UserError(f'a {config.family} checkpoint cannot hold this model, for its {min(unnamed)}')
        self.value_head = None
        self.shard = 'none'              # how training is spread over processes: 'none', 'ddp' or 'fsdp'; see distribute
        self.grad_checkpointing = False  # keep a block's input alone for backward, and compute the rest again there

    def init_weights(self):
        """N(0, 1 / sqrt(fan in)), so that activations keep their size at any width (GPT-2's fixed 0.02 suits a width of 2,500 and
        makes a small model learn half as fast); half of that for the embedding, which tied makes the first logits; and the two
        matrices that write into the residual stream smaller by the square root of their number."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = p.shape[1] ** -0.5
                if name.endswith('out.weight'):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std / 2 if name.startswith(('embed', 'positions', 'head')) else std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        return self

    def trunk(self, ids, positions=None, cache=None, cells=None):
        """Final hidden states (B, T, C), after the last norm, with causal attention.

        ids: (B, T). positions: (B, T), by default 0 .. T - 1. cache: a KVCache, whose prompts or samples the ids go on with.
        cells: (N,) the numbers of those of the B * T cells that hold tokens, ascending, if not all do (sample.real_cells): no
        product with a weight is computed for the others, whose hidden states mean nothing."""
        B, T = ids.shape
        if positions is None:
            if T > self.config.block_size:
                raise UserError(f'{T} tokens exceed the context of {self.config.block_size}')
            positions = torch.arange(T, device=ids.device)[None]
        x, rope, packing = self.embed(ids).float(), None, None  # the residual stream is fp32, whatever the type of the weights
        if self.config.rope_theta:
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, D)
        else:
            x = x + self.positions(positions)
        if cells is not None:
            packing = Packing(cells, B, T)
            x = packing.pack(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, None, packing, use_reentrant=False)
            else:
                x = block(x, rope, cache, packing)
        x = self.norm(x)
        return x if packing is None else packing.unpack(x)

    def logits(self, hidden):
        """(..., C) -> (..., V), in fp32. Under bf16 the factors are rounded and the result is not: between 16 and 32 bf16 numbers are
        0.125 apart. TF32, where a GPU uses it for the fp32 product, holds the rounded factors exactly."""
        device, weight = hidden.device.type, self.head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if dtype == torch.float32:
            return self.head(hidden.float())
        x = hidden.to(dtype)
        with torch.autocast(device, enabled=False):
            if device == 'cuda' and not torch.is_grad_enabled():  # a product with an fp32 result has no derivative
                flat = torch.mm(x.flatten(0, -2), weight.to(dtype).t(), out_dtype=torch.float32)
                return flat.view(*x.shape[:-1], -1)
            if self.head.packed is not None:
                return self.head(x)
            return F.linear(x.float(), weight.to(dtype).float())

    def forward(self, ids, positions=None, cache=None):
        return self.logits(self.trunk(ids, positions, cache))

    def add_value_head(self):
        """A scalar per token beside the logits, which it leaves unchanged; zero at first, so that it predicts 0."""
        self.head_kind = 'value'  # what it was trained for: 'value', 'orm' or 'prm'; its file says so ('': an old one)
        self.value_head = ScalarHead(self.config.n_embd, 1, device=self.embed.weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        return self

    def add_tokens(self, first, count):
        """Makes the rows first .. first + count of the embedding and the output projection those of new tokens. Both grow where
        they are shorter, to a multiple of 64; rows that only padded them are taken. Each starts as the mean of the real rows."""
        def grown(weight):
            mean = weight[:first].float().mean(0).to(weight.dtype)
            new = mean.repeat(max(len(weight), math.ceil((first + count) / 64) * 64 if first + count > len(weight) else 0), 1)
            new[:first] = weight[:first]
            new[first + count:len(weight)] = weight[first + count:]
            return nn.Parameter(new)

        with torch.no_grad():
            self.embed.weight = grown(self.embed.weight)
            self.head.weight = self.embed.weight if self.config.tied else grown(self.head.weight)
        self.config.vocab_size = self.embed.num_embeddings = self.head.out_features = len(self.embed.weight)
        return self

    def values(self, hidden):
        """(..., C) -> (...), fp32: see ScalarHead."""
        return self.value_head(hidden)

    # ---- LoRA

    def add_lora(self, r, alpha=32.0):
        """Puts an adapter of rank r beside every matrix of the blocks, and freezes all else but the value head."""
        if r < 1:
            raise UserError('lora_rank must be at least 1, or 0 for none')
        self.requires_grad_(False)
        for name in self.adapted_names():
            self.adapted(name).add(r, alpha)
        for name, p in self.named_parameters():
            if name.endswith('lora_a') and not p.is_meta:
                p.data.copy_(initial_lora_a(name, p.shape))
        if self.value_head is not None:
            self.value_head.requires_grad_(True)
        return self

    def adapted_names(self):
        """The matrices that an adapter can stand beside."""
        return [name for name, m in self.named_modules() if isinstance(m, nn.Linear) and name.startswith('blocks')]

    def adapted(self, name):
        """The matrix of that name as a LoRALinear, which it becomes unless it is one."""
        linear = self.get_submodule(name)
        if not isinstance(linear, LoRALinear):
            path, _, part = name.rpartition('.')
            setattr(self.get_submodule(path), part, LoRALinear(linear))
        return self.get_submodule(name)

    def adapters(self):
        """{name of a matrix: (A, B)} in fp32 of all that its adapters add, B A; several adapters are one of their ranks' sum. Every
        process has to ask."""
        found = {}
        for name, m in self.named_modules():
            if isinstance(m, LoRALinear) and m.adapters():
                pairs = [(full(a).float(), full(b).float() * scale) for a, b, scale in m.adapters()]
                found[name] = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        return found

    @contextmanager
    def without_adapter(self):
        """Within it the model is what it was before add_lora: the reference of a KL penalty, without a second copy of the weights."""
        layers = [m for m in self.modules() if isinstance(m, LoRALinear)]
        for m in layers:
            m.adapting = False
        try:
            yield self
        finally:
            for m in layers:
                m.adapting = True

    # ---- decoding on a CPU

    @contextmanager
    def packed(self, dtype):
        """Within it linear layers use copies of their weights, in dtype and laid out for oneDNN, which else lays out a weight anew in every
        product: for few rows that takes as long as the product itself. It is 1.06 times as fast for 256 rows, 1.4 times for 16 and 2 times
        for one, and gives the same bits (where fast_cpu_matmul is on; else what another library's rounding gives). No gradients, and
        weights must not change; without effect where there are no such layouts to be had."""
        on_cpu = self.embed.weight.device.type == 'cpu'
        layers = [m for m in self.modules() if isinstance(m, Linear)] if on_cpu and can_pack(dtype) else []
        try:
            for m in layers:
                weight = m.weight.detach().to(dtype)
                if m is self.head:  # see logits
                    weight = weight.float()
                m.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 256)  # rows to be expected
            yield self
        finally:
            for m in layers:
                vars(m).pop('packed', None)  # as if it had never been there, for what torch.compile made before

    # ---- several processes

    def distribute(self, shard, dtype=torch.float32, device='cpu'):
        """Says how this model learns on several processes, before its optimizer is made. 'ddp': each has all weights, and gradients are
        summed after backward (finish_gradients). 'fsdp': PyTorch's FSDP2; each has 1 / n of every weight, gradient and optimizer state
        in fp32, gathers a block's weights in dtype when it is computed, and sums gradients in fp32."""
        self.shard = shard
        if shard == 'fsdp':
            from torch.distributed.device_mesh import init_device_mesh  # half a second to import, and needed here alone
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
            # A block's inputs stay as they are, the angles of rotary positions above all: autocast casts what goes into a product.
            policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32,
                                          cast_forward_inputs=False)
            mesh = init_device_mesh(torch.device(device).type, (world_size(),))
            if self.value_head is not None:
                fully_shard(self.value_head, mesh=mesh)  # in fp32, whatever the rest is computed in
            for module in (*self.blocks, self):
                # True for the root, too: else its weights stay gathered after a pass without a backward, and a state would miss them
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            register_fsdp_forward_method(self, 'run')
        return self

    def run(self, f, *args, **kwargs):
        """f(self, *args): passes through a model that learns go through here, so that FSDP gathers the weights for them."""
        return f(self, *args, **kwargs)

    @torch.no_grad()
    def for_sampling(self, dtype):
        """This model as one that each process can draw from on its own, in dtype, with its adapters beside the weights: itself if it is that,
        else a copy that is gathered once. Nothing is exchanged while samples are drawn, since processes end at different steps."""
        weights = {name: p for name, p in self.named_parameters() if not name.startswith('value_head')}
        if self.shard != 'fsdp' and dtype == self.embed.weight.dtype:
            same_everywhere(bit_sum(weights.values()))
            return self
        adapters = self.adapters()
        with torch.device('meta'):
            copy = Transformer(self.config).to(dtype)
            for name, (a, _) in adapters.items():
                copy.adapted(name).fix(len(a))
        copy = copy.to_empty(device=self.embed.weight.device).finish_loading().requires_grad_(False)
        for name, p in copy.named_parameters():
            if name in weights and 'fixed_' not in name:
                p.copy_(full(weights[name]))
        for name, (a, b) in adapters.items():
            copy.get_submodule(name).fixed_a.copy_(a)
            copy.get_submodule(name).fixed_b.copy_(b)
        same_everywhere(bit_sum(copy.parameters()))
        if self.shard == 'fsdp':  # what was gathered is what learns
            plain = [name for name, _ in copy.named_parameters() if 'fixed_' not in name]
            held = bit_sum(weights[name].to_local().to(dtype) for name in plain)
            if sum_over_processes(torch.tensor(held)).item() != bit_sum(copy.get_parameter(name) for name in plain):
                raise RuntimeError('the copy of the weights for sampling is not what the processes hold')
        return copy

    def flops(self, lengths, n_logits):
        """Floating-point operations of a forward pass over sequences of these lengths, with logits for n_logits of their tokens."""
        c, n = self.config, sum(lengths)
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name.startswith('blocks'))
        attention = 2 * c.n_layer * c.n_head * c.head_dim * sum(length ** 2 for length in lengths)  # half of the pairs, two products
        return 2 * matrices * n + attention + 2 * c.n_embd * c.vocab_size * n_logits

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    # ---- checkpoints in Hugging Face's form

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, path, device='cpu', dtype=torch.float32, *, value_head=False, lora_rank=0, lora_alpha=32.0, shard='none',
                        product_dtype=torch.float32, merge=False):
        """Reads a Hugging Face checkpoint: a folder, a run's folder (its best/), or a hub name. Each weight goes straight from the
        memory-mapped file into its place, cast to dtype, and with 'fsdp' a process reads its own part of it alone, so that no whole copy
        is ever in memory. value_head, lora_rank: adds what the checkpoint does not have. shard: 'auto', 'none', 'ddp' or 'fsdp', the
        last with products in product_dtype. merge: bf16 weights, too, take an adapter in. UserError where the checkpoint is missing,
        broken or not covered."""
        folder = find_checkpoint(path)
        config = config_from_hf(read_json(os.path.join(folder, 'config.json')), folder)
        tensors = read_weights(folder)
        embedding, head = hf_names(config)['embed.weight'][0][0], tensors.get('lm_head.weight')
        if config.tied and head is not None:  # the file is right, not the config, as in transformers
            config.tied = torch.equal(tensors.setdefault(embedding, head).to(head.dtype), head)
        value_file = os.path.join(folder, 'value_head.safetensors')
        # Weights in fp32 take an adapter in; beside those in bf16 it stays.
        adapter_file = os.path.join(folder, 'adapter.safetensors')
        beside = dtype == torch.bfloat16 and not merge and os.path.exists(adapter_file)
        adapters = load_file(adapter_file) if beside else {}
        with torch.device('meta'):  # no memory and no time for an initialisation that the checkpoint overwrites
            model = cls(config).to(dtype)
            if value_head or os.path.exists(value_file):
                model.add_value_head()
            for name in model.adapted_names():
                if f'{name}.fixed_a' in adapters:
                    model.adapted(name).fix(len(adapters[f'{name}.fixed_a']))
            own = {name: p.shape for name, p in model.named_parameters() if 'fixed_' in name}
            if own != {name: a.shape for name, a in adapters.items()}:
                raise UserError(f'{adapter_file}: adapters of another model')
            if lora_rank:
                model.add_lora(lora_rank, lora_alpha)
        model.distribute(sharding(shard, model, torch.device(device)), product_dtype, device)
        model.to_empty(device=device).finish_loading()

        for name, (sources, transpose) in hf_names(config).items():
            missing = [s for s in sources if s not in tensors]
            if missing:
                raise UserError(f'{folder}: the checkpoint has no {missing[0]}')
            parts = [tensors.pop(s) for s in sources]
            weight = torch.cat([p.t() if transpose else p for p in parts]) if len(parts) > 1 or transpose else parts[0]
            wanted = model.get_parameter(name).shape
            if weight.shape != wanted:
                raise UserError(f'{folder}: {name} has shape {tuple(weight.shape)}, the config asks for {tuple(wanted)}')
            matrix = name.removesuffix('.weight')
            if f'{matrix}.fixed_a' in adapters:  # what the file holds is merged
                a, b = (adapters[f'{matrix}.{part}'].double() for part in ('fixed_a', 'fixed_b'))
                weight = weight.double() - b @ a  # in fp64: the same bf16 weights whatever the order of additions
            fill(model.get_parameter(name), weight)
        # what may be left over: buffers that old files carry, and the copy of a tied output projection
        ignorable = ('.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq') + (('lm_head.weight',) if config.tied else ())
        left = [name for name in tensors if not name.endswith(ignorable)]
        if left:
            raise UserError(f'{folder}: weights that a {config.family} model has no place for: {", ".join(left[:3])}')
        saved_head = {}
        if os.path.exists(value_file):
            saved_head = load_file(value_file)
            with safe_open(value_file, framework='pt') as f:
                model.head_kind = (f.metadata() or {}).get('kind', '')
        for name, p in model.named_parameters():
            if name.startswith('value_head'):
                fill(p, saved_head.get(name.removeprefix('value_head.'), torch.zeros(p.shape)))
            elif name in adapters:
                fill(p, adapters[name])
            elif name.endswith('lora_a'):
                fill(p, initial_lora_a(name, p.shape))
            elif name.endswith('lora_b'):
                fill(p, torch.zeros(p.shape))
        return model if lora_rank else model.requires_grad_(True)

    def finish_loading(self):
        """After to_empty: what no checkpoint holds."""
        if self.config.tied:
            self.head.weight = self.embed.weight
        if self.config.rope_theta:
            self.cos, self.sin = (table.to(self.embed.weight.device) for table in rope_tables(self.config))
        return self

    @torch.no_grad()
    def save_pretrained(self, path, tokenizer=None):
        """Writes a folder that AutoModelForCausalLM (and with a tokenizer AutoTokenizer) loads, whole or not at all. Adapters are merged
        in fp32 for others, and stand in adapter.safetensors for from_pretrained. Process 0 writes; the others have to call it too."""
        own, tensors, adapters = dict(self.named_parameters()), {}, self.adapters()
        dtype = torch.float32 if adapters else self.embed.weight.dtype
        for name, (targets, transpose) in hf_names(self.config).items():
            weight = full(own[name])
            if rank() == 0:
                weight = weight.cpu().to(dtype)
                if name.removesuffix('.weight') in adapters:
                    a, b = (x.cpu().double() for x in adapters[name.removesuffix('.weight')])
                    weight = (weight.double() + b @ a).to(dtype)
                sizes = [len(weight)] if len(targets) == 1 else part_sizes(self.config, name)
                for target, part in zip(targets, weight.split(sizes)):
                    part = part.clone() if len(sizes) > 1 else part  # parts of one storage cannot be saved
                    tensors[hf_prefix(self.config, target)] = part.t().contiguous() if transpose else part
        head = {name.removeprefix('value_head.'): full(p).float().cpu() for name, p in own.items() if name.startswith('value_head')}
        if rank() > 0:
            return
        tmp = path.rstrip('/') + '.tmp'
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
            save_file(tensors, os.path.join(tmp, 'model.safetensors'), metadata={'format': 'pt'})
            if head:  # in a file of its own: AutoModelForCausalLM knows no such weight
                save_file(head, os.path.join(tmp, 'value_head.safetensors'), metadata={'kind': self.head_kind})
            if adapters:
                parts = {f'{name}.{part}': x.cpu() for name, pair in adapters.items() for part, x in zip(('fixed_a', 'fixed_b'), pair)}
                save_file(parts, os.path.join(tmp, 'adapter.safetensors'))
            if tokenizer is not None:
                tokenizer.save(tmp)
            hf = config_to_hf(self.config, str(dtype).removeprefix('torch.'))
            if tokenizer is not None:
                hf['eos_token_id'] = tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.eos
            with open(os.path.join(tmp, 'config.json'), 'w') as f:
                json.dump(hf, f, indent=2)
            replace_folder(tmp, path)
        except Exception as error:  # a full disk, most often; each writer has its own exception for it
            shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(f'{path}: not written ({first_line(error)}); what was there is whole') from None


def initial_lora_a(name, shape):
    """Uniform within 1 / sqrt(in), the same in every process; by the name, so that it does not depend on an order."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), 'little'))
    return (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5


def is_sharded(tensor):
    """Whether it is a DTensor, of which this process holds a part. (The class itself takes a third of a second to import.)"""
    return hasattr(tensor, 'full_tensor')


def full(parameter):
    """A parameter's whole value, whatever process holds which part of it; every process has to ask."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()


def fill(parameter, weight):
    """Copies a whole weight into a parameter, or into the part of it (rows, as torch.chunk divides them) that this process holds."""
    if is_sharded(parameter):
        parts = weight.chunk(world_size())
        weight, parameter = parts[rank()] if rank() < len(parts) else weight[:0], parameter.to_local()
    parameter.copy_(weight)


def bit_sum(tensors):
    """A checksum: the sum of the tensors' bits as integers, which no order of summation changes."""
    return sum(t.detach().view(torch.int16 if t.dtype == torch.bfloat16 else torch.int32).sum(dtype=torch.int64).item() for t in tensors)


def same_everywhere(number):
    if len(set(from_all(number))) > 1:
        raise RuntimeError('the processes have different weights')


# -----------------------------------------------------------------------------
# Hugging Face names, configs and files

def hf_names(config):
    """{our parameter: ((Hugging Face's parameters that it concatenates), transposed there)}; the one map of both ways."""
    names = {}
    if config.family == 'gpt2':
        names['embed.weight'], names['positions.weight'] = (('wte.weight',), False), (('wpe.weight',), False)
        for i in range(config.n_layer):
            for ours, theirs, is_matrix in (('norm1', 'ln_1', False), ('attention.qkv', 'attn.c_attn', True),
                                            ('attention.out', 'attn.c_proj', True), ('norm2', 'ln_2', False),
                                            ('mlp.up', 'mlp.c_fc', True), ('mlp.out', 'mlp.c_proj', True)):
                for part in ('weight', 'bias'):  # GPT-2's Conv1D holds (in, out) where a Linear holds (out, in)
                    names[f'blocks.{i}.{ours}.{part}'] = ((f'h.{i}.{theirs}.{part}',), is_matrix and part == 'weight')
        names['norm.weight'], names['norm.bias'] = (('ln_f.weight',), False), (('ln_f.bias',), False)
    else:
        names['embed.weight'] = (('embed_tokens.weight',), False)
        for i in range(config.n_layer):
            def add(ours, part, *theirs):
                names[f'blocks.{i}.{ours}.{part}'] = (tuple(f'layers.{i}.{t}.{part}' for t in theirs), False)
            add('norm1', 'weight', 'input_layernorm')
            add('norm2', 'weight', 'post_attention_layernorm')
            for part, has_qkv, has_out, has_mlp in (('weight', True, True, True),
                                                    ('bias', config.qkv_bias, config.out_bias, config.mlp_bias)):
                if has_qkv:
                    add('attention.qkv', part, 'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj')
                if has_out:
                    add('attention.out', part, 'self_attn.o_proj')
                if has_mlp:
                    add('mlp.up', part, *['mlp.gate_proj'] * (config.activation == 'silu'), 'mlp.up_proj')
                    add('mlp.out', part, 'mlp.down_proj')
            if config.qk_norm:
                add('attention.q_norm', 'weight', 'self_attn.q_norm')
                add('attention.k_norm', 'weight', 'self_attn.k_norm')
        names['norm.weight'] = (('norm.weight',), False)
    if not config.tied:
        names['head.weight'] = (('lm_head.weight',), False)
    return names


def part_sizes(config, name):
    """Rows of each Hugging Face matrix within our concatenated one."""
    kv = config.n_kv_head * config.head_dim
    return (config.n_head * config.head_dim, kv, kv) if '.qkv.' in name else (config.n_inner, config.n_inner)


def hf_prefix(config, name):
    if name == 'lm_head.weight':
        return name
    return ('transformer.' if config.family == 'gpt2' else 'model.') + name


def config_from_hf(hf, source='config.json'):
    """A ModelConfig from config.json's dictionary; UserError, by name, for whatever this Transformer does not cover."""
    def refuse(what):
        raise UserError(f'{source}: {what} is not covered (this code knows {", ".join(FAMILIES)})')

    own = hf.get('nanoreason')
    if hf.get('model_type') == 'nanoreason' and isinstance(own, dict) and 'family' in own:  # see config_to_hf
        for key in set(own) - set(asdict(ModelConfig())):
            refuse(f'the setting {key!r}')
        return replace(config_from_hf(hf | {'model_type': own['family']}, source), **own)
    hf = {key: value for key, value in hf.items() if value is not None}
    family = hf.get('model_type')
    if family not in FAMILIES:
        refuse(f'the architecture {family!r}')
    if hf.get('quantization_config'):
        refuse('a quantized checkpoint')
    try:
        if family == 'gpt2':
            activations = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
            activation = hf.get('activation_function', 'gelu_new')
            if activation not in activations:
                refuse(f'activation_function {activation!r}')
            if not hf.get('scale_attn_weights', True) or hf.get('scale_attn_by_inverse_layer_idx') or hf.get('add_cross_attention'):
                refuse('this variant of GPT-2 attention')
            C, H = hf['n_embd'], hf['n_head']
            return ModelConfig(
                family='gpt2', vocab_size=hf['vocab_size'], block_size=hf['n_positions'], n_layer=hf['n_layer'], n_head=H,
                n_kv_head=H, n_embd=C, head_dim=C // H, n_inner=hf.get('n_inner') or 4 * C, norm='layer', rope_theta=0.0,
                norm_eps=hf.get('layer_norm_epsilon', 1e-5), activation=activations[activation], qkv_bias=True, out_bias=True,
                mlp_bias=True, tied=hf.get('tie_word_embeddings', True))

        if hf.get('hidden_act', 'silu') != 'silu':
            refuse(f'hidden_act {hf["hidden_act"]!r}')
        rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # transformers 5, or 4
        rope = {key: value for key, value in rope.items() if value is not None}
        rope_type = rope.setdefault('rope_type', rope.pop('type', 'default'))
        theta = rope.pop('rope_theta', None) or hf.get('rope_theta', 10000.0)
        needed = {'default': (), 'linear': ('factor',),
                  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor')}
        if rope_type not in needed:
            refuse(f'rope scaling {rope_type!r}')
        for key in needed[rope_type]:
            if key not in rope:
                raise UserError(f'{source}: rope scaling {rope_type!r} without {key!r}')
        if rope_type == 'llama3':
            rope.setdefault('original_max_position_embeddings', hf['max_position_embeddings'])
        if rope.get('partial_rotary_factor', hf.get('partial_rotary_factor', 1.0)) != 1.0:
            refuse('partial rotary positions')
        H, block_size = hf['num_attention_heads'], hf['max_position_embeddings']
        # Within the window, sliding-window attention is full attention; so the window is the longest context we promise.
        if hf.get('sliding_window') and (family == 'mistral' or hf.get('use_sliding_window')):
            block_size = min(block_size, hf['sliding_window'])
        bias = bool(hf.get('attention_bias', False))
        return ModelConfig(
            family=family, vocab_size=hf['vocab_size'], block_size=block_size, n_layer=hf['num_hidden_layers'], n_head=H,
            n_kv_head=hf.get('num_key_value_heads') or H, n_embd=hf['hidden_size'],
            head_dim=hf.get('head_dim') or hf['hidden_size'] // H, n_inner=hf['intermediate_size'],
            norm_eps=hf.get('rms_norm_eps', 1e-6), rope_theta=float(theta), rope_scaling=None if rope_type == 'default' else rope,
            qkv_bias=True if family == 'qwen2' else bias, out_bias=False if family == 'qwen2' else bias,
            mlp_bias=bool(hf.get('mlp_bias', False)), qk_norm=family == 'qwen3', tied=bool(hf.get('tie_word_embeddings', False)))
    except KeyError as missing:
        raise UserError(f'{source}: the config has no {missing}') from None


def config_to_hf(config, dtype):
    """config.json's dictionary, in the keys of transformers 4 and 5. Where Hugging Face's form has no room for a
    field, the field is kept under 'nanoreason', which is then the model's type, too: it is no plain Llama."""
    hf = family_to_hf(config, dtype)
    held = asdict(config_from_hf(hf))
    own = {key: value for key, value in asdict(config).items() if value != held[key]}
    return hf | {'model_type': 'nanoreason', 'nanoreason': own | {'family': config.family}} if own else hf


def family_to_hf(c, dtype):
    """The fields that Hugging Face's form of the family has."""
    if c.family == 'gpt2':
        return dict(model_type='gpt2', architectures=['GPT2LMHeadModel'], vocab_size=c.vocab_size, n_positions=c.block_size,
                    n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_inner=c.n_inner, layer_norm_epsilon=c.norm_eps,
                    activation_function='gelu_new' if c.activation == 'gelu_tanh' else 'gelu', tie_word_embeddings=c.tied,
                    bos_token_id=None, eos_token_id=None, torch_dtype=dtype)
    hf = dict(model_type=c.family, vocab_size=c.vocab_size, max_position_embeddings=c.block_size, num_hidden_layers=c.n_layer,
              num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, hidden_size=c.n_embd, head_dim=c.head_dim,
              intermediate_size=c.n_inner, rms_norm_eps=c.norm_eps, hidden_act='silu', tie_word_embeddings=c.tied,
              rope_theta=c.rope_theta, rope_parameters={'rope_type': 'default', **(c.rope_scaling or {}), 'rope_theta': c.rope_theta},
              bos_token_id=None, eos_token_id=None, torch_dtype=dtype)
    if c.rope_scaling:
        hf['rope_scaling'] = c.rope_scaling
    hf['architectures'] = [{'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[c.family] + 'ForCausalLM']
    if c.family in ('llama', 'qwen3'):
        hf['attention_bias'] = c.out_bias
    if c.family == 'llama':
        hf['mlp_bias'] = c.mlp_bias
    if c.family == 'mistral':
        hf['sliding_window'] = None
    return hf


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: not readable as JSON ({error})') from None


def refuse_missing_folder(path):
    """UserError for what is not there and, by its looks, no name to ask the hub for, which offline takes most of a minute."""
    if not os.path.isdir(path) and (path.count('/') > 1 or path.startswith(('.', '/', 'out/'))):
        raise UserError(f'{path}: no such checkpoint')


def download(path, *patterns):
    """Fetches the settings, the tokenizer and what else fits one of the patterns from a hub; returns the folder."""
    refuse_missing_folder(path)
    from huggingface_hub import snapshot_download  # slow to import, and needed for hub names alone
    try:
        patterns = ['*.json', '*.jinja', 'tokenizer*', 'vocab*', 'merges*', *patterns]
        return snapshot_download(path, allow_patterns=patterns)
    except Exception as error:  # offline, no such name, no permission: many types, all the user's to mend
        reason = first_line(error)
        raise UserError(f'{path}: neither a folder nor to be had from the hub ({reason})') from None


def find_checkpoint(path):
    """The folder that holds config.json and weights: the path itself, a run's best/ (or last/), or a download from the hub."""
    for folder in [os.path.join(path, name) for name in ('best', 'best.old', 'last', 'last.old')] + [path]:  # .old: see replace_folder
        if os.path.exists(os.path.join(folder, 'config.json')) and any(
                name.endswith(('.safetensors', '.bin')) for name in os.listdir(folder)):
            return folder
    if os.path.isdir(path):
        raise UserError(f'{path}: no checkpoint there (config.json with *.safetensors, or a run with best/ or last/)')
    folder = download(path, '*.safetensors')
    if weight_files(folder)[0].endswith('.bin'):  # many repositories have both, of the same weights
        download(path, 'pytorch_model*.bin')
    return folder


def weight_files(folder):
    """The names of the files that hold the weights, in transformers' order of preference: an index beside a
    single file may be stale."""
    for file in ('model.safetensors', 'pytorch_model.bin'):
        if os.path.exists(os.path.join(folder, file)):
            return [file]
        index = os.path.join(folder, file + '.index.json')
        if os.path.exists(index):
            try:
                return sorted(set(read_json(index)['weight_map'].values()))
            except (KeyError, TypeError, AttributeError):
                raise UserError(f'{index}: has no weight_map') from None
    return ['pytorch_model.bin']


def read_weights(folder):
    """{Hugging Face's name without its model prefix: tensor on the CPU, memory-mapped where the format allows it}."""
    tensors = {}
    for file in weight_files(folder):
        path = os.path.join(folder, file)
        try:
            if file.endswith('.bin'):
                mmap = zipfile.is_zipfile(path)  # files from before 2020 are not
                tensors.update(torch.load(path, map_location='cpu', weights_only=True, mmap=mmap))
            else:
                with safe_open(path, framework='pt') as f:
                    tensors.update({name: f.get_tensor(name) for name in f.keys()})
        except Exception as error:  # torn, truncated or missing: each library has its own exception for it
            reason = str(error).strip().split('\n')[0]
            raise UserError(f'{path}: the checkpoint is missing or broken ({type(error).__name__}: {reason})') from None
    return {name.removeprefix('transformer.').removeprefix('model.'): tensor for name, tensor in tensors.items()}


def replace_folder(tmp, path):
    """Puts a finished folder in another's place, on the disk before it is in place. The old one goes last, so that there is a whole
    one at every moment: under its own name, or for an instant, and after a kill there, under .old."""
    for name in os.listdir(tmp):
        sync(os.path.join(tmp, name))
    sync(tmp)
    old = path.rstrip('/') + '.old'
    if os.path.exists(path):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(tmp, path)
    sync(os.path.dirname(os.path.abspath(path)))
    shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """What was written is on the disk when this returns, for a file's content or a folder's list of names."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


def first_line(error):
    return f'{type(error).__name__}: ' + (str(error).strip().split('\n') or [''])[0]


# -----------------------------------------------------------------------------
# device and optimizer

def setup(device='auto', dtype='auto', seed=0):
    """(torch.device, dtype of the matrix products): seeds torch and picks 'auto' as CUDA, then MPS, then CPU; bf16 where
    the GPU has it, else fp32. Weights stay fp32 masters; autocast(device, dtype) does the rest. Under torchrun the processes find
    each other here, each with a GPU of its own where there are any."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device)
        if SEVERAL and device.type == 'cuda':
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        if device.type == 'cuda':
            torch.cuda.set_device(device)  # a number is for all: graphs, say, are recorded on the current device
        torch.empty(1, device=device)
    except Exception as error:
        raise UserError(f'device {str(device)!r} cannot be used: {str(error).strip().split(chr(10))[0]}') from None
    if (SEVERAL or 'TORCHELASTIC_RUN_ID' in os.environ) and not dist.is_initialized():
        join_job(device)
    if dtype == 'auto':
        dtype = 'bfloat16' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'float32'
    if dtype not in ('float32', 'bfloat16'):
        raise UserError(f"dtype is 'auto', 'float32' or 'bfloat16', not {dtype!r}")
    torch.manual_seed(seed)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 for what stays fp32 beside bf16
    if device.type == 'cpu':
        fast_cpu_matmul()
        keep_freed_memory()
    return device, getattr(torch, dtype)


# Processes start within seconds of each other; importing torch from a cold network disk takes a minute or two.
START_PATIENCE = timedelta(minutes=5)
# Later a process waits where another still draws samples. One that dies is noticed by torchrun, and not by this.
PATIENCE = timedelta(hours=4)


def join_job(device):
    """The processes that torchrun has started find each other. RUN_JOB, in the environment, then names the job,
    the same after a restart: it is kept in torchrun's store, which outlives the processes and ends with the job."""
    try:
        store, number, n = next(rendezvous('env://', timeout=START_PATIENCE))
    except dist.DistError as error:
        said = f'process {RANK} waited {START_PATIENCE} for the others: {first_line(error)}'
        raise UserError(said) from None
    os.environ['RUN_JOB'] = store.compare_set('job', '', uuid.uuid4().hex).decode()
    if n == 1:
        return
    name = meet(store, number, n)
    store.set_timeout(PATIENCE)
    # Objects and flags go over gloo, tensors on a GPU over NCCL.
    hook, backend = sys.excepthook, 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:
        dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=number, world_size=n,
                                timeout=START_PATIENCE)
    except RuntimeError as error:
        said = f'process {number} of {n} met the others, but cannot connect to them: {first_line(error)}'
        raise UserError(said) from None
    dist.group.WORLD.set_timeout(PATIENCE)
    sys.excepthook = hook  # which init_process_group replaces by one that swallows what ours writes
    # The end of a process, where PyTorch takes down its threads, now and then aborts ("terminate called without
    # an active exception"), after everything is done; torchrun would take it for a failure.
    atexit.register(lambda: (sys.stdout.flush(), sys.stderr.flush(), os._exit(int(hasattr(sys, 'last_type')))))
    if rank() > 0:
        sys.stdout = open(os.devnull, 'w')  # what is printed is the same for all


def meet(store, number, n):
    """A random name that the n processes of this start share, and those of no other start. UserError after
    START_PATIENCE says who did not come.

    The store may hold what processes wrote that are gone, and nothing in the environment tells one start from
    another: an agent of torchrun counts the failures of its own processes (TORCHELASTIC_RESTART_COUNT), not those
    of other hosts. So each process writes a random word of its own beside the words that it has read of the others,
    again and again, until all have written the same words. Who has read a process's word is there now: so, then,
    is everyone."""
    keys, words = [f'word {i} of {n}' for i in range(n)], [''] * n
    words[number], deadline = uuid.uuid4().hex, time.time() + START_PATIENCE.total_seconds()
    for key in keys:
        store.append(key, '')  # all can be read at once, whether they are written or not
    while True:
        store.set(keys[number], json.dumps(words))
        found = [json.loads(text) if text else [''] * n for text in store.multi_get(keys)]
        if all(theirs == words for theirs in found):
            return words[0]
        absent = [str(i) for i in range(n) if found[i][number] != words[number]]
        if time.time() > deadline:
            raise UserError(f'process {number} of {n} waited {START_PATIENCE} for those that did not come: '
                            f'{", ".join(absent)}')
        words = [theirs[i] for i, theirs in enumerate(found)]
        time.sleep(0.05)


def fast_cpu_matmul():
    """Sends fp32 matrix products to oneDNN, which is about twice as fast as the default on AMD cores. The switch that does
    it permits bf16 inside, which a core with AMX would use: so it stays on only where the products are still true fp32."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.backends.mkldnn, 'matmul'):
        return
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = 'bf16'
    error = (F.linear(a, b) - F.linear(a.double(), b.double())).abs().max()
    if error > 1e-3:  # true fp32 is off by 3e-5 here, bf16 by 0.2
        torch.backends.mkldnn.matmul.fp32_precision = before


@functools.cache
def can_pack(dtype):
    """Whether oneDNN's own layouts of weights are to be had here (Transformer.packed): PyTorch offers them under names that may move."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (8, 96))
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, torch.ops.mkldnn._reorder_linear_weight(w, 8), None, 'none', [], '')
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, F.linear(x, w), rtol=0, atol=1e-4 if dtype == torch.float32 else 0.1)


def keep_freed_memory():
    """Tells the C library to keep what is freed for the next allocation: by default it gives every block above 32 MB back to the
    system, and each new one is zeroed page by page, which for GPT-2's logits takes longer than the softmax. A training step of
    GPT-2 124M is 1.2 times as fast. Without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt(M_MMAP_MAX, 0)         # no blocks of their own, which cannot be kept
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap never shrinks


def peak_flops(device, dtype, size=0, seconds=0.1):
    """Floating-point operations a second that a large product of two square matrices reaches here, the best of some tries."""
    size = size or (1024 if device.type == 'cpu' else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best == math.inf:
        wait()
        start = time.perf_counter()
        for _ in range(2):
            a @ b
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * 2 * size ** 3 / best


def memory_bandwidth(device):
    """Bytes a second that a large copy reads and writes."""
    a = torch.empty(2 ** 28 if device.type == 'cpu' else 2 ** 32, dtype=torch.uint8, device=device).zero_()
    b, best = torch.empty_like(a), math.inf
    for _ in range(6):
        start = time.perf_counter()
        b.copy_(a)
        if device.type == 'cuda':
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() / best


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW with decay on matrices alone: a gain, a bias or a norm has nothing to shrink towards zero for."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(step, steps, lr, min_lr, warmup):
    """Linear warm-up over the first share `warmup` of the updates, then a cosine from lr to min_lr at the last one."""
    n_warmup = int(warmup * steps)
    if step < n_warmup:
        return lr * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, steps - 1 - n_warmup)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def sharding(shard, model, device):
    """'none', 'ddp' or 'fsdp' for a model. 'auto': all of it on each process as long as its weights, and the gradients and Adam's averages
    of those that learn (12 bytes each), take at most 40% of a GPU's memory."""
    if shard not in ('auto', 'none', 'ddp', 'fsdp'):
        raise UserError(f"shard is 'auto', 'none', 'ddp' or 'fsdp', not {shard!r}")
    if world_size() == 1:
        return 'none'
    if shard == 'auto':
        n_bytes = sum(p.numel() * (p.element_size() + 12 * p.requires_grad) for p in model.parameters())
        small = device.type != 'cuda' or n_bytes < 0.4 * torch.cuda.get_device_properties(device).total_memory
        return 'ddp' if small else 'fsdp'
    return shard


def backward(loss, model):
    """loss: this process's part of a sum over all of them."""
    (loss * world_size() if model.shard == 'fsdp' else loss).backward()  # FSDP divides what it sums


def finish_gradients(parameters, shard, max_norm):
    """After an update's last backward: sums what processes have found ('ddp'), clips on the global norm (0: not), and returns it."""
    parameters = [p for p in parameters if p.grad is not None]
    if shard == 'ddp':
        flat = torch.cat([p.grad.flatten() for p in parameters])  # one exchange instead of one a weight
        for p, summed in zip(parameters, sum_over_processes(flat).split([p.numel() for p in parameters])):
            p.grad.copy_(summed.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()


def activation_bytes(config, n_tokens, longest, dtype, grad_checkpointing, device):
    """What a micro-batch keeps for its backward pass: in each layer the two residual inputs and their norms in fp32, what goes into the
    linear layers and out of them in dtype, on a CPU the attention's probabilities; and logits, twice, in fp32."""
    c, width = config, 4 if dtype == torch.float32 else 2
    mlp = (4 if c.activation == 'silu' else 2) * c.n_inner
    scores = c.n_head * longest if device.type == 'cpu' and longest <= 512 else 0
    layer = n_tokens * (4 * 4 * c.n_embd + width * (6 * c.n_embd + mlp + scores))
    layers = c.n_layer * n_tokens * 4 * c.n_embd + layer if grad_checkpointing else c.n_layer * layer
    return layers + 2 * 4 * min(n_tokens * c.vocab_size, max(1024 * c.vocab_size, 2 ** 27))  # sample.action_logprobs


def memory_needed(models, dtype, micro_tokens, longest, max_rows=0, longest_prompt=0, max_new_tokens=0):
    """A line of arithmetic: the bytes that a run's tensors take on each process. (What a CPU's process takes is more, by Python and
    torch, and by gaps in the heap: up to half as much again was seen.) models: those in memory while it trains, the first one the
    policy. longest: tokens of the longest row that is learned. max_rows: samples drawn from the policy beside all that; 0: none are."""
    policy, parts = models[0], []

    def take(what, n_bytes):
        if n_bytes:
            parts.append((what, n_bytes))
    held = [(p, world_size() if m.shard == 'fsdp' else 1) for m in models for p in m.parameters()]
    take('weights', sum(p.numel() * p.element_size() / n for p, n in held))
    learned = sum(p.numel() / n for p, n in held if p.requires_grad)
    take('gradients', 4 * learned)
    take("Adam's averages", 8 * learned)
    if policy.shard == 'fsdp':  # the embedding stays, two blocks are there at a time, and a block's gradients
        block = sum(p.numel() for p in policy.blocks[0].parameters())
        take('gathered blocks', (policy.n_params() - len(policy.blocks) * block + 3 * block) * dtype.itemsize)
    always = sum(n for _, n in parts)
    c, device = policy.config, policy.embed.weight.device
    kept_dtype = torch.float32 if any(isinstance(m, LoRALinear) for m in policy.modules()) else dtype  # as adapters add
    learning = activation_bytes(c, micro_tokens, longest, kept_dtype, policy.grad_checkpointing, device)
    if dtype != torch.float32 and micro_tokens:  # the output projection rounded, in fp32 again, and its gradient: see logits
        learning += (2 + 4 + 4 * policy.head.weight.requires_grad) * policy.head.weight.numel()
    copied = policy.shard == 'fsdp' or dtype != policy.embed.weight.dtype
    sizes = [p.numel() * (4 if 'lora_' in name or 'fixed_' in name else dtype.itemsize) for name, p in policy.named_parameters()]
    copy = sum(sizes) if copied and max_rows else 0
    cache = cache_bytes(c, max_rows, longest_prompt, max_rows, max_new_tokens, dtype, device)
    linear = sum(m.weight.numel() for m in policy.modules() if isinstance(m, Linear))
    packed = linear * dtype.itemsize if max_rows and device.type == 'cpu' and can_pack(dtype) else 0
    text = ', '.join(f'{what} {size_text(n)}' for what, n in parts)
    text += f'; beside these a micro-batch of {micro_tokens:,} tokens {size_text(learning)}' if micro_tokens else ''
    if max_rows:
        text += ', or' if micro_tokens else '; beside these'
        text += ' for samples ' + (f'a copy of the weights {size_text(copy)}, ' if copy else '')
        text += (f'their layout for the CPU {size_text(packed)} and ' if packed else '') + f'{max_rows} rows of cache {size_text(cache)}'
    return f'memory of a process at most about {size_text(always + max(learning, copy + packed + cache))}: {text}'


def disk_needed(config, n_exports, keep_states=0, lora_rank=0, n_learners=1):
    """A line of arithmetic: the bytes that a run's states and checkpoints take on the disk. A state has the weights that learn and Adam's
    two averages in fp32; a new one is written beside the two that stay while the run goes on, and keep_states of them stay when it has
    finished. n_exports: checkpoints, in fp32 at most, and adapters beside them. n_learners: transformers that learn, of equal shape."""
    with torch.device('meta'):
        model = Transformer(config)
        if lora_rank:
            model.add_lora(lora_rank)
        export = 4 * model.n_params()
    state = 12 * n_learners * sum(p.numel() for p in model.parameters() if p.requires_grad)
    keep_states = min(keep_states, 2)
    return (f'disk at most about {size_text(3 * state + n_exports * export)}, {size_text(keep_states * state + n_exports * export)} when '
            f'finished: up to 3 states of {size_text(state)}, then {keep_states}, and {n_exports} checkpoints of {size_text(export)}')


def size_text(n_bytes):
    return f'{n_bytes / 2 ** 30:.1f} GiB' if n_bytes >= 2 ** 30 else f'{n_bytes / 2 ** 20:.0f} MiB'


@contextmanager
def enough_memory(doing, advice):
    """Turns running out of memory within it into a UserError that says while doing what, and what helps."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):
            raise
        raise UserError(f'out of memory in {doing}: {advice} ({first_line(error)})') from None


# -----------------------------------------------------------------------------
# states that a run goes on from

class Checkpoints:
    """Checkpoints(out_dir): out_dir/state/00000120/ and the one before it hold all that a run needs to go on after update 120.

    Written by torch.distributed.checkpoint, each process its own part, as safetensors, which can hold no code; the rest as JSON. A state is
    written beside the others, synced to the disk and then renamed, and a checksum of every file tells a whole one from a
    broken one. Any number of processes can go on from it."""

    def __init__(self, out_dir):
        self.folder = os.path.join(out_dir, 'state')

    def tensors(self, models, optimizer):
        """{name: (tensor of a weight that learns)}, and with Adam's two averages of its gradient where there are any."""
        learned = {id(p) for group in optimizer.param_groups for p in group['params']}
        named = {f'{model_name}.{name}': p for model_name, model in models.items() for name, p in model.named_parameters() if id(p) in learned}
        assert len(named) == len(learned), 'a weight that learns is in none of the models'
        moments = {f'{key}.{name}': optimizer.state[p][key] for name, p in named.items() for key in ('exp_avg', 'exp_avg_sq')
                   if p in optimizer.state}
        return named, {name: p.detach() for name, p in named.items()} | moments

    def frozen(self, models, optimizer):
        """{model: checksum of its weights that do not learn}"""
        learned, sums = {id(p) for group in optimizer.param_groups for p in group['params']}, {}
        for name, model in models.items():
            rest = [p for p in model.parameters() if id(p) not in learned]
            sums[name] = bit_sum(p.to_local() if is_sharded(p) else p for p in rest)
            if model.shard == 'fsdp':
                sums[name] = sum_over_processes(torch.tensor(sums[name])).item()
        return sums

    @torch.no_grad()
    def save(self, step, models, optimizer, state):
        """models: {name: Transformer}. state: a dictionary of plain values. Of weights that do not learn a checksum is kept: they are
        where they came from. UserError where it cannot be written; the states before it are whole."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter, save  # half a second to import
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')  # so it is, with one process
        path = os.path.join(self.folder, f'{step:08d}')
        tmp = path + '.tmp'
        named, tensors = self.tensors(models, optimizer)
        steps = {name: optimizer.state[p]['step'].item() for name, p in named.items() if p in optimizer.state}
        frozen = self.frozen(models, optimizer)

        def prepare():
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
        try:
            from_main(prepare)
            save(tensors, storage_writer=HuggingFaceStorageWriter(tmp, save_distributed=True), no_dist=world_size() == 1)

            def write_rest():
                with open(os.path.join(tmp, 'state.json'), 'w') as f:
                    json.dump({'step': step, 'state': state, 'adam_steps': steps, 'frozen': frozen}, f)
                return sorted(os.listdir(tmp))
            names = from_main(write_rest)
            mine = {name: checksum(os.path.join(tmp, name)) for name in names[rank()::world_size()]}
            sums = {name: found for part in from_all(mine) for name, found in part.items()}

            def finish():
                with open(os.path.join(tmp, 'sha256.json'), 'w') as f:
                    json.dump(sums, f)
                replace_folder(tmp, path)
                self.keep(2)
            from_main(finish)
        except (Exception, CheckpointException) as error:  # a full disk, most often; CheckpointException is none of the Exceptions
            shutil.rmtree(tmp, ignore_errors=True)
            cause = error.__cause__ or error.__context__ or error
            raise UserError(f'{path}: the state was not written ({first_line(error)}; {first_line(cause)}); those before it are whole: '
                            f'{", ".join(self.steps()) or "none"}') from None

    def keep(self, n):
        """Removes all states but the newest n; process 0 does."""
        for old in self.steps()[:-n or None] if rank() == 0 else []:
            shutil.rmtree(os.path.join(self.folder, old), ignore_errors=True)

    def keep_batch(self, step, examples):
        """Writes the token ids of a batch for inspection, and says where."""
        path = os.path.join(os.path.dirname(self.folder), 'bad_batch.json')
        if rank() == 0:
            with open(path, 'w') as f:
                json.dump({'step': step, 'ids': [list(e.ids) for e in examples], 'n_prompt': [e.n_prompt for e in examples]}, f)
        return f'Its batch is in {path}, and the states in {self.folder} are whole: {", ".join(self.steps()) or "none yet"}'

    def steps(self):
        found = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in found if name.isdecimal())

    def tidy(self, newest):
        """Removes what a kill has left half written, and names the states after the newest whole one .broken: they do not count."""
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name.endswith('.tmp'):
                shutil.rmtree(path, ignore_errors=True)
            elif name.isdecimal() and name > newest:
                shutil.rmtree(path + '.broken', ignore_errors=True)
                os.rename(path, path + '.broken')

    def broken(self, path):
        """What is wrong with a state; '' if it is whole. Processes share the reading."""
        try:
            sums = from_main(lambda: read_json(os.path.join(path, 'sha256.json')))
            wrong = [name for name in sorted(sums)[rank()::world_size()] if checksum(os.path.join(path, name)) != sums[name]]
            wrong = [f'{name} is not what was written' for name in wrong]
        except (OSError, UserError, AttributeError) as error:
            wrong = [first_line(error)]
        return ', '.join(dict.fromkeys(line for part in from_all(wrong) for line in part))

    @torch.no_grad()
    def load(self, models, optimizer):
        """Fills models and optimizer from the newest whole state and returns its `state`; None where there is none. UserError if all
        are broken, or it is of another model."""
        from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, load
        warnings.filterwarnings('ignore', message='torch.distributed is disabled')
        names = from_main(self.steps)
        for name in reversed(names):
            path = os.path.join(self.folder, name)
            wrong = self.broken(path)
            if wrong:
                print(f'{path} is broken ({wrong}); the one before it is taken')
                continue
            from_main(lambda: self.tidy(name))
            saved = from_main(lambda: read_json(os.path.join(path, 'state.json')))
            named, _ = self.tensors(models, optimizer)
            if set(saved['adam_steps']) - set(named):
                raise UserError(f'{path}: the state of another model, with {min(set(saved["adam_steps"]) - set(named))}')
            other = [name for name, found in self.frozen(models, optimizer).items() if found != saved['frozen'].get(name)]
            if other:
                raise UserError(f'{path}: the weights that do not learn ({", ".join(other)}) are not those of that run: was the checkpoint that '
                                'they come from written anew?')
            for weight, n in saved['adam_steps'].items():
                p = named[weight]
                optimizer.state[p] = {'step': torch.tensor(n, dtype=torch.float32, device=p.device), 'exp_avg': torch.zeros_like(p),
                                      'exp_avg_sq': torch.zeros_like(p)}
            try:
                load(self.tensors(models, optimizer)[1], storage_reader=HuggingFaceStorageReader(path), no_dist=world_size() == 1)
            except (Exception, CheckpointException) as error:  # other names, or other shapes
                raise UserError(f'{path}: the state of another model ({first_line(error.__cause__ or error)})') from None
            return saved['state']
        if names:
            raise UserError(f'{self.folder}: no state there is whole; --overwrite starts again')
        return None


def checksum(path):
    """SHA-256 of a file, which is on the disk when this returns."""
    sync(path)
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


if __name__ == '__main__':
    override(globals())
    if bench:
        device, _ = setup(device)
        kind = f' ({torch.backends.cpu.get_cpu_capability()})' if device.type == 'cpu' else ''
        print(f'{device}{kind}, {torch.get_num_threads()} threads; {memory_bandwidth(device) / 1e9:.0f} GB/s copied')
        for dtype in (torch.float32, torch.bfloat16):
            print(f'{dtype}: {peak_flops(device, dtype, seconds=1.0) / 1e9:,.0f} GFLOP/s')
        raise SystemExit
    if not init_from:
        raise UserError('which checkpoint? --init_from=out/demo_sft')
    model = Transformer.from_pretrained(init_from)
    for key, value in asdict(model.config).items():
        print(f'{key:14s} {value}')
    print(f'{model.n_params():,} parameters')
