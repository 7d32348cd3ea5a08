"""
One Transformer for the GPT-2 and the Llama families: blocks of x + attention(norm(x)), then x + mlp(norm(x)).
What differs is a field of ModelConfig. Here are also LoRA, a scalar head, Hugging Face checkpoints in and
out, the optimizer, and a model's life in several processes.

$ python model.py --init_from=out/demo_sft     # prints a checkpoint's shape and parameter count
$ python model.py --bench                      # what this machine's matrix products and memory reach
"""
import functools
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from config import UserError, override
from config.run import (bit_sum, first_line, full, is_sharded, rank, read_json, replace_folder,
                        same_everywhere, setup, sum_over_processes, world_size)

# -----------------------------------------------------------------------------
# settings, for running this file as a script
init_from = ''   # a checkpoint: a folder or a hub name
bench = False    # measure matrix products in fp32 and bf16, and copies
device = 'auto'  # 'auto' | 'cpu' | 'cuda' | 'mps'; of the measurement
# -----------------------------------------------------------------------------

@dataclass
class ModelConfig:
    """The shape; by default a small Llama's. A new field survives save and load by itself."""
    family: str = 'llama'        # 'gpt2' | 'llama' | 'mistral' | 'qwen2' | 'qwen3'
    vocab_size: int = 512        # rows of the embedding; those beyond the tokenizer's are never drawn
    block_size: int = 256        # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4           # < n_head: grouped-query attention
    n_embd: int = 128
    head_dim: int = 32
    n_inner: int = 384           # width of the mlp
    norm_eps: float = 1e-5
    activation: str = 'silu'     # 'silu' | 'gelu' | 'gelu_tanh'; silu is gated (SwiGLU)
    rope_theta: float = 10000.0  # base of the rotary frequencies; 0: learned positions (GPT-2)
    rope_scaling: dict | None = None  # Hugging Face's, of rope_type 'linear' or 'llama3'
    norm: str = 'rms'            # 'rms' | 'layer'
    qkv_bias: bool = False
    out_bias: bool = False       # bias of attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False        # RMSNorm over each head's query and key (Qwen3)
    tied: bool = True            # the output projection is the embedding


# -----------------------------------------------------------------------------
# the network

