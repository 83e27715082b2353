"""`InternEvoFolder`: parallel mode, stages and tensor order of a training folder, from the names and shapes
in its files.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ascendspeed.conversion import rank_files
from ascendspeed.conversion.formats.internevo import config
from ascendspeed.conversion.formats.internevo.file_names import (
    EXPERTS,
    TENSOR_PARALLEL,
    ShardedFileNames,
    file_names_of,
)
from ascendspeed.conversion.rank_file_names import RankFileNames
from ascendspeed.conversion.rank_files import RankTensors
from ascendspeed.models.families.internevo_names import (
    PARAM_MAPPINGS,
    QKV,
    InternEvoModelType,
    InternEvoOptions,
    InternEvoStyle,
)
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

logger = logging.getLogger(__name__)

UP_PROJECTION = {1: "w2 is up, w3 is down", 2: "w3 is up, w2 is down"}
"""InternEvo's version -> names of the MLP's matrices; w1 is the gate."""


def read(folder: Path, file_names: RankFileNames) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Reads every rank's tensors without the wrapper's prefix; each chunk of an interleaved pipeline becomes
    a stage.
    """
    files = rank_files.read(folder, file_names)
    stages: dict[tuple[int, int], dict[str, Tensor]] = {}
    pp = 1 + max(p for _, p in files)
    for (t, p), tensors in files.items():
        for full_name, tensor in tensors.items():
            chunk, name = re.fullmatch(r"(?:(\d+)\.)?(?:model\.)?(.*)", full_name, re.DOTALL).groups()
            name = name.replace(".mixer.wqkv.", ".mixer.Wqkv.")  # the spelling of some releases
            stages.setdefault((t, int(chunk or 0) * pp + p), {})[name] = tensor
    return stages


@dataclass(frozen=True)
class InternEvoFolder:
    """The tensors and the model configuration of a training folder."""

    folder: Path
    tensors: RankTensors
    model_config: Mapping[str, Any]
    """Content of model_config.pt; empty if there is none."""
    isp: bool
    ranks: int
    """Ranks that share every layer."""
    vocabulary_ranks: int
    """Ranks that share embedding and head."""

    @classmethod
    def open(cls, folder: Path) -> "InternEvoFolder":
        """Reads a folder. Raises `UserError` if a file is missing or damaged."""
        sharded = file_names_of(folder) or ShardedFileNames(TENSOR_PARALLEL)
        tensors = read(folder, sharded.file_names)
        files = 1 + max(t for t, _ in tensors)
        return cls(
            folder,
            tensors,
            config.read(folder),
            sharded.file_names is not TENSOR_PARALLEL,
            sharded.layer_ranks or files,
            sharded.vocabulary_ranks or files,
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of layers on every stage."""
        counts = {p: 0 for _, p in self.tensors}
        for (t, p), names in self.tensors.items():
            if t == 0:
                matches = (re.match(r"(?:blocks|layers)\.(\d+)\.", name) for name in names)
                counts[p] = max((1 + int(match[1]) for match in matches if match), default=0)
        return tuple(counts[p] for p in sorted(counts))

    @property
    def names(self) -> set[str]:
        """Names of the first rank's tensors, on all stages."""
        return {name for (t, _), tensors in self.tensors.items() if t == 0 for name in tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the first rank. Raises `UserError` if it is missing."""
        stages = (tensors for (t, _), tensors in sorted(self.tensors.items()) if t == 0)
        tensor = next((tensors[name] for tensors in stages if name in tensors), None)
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise UserError(f"{self.folder} lacks {name}")
        return tuple(tensor.shape)

    def style(self, options: InternEvoOptions) -> InternEvoStyle:
        """Names and order of the tensors. Raises `UserError` if they are ambiguous or not as in `options`."""
        style = InternEvoStyle(
            self._model_type(), self.ranks, self.isp, self.vocabulary_ranks, self._version(options)
        )
        style = replace(style, word_embeddings=style.named("word_embeddings.weight")[0] not in self.names)
        hidden = self.shape(style.named("input_layernorm.weight")[0])[0]
        width = self.shape(style.named("word_embeddings.weight")[0])[-1]
        parts = self.vocabulary_ranks
        if width not in (hidden, hidden / parts):
            raise UserError(
                f"{self.folder}: the embedding is {width} wide, neither {hidden} nor what {parts} ranks "
                f"have of it"
            )
        return replace(
            style,
            embed_split=width * parts == hidden,
            qk_interleaved=self._interleaved(style, options),
            cut_qkv=style.model_type == "LLAMA2" and bool(self.has_fused_qkv(options)),
            cut_glu=self.isp and self.model_config.get("mlp_layer_fusion") is True,
        )

    def _model_type(self) -> InternEvoModelType:
        for model_type, rows in PARAM_MAPPINGS.items():
            qkv_names = {
                name.format(l=0)
                for row in rows
                if row.megatron_param == QKV + "weight"
                for name in row.hf_params
            }
            if qkv_names & self.names:
                return model_type
        if any("moe_layer" in name for name in self.names):
            raise UserError(f"{self.folder} holds {EXPERTS}")
        raise UserError(f"{self.folder} holds tensors of unknown names: {shorten_list(sorted(self.names))}")

    def _version(self, options: InternEvoOptions) -> Literal[1, 2]:
        """The version by the shapes: the up projection has the shape of the gate (w1), the down projection
        has not.
        """
        modules = (
            name.removesuffix("1.weight") for name in sorted(self.names) if name.endswith(".w1.weight")
        )
        module = next(modules, "w")
        w1, w2, w3 = (self.shape(f"{module}{i}.weight") for i in (1, 2, 3))
        candidates: list[Literal[1, 2]] = [version for version, up in ((1, w2), (2, w3)) if up == w1]
        shapes = f"w1 {list(w1)}, w2 {list(w2)} and w3 {list(w3)}"
        if options.version is not None and options.version not in candidates:
            meaning = UP_PROJECTION[options.version]
            raise UserError(
                f"{self.folder} is not of version {options.version}, where {meaning}: it has {shapes}"
            )
        if not candidates:
            raise UserError(f"{self.folder} has {shapes}: neither w2 nor w3 can be the up projection")
        if len(candidates) == 2 and options.version is None:
            choices = " or ".join(f"--version {version} ({what})" for version, what in UP_PROJECTION.items())
            raise UserError(f"{self.folder} has {shapes}, which do not tell up from down: say {choices}")
        return options.version or candidates[0]

    def _interleaved(self, style: InternEvoStyle, options: InternEvoOptions) -> bool:
        if options.qk_interleaved is not None:
            return options.qk_interleaved == "yes"
        interleaved = config.interleaved(self.folder, self.model_config, style.model_type)
        if interleaved is None and style.model_type != "INTERNLM":
            logger.info(
                f"note: {self.folder} does not say qk_interleaved or adapt_hf: q and k are taken as not "
                f"interleaved, InternEvo's "
                "default; say --qk-interleaved yes if training had adapt_hf=False"
            )
        return bool(interleaved)

    def has_fused_qkv(self, options: InternEvoOptions) -> bool | None:
        """True if wq, wk and wv were one wqkv in training, which releases of 2024 saved in three parts; None:
        unknown.

        Before that could be switched, InternLM2 was always fused and Llama never.
        """
        if options.qkv_fused is not None:
            return options.qkv_fused == "yes"
        if self.model_config.get("enable_qkv_fusion") is not None:
            return bool(self.model_config["enable_qkv_fusion"])
        model_type = config.trained_model_type(self.folder)
        return model_type.startswith("INTERNLM2") if model_type else None
