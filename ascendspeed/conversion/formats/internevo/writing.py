"""Writes training folders of InternEvo, which its trainer loads with `load_ckpt_info=dict(path=...,
content=("model",))`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import hf_assets, rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.internevo import config as model_config
from ascendspeed.conversion.formats.internevo.file_names import TENSOR_PARALLEL, WEIGHT_PARALLEL
from ascendspeed.conversion.formats.internevo.reading import naming_scheme
from ascendspeed.conversion.output_files import create_pt, save_pt
from ascendspeed.conversion.rank_files import RankLayout
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models.families import FAMILIES
from ascendspeed.models.families.base import InternEvoModelType
from ascendspeed.models.families.internevo_names import InternEvoStyle
from ascendspeed.utils.errors import UserError


@dataclass(frozen=True)
class InternEvoWriter:
    """Writer of a training folder."""

    tp: int = 1
    pp: int = 1
    wp: int = 0
    """Weight-parallel ranks (isp) instead of tensor-parallel ones; 0: tensor parallel."""
    model_type: InternEvoModelType | None = None
    """`model_type` in InternEvo's configuration; None: the first that fits."""
    version: int = 2
    """1: w2 is up and w3 is down; 2: w3 is up and w2 is down."""
    embed_split: bool = True
    """Shards the embedding along the hidden size (`embed_split_hidden`), not along the vocabulary."""
    qk_interleaved: bool = False
    use_flash: bool = True
    """`use_flash_attn`: an embedding along the vocabulary is then flash-attention's, which has another name.
    """

    def check(self, reader: CheckpointReader) -> None:
        """Raises `UserError` if the model does not split over these ranks, or InternEvo cannot train it."""
        config = reader.config
        style = self._style(config)
        if self.wp and self.tp > 1:
            raise UserError(
                f"weight parallel (--wp {self.wp}) takes the place of tensor parallel: leave --tp {self.tp} "
                f"out"
            )
        if not 1 <= self.pp <= config.num_layers:
            raise UserError(f"{config.num_layers} layers do not give {self.pp} stages something each")
        if self.version not in (1, 2):
            raise UserError(
                f"--version {self.version} does not exist: 1 (w2 is up, w3 is down) or 2 (w3 is up, w2 is "
                f"down)"
            )
        sizes = [config.hidden_size, config.ffn_hidden_size, config.vocab_size]
        if not style.isp:
            sizes += [config.num_attention_heads, config.kv_heads]  # a rank computes whole heads
        choices = [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
        if style.ranks not in choices:
            raise UserError(
                f"{sizes} (hidden size, MLP, vocabulary, heads) do not split over {style.ranks} ranks; "
                f"choose {', '.join(map(str, choices))}"
            )

    def files(self, reader: CheckpointReader, dtype: torch.dtype | None) -> list[PlannedFile]:
        """Plans one file for every rank; if the stages are uneven, the last ones have one layer more."""
        config = reader.config
        style = self._style(config)
        layers, remainder = divmod(config.num_layers, self.pp)
        stages = tuple(layers + (p >= self.pp - remainder) for p in range(self.pp))
        layout = RankLayout(style.ranks, stages, 0)
        file_names = WEIGHT_PARALLEL if style.isp else TENSOR_PARALLEL
        scheme = naming_scheme(style)
        create = partial(create_pt, wrap=lambda tensors: tensors)
        return [
            PlannedFile(
                file_names.path(t, p, self.pp),
                tuple(rank_files.stored_tensors(config, scheme, layout, t, p)),
                create,
            )
            for t in range(style.ranks)
            for p in range(self.pp)
        ]

    def finish(self, reader: CheckpointReader, folder: Path, dtype: torch.dtype | None) -> None:
        """Writes model_config.pt, config.json and the tokenizer, and last the file that marks a complete
        save.
        """
        types = [str(dtype or stored).removeprefix("torch.") for stored in reader.dtypes.values()]
        main_type = max(set(types), key=types.count)
        model_config.write(folder, reader.config, self._style(reader.config), self.use_flash, main_type)
        hf_assets.write(reader, folder, reader.config, dtype)
        save_pt({"step": 0}, folder / "0.step")  # step 0: nothing is trained, and no run resumes from it

    def resolve_model_type(self, config: ModelConfig) -> InternEvoModelType:
        """Returns the `model_type` that InternEvo trains such a model as. Raises `UserError` if there is
        none.
        """
        candidates = [
            model_type
            for model_type in FAMILIES[config.family].internevo_types
            if _can_hold(model_type, config)
        ]
        if not candidates or self.model_type not in (None, *candidates):
            if FAMILIES[config.family].internevo_types:
                model = f"this {config.family} model"
            else:
                model = f"a model of family {config.family}"
            raise UserError(
                f"InternEvo has no {self.model_type or 'kind of model'} that holds {model}: "
                f"{_reason(config, self.model_type)}"
            )
        return self.model_type or candidates[0]

    def _style(self, config: ModelConfig) -> InternEvoStyle:
        return InternEvoStyle(
            self.resolve_model_type(config),
            ranks=self.wp or self.tp,
            isp=bool(self.wp),
            version=self.version,
            embed_split=self.embed_split,
            word_embeddings=self.use_flash and not self.embed_split,
            qk_interleaved=self.qk_interleaved,
        )


def _is_plain(config: ModelConfig) -> bool:
    """True if the model uses nothing that InternEvo lacks in all of its model types."""
    unsupported = (
        config.add_mlp_bias,
        config.tie_embeddings,
        config.num_experts,
        config.zero_centered_norm,
        config.normalize_head,
        config.scale_embeddings,
        config.rope_scaling_type not in ("none", "dynamic"),
    )
    return (
        not any(unsupported) and config.activation == "silu" and config.add_qkv_bias == config.add_dense_bias
    )


def _can_hold(model_type: InternEvoModelType, config: ModelConfig) -> bool:
    if model_type != "INTERNLM":
        return _is_plain(config)
    # INTERNLM always has biases, and one width for q, k and v.
    return (
        _is_plain(config)
        and config.add_qkv_bias
        and config.kv_heads == config.num_attention_heads
        and config.kv_channels is None
    )


def _reason(config: ModelConfig, model_type: InternEvoModelType | None) -> str:
    """Explains why `model_type` (None: every type) cannot hold the model, with the choices."""
    types = FAMILIES[config.family].internevo_types
    if not types:
        return f"there are {', '.join(name for name, family in FAMILIES.items() if family.internevo_types)}"
    if model_type == "INTERNLM" and _is_plain(config):
        return "INTERNLM always has biases on q, k, v and o, and as many key/value heads as heads"
    if model_type and _is_plain(config):
        choices = (choice for choice in types if _can_hold(choice, config))
        return f"choose {' or '.join(choices)}"
    return (
        "it has biases in the MLP or not on all of q, k, v and o, tied embeddings, "
        "or a rope scaling other than dynamic"
    )