class Norm(nn.Module):
    """RMSNorm or LayerNorm, in fp32 whatever the autocast type."""

    def __init__(self, kind, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == 'layer' else None

    def forward(self, x):
        wide, size, weight = x.float(), x.shape[-1:], self.weight.float()
        if self.bias is None:
            return F.rms_norm(wide, size, weight, self.eps).to(x.dtype)
        return F.layer_norm(wide, size, weight, self.bias.float(), self.eps).to(x.dtype)

def rope_tables(config):
    """cos and sin of the rotary angles (Su et al. 2021, arXiv 2104.09864), each (block_size, head_dim) fp32,
    in the half-split layout of Hugging Face checkpoints; sin is negative in the first half."""
    inv_freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    scaling, keep = config.rope_scaling, 0.0  # linear: all wavelengths are stretched by `factor`
    if scaling and scaling['rope_type'] == 'llama3':  # short ones stay, those between are mixed linearly
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        turns = scaling['original_max_position_embeddings'] * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    if scaling:
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling['factor']
    angle = torch.outer(torch.arange(config.block_size).float(), inv_freq).repeat(1, 2)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(config.head_dim // 2)
    return angle.cos(), angle.sin() * sign

def rotate(x, cos, sin):
    """Halves (a, b) of a head -> (a cos - b sin, b cos + a sin). x (B, H, T, D); cos, sin (.., 1, T, D)."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

def attend(q, k, v):
    """Causal attention, softmax(q k' / sqrt(D)) v, of the last T of S: q (B, H, T, D); k, v (B, KV, S, D)."""
    (B, H, T, D), (_, KV, S, _) = q.shape, k.shape
    if q.device.type != 'cpu' or T > 512:
        mask = None if S == T else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=S == T, enable_gqa=KV != H)
    # A CPU's SDPA is slow for few queries. The heads of a group are stacked as queries of their key head.
    mask = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(1 + S - T)
    scores = (q * D ** -0.5).reshape(B, KV, H // KV * T, D) @ k.mT + mask.repeat(H // KV, 1)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(B, H, T, D)

class Linear(nn.Linear):
    packed = None  # the weight in oneDNN's layout, see Transformer.packed

    def forward(self, x):
        if self.packed is None:
            return super().forward(x if torch.is_autocast_enabled(x.device.type) else x.to(self.weight.dtype))
        x, bias = x.to(self.packed.dtype), None if self.bias is None else self.bias.to(self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, 'none', [], '')

def in_layout(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, 256)  # the number of rows to expect

@functools.cache
def can_pack(dtype):
    """Whether oneDNN's layout, which has private names in PyTorch, works here."""
    layer = Linear(64, 64, bias=False, device='meta')
    try:
        layer.packed = in_layout(torch.eye(64, dtype=dtype).flip(0))
        return torch.equal(layer(torch.arange(64.0)[None]).float(), torch.arange(63.0, -1, -1)[None])
    except (AttributeError, RuntimeError):
        return False

@contextmanager
def replaced(attribute, values):
    """Within it modules have other values of a class attribute: {module: value}."""
    try:
        for m, value in values.items():
            setattr(m, attribute, value)
        yield
    finally:
        for m in values:
            vars(m).pop(attribute, None)

class LoRALinear(Linear):
    """W x + b + scale B A x (Hu et al. 2021, arXiv 2106.09685): lora_a (r, in) and lora_b (out, r) learn, W
    and b stay, as does a checkpoint's adapter (fixed_a, and fixed_b with its scale). Merged into bf16 weights
    an adapter would lose most of what updates at 1e-5 add: it stays beside them, and the sum is fp32."""
    adapting = True  # the one that learns is in use

    def add(self, kind, r, scale=1.0):
        self.__class__, self.scale = LoRALinear, scale
        for part, shape in (('a', (r, self.in_features)), ('b', (self.out_features, r))):
            weight = torch.zeros(shape, device=self.weight.device)
            setattr(self, f'{kind}_{part}', nn.Parameter(weight, requires_grad=kind == 'lora'))

    def adapters(self):
        """[(A, B, scale)] of those in use."""
        found = [(self.fixed_a, self.fixed_b, 1.0)] if hasattr(self, 'fixed_a') else []
        if self.adapting and hasattr(self, 'lora_a'):
            found.append((self.lora_a, self.lora_b, self.scale))
        return found

    def forward(self, x):
        y = super().forward(x).float()  # even without an adapter in use: a fresh one must change nothing
        for a, b, scale in self.adapters():
            y = y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).float() * scale
        return y

class ScalarHead(nn.Linear):
    """(..., C) -> (...) fp32: a value, or a reward model's logit. Not a matrix product, which may be TF32."""

    def forward(self, x):
        return (x.float() * self.weight[0]).sum(-1) + self.bias

class Attention(nn.Module):
    """Causal self-attention with grouped queries, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.sizes = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.out = Linear(self.sizes[0], config.n_embd, bias=config.out_bias)
        self.q_norm, self.k_norm = (Norm('rms', config.head_dim, config.norm_eps) if config.qk_norm
                                    else nn.Identity() for _ in range(2))

    def forward(self, x, rope, cache):
        q, k, v = (part.view(*x.shape[:2], -1, self.head_dim) for part in self.qkv(x).split(self.sizes, -1))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))  # (B, heads, T, D)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """SwiGLU, out(silu(gate x) * up x), with gate and up in one matrix; or GPT-2's out(gelu(up x))."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        width = config.n_inner * (2 if config.activation == 'silu' else 1)
        self.up = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.out = Linear(config.n_inner, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        if self.activation == 'silu':
            gate, x = self.up(x).chunk(2, dim=-1)
            return self.out(F.silu(gate) * x)
        return self.out(F.gelu(self.up(x), approximate='tanh' if self.activation == 'gelu_tanh' else 'none'))

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm1, self.norm2 = (Norm(config.norm, config.n_embd, config.norm_eps) for _ in range(2))
        self.attention, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))

class Transformer(nn.Module):
    """model(ids (B, T)) -> logits (B, T, V) fp32. Without dropout: RL trains the policy that it samples."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.rope_theta:
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config.norm, config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.value_head = None
        self.head_kind = 'value'         # 'value' | 'orm' | 'prm' | '': what it was trained for; '': unknown
        self.hf_config = {}              # the config.json that the model was read from
        self.shard = 'none'              # 'none' | 'ddp' | 'fsdp'; see distribute
        self.grad_checkpointing = False  # keep only a block's input for backward, and compute the rest again
        self.finish_loading()
        hf_names(self)                   # UserError, before any training, if the model could not be saved

    def finish_loading(self):
        """What no checkpoint holds; again after to_empty or a cast."""
        if self.config.tied:
            self.head.weight = self.embed.weight
        if self.config.rope_theta:
            for name, table in zip(('cos', 'sin'), rope_tables(self.config)):
                self.register_buffer(name, table.to(self.embed.weight.device), persistent=False)
        return self

    def init_weights(self):
        """N(0, 1 / fan in), which keeps activations at their size; half that deviation for embedding and
        head, 1 / sqrt(2 L) of it for what writes into the residual stream."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                share = 1 / 2 if name.startswith(('embed', 'positions', 'head')) else 1.0
                if name.endswith('out.weight'):
                    share = (2 * self.config.n_layer) ** -0.5
                nn.init.normal_(p, std=share * p.shape[1] ** -0.5)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        return self

    def trunk(self, ids, positions=None, cache=None):
        """ids (B, T) -> hidden states (B, T, C) after the last norm. positions (B, T): by default 0 .. T - 1.
        cache: its attend(layer, q, k, v) replaces causal attention among the ids."""
        if positions is None:
            if ids.shape[1] > self.config.block_size:
                raise UserError(f'{ids.shape[1]} tokens exceed the context of {self.config.block_size}')
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        x, rope = self.embed(ids).float(), None  # the residual stream is always fp32
        if self.config.rope_theta:
            rope = self.cos[positions][:, None], self.sin[positions][:, None]  # (B or 1, 1, T, D)
        else:
            x = x + self.positions(positions)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, cache, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V) fp32, of bf16 factors, too: bf16 numbers between 16 and 32 are 0.125 apart."""
        device, weight = hidden.device.type, self.head.weight
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if dtype == torch.float32:
            return self.head(hidden.float())
        x = hidden.to(dtype)
        with torch.autocast(device, enabled=False):
            if device == 'cuda' and not torch.is_grad_enabled():  # mm with out_dtype has no derivative
                flat = torch.mm(x.flatten(0, -2), weight.to(dtype).t(), out_dtype=torch.float32)
                return flat.view(*x.shape[:-1], -1)
            packed = self.head.packed is not None
            return self.head(x) if packed else F.linear(x.float(), weight.to(dtype).float())

    def forward(self, ids, positions=None, cache=None):
        return self.logits(self.trunk(ids, positions, cache))

    def add_value_head(self):
        """A scalar per token, 0 at first, beside the logits."""
        self.value_head = ScalarHead(self.config.n_embd, 1, device=self.embed.weight.device)
        for p in self.value_head.parameters():
            nn.init.zeros_(p)
        return self

    def values(self, hidden):
        """(..., C) -> (...) fp32."""
        return self.value_head(hidden)

    @torch.no_grad()
    def add_tokens(self, first, count):
        """Sets rows first .. first + count of embedding and output projection to the mean of those before.
        Both grow where they are too short, to a multiple of 64."""
        last, rows = first + count, self.config.vocab_size
        rows = rows if last <= rows else -(-last // 64) * 64
        for layer in [self.embed] if self.config.tied else [self.embed, self.head]:
            new = layer.weight[:first].float().mean(0).to(layer.weight.dtype).repeat(rows, 1)
            new[:first], new[last:len(layer.weight)] = layer.weight[:first], layer.weight[last:]
            layer.weight = nn.Parameter(new)
        self.config.vocab_size = self.embed.num_embeddings = self.head.out_features = rows
        return self.finish_loading()

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops(self, lengths, n_logits):
        """Operations of a forward pass over rows of these lengths, with n_logits logits."""
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        attention = 2 * c.n_layer * c.n_head * c.head_dim * sum(n ** 2 for n in lengths)  # half the pairs
        return 2 * matrices * sum(lengths) + attention + 2 * c.n_embd * c.vocab_size * n_logits

    def packed(self, dtype):
        """Within it a CPU's layers keep weights in oneDNN's layout: 1.5 times as fast at 16 rows, 1.1 at
        128."""
        usable = self.embed.weight.device.type == 'cpu' and can_pack(dtype)
        layers = [m for m in self.modules() if usable and isinstance(m, Linear)]
        weights = ((m, m.weight.detach().to(dtype)) for m in layers)
        return replaced('packed', {m: in_layout(w.float() if m is self.head else w) for m, w in weights})

    def matrices(self):
        """{name: linear layer} of those that adapters can stand beside."""
        return {name: m for name, m in self.blocks.named_modules(prefix='blocks') if isinstance(m, Linear)}

    def add_lora(self, r, alpha=32.0):
        """Adds adapters of rank r to the blocks' matrices, and freezes all else but the value head."""
        if r < 1:
            raise UserError('lora_rank must be at least 1, or 0 for none')
        self.requires_grad_(False)
        for name, m in self.matrices().items():
            LoRALinear.add(m, 'lora', r, alpha / r)
            m.lora_a.data.copy_(initial(f'{name}.lora_a', m.lora_a.shape))
        if self.value_head is not None:
            self.value_head.requires_grad_(True)
        return self

    def make_room(self, adapters):
        """For a checkpoint's adapters, as `adapters` returns them."""
        for name, m in self.matrices().items():
            if f'{name}.fixed_a' in adapters:
                LoRALinear.add(m, 'fixed', len(adapters[f'{name}.fixed_a']))
        return self

    def adapters(self):
        """{'layer.fixed_a': A, 'layer.fixed_b': B} fp32: B A is what adapters add there. Collective."""
        found = {}
        for name, m in self.matrices().items():
            if isinstance(m, LoRALinear) and m.adapters():
                pairs = [(full(a).float(), full(b).float() * scale) for a, b, scale in m.adapters()]
                found[f'{name}.fixed_a'] = torch.cat([a for a, _ in pairs])
                found[f'{name}.fixed_b'] = torch.cat([b for _, b in pairs], 1)
        return found

    def without_adapter(self):
        """Within it the model is what it was before add_lora: a KL penalty's reference."""
        return replaced('adapting', {m: False for m in self.modules() if isinstance(m, LoRALinear)})

    def distribute(self, shard, dtype=torch.float32, device='cpu'):
        """How processes share training; before the optimizer is made. 'ddp': each has all weights. 'fsdp':
        each has 1 / n of every weight, gradient and average in fp32, and gathers a block in dtype to compute
        it."""
        self.shard = shard
        if shard == 'fsdp':
            from torch.distributed.device_mesh import init_device_mesh  # half a second to import
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
            # Inputs are not cast, rotary angles above all: autocast casts what goes into a product.
            policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype,
                                          reduce_dtype=torch.float32, cast_forward_inputs=False)
            mesh = init_device_mesh(torch.device(device).type, (world_size(),))
            if self.value_head is not None:
                fully_shard(self.value_head, mesh=mesh)  # always fp32
            for module in (*self.blocks, self):  # the root, too, is resharded after a pass without backward
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            register_fsdp_forward_method(self, 'run')
        return self

    def run(self, f, *args, **kwargs):
        """f(self, ...): how a model that learns is called, so that FSDP gathers its weights."""
        return f(self, *args, **kwargs)

    @torch.no_grad()
    def for_sampling(self, dtype):
        """This model in dtype for each process to draw from: itself or a copy, checked to be equal
        everywhere."""
        weights = {name: p for name, p in self.named_parameters() if not name.startswith('value_head')}
        if self.shard != 'fsdp' and dtype == self.embed.weight.dtype:
            same_everywhere(bit_sum(weights.values()))
            return self
        adapters = self.adapters()
        with torch.device('meta'):
            copy = Transformer(self.config).to(dtype).make_room(adapters)
        copy = copy.to_empty(device=self.embed.weight.device).finish_loading().requires_grad_(False)
        for name, p in copy.named_parameters():
            p.copy_(adapters[name] if name in adapters else full(weights[name]))
        same_everywhere(bit_sum(copy.parameters()))
        if self.shard == 'fsdp':
            plain = {name: p for name, p in copy.named_parameters() if name not in adapters}
            held = torch.tensor(bit_sum(weights[name].to_local().to(dtype) for name in plain))
            if sum_over_processes(held).item() != bit_sum(plain.values()):
                raise RuntimeError('the copy of the weights for sampling is not what the processes hold')
        return copy

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, path, device='cpu', dtype=torch.float32, *, value_head=False, lora_rank=0,
                        lora_alpha=32.0, shard='none', product_dtype=torch.float32, merge=False):
        """Reads a checkpoint (a folder, a run's folder, a hub name); UserError where it is missing, broken or
        not covered. Weights go from the memory-mapped file into place, with FSDP only a process's own rows.
        value_head, lora_rank: added if not there. shard: see `sharding`; FSDP's products are in
        product_dtype. merge: bf16 weights, too, take the checkpoint's adapters in."""
        folder = find_checkpoint(path)
        hf = read_json(f'{folder}/config.json')
        config, tensors = config_from_hf(hf, folder), read_weights(folder)
        embedding, head = NAMES[config.family]['embed'] + '.weight', tensors.get('lm_head.weight')
        if config.tied and head is not None:  # the file is right, not the config, as in transformers
            config.tied = torch.equal(tensors.setdefault(embedding, head).to(head.dtype), head)
        adapters, head_kind = {}, 'value'
        if os.path.exists(f'{folder}/value_head.safetensors'):
            with safe_open(f'{folder}/value_head.safetensors', framework='pt') as f:
                value_head, head_kind = True, (f.metadata() or {}).get('kind', '')
                tensors |= {f'value_head.{name}': f.get_tensor(name) for name in f.keys()}
        if os.path.exists(f'{folder}/adapter.safetensors') and dtype == torch.bfloat16 and not merge:
            adapters = load_file(f'{folder}/adapter.safetensors')
        with torch.device('meta'):  # no memory, and no time for weights that are overwritten
            model = cls(config).to(dtype).make_room(adapters)
            if value_head:
                model.add_value_head()
            if lora_rank:
                model.add_lora(lora_rank, lora_alpha)
        model.distribute(sharding(shard, model, torch.device(device)), product_dtype, device)
        model.to_empty(device=device).finish_loading()
        model.hf_config, model.head_kind = hf, head_kind

        tensors, names = tensors | adapters, hf_names(model)
        # adapters first: they are taken out of the weights, and might not fit
        for name, p in sorted(model.named_parameters(), key=lambda item: 'fixed_' not in item[0]):
            if 'lora_' in name or name.startswith('value_head'):
                tensors.setdefault(name, initial(name, p.shape))
            sources = names.get(name, [name])
            missing = [source for source in sources if source not in tensors]
            if missing:
                raise UserError(f'{folder}: the checkpoint has no {missing[0]}')
            parts = [tensors.pop(source) for source in sources]
            weight = turned(torch.cat(parts) if len(parts) > 1 else parts[0], name, config)
            if weight.shape != p.shape:
                raise UserError(f'{folder}: {name} has shape {[*weight.shape]}, its config says {[*p.shape]}')
            fill(p, merged(weight, name, adapters, -1))
        # left may be buffers of old files, and the copy of a tied output projection
        ignorable = '.attn.bias', '.attn.masked_bias', 'rotary_emb.inv_freq', 'lm_head.weight'
        left = [name for name in tensors if not name.endswith(ignorable)][:3]
        if left:
            raise UserError(f'{folder}: a {config.family} model has no place for: {", ".join(left)}')
        return model

    @torch.no_grad()
    def save_pretrained(self, path, tokenizer=None):
        """Writes a folder for AutoModelForCausalLM and AutoTokenizer, whole or not at all; adapters are
        merged, in fp32, and stand beside. Collective; process 0 writes."""
        adapters, names = self.adapters(), hf_names(self)
        prefix = 'transformer.' if self.config.family == 'gpt2' else 'model.'
        files = {'model': {}, 'value_head': {}, 'adapter': {name: x.cpu() for name, x in adapters.items()}}
        dtype = torch.float32 if adapters else self.embed.weight.dtype
        for name, p in self.named_parameters():
            weight = full(p)
            if rank() == 0 and name in names:
                weight = merged(weight.cpu().to(dtype), name, adapters, 1).to(dtype)
                weight, n = turned(weight, name, self.config), len(names[name])
                parts = weight.split(self.blocks[0].attention.sizes) if n == 3 else weight.chunk(n)
                for target, part in zip(names[name], parts):  # in a file tensors share no memory
                    target = target if target == 'lm_head.weight' else prefix + target
                    files['model'][target] = part.clone() if n > 1 else part.contiguous()
            elif name.startswith('value_head'):
                files['value_head'][name.removeprefix('value_head.')] = weight.float().cpu()
        if rank() > 0:
            return
        hf, tmp = config_to_hf(self.config, dtype, self.hf_config), path.rstrip('/') + '.tmp'
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)
            for file, tensors in files.items():
                if tensors:
                    said = {'kind': self.head_kind} if file == 'value_head' else {'format': 'pt'}
                    save_file(tensors, f'{tmp}/{file}.safetensors', said)  # of several keys the order varies
            if tokenizer is not None:
                tokenizer.save(tmp)
                hf['eos_token_id'] = tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.eos
            with open(f'{tmp}/config.json', 'w') as f:
                json.dump(hf, f, indent=2)
            replace_folder(tmp, path)
        except Exception as error:  # most often a full disk
            shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(f'{path}: not written ({first_line(error)}); what was there is whole') from None

