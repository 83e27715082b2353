"""Skeleton of a command: legacy flags -> parsing -> checks -> device -> process groups -> work."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from ascendspeed.cli import legacy_flags, parser
from ascendspeed.cli.compat import HINT
from ascendspeed.cli.config_file import reading as config_file
from ascendspeed.cli.foreign_launchers import foreign_world
from ascendspeed.cli.legacy_flags import Table, Translation
from ascendspeed.utils.errors import UserError

T = TypeVar("T")
Resolver = Callable[[Sequence[str], int], tuple[Any, list[str]]]
"""(words of the command line, number of processes) -> checked job, notes for the user."""


@dataclass(frozen=True)
class CommandLine(Generic[T]):
    """A parsed command line."""

    options: T
    typed: frozenset[str]
    """Fields that the command line sets, by a current flag or by a legacy one."""
    legacy: Translation
    dumps: bool = False
    """--dump-config: print the settings and stop."""

    @property
    def args(self) -> tuple[str, ...]:
        """Words without legacy flags."""
        return self.legacy.args

    @property
    def notes(self) -> list[str]:
        """Notes about legacy flags."""
        return list(self.legacy.notes)


def parse(
    cls: type[T],
    args: Sequence[str] | None = None,
    table: Table | None = None,
    description: str = "",
    dumps_later: bool = False,
) -> CommandLine[T]:
    """Parses `args`, by default those of `sys.argv`, after the legacy flags of `table` have been translated
    and the settings of --config have been added.

    `dumps_later`: the caller handles --dump-config. Raises UserError for an unknown flag or a malformed
    value.
    """
    table = table or {}
    words = sys.argv[1:] if args is None else args
    has_config = config_file.supports(cls)
    config = config_file.take(words) if has_config else config_file.ConfigFlags(tuple(words))
    legacy = legacy_flags.translate(config.words, table)
    if config.path is not None:
        added, notes = config_file.words_of(cls, config.path, parser.typed_words(cls, legacy.args))
        legacy = replace(legacy, args=(*added, *legacy.args), notes=(*legacy.notes, *notes))
    if table:
        description = f"{description}\n\n{HINT}"
    if has_config:
        description = f"{description}\n\n{config_file.HINT}"
    others = [*table, *((config_file.CONFIG, config_file.DUMP) if has_config else ())]
    options = parser.parse(cls, legacy.args, description=description, other_flags=others)
    if config.dumps and not dumps_later:
        config_file.dump(asdict(options))
    return CommandLine(options, frozenset(parser.typed_fields(cls, legacy.args)), legacy, config.dumps)


def world_size() -> int:
    """Returns the number of processes that the launcher started.

    Raises UserError if srun or mpirun started several, which would all run alone.
    """
    if "WORLD_SIZE" not in os.environ and (world := foreign_world(os.environ)):
        raise UserError(
            f"{world}, and each of them would run alone: start torchrun (or a recipe) once per node, or set "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process; WORLD_SIZE=1 runs "
            "it alone"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_minimum(options: Any, least: dict[str, int]) -> None:
    """Raises UserError for a field of `options` below its least value; None is always legal."""
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise UserError(f"{parser.flag_of(name)} {value} is too small: at least {minimum}")


def check_precision(bf16: bool, fp16: bool) -> None:
    """Raises UserError if two number formats are chosen."""
    if bf16 and fp16:
        raise UserError("--bf16 and --fp16 contradict each other; choose one")


def run_inference(
    resolve: Resolver,
    work: Callable[[Any, Any, Sequence[str]], None],
    check_folders: Callable[[str, str], None] | None = None,
) -> None:
    """Runs a command that needs weights: `resolve` checks the command line, `work(job, device, notes)` does
    the rest.

    `job.spec.args` are the `EngineArgs`. `check_folders` checks the folders of weights and tokenizer before
    torch is imported, in a process that is alone; for several the launcher has done so. Modules that need
    Megatron-core must be imported by `work`.
    """
    job, notes = resolve(sys.argv[1:], world_size())
    if check_folders and world_size() == 1:
        check_folders(job.spec.args.load, job.spec.tokenizer)
    from ascendspeed.distributed import device as devices

    device = devices.prepare(job.spec.args.device, job.spec.args.distributed_backend)

    # From here on torch.cuda means the device, so Megatron-core may be imported.
    from ascendspeed.distributed import process_groups

    work(job, device, notes)
    process_groups.destroy()
