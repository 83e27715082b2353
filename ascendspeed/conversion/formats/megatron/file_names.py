"""File names of the two layouts of rank files, and their recognition. No torch."""

from pathlib import Path

from ascendspeed.conversion.rank_file_names import RankFileNames

DEEPSPEED = RankFileNames(
    "DeepSpeed rank files",
    "latest",
    ("mp_rank_{t:02d}_model_states.pt",) * 2,
    r"mp_rank_(\d\d+)_model_states\.pt",
    "module",
    {"checkpoint_version": 3.0, "dp_world_size": 0},
)
MEGATRON = RankFileNames(
    "Megatron rank files",
    "latest_checkpointed_iteration.txt",
    ("mp_rank_{t:02d}/model_optim_rng.pt", "mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt"),
    r"mp_rank_(\d\d+)(?:_(\d\d\d+))?/model_(?:optim_)?rng\.pt",
    "model",
    {"checkpoint_version": 3.0, "iteration": 0},
)


def file_names_of(folder: Path) -> RankFileNames | None:
    """Recognizes the tracker of one of the layouts, or the files of one iteration; None: neither."""
    for file_names in (MEGATRON, DEEPSPEED):
        markers = (file_names.tracker, *(file_names.path(0, 0, pp) for pp in (1, 2)))
        if any((folder / name).is_file() for name in markers):
            return file_names
    return None