def initial(name, shape):
    """0, or an adapter's A: uniform within 1 / sqrt(in), seeded by its name, equal in all processes."""
    if not name.endswith('lora_a'):
        return torch.zeros(shape)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), 'little')
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(shape, generator=generator, device='cpu') - 1) * shape[1] ** -0.5

def turned(weight, name, config):
    """GPT-2's blocks hold their matrices transposed (Conv1D)."""
    return weight.t() if config.family == 'gpt2' and name.startswith('blocks') else weight

def merged(weight, name, adapters, sign):
    """weight + sign B A of its adapter, if any; in fp64, so that the reverse gives the same bits."""
    matrix = name.removesuffix('.weight')
    if f'{matrix}.fixed_a' not in adapters:
        return weight
    a, b = (adapters[f'{matrix}.{part}'].to(weight.device).double() for part in ('fixed_a', 'fixed_b'))
    return weight.double() + sign * (b @ a)

def fill(parameter, weight):
    """Copies a weight into a parameter, or this process's rows of it, as torch.chunk divides them."""
    if is_sharded(parameter):
        parts = weight.chunk(world_size())
        weight, parameter = parts[rank()] if rank() < len(parts) else weight[:0], parameter.to_local()
    parameter.copy_(weight)


# -----------------------------------------------------------------------------
# Hugging Face's names, configs and files

