"""Small GGUF files, made by the `gguf` package as llama.cpp's converter makes them of a model's folder."""

import json

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from tests.tiny import model_config, tokenizer


def save_gguf(path, kind="Q8_0", weights=True, vocabulary=True, tie=True, architecture="llama", more=()):
    """A random llama of two layers, its matrices in a kind of blocks and its norms in fp32, and the tokenizer
    that tests.tiny makes. more: (how to add, name, value) of what else is in the file."""
    own = tokenizer()
    torch.manual_seed(0)
    config = model_config("llama", vocab_size=len(own), tie_word_embeddings=tie)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(own))
    if vocabulary:
        _add_tokenizer(writer, own)
    for add, name, value in more:
        getattr(writer, add)(name, value)
    if weights:
        _add_weights(writer, AutoModelForCausalLM.from_config(config), Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_tokenizer(writer, own):
    tokens, special = own.convert_ids_to_tokens(range(len(own))), own.get_added_vocab()
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(own.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(own.eos_token_id)
    writer.add_pad_token_id(own.pad_token_id)
    writer.add_chat_template(own.chat_template)


def _add_weights(writer, model, kind):
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        for projection, count in heads.items():
            if projection in name:  # the two halves of a head's rotation, by turns
                halves = values.reshape(count, 2, -1, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        its = kind if values.ndim > 1 else Kind.F32
        stem = name.removesuffix(".weight")
        writer.add_tensor(f"{names.get_name(stem)}.weight", _blocks(values, its), raw_dtype=its)


def _blocks(values, kind):
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:  # then nobody reads them either
        return np.zeros(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
