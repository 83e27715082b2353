"""The commands that InternLM published for InternEvo's training folders: their flags and defaults, and what they do now."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendspeed.models.families.internevo_names import InternEvoOptions
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ToHuggingFace:
    """Flags of `convert2hf_*`."""

    src: str
    """Training folder of InternEvo: model_tp0_pp0.pt and so on."""
    tgt: str
    """Hugging Face directory to write; must not hold anything yet."""
    tokenizer: str | None = None
    """tokenizer.model, or the folder that has it; None: the one in --src."""
    dtype: Literal["bfloat16", "float16", "float32", "keep"] = "bfloat16"
    """Type of the written tensors; keep: as they are."""
    max_shard: str = "10GB"
    """Size of a safetensors file."""
    max_pos: int = 4096
    """Longest trained sequence. A config.json in --src goes before this default and the next, not before what is typed."""
    rotary_type: Literal["origin", "dynamic"] = "origin"
    """Plain rotary embedding, or dynamic NTK beyond --max_pos."""
    scaling_factor: float = 1.0
    """Factor of dynamic NTK: it counts with --rotary_type dynamic (and not, as the published page says, with origin)."""
    version: Literal[1, 2] | None = None
    """1: w2 is up and w3 is down; 2: w3 is up and w2 is down; None: their shapes tell, unless they are equal."""
    qk_interleaved: Literal["yes", "no"] | None = None
    """The rows of q and k lie in pairs (once adapt_hf=False); None: as model_config.pt says."""
    qkv_fused: Literal["yes", "no"] | None = None
    """wq, wk and wv are a fused wqkv cut in three (releases of 2024); None: as model_config.pt says."""


@dataclass(frozen=True)
class ToInternEvo:
    """Flags of `revert_*`."""

    src: str
    """Hugging Face directory."""
    tgt: str
    """Training folder to write; must not hold anything yet."""
    tp_size: int = 1
    """Tensor-parallel ranks."""
    embed_split: bool = False
    """Cut the embedding along the hidden size (embed_split_hidden=True, InternEvo's default); else along the vocabulary."""
    use_flash: bool = False
    """Training has use_flash_attn=True: an embedding along the vocabulary is flash-attention's then, under its name."""


def to_hugging_face(options: ToHuggingFace, typed: set[str], family: str, other: str) -> None:
    """`typed`: names of the flags that were given. `other`: the command for the other kinds. Raises `UserError`."""
    from ascendspeed.conversion import convert
    from ascendspeed.tokenization import tokenizer
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.tgt)
    size = convert.parse_size(options.max_shard)
    defaults = not (Path(options.src) / "config.json").is_file()
    asked = InternEvoOptions(
        options.version,
        options.qk_interleaved,
        options.qkv_fused,
        options.max_pos if defaults or "max_pos" in typed else None,
        options.rotary_type if defaults or "rotary_type" in typed else None,
        options.scaling_factor,
        family,
    )
    if "scaling_factor" in typed and asked.rotary_type != "dynamic":
        logger.info(
            f"note: --scaling_factor {options.scaling_factor} changes nothing without --rotary_type dynamic"
        )
    source = convert.open_reader(options.src, internevo=asked)
    if source.config.family != family:
        raise UserError(
            f"{options.src} is a model of family {source.config.family}, not {family}: use {other}"
        )
    if options.tokenizer is None and not any(
        (Path(options.src) / name).is_file() for name in tokenizer.TOKENIZER_CLASSES
    ):
        raise UserError(
            f"{options.src} has no tokenizer: --tokenizer is needed (tokenizer.model, or the folder that has it)"
        )
    with _tokenizer_folder(options.tokenizer) as folder:
        source = convert.with_tokenizer(source, folder)
        dtype = getattr(convert.torch, options.dtype, None)
        convert.write_hf(source, options.tgt, None, dtype, size)
    rope = f"{source.config.rope_scaling_type} rope scaling, factor {source.config.rope_scaling_factor}"
    print(
        f"from {source.description}, up to {source.config.max_position_embeddings} positions, {rope}: {options.tgt}"
    )


@contextmanager
def _tokenizer_folder(path: str | None) -> Iterator[str | None]:
    """The published commands take the tokenizer's file, by any name; everything here takes its folder."""
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
        except UserError as error:  # in the words of whoever typed the path
            raise UserError(str(error).replace(str(copy), path).replace(folder, path)) from None


def to_internevo(
    options: ToInternEvo, families: tuple[str, ...], other: str, version: int = 2, adapt_hf: bool = True
) -> None:
    """`families`: ours that the command is for, `other`: that for the others. `adapt_hf`: leave the rows of q and k as they are."""
    from dataclasses import replace

    from ascendspeed.conversion import convert
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.tgt)
    source = convert.open_reader(options.src)
    if source.config.family not in families:
        raise UserError(
            f"{options.src} is a model of family {source.config.family}, not {' or '.join(families)}: use {other}"
        )
    target = convert.InternEvoWriter(
        options.tp_size, version=version, embed_split=options.embed_split, use_flash=options.use_flash
    )
    kind = target.resolve_model_type(source.config)
    target = replace(target, qk_interleaved=kind == "LLAMA2" and not adapt_hf)
    convert.convert(source, options.tgt, target)
    print(
        f"for TP {options.tp_size}, to be trained as {kind} with embed_split_hidden={target.embed_split}, "
        f"qk_interleaved={target.qk_interleaved} (adapt_hf={not target.qk_interleaved} once): {options.tgt}"
    )
