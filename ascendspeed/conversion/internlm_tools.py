"""Implements InternLM's published commands for InternEvo training folders, with their flags and defaults."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ascendspeed.cli.parser import output_flag
from ascendspeed.models.families import FAMILIES, REFERENCE
from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToHuggingFace:
    """Flags of `convert2hf_*`."""

    src: str
    """Training folder of InternEvo, with model_tp0_pp0.pt and the files of the other ranks."""
    tgt: Annotated[str, output_flag("tgt")]
    """Hugging Face directory to write; must be empty or absent."""
    tokenizer: str | None = None
    """Sentencepiece model file, or the folder that contains tokenizer.model; None: the one in --src."""
    dtype: Literal["bfloat16", "float16", "float32", "keep"] = "bfloat16"
    """Data type of the written tensors; keep: unchanged."""
    max_shard: str = "10GB"
    """Largest size of a safetensors file."""
    max_pos: int = 4096
    """Longest training sequence. A config.json in --src overrides the defaults of --max-pos and
    --rotary-type, but not values on the command line.
    """
    rotary_type: Literal["origin", "dynamic"] = "origin"
    """Plain rotary embedding, or dynamic NTK beyond --max-pos."""
    scaling_factor: float = 1.0
    """Factor of dynamic NTK; only used with --rotary-type dynamic (the published page wrongly names
    origin)."""
    version: Literal[1, 2] | None = None
    """1: w2 is up and w3 is down; 2: w3 is up and w2 is down; None: detected from their shapes, unless these
    are equal.
    """
    qk_interleaved: Literal["yes", "no"] | None = None
    """Rows of q and k are in rotated pairs (formerly adapt_hf=False); None: as in model_config.pt."""
    qkv_fused: Literal["yes", "no"] | None = None
    """wq, wk and wv are a fused wqkv cut in three (releases of 2024); None: as in model_config.pt."""
    format: Literal["hf", "hf-llama"] = "hf"
    """hf: the family's own names, which need InternLM's model code; hf-llama: a plain LlamaForCausalLM, which
    stock transformers loads.
    """
    chat_template: str | None = None
    """Chat template that the weights were trained with (v1, v1-eoh, v2, v2.5, v3), to write into the export;
    None: none is written.
    """


@dataclass(frozen=True)
class ToInternEvo:
    """Flags of `revert_*`."""

    src: str
    """Hugging Face directory."""
    tgt: Annotated[str, output_flag("tgt")]
    """Training folder to write; must be empty or absent."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    embed_split: bool = False
    """Cut the embedding along the hidden size (embed_split_hidden=True, InternEvo's default) instead of
    along the vocabulary.
    """
    use_flash: bool = False
    """For training with use_flash_attn=True: an embedding that is cut along the vocabulary is named as in
    flash-attention.
    """


def to_hugging_face(options: ToHuggingFace, typed: set[str], family: str, other_command: str) -> None:
    """Converts a training folder to a Hugging Face directory.

    `typed`: names of the flags on the command line. `other_command`: the command for other families. Raises
    `UserError`.
    """
    from ascendspeed.conversion import chat_assets, convert, model_card
    from ascendspeed.tokenization import tokenizer
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.tgt)
    size = convert.parse_size(options.max_shard)
    read_options = _read_options(options, typed, family)
    if "scaling_factor" in typed and read_options.rotary_type != "dynamic":
        logger.info(
            f"note: --scaling_factor {options.scaling_factor} changes nothing without --rotary_type dynamic"
        )
    reader = convert.open_reader(options.src, internevo=read_options)
    if reader.config.family != family:
        raise UserError(
            f"{options.src} is a model of family {reader.config.family}, not {family}: use {other_command}"
        )
    source = Path(options.src)
    if options.tokenizer is None and not any(
        (source / name).is_file() for name in tokenizer.TOKENIZER_CLASSES
    ):
        raise UserError(
            f"{options.src} has no tokenizer: --tokenizer is needed (tokenizer.model, or the folder that "
            f"has it)"
        )
    with _tokenizer_folder(options.tokenizer) as folder:
        reader = convert.with_tokenizer(reader, folder)
        reader = chat_assets.with_template(reader, options.chat_template)
        dtype = getattr(convert.torch, options.dtype, None)
        target_family = REFERENCE.name if options.format == "hf-llama" else None
        convert.write_hf(reader, options.tgt, target_family, dtype, size)
    config = reader.config
    rope = f"{config.rope_scaling_type} rope scaling, factor {config.rope_scaling_factor}"
    print(
        f"from {reader.description}, up to {config.max_position_embeddings} positions, {rope}: {options.tgt}"
    )
    for line in model_card.what_loads(FAMILIES[target_family or family]):
        print(line)


def _read_options(options: ToHuggingFace, typed: set[str], family: str) -> InternEvoOptions:
    """The flags as read options; the defaults of positions and rope apply only if the folder has no
    config.json.
    """
    use_defaults = not (Path(options.src) / "config.json").is_file()
    return InternEvoOptions(
        options.version,
        options.qk_interleaved,
        options.qkv_fused,
        options.max_pos if use_defaults or "max_pos" in typed else None,
        options.rotary_type if use_defaults or "rotary_type" in typed else None,
        options.scaling_factor,
        family,
    )


@contextmanager
def _tokenizer_folder(path: str | None) -> Iterator[str | None]:
    """Copies a tokenizer file of any name into a temporary folder: the published commands take the file,
    `with_tokenizer` a folder.
    """
    if path is None or Path(path).is_dir():
        yield path
        return
    if not Path(path).is_file():
        raise UserError(f"--tokenizer {path} is neither a file nor a directory")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tokenizer.model"
        shutil.copyfile(path, copy)
        try:
            yield folder
        except UserError as error:  # name the path on the command line, not the temporary one
            raise UserError(str(error).replace(str(copy), path).replace(folder, path)) from None


def to_internevo(
    options: ToInternEvo,
    families: tuple[str, ...],
    other_command: str,
    version: int = 2,
    adapt_hf: bool = True,
) -> None:
    """Converts a Hugging Face directory of one of `families` to a training folder.

    `other_command`: the command for other families. `adapt_hf`: keeps the rows of q and k in their order.
    Raises `UserError`.
    """
    from dataclasses import replace

    from ascendspeed.conversion import convert
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.tgt)
    reader = convert.open_reader(options.src)
    if reader.config.family not in families:
        raise UserError(
            f"{options.src} is a model of family {reader.config.family}, not {' or '.join(families)}: use "
            f"{other_command}"
        )
    writer = convert.InternEvoWriter(
        options.tp_size, version=version, embed_split=options.embed_split, use_flash=options.use_flash
    )
    model_type = writer.resolve_model_type(reader.config)
    writer = replace(writer, qk_interleaved=model_type == "LLAMA2" and not adapt_hf)
    convert.convert(reader, options.tgt, writer)
    print(
        f"for TP {options.tp_size}, to be trained as {model_type} with "
        f"embed_split_hidden={writer.embed_split}, "
        f"qk_interleaved={writer.qk_interleaved} (adapt_hf={not writer.qk_interleaved} once): {options.tgt}"
    )
