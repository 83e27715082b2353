"""Trains InternLM with Megatron-core or DeepSpeed: the command `intern train` and `pretrain_intern.py`."""

import json
import logging
import os
import sys
from collections.abc import Sequence

from ascendspeed.cli.command import world_size
from ascendspeed.cli.default_model import note_of_default_model
from ascendspeed.cli.train_args import check_inputs, parse, resolve_line
from ascendspeed.config.schema import Run
from ascendspeed.utils import errors
from ascendspeed.utils.run_record import RunRecord

logger = logging.getLogger("ascendspeed.pretrain")


def main(record: RunRecord | None = None) -> int:
    """Command line -> device -> data -> model and weights -> engine -> training loop."""
    record = record or RunRecord(sys.argv)
    line = parse(sys.argv[1:])
    run, notes = resolve_line(line, world_size())
    notes = [*note_of_default_model(line), *notes]
    check_inputs(run)
    tasks = None
    if run.train.eval_tasks:
        from ascendspeed.evaluation import training_scores

        tasks = training_scores.resolve(run)
    if line.options.rehearsal.dry_run:
        return dry_run(run, notes)

    from ascendspeed.distributed import device as devices

    device = devices.prepare(run.train.device, run.train.distributed_backend, run.train.deterministic)

    # From here on torch.cuda means the device, so Megatron-core and DeepSpeed may be imported.
    from ascendspeed.config.schema import to_dict
    from ascendspeed.distributed import process_groups
    from ascendspeed.planning import auto_recompute
    from ascendspeed.run_report.page import RunPage
    from ascendspeed.training import (
        data_setup,
        engines,
        input_record,
        kernel_choice,
        loop,
        profiling,
        reference,
        setup,
        trackers,
    )
    from ascendspeed.training.fault_tolerance import RunMonitor
    from ascendspeed.training.metrics_file import MetricsFile
    from ascendspeed.training.metrics_log import MetricsLogger

    trackers.check_installed(trackers.names_of(run.train))
    grid = process_groups.initialize(
        device, run.parallel, run.train.seed, run.train.distributed_timeout_minutes
    )
    with (
        MetricsLogger(
            grid.rank, run.train.log_dir, trackers.events_dir(run.train), record.start_line()
        ) as log,
        RunMonitor(run, grid) as watch,
    ):
        kernels = kernel_choice.select(run, device)
        logger.info(f"device: {device.kind} ({device.name}), {device.backend}; {grid}")
        logger.info(f"kernels: {kernel_choice.describe(run, kernels)}")
        if run.train.deterministic:
            logger.info("deterministic: fixed order of sums; an operation without such a kernel is an error")
        for note in notes:
            logger.info(f"note: {note}")
        run, batches = data_setup.open_data(run, grid)
        run = input_record.with_inputs(run, grid)
        run, choice = auto_recompute.apply(run, grid, device)
        settings = json.dumps(to_dict(run))
        logger.info(f"run: {settings}", extra={"terminal": f"run: all settings are in {log.path}"})
        build = engines.engine_builder(run, grid, device, kernels)
        start = setup.find_start(run, grid, device)
        if grid.rank == 0:
            step = start.state.step
            log.add_sinks([MetricsFile(run.train.log_dir, step), *trackers.open_trackers(run, step)])
            log.add_sinks([RunPage(run.train.log_dir)])
            log.add_sinks([auto_recompute.PeakCheck(choice, device.kind, step)] if choice else [])
        observes = run.train.profile or run.train.record_memory_history
        profiler = profiling.StepProfiler(run, grid, device) if observes else None
        engine = build(start.tensors)
        if start.resume:
            engine.restore(start.resume)
        reference.attach(run, grid, engine, batches, start)
        score_tasks = training_scores.TrainingScores(run, tasks, grid, device) if tasks else None
        loop.train(run, grid, device, engine, batches, log, start, watch, profiler, score_tasks)
    process_groups.destroy()
    return watch.exit_code


def dry_run(run: Run, notes: Sequence[str]) -> int:
    """Checks a run without starting it; only the first of several processes does."""
    if int(os.environ.get("RANK", "0")):
        return 0
    from ascendspeed.distributed import device as devices

    choice = run.train.device
    on_cpu = choice == "cpu" or (choice == "auto" and devices.choose(choice) == "cpu")
    device = devices.prepare("cpu")
    from ascendspeed.distributed import layer_compiler
    from ascendspeed.planning import rehearsal

    if on_cpu and run.train.compile:
        layer_compiler.choose(run, device)
    for note in notes:
        logger.info(f"note: {note}")
    rehearsal.rehearse(run, world_size(), device, "cpu" if on_cpu else "accelerator")
    return 0


def run_command() -> None:
    """Runs the command as a program; its log file also receives errors."""
    program, *flags = sys.argv
    words = program.split() if program.startswith("intern ") else [program]
    record = RunRecord([*words, *flags])
    errors.run(lambda: main(record), record=record.write_error)


if __name__ == "__main__":
    run_command()
