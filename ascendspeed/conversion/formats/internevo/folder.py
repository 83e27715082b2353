"""What can be told of a training folder from the names and shapes in its files: parallel mode, stages, and how its tensors lie."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ascendspeed.conversion import rank_files
from ascendspeed.conversion.formats.internevo import config
from ascendspeed.conversion.rank_files import RankFileNames, RankTensors
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

KIND = "InternEvo training folder"
TENSOR = RankFileNames(KIND, "", ("model_tp{t}_pp{p}.pt",) * 2, r"model_tp(\d+)_pp(\d+)\.pt", "", {})
WEIGHT = RankFileNames(KIND, "", ("model_wp{t}_pp{p}.pt",) * 2, r"model_wp(\d+)_pp(\d+)\.pt", "", {})
EARLY = re.compile(r"model_tp(\d+)_wp(\d+)_pp\d+\.pt")
EXPERTS = "experts: mixtures of experts are not read from InternEvo's folders"
OTHER_FORMS = {
    r"model_.*_(dp|zo)\d+\.pt": "shards of FSDP, which only a run of the same size can load",
    r"model_moe_layer.*\.pt": EXPERTS,
}


def layout_of(folder: Path) -> tuple[RankFileNames, int, int] | None:
    """How the files are named; over how many ranks layers lie, and embedding and head (0: as many as files). None: no such files.

    Raises `UserError` for files of several parallel modes, and for forms that are not read.
    """
    names = sorted(path.name for path in folder.glob("model_*.pt"))
    for pattern, what in OTHER_FORMS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{folder} holds {what}")
    forms = [
        layout for layout in (TENSOR, WEIGHT) if any(re.fullmatch(layout.pattern, name) for name in names)
    ]
    early = [match for name in names if (match := EARLY.fullmatch(name))]
    if len(forms) + bool(early) > 1:
        raise UserError(
            f"{folder} has files of several parallel modes ({shorten_list(names)}): keep those of one save"
        )
    if not early:
        return (forms[0], 0, 0) if forms else None
    tp, wp = (1 + max(int(match[i]) for match in early) for i in (1, 2))
    for match in early:  # both count the same ranks, each up to its own size
        rank = max(int(match[1]), int(match[2]))
        if (rank % tp, rank % wp) != (int(match[1]), int(match[2])):
            raise UserError(
                f"{folder} has {match[0]}, which no rank of TP {tp} and WP {wp} writes: keep the files of one save"
            )
    pattern, name = (r"tp\d+_wp(\d+)", "tp*_wp{t}") if wp >= tp else (r"tp(\d+)_wp\d+", "tp{t}_wp*")
    return (
        replace(WEIGHT, pattern=rf"model_{pattern}_pp(\d+)\.pt", files=(f"model_{name}_pp{{p}}.pt",) * 2),
        wp,
        tp,
    )


def read(folder: Path, layout: RankFileNames) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Every rank's tensors without the wrapper's prefix; every chunk of an interleaved pipeline is a stage of its own."""
    found = rank_files.read(folder, layout)
    stages: dict[tuple[int, int], dict[str, Tensor]] = {}
    pp = 1 + max(p for _, p in found)
    for (t, p), held in found.items():
        for name, tensor in held.items():
            chunk, bare = re.fullmatch(r"(?:(\d+)\.)?(?:model\.)?(.*)", name, re.DOTALL).groups()
            bare = bare.replace(".mixer.wqkv.", ".mixer.Wqkv.")  # some releases say it so
            stages.setdefault((t, int(chunk or 0) * pp + p), {})[bare] = tensor
    return stages


