"""Writes a model with random weights as a Hugging Face directory, to try the whole chain on before real weights are there.

python tools/random_model.py --model internlm-tiny --tokenizer dataset/internlm --output-dir model_from_hf/internlm-tiny
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendspeed import errors, families, flags


@dataclass(frozen=True)
class Options:
    """Writes a model with random weights as a Hugging Face directory."""

    output_dir: str
    """Folder to write; must not hold anything yet."""
    model: str = "internlm-tiny"
    """Architecture by name."""
    tokenizer: str | None = None
    """Folder with the tokenizer to copy beside the weights."""
    seed: int = 1234
    """The same seed gives the same weights."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Type of the weights."""


def main() -> None:
    """Parses, draws, writes."""
    options = flags.parse(Options, description=Options.__doc__ or "")
    config = families.preset(options.model)
    import torch  # after parsing, so that --help does not wait for torch

    from ascendspeed import convert
    from ascendspeed.formats.source import Source, from_maker
    from ascendspeed.weights import parameters, random_tensor

    known = {parameter.name: parameter for parameter in parameters(config)}
    source = Source(
        kind="random weights",
        where=Path(options.model),
        config=config,
        theirs={} if options.tokenizer else {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},  # InternLM's
        dtypes=dict.fromkeys(known, torch.float32),
        block=from_maker(lambda name: random_tensor(config, known[name], options.seed)),
        beside=None,
    )
    source = convert.with_tokenizer(source, options.tokenizer)
    convert.convert(source, options.output_dir, convert.HuggingFace(), convert.DTYPES[options.dtype])


if __name__ == "__main__":
    errors.run(main, clean_up=True)
