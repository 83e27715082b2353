"""Tiny model that continues every text with a given sequence of tokens: a table of token pairs as weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families, param_mapping
from ascendspeed.tokenization import tokenizer
from helpers import corpus

IM_END = "<|im_end|>"


def scripted_model(
    folder: Path,
    answer: list[str],
    loop: str,
    eos_ids: list[int] | None = None,
    special: tuple[str, ...] = (IM_END,),
    extra_rows: int = 0,
    ordinary: tuple[str, ...] = (),
) -> Path:
    """Writes a Hugging Face directory whose model says the tokens `answer` after any text, then `loop`
    for ever.

    The tokens of `answer` and `loop` are different, and the texts that are asked end with none of them.
    `special`: control tokens beyond the sentencepiece vocabulary; `eos_ids`: eos_token_id of
    generation_config.json; None: no such file. `extra_rows`: rows of the embedding beyond the ids;
    negative: fewer rows than ids. `ordinary`: added tokens that are text.
    """
    corpus.sentencepiece_dir(folder, 400)
    base = tokenizer.load(folder).vocab_size
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "added_tokens_decoder": {
            str(base + i): {"content": text, "special": text in special, "normalized": False}
            for i, text in enumerate((*special, *ordinary))
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = tokenizer.load(folder)
    chain = [tokens.required_id(text) for text in (*answer, loop)]
    model = ModelConfig(
        "internlm",
        num_layers=1,
        hidden_size=32,
        ffn_hidden_size=32,
        num_attention_heads=2,
        vocab_size=tokens.vocab_size + extra_rows,
        max_position_embeddings=1024,
    )
    embedding = torch.zeros(model.vocab_size, 32)
    embedding[:, 31] = 1.0  # any other token
    head = torch.zeros(model.vocab_size, 32)
    head[chain[0], 31] = 9.0
    for place, token in enumerate(chain):
        embedding[token] = torch.eye(32)[place]
        head[chain[min(place + 1, len(chain) - 1)], place] = 9.0
    tensors = {}
    for parameter in param_mapping.parameters(model):
        tensor = param_mapping.random_tensor(model, parameter, 3)
        if parameter.name.endswith("word_embeddings.weight"):
            tensor = embedding
        elif parameter.name == "output_layer.weight":
            tensor = head
        elif tensor.dim() == 2 or parameter.name.endswith("bias"):
            tensor = torch.zeros_like(tensor)  # attention and MLP add nothing
        tensors |= param_mapping.megatron_to_hf(model, parameter, tensor)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps(families.FAMILIES["internlm"].write_config(model) | ids))
    if eos_ids is not None:
        (folder / "generation_config.json").write_text(json.dumps(ids | {"eos_token_id": eos_ids}))
    return folder