@dataclass(frozen=True)
class InternEvoFolder:
    """The files of a folder."""

    folder: Path
    found: RankTensors
    said: Mapping[str, Any]
    """model_config.pt."""
    isp: bool
    ranks: int
    """That share every layer."""
    outer: int
    """Ranks that share embedding and head."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of every stage."""
        last = {p: -1 for _, p in self.found}
        for (t, p), held in self.found.items():
            if t == 0:
                last[p] = max(
                    [
                        -1,
                        *(
                            int(match[1])
                            for name in held
                            if (match := re.match(r"(?:blocks|layers)\.(\d+)\.", name))
                        ),
                    ]
                )
        return tuple(1 + last[p] for p in sorted(last))

    @property
    def names(self) -> set[str]:
        """Of the first rank's tensors, on all stages."""
        return {name for (t, _), held in self.found.items() if t == 0 for name in held}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the first rank. Raises `UserError` when it is not there."""
        tensor = next(
            (held[name] for (t, _), held in sorted(self.found.items()) if t == 0 and name in held), None
        )
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise UserError(f"{self.folder} lacks {name}")
        return tuple(tensor.shape)

    def style(self, asked: InternEvoOptions) -> InternEvoStyle:
        """How the tensors are named and lie. Raises `UserError` when that cannot be told, or is not what was said."""
        style = InternEvoStyle(self._model_type(), self.ranks, self.isp, self.outer, self._version(asked))
        style = replace(style, word_embeddings=style.named("word_embeddings.weight")[0] not in self.names)
        hidden, parts = self.shape(style.named("input_layernorm.weight")[0])[0], self.outer
        width = self.shape(style.named("word_embeddings.weight")[0])[-1]
        if width not in (hidden, hidden / parts):
            raise UserError(
                f"{self.folder}: the embedding is {width} wide, neither {hidden} nor what {parts} ranks have of it"
            )
        return replace(
            style,
            embed_split=width * parts == hidden,
            qk_interleaved=self._interleaved(style, asked),
            cut_qkv=style.model_type == "LLAMA2" and bool(self.fused(asked)),
            cut_glu=self.isp and self.said.get("mlp_layer_fusion") is True,
        )

    def _model_type(self) -> InternEvoModelType:
        for model_type, rows in PARAM_MAPPINGS.items():
            if any(
                name.format(l=0) in self.names
                for row in rows
                if row.megatron_param == QKV + "weight"
                for name in row.hf_params
            ):
                return model_type
        if any("moe_layer" in name for name in self.names):
            raise UserError(f"{self.folder} holds {EXPERTS}")
        raise UserError(
            f"{self.folder} holds tensors of names that are not known here: {shorten_list(sorted(self.names))}"
        )

    def _version(self, asked: InternEvoOptions) -> Literal[1, 2]:
        """By the shapes: up has that of gate (w1), down has not."""
        module = next(
            (name.removesuffix("1.weight") for name in sorted(self.names) if name.endswith(".w1.weight")), "w"
        )
        w1, w2, w3 = (self.shape(f"{module}{i}.weight") for i in (1, 2, 3))
        fits: list[Literal[1, 2]] = [version for version, up in ((1, w2), (2, w3)) if up == w1]
        shapes = f"w1 {list(w1)}, w2 {list(w2)} and w3 {list(w3)}"
        if asked.version is not None and asked.version not in fits:
            raise UserError(
                f"{self.folder} is not of version {asked.version}, where {_UP[asked.version]}: it has {shapes}"
            )
        if not fits:
            raise UserError(f"{self.folder} has {shapes}: neither w2 nor w3 can be the up projection")
        if len(fits) == 2 and asked.version is None:
            choices = " or ".join(f"--version {version} ({what})" for version, what in _UP.items())
            raise UserError(f"{self.folder} has {shapes}, which do not tell up from down: say {choices}")
        return asked.version or fits[0]

    def _interleaved(self, style: InternEvoStyle, asked: InternEvoOptions) -> bool:
        if asked.qk_interleaved is not None:
            return asked.qk_interleaved == "yes"
        found = config.interleaved(self.folder, self.said, style.model_type)
        if found is None and style.model_type != "INTERNLM":
            logger.info(
                f"note: {self.folder} does not say qk_interleaved or adapt_hf: q and k are taken as not interleaved, InternEvo's "
                "default; say --qk-interleaved yes if training had adapt_hf=False"
            )
        return bool(found)

    def fused(self, asked: InternEvoOptions) -> bool | None:
        """Whether wq, wk and wv were one wqkv in training, which releases of 2024 saved as three pieces; None: nothing says it.

        While that could not be switched, InternLM2 was always fused, and Llama never.
        """
        if asked.qkv_fused is not None:
            return asked.qkv_fused == "yes"
        if self.said.get("enable_qkv_fusion") is not None:
            return bool(self.said["enable_qkv_fusion"])
        trained_as = config.trained_as(self.folder)
        return trained_as.startswith("INTERNLM2") if trained_as else None


_UP = {1: "w2 is up, w3 is down", 2: "w3 is up, w2 is down"}