LLAMA_NAMES = {  # our modules: theirs, which ours concatenates
    'embed': 'embed_tokens', 'norm': 'norm', 'head': 'lm_head', 'norm1': 'input_layernorm',
    'norm2': 'post_attention_layernorm', 'mlp.up': 'mlp.gate_proj mlp.up_proj', 'mlp.out': 'mlp.down_proj',
    'attention.qkv': 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
    'attention.out': 'self_attn.o_proj', 'attention.q_norm': 'self_attn.q_norm',
    'attention.k_norm': 'self_attn.k_norm'}
GPT2_NAMES = {
    'embed': 'wte', 'positions': 'wpe', 'norm': 'ln_f', 'head': 'lm_head', 'norm1': 'ln_1', 'norm2': 'ln_2',
    'attention.qkv': 'attn.c_attn', 'attention.out': 'attn.c_proj', 'mlp.up': 'mlp.c_fc',
    'mlp.out': 'mlp.c_proj'}
LLAMA_KEYS = dict(  # our fields: their keys in config.json
    vocab_size='vocab_size', block_size='max_position_embeddings', n_layer='num_hidden_layers',
    n_head='num_attention_heads', n_kv_head='num_key_value_heads', n_embd='hidden_size', head_dim='head_dim',
    n_inner='intermediate_size', norm_eps='rms_norm_eps', rope_theta='rope_theta', tied='tie_word_embeddings')
