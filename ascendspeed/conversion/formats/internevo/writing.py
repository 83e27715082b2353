"""Writes a training folder of InternEvo, which its trainer loads with `load_ckpt_info=dict(path=..., content=("model",))`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import hf_assets, rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.internevo import config as model_config
from ascendspeed.conversion.formats.internevo.folder import TENSOR, WEIGHT
from ascendspeed.conversion.formats.internevo.reading import dialect
from ascendspeed.conversion.output_files import create_pt
from ascendspeed.conversion.rank_files import RankLayout
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.internevo_names import InternEvoModelType, InternEvoStyle
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class InternEvoWriter:
    """How to write a training folder."""

    tp: int = 1
    pp: int = 1
    wp: int = 0
    """Weight-parallel ranks (isp) instead of tensor-parallel ones; 0: tensor parallel."""
    model_type: InternEvoModelType | None = None
    """What InternEvo trains it as; None: the kind that fits."""
    version: int = 2
    """1: w2 is up and w3 is down; 2: w3 is up and w2 is down."""
    embed_split: bool = True
    """Cut the embedding along the hidden size (`embed_split_hidden`), not along the vocabulary."""
    qk_interleaved: bool = False
    use_flash: bool = True
    """`use_flash_attn`: whether an embedding along the vocabulary is flash-attention's, which has another name."""

    def check(self, source: CheckpointReader) -> None:
        """Raises `UserError` when the source cannot be written so."""
        config, style = source.config, self._style(source.config)
        if self.wp and self.tp > 1:
            raise UserError(
                f"weight parallel (--wp {self.wp}) takes the place of tensor parallel: leave --tp {self.tp} out"
            )
        if not 1 <= self.pp <= config.num_layers:
            raise UserError(f"{config.num_layers} layers do not give {self.pp} stages something each")
        if self.version not in (1, 2):
            raise UserError(
                f"--version {self.version} does not exist: 1 (w2 is up, w3 is down) or 2 (w3 is up, w2 is down)"
            )
        sizes = [config.hidden_size, config.ffn_hidden_size, config.vocab_size]
        if not style.isp:
            sizes += [config.num_attention_heads, config.kv_heads]  # a rank computes whole heads
        choices = [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
        if style.ranks not in choices:
            said = ", ".join(map(str, choices))
            raise UserError(
                f"{sizes} (hidden size, MLP, vocabulary, heads) do not split over {style.ranks} ranks; choose {said}"
            )

    def files(self, source: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """What will be written: a file for every rank; the last stages have a layer more where they are not even."""
        config, style = source.config, self._style(source.config)
        each, more = divmod(config.num_layers, self.pp)
        grid = RankLayout(style.ranks, tuple(each + (p >= self.pp - more) for p in range(self.pp)), 0)
        create, layout, names = (
            partial(create_pt, around=lambda tensors: tensors),
            WEIGHT if style.isp else TENSOR,
            dialect(style),
        )
        return [
            PlannedFile(
                layout.path(t, p, self.pp), tuple(rank_files.stored(config, names, grid, t, p)), create
            )
            for t in range(style.ranks)
            for p in range(self.pp)
        ]

    def finish(self, source: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes what stands beside the weights, and last the mark of a whole save."""
        kinds = [str(dtype or kind).removeprefix("torch.") for kind in source.dtypes.values()]
        model_config.write(
            folder,
            source.config,
            self._style(source.config),
            self.use_flash,
            max(set(kinds), key=kinds.count),
        )
        hf_assets.write(source, folder, source.config, dtype)
        torch.save(
            {"step": 0}, folder / "0.step"
        )  # 0: nothing was trained, and nothing resumes from it by itself

    def kind(self, config: ModelConfig) -> InternEvoModelType:
        """What InternEvo trains such a model as. Raises `UserError` when there is nothing."""
        fitting = [kind for kind in FAMILIES[config.family].internevo_types if _holds(kind, config)]
        if not fitting or self.model_type not in (None, *fitting):
            what = (
                f"this {config.family} model"
                if FAMILIES[config.family].internevo_types
                else f"a model of family {config.family}"
            )
            raise UserError(
                f"InternEvo has no {self.model_type or 'kind of model'} that holds {what}: {_why(config, self.model_type)}"
            )
        return self.model_type or fitting[0]

    def _style(self, config: ModelConfig) -> InternEvoStyle:
        return InternEvoStyle(
            self.kind(config),
            ranks=self.wp or self.tp,
            isp=bool(self.wp),
            version=self.version,
            embed_split=self.embed_split,
            word_embeddings=self.use_flash and not self.embed_split,
            qk_interleaved=self.qk_interleaved,
        )


def _plain(config: ModelConfig) -> bool:
    """Without what none of them can have."""
    strange = (
        config.add_mlp_bias,
        config.tie_embeddings,
        config.num_experts,
        config.zero_centered_norm,
        config.normalize_head,
    )
    return (
        not any(strange)
        and not config.scale_embeddings
        and config.activation == "silu"
        and config.add_qkv_bias == config.add_dense_bias
    )


def _holds(kind: InternEvoModelType, config: ModelConfig) -> bool:
    if kind == "INTERNLM":  # its biases and its one width of q, k and v are fixed
        return (
            _plain(config)
            and config.add_qkv_bias
            and config.kv_heads == config.num_attention_heads
            and config.kv_channels is None
        )
    return _plain(config)


def _why(config: ModelConfig, kind: InternEvoModelType | None) -> str:
    types = FAMILIES[config.family].internevo_types
    if not types:
        return f"there are {', '.join(name for name, family in FAMILIES.items() if family.internevo_types)}"
    if kind == "INTERNLM" and _plain(config):
        return "INTERNLM always has biases on q, k, v and o, and as many key/value heads as heads"
    if kind and _plain(config):
        return f"choose {' or '.join(k for k in types if _holds(k, config))}"
    return "it has biases in the MLP or not on all of q, k, v and o, or tied embeddings"
