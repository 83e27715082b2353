"""Small models on disk and their export as GGUF."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import save_file

from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.base import WriteOptions
from ascendspeed.conversion.formats.registry import format_named
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS
from ascendspeed.tokenization import tokenizer
from helpers.chat import UNUSED, vocabulary
from helpers.shapes import hf_shapes

SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return vocabulary(tmp_path_factory.mktemp("gguf") / "tokenizer", UNUSED.values(), UNUSED)


def model(family: str, folder, tokens, dtype=torch.float32):
    """Random weights of a small model -> its directory."""
    size = tokenizer.load(tokens).vocab_size + 3  # an embedding with rows that no text has
    groups = {} if family == "internlm" else {"num_query_groups": 2}
    config = replace(PRESETS[f"{family}-tiny"], **SIZES, **groups, vocab_size=size)
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for parameter in param_mapping.parameters(config)
        for name, shape in hf_shapes(config, parameter).items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].write_config(config)))
    return folder


def export(folder, target, tokens, **options) -> gguf.GGUFReader:
    writer = format_named("gguf").writer(WriteOptions(**options))
    convert.convert(convert.with_tokenizer(convert.open_reader(folder), str(tokens)), target, writer)
    return gguf.GGUFReader(target / "model.gguf")
