"""Checks of flags that observe a run: profiles (--profile)."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import TrainConfig
from ascendspeed.utils.errors import UserError


def check_profile(train: TrainConfig) -> None:
    """Raises UserError for a profile without iterations, and for its flags without --profile."""
    if not train.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
            if getattr(train, name) != getattr(TrainConfig, name, ()):
                raise UserError(f"{flag_of(name)} belongs to --profile; add it")
    if not train.record_memory_history and train.memory_snapshot_path != TrainConfig.memory_snapshot_path:
        raise UserError("--memory-snapshot-path belongs to --record-memory-history; add it")
    if train.profile_step_end <= train.profile_step_start:
        raise UserError(
            f"--profile-step-end {train.profile_step_end}: must be above --profile-step-start "
            f"{train.profile_step_start}"
        )
