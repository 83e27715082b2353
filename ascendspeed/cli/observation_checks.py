"""Checks of flags that observe a run: benchmarks (--eval-tasks) and profiles (--profile)."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.config.schema import Run, TrainConfig
from ascendspeed.utils.errors import UserError


def check_eval_tasks(run: Run, world: int | None) -> None:
    """Raises UserError for --eval-tasks without what it needs, or with a layout that evaluation lacks.

    `world`: number of processes; None if it is not known yet.
    """
    train, parallel = run.train, run.parallel
    if not train.eval_tasks:
        for name in ("eval_tasks_data_path", "eval_tasks_interval", "eval_tasks_limit"):
            if getattr(train, name):
                raise UserError(f"{flag_of(name)} belongs to --eval-tasks; add it")
        return
    if train.eval_tasks_interval is None:
        raise UserError("--eval-tasks needs --eval-tasks-interval, the iterations between scores")
    if run.data.tokenizer_name_or_path is None:
        raise UserError("--eval-tasks needs --tokenizer-name-or-path, the folder of the model's tokenizer")
    stages = parallel.pipeline_model_parallel_size
    copies = (world or 1) // max(1, parallel.tensor_model_parallel_size * stages)
    obstacles = {
        "--lora-rank": run.lora.lora_rank > 0,
        "--stage rm": run.preference.stage == "rm",
        "virtual pipeline stages": parallel.num_virtual_stages_per_pipeline_rank > 1,
        "--expert-model-parallel-size": parallel.expert_model_parallel_size > 1,
        "pipeline stages together with data or context parallel": stages > 1 and copies > 1,
    }
    for name, is_used in obstacles.items():
        if is_used:
            raise UserError(f"--eval-tasks does not support {name}: evaluate the checkpoints instead")


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