GPT2_KEYS = dict(
    vocab_size='vocab_size', block_size='n_positions', n_layer='n_layer', n_head='n_head', n_embd='n_embd',
    n_inner='n_inner', norm_eps='layer_norm_epsilon', tied='tie_word_embeddings')
FAMILIES = dict(gpt2='GPT2LMHeadModel', llama='LlamaForCausalLM', mistral='MistralForCausalLM',
                qwen2='Qwen2ForCausalLM', qwen3='Qwen3ForCausalLM')
NAMES = dict.fromkeys(FAMILIES, LLAMA_NAMES) | {'gpt2': GPT2_NAMES}
KEYS = dict.fromkeys(FAMILIES, LLAMA_KEYS) | {
    'gpt2': GPT2_KEYS, 'llama': LLAMA_KEYS | dict(out_bias='attention_bias', mlp_bias='mlp_bias'),
    'qwen3': LLAMA_KEYS | dict(out_bias='attention_bias')}
ACTIVATIONS = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu')
ROPE_NEEDS = dict(default=[], linear=['factor'], llama3=['factor', 'low_freq_factor', 'high_freq_factor'])
ONLY = dict(  # the one covered value of a key, which may also be absent
    quantization_config=None, hidden_act='silu', partial_rotary_factor=1.0, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)

