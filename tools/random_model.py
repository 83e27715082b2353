"""Writes a model with random weights as a Hugging Face directory, for trying the tools without real weights.

python tools/random_model.py --model internlm-tiny --tokenizer dataset/internlm \\
    --output model_from_hf/internlm-tiny

The vocabulary of a tiny model grows to that of its tokenizer; other sizes are set by flags, for any model.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from zlib import crc32

from ascendspeed.cli import parser
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families
from ascendspeed.models.families.base import check_heads
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils import errors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Writes a model with random weights as a Hugging Face directory."""

    output_dir: Annotated[str, parser.output_flag("output-dir")]
    """Folder to write; must be empty or absent."""
    model: str = "internlm-tiny"
    """Name of the architecture."""
    tokenizer: str | None = None
    """Folder with the tokenizer to copy."""
    vocab_size: int | None = None
    """Rows of the vocabulary; default: those of --model, and for a tiny model at least the tokenizer's."""
    num_layers: int | None = None
    """Transformer layers; default of this and the next flags: those of --model."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads."""
    max_position_embeddings: int | None = None
    """Longest sequence that the model is made for."""
    seed: int = 1234
    """Random seed of the weights."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Data type of the weights."""
    noise: float = 0.0
    """Standard deviation of biases around 0 and of norm weights around 1; above 0, logits reveal a program
    that drops one of them."""


SIZES = (
    "vocab_size",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "max_position_embeddings",
)
INTERNLM_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def _config(options: Options) -> ModelConfig:
    """Returns the architecture: sizes of the command line over those of --model. Raises UserError."""
    config = families.preset(options.model)
    typed = {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    for name, value in typed.items():
        if value < 1:
            raise errors.UserError(f"{parser.flag_of(name)} {value}: at least 1")
    if options.tokenizer and "vocab_size" not in typed and options.model.endswith("-tiny"):
        typed["vocab_size"] = max(config.vocab_size, tokenizer.load(options.tokenizer).vocab_size)
    config = dataclasses.replace(config, **typed)
    check_heads(config)
    return config


def _with_noise(tensor: "Tensor", name: str, seed: int, deviation: float) -> "Tensor":
    """Adds normal noise to a bias or a norm weight; matrices stay as they are."""
    import torch

    if not deviation or tensor.ndim > 1:
        return tensor
    generator = torch.Generator().manual_seed(crc32(f"{seed} noise {name}".encode()))
    return tensor + deviation * torch.randn(tensor.shape, generator=generator)


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    config = _config(options)
    if not 0 <= options.noise < math.inf:
        raise errors.UserError(f"--noise {options.noise} is not a standard deviation: 0 or a little more")
    import torch  # after parsing, so that --help does not wait for torch

    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
    from ascendspeed.models.param_mapping import parameters, random_tensor
    from ascendspeed.utils.atomic import require_empty_dir

    def random_parameter(name: str) -> "Tensor":
        return _with_noise(
            random_tensor(config, parameters_by_name[name], options.seed), name, options.seed, options.noise
        )

    require_empty_dir(options.output_dir)
    parameters_by_name = {parameter.name: parameter for parameter in parameters(config)}
    source = CheckpointReader(
        description="random weights",
        path=Path(options.model),
        config=config,
        config_json={} if options.tokenizer else INTERNLM_TOKENS,
        dtypes=dict.fromkeys(parameters_by_name, torch.float32),
        read_block=from_factory(random_parameter),
        assets_dir=None,
    )
    source = convert.with_tokenizer(source, options.tokenizer)
    convert.convert(source, options.output_dir, convert.HuggingFaceWriter(), convert.DTYPES[options.dtype])


if __name__ == "__main__":
    errors.run(main, clean_up=True)
