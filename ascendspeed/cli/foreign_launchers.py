"""Detects processes that srun or mpirun started, whose variables no launcher of this project sets."""

from collections.abc import Mapping

WORLD_SIZES = {
    "SLURM_NTASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
}
"""Variable with the number of processes -> the program that sets it."""


def foreign_world(environment: Mapping[str, str]) -> str:
    """Describes the several processes that srun or mpirun started; empty if there is one or none.

    A batch script of Slurm is not one of several: it has SLURM_NTASKS too, but was not started by srun.
    """
    for name, program in WORLD_SIZES.items():
        text = environment.get(name, "")
        is_several = text.isascii() and text.isdigit() and int(text) > 1
        if is_several and not (program == "srun" and not _is_srun_task(environment)):
            return f"this is one of {text} processes that {program} started ({name}={text})"
    return ""


def _is_srun_task(environment: Mapping[str, str]) -> bool:
    """True for a task of srun; the batch script itself has the rank 0 and a job, but no step."""
    is_batch_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return "SLURM_PROCID" in environment and not (is_batch_script and environment["SLURM_PROCID"] == "0")