def hf_names(model):
    """{our parameter: [Hugging Face's, which it concatenates]}; UserError for one without a name there."""
    family, names = model.config.family, {}
    for name, _ in model.named_parameters():
        layer, key, part = re.fullmatch(r'(?:blocks\.(\d+)\.)?(.+)\.(\w+)', name).groups()
        if key == 'value_head' or part not in ('weight', 'bias'):  # a scalar head's, an adapter's
            continue
        if key not in NAMES[family]:
            raise UserError(f'a {family} checkpoint cannot hold this model, for its {name}')
        block = f'{"h" if family == "gpt2" else "layers"}.{layer}.' if layer else ''
        names[name] = [f'{block}{theirs}.{part}' for theirs in NAMES[family][key].split()]
    return names

def config_from_hf(hf, source='config.json'):
    """A ModelConfig from config.json's dictionary; UserError, by name, for what is not covered."""
    def require(covered, what):
        if not covered:
            raise UserError(f'{source}: {what} is not covered (this code knows {", ".join(FAMILIES)})')

    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}  # transformers 5, or 4
    hf, rope = ({key: value for key, value in d.items() if value is not None} for d in (hf, rope))
    hf, own = hf | rope, hf.get('nanoreason', {})  # see config_to_hf
    family = own.get('family', hf.get('model_type'))
    require(family in FAMILIES, f'the architecture {family!r}')
    for key, value in ONLY.items():
        require(hf.get(key, value) == value, f'{key} {hf.get(key)!r}')
    for key in own:
        require(key in vars(ModelConfig), f'the setting {key!r}')
    c = {ours: hf[theirs] for ours, theirs in KEYS[family].items() if theirs in hf}
    for ours in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'):
        require(ours in c, f'a config without {KEYS[family][ours]!r}')
    width, n_head = c['n_embd'], c['n_head']
    c = dict(family=family, head_dim=width // n_head, n_kv_head=n_head, n_inner=4 * width) | c
    if family == 'gpt2':
        activation = hf.get('activation_function', 'gelu_new')
        require(activation in ACTIVATIONS, f'activation_function {activation!r}')
        c |= dict(norm='layer', activation=ACTIVATIONS[activation], rope_theta=0.0)
        return ModelConfig(**c | dict.fromkeys(('qkv_bias', 'out_bias', 'mlp_bias'), True) | own)

    rope.pop('rope_theta', None)
    kind = rope.setdefault('rope_type', rope.pop('type', 'default'))
    require(kind in ROPE_NEEDS, f'rope scaling {kind!r}')
    for key in ROPE_NEEDS[kind]:
        require(key in rope, f'rope scaling {kind!r} without {key!r}')
    if kind == 'llama3':
        rope.setdefault('original_max_position_embeddings', c['block_size'])
    if hf.get('sliding_window') and (family == 'mistral' or hf.get('use_sliding_window')):
        c['block_size'] = min(c['block_size'], hf['sliding_window'])  # within the window it is full attention
    c |= dict(rope_scaling=None if kind == 'default' else rope, qk_norm=family == 'qwen3',
              qkv_bias=family == 'qwen2' or c.get('out_bias', False))
    return ModelConfig(**{'norm_eps': 1e-6, 'tied': False} | c | own)

def config_to_hf(config, dtype, source=None):
    """config.json's dictionary: that of `source`, from which the model was read, but for what has changed.
    Fields without a place there stand under 'nanoreason', then also the model's type: no plain Llama."""
    before = family_to_hf(config_from_hf(source)) if source else {}
    hf = {**(source or {}), 'model_type': config.family}
    hf |= {key: x for key, x in family_to_hf(config).items() if (key, x) not in before.items()}
    hf.pop('nanoreason', None)
    plain = asdict(config_from_hf(hf))
    own = {key: x for key, x in asdict(config).items() if x != plain[key]}
    if own:
        hf |= {'model_type': 'nanoreason', 'nanoreason': own | {'family': config.family}}
    name = str(dtype).removeprefix('torch.')
    return hf | {'torch_dtype': name, 'dtype': name}  # transformers 4, and 5

def family_to_hf(c):
    """What Hugging Face's form of the family has, in the keys of transformers 4 and 5."""
    hf = dict(model_type=c.family, architectures=[FAMILIES[c.family]], bos_token_id=None, eos_token_id=None)
    hf |= {theirs: getattr(c, ours) for ours, theirs in KEYS[c.family].items()}
    if c.family == 'gpt2':
        return hf | {'activation_function': 'gelu_new' if c.activation == 'gelu_tanh' else 'gelu'}
    rope = {'rope_type': 'default', **(c.rope_scaling or {}), 'rope_theta': c.rope_theta}
    hf |= {'hidden_act': 'silu', 'rope_parameters': rope, 'rope_scaling': c.rope_scaling}
    return hf | ({'sliding_window': None} if c.family == 'mistral' else {})  # whose default is 4,096

def download(path, *patterns):
    """Fetches settings, tokenizer and what fits a pattern from a hub -> the folder."""
    if not os.path.isdir(path) and (path.count('/') > 1 or path.startswith(('.', '/', 'out/'))):
        raise UserError(f'{path}: no such checkpoint')  # at once: offline, to ask a hub takes a minute
    from huggingface_hub import snapshot_download  # slow to import
    try:
        patterns = ['*.json', '*.jinja', 'tokenizer*', 'vocab*', 'merges*', *patterns]
        return snapshot_download(path, allow_patterns=patterns)
    except Exception as error:  # offline, no such name, no permission, ...
        raise UserError(f'{path}: neither a folder nor from the hub ({first_line(error)})') from None

def find_checkpoint(path):
    """The folder of config.json and weights: a run's best/ or last/, the path itself, or a download."""
    for name in ('best', 'best.old', 'last', 'last.old', '.'):  # .old: see replace_folder
        folder = os.path.normpath(f'{path}/{name}')
        files = os.listdir(folder) if os.path.isdir(folder) else []
        if 'config.json' in files and any(file.endswith(('.safetensors', '.bin')) for file in files):
            return folder
    if os.path.isdir(path):
        raise UserError(f'{path}: no checkpoint there (config.json and *.safetensors, or best/ or last/)')
    folder = download(path, '*.safetensors')
    if not any(file.endswith('.safetensors') for file in os.listdir(folder)):
        download(path, 'pytorch_model*.bin')  # not at once: many repositories have both, of the same weights
    return folder

def read_weights(folder):
    """{name without prefix, which not all files have: tensor}, memory-mapped if possible, from the files that
    transformers would take: an index beside a single file may be stale."""
    names = [name + end for name in ('model.safetensors', 'pytorch_model.bin') for end in ('', '.index.json')]
    tensors, file = {}, next((name for name in names if os.path.exists(f'{folder}/{name}')), names[0])
    try:
        files = [file]
        if file.endswith('.json'):
            files = sorted(set(read_json(f'{folder}/{file}')['weight_map'].values()))
        for file in files:
            path = f'{folder}/{file}'
            if file.endswith('.safetensors'):
                tensors |= load_file(path)
            else:
                mmap = zipfile.is_zipfile(path)  # files from before 2020 are not
                tensors |= torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except Exception as error:  # torn, truncated or missing: each library has its own
        reason = first_line(error)
        raise UserError(f'{folder}/{file}: the checkpoint is missing or broken ({reason})') from None
    return {name.removeprefix('transformer.').removeprefix('model.'): x for name, x in tensors.items()}


# -----------------------------------------------------------------------------
# learning, and what the machine can do

def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

def make_optimizer(model, lr, weight_decay, betas=(0.9, 0.95)):
    """AdamW that decays only matrices."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

def learning_rate(step, steps, lr, min_lr, warmup):
    """Linear warm-up over a share `warmup` of the updates, then a cosine to min_lr at the last."""
    n_warmup = int(warmup * steps)
    if step < n_warmup:
        return lr * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, steps - 1 - n_warmup)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))

def sharding(shard, model, device):
    """'none', 'ddp' or 'fsdp'. 'auto' is 'ddp' as long as weights, and 12 bytes of gradient and Adam's
    averages for each that learns, take less than 40% of a GPU's memory."""
    if shard != 'auto' or world_size() == 1:
        return shard if world_size() > 1 else 'none'
    n_bytes = sum(p.numel() * (p.element_size() + 12 * p.requires_grad) for p in model.parameters())
    fits = device.type != 'cuda' or n_bytes < 0.4 * torch.cuda.get_device_properties(device).total_memory
    return 'ddp' if fits else 'fsdp'

def backward(loss, model):
    """loss: this process's part of a sum over all of them."""
    (loss * world_size() if model.shard == 'fsdp' else loss).backward()  # FSDP divides what it sums

def finish_gradients(parameters, shard, max_norm):
    """Sums over processes ('ddp'), clips the global norm (0: not) and returns it."""
    parameters = [p for p in parameters if p.grad is not None]
    if shard == 'ddp':
        flat = torch.cat([p.grad.flatten() for p in parameters])  # one exchange for all
        for p, summed in zip(parameters, sum_over_processes(flat).split([p.numel() for p in parameters])):
            p.grad.copy_(summed.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (norm.full_tensor() if is_sharded(norm) else norm).item()

def rate(amount, f, seconds):
    """amount / the time of the fastest of several calls of f, `seconds` together."""
    from torch.utils.benchmark import Timer  # slow to import
    timer = Timer('f()', globals={'f': f}, num_threads=torch.get_num_threads())
    return amount / min(timer.blocked_autorange(min_run_time=seconds).times)

def peak_flops(device, dtype, seconds=0.1):
    """Operations a second that a product of two large square matrices reaches here."""
    size = 1024 if device.type == 'cpu' else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return rate(2 * size ** 3, lambda: a @ b, seconds)

def memory_bandwidth(device):
    """Bytes a second that a large copy reads and writes."""
    a, b = torch.ones(2, 2 ** (28 if device.type == 'cpu' else 32), dtype=torch.uint8, device=device)
    return rate(2 * len(a), lambda: b.copy_(a), 0.5)


if __name__ == '__main__':
    override(globals())
    if bench:
        device, _ = setup(device)
        kind = f' ({torch.backends.cpu.get_cpu_capability()})' if device.type == 'cpu' else ''
        print(f'{device}{kind}, {torch.get_num_threads()} threads')
        print(f'{memory_bandwidth(device) / 1e9:.0f} GB/s copied')
        for dtype in (torch.float32, torch.bfloat16):
            print(f'{dtype}: {peak_flops(device, dtype, seconds=1.0) / 1e9:,.0f} GFLOP/s')
        raise SystemExit
    if not init_from:
        raise UserError('which checkpoint? --init_from=out/demo_sft')
    model = Transformer.from_pretrained(init_from)
    for key, value in asdict(model.config).items():
        print(f'{key:14s} {value}')
    print(f'{model.n_params():,} parameters')
