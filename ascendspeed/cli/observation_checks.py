"""Checks of flags that observe a run: benchmarks (--eval-tasks) and profiles (--profile)."""

from ascendspeed.cli.parser import flag_of
from ascendspeed.config import batch_schedule
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
    is_known = train.train_epochs is None  # otherwise the length follows from the data
    if train.profile and is_known and train.profile_step_start >= train.train_iters:
        raise UserError(
            f"--profile-step-start {train.profile_step_start}: the run ends after {train.train_iters} "
            "iterations, so nothing would be traced; choose an earlier iteration"
        )


def notes_of_length(train: TrainConfig) -> list[str]:
    """Notes about flags that have no effect because the run ends before; its length must be known."""
    end = train.train_iters
    intervals = {name: getattr(train, name) or 0 for name in ("eval_interval", "eval_tasks_interval")}
    notes = [
        f"{flag_of(name)} {interval}: the run ends after {end} iterations, before an evaluation"
        for name, interval in intervals.items()
        if interval > end
    ]
    late = [numbers[-1] for numbers in batch_schedule.skipped_iterations(train) if numbers[-1] >= end]
    if late:
        notes.append(
            f"--iterations-to-skip, --skip-batches: {max(late)} is beyond the last iteration, {end - 1}"
        )
    return notes
