"""File names of InternEvo's training folders, and their recognition. No torch."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ascendspeed.conversion.rank_file_names import RankFileNames
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

DESCRIPTION = "InternEvo training folder"
TENSOR_PARALLEL = RankFileNames(
    DESCRIPTION, "", ("model_tp{t}_pp{p}.pt",) * 2, r"model_tp(\d+)_pp(\d+)\.pt", "", {}
)
WEIGHT_PARALLEL = RankFileNames(
    DESCRIPTION, "", ("model_wp{t}_pp{p}.pt",) * 2, r"model_wp(\d+)_pp(\d+)\.pt", "", {}
)
EARLY_WEIGHT_PARALLEL = re.compile(r"model_tp(\d+)_wp(\d+)_pp\d+\.pt")
EXPERTS = "experts: mixtures of experts are not read from InternEvo's folders"
UNSUPPORTED = {
    r"model_.*_(dp|zo)\d+\.pt": "shards of FSDP, which only a run of the same size can load",
    r"model_moe_layer.*\.pt": EXPERTS,
}


@dataclass(frozen=True)
class ShardedFileNames:
    """File names of a training folder, with the numbers of ranks that the names of early releases tell."""

    file_names: RankFileNames
    layer_ranks: int = 0
    """Ranks that share every layer; 0: as many as files."""
    vocabulary_ranks: int = 0
    """Ranks that share embedding and head; 0: as many as files."""


def file_names_of(folder: Path) -> ShardedFileNames | None:
    """Recognizes the file names; None: there are none of InternEvo.

    Raises `UserError` for files of several parallel modes, and for forms that cannot be read.
    """
    names = sorted(path.name for path in folder.glob("model_*.pt"))
    for pattern, what in UNSUPPORTED.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{folder} holds {what}")
    forms = [
        form
        for form in (TENSOR_PARALLEL, WEIGHT_PARALLEL)
        if any(re.fullmatch(form.pattern, name) for name in names)
    ]
    early = [match for name in names if (match := EARLY_WEIGHT_PARALLEL.fullmatch(name))]
    if len(forms) + bool(early) > 1:
        raise UserError(
            f"{folder} has files of several parallel modes ({shorten_list(names)}): keep those of one save"
        )
    if early:
        return _early_file_names(folder, early)
    return ShardedFileNames(forms[0]) if forms else None


def _early_file_names(folder: Path, matches: list[re.Match[str]]) -> ShardedFileNames:
    """File names of early 2024, which number the same ranks twice: modulo the tensor- and the weight-parallel
    size.
    """
    tp = 1 + max(int(match[1]) for match in matches)
    wp = 1 + max(int(match[2]) for match in matches)
    for match in matches:
        rank = max(int(match[1]), int(match[2]))
        if (rank % tp, rank % wp) != (int(match[1]), int(match[2])):
            raise UserError(
                f"{folder} has {match[0]}, which no rank of TP {tp} and WP {wp} writes: keep the files of "
                f"one save"
            )
    pattern, name = (r"tp\d+_wp(\d+)", "tp*_wp{t}") if wp >= tp else (r"tp(\d+)_wp\d+", "tp{t}_wp*")
    file_names = replace(
        WEIGHT_PARALLEL,
        pattern=rf"model_{pattern}_pp(\d+)\.pt",
        files=(f"model_{name}_pp{{p}}.pt",) * 2,
    )
    return ShardedFileNames(file_names, wp, tp)
