"""Fault tolerance of a run: two real ranks of a toy over gloo, real files, real signals.

The curve of an interrupted and restarted run must equal, in hexadecimal, the curve of an undisturbed one.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.fault_jobs import ITERS, WORLD, Job, ended

from ascendspeed.utils import errors

KILLED = -signal.SIGKILL
SLOW = pytest.mark.slow


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[int, str]:
    """The curve of a run that nothing happens to."""
    job = Job(tmp_path_factory.mktemp("whole"))
    assert job.run() == [0, 0], job.said()
    assert len(job.curve()) == ITERS
    return job.curve()


def finish(job: Job, whole: dict[int, str]) -> None:
    """Started again, the run ends with the untouched curve."""
    assert job.run() == [0, 0], job.said()
    assert job.curve() == whole
    assert job.good() == ITERS


@pytest.fixture(scope="module")
def half_way(tmp_path_factory) -> Path:
    """Folder of a job that stopped after iteration 6."""
    job = Job(tmp_path_factory.mktemp("half way") / "job")
    assert job.run("--exit-interval", "6") == [0, 0], job.said()
    return job.folder


@pytest.mark.parametrize(
    "lost", ["exp_avg", *(pytest.param(kind, marks=SLOW) for kind in ("rng", "master", "exp_avg_sq"))]
)
def test_control_what_is_lost_is_seen(whole, half_way, tmp_path, lost):
    """Control of the comparison: a resumed run that lost one part of its state has another curve."""
    job = Job(shutil.copytree(half_way, tmp_path / "job"))
    job.env["TOY_LOSES"] = lost
    assert job.run() == [0, 0]
    assert job.curve().keys() == whole.keys()
    assert {i: values for i, values in job.curve().items() if i <= 6} == {
        i: values for i, values in whole.items() if i <= 6
    }
    assert job.curve()[12] != whole[12]


# --- killed


@SLOW
@pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind the step"])
def test_killed_again_and_again(whole, tmp_path, behind):
    """Three kills in one run: in an iteration, and twice at a change of a file during a save."""
    dice = random.Random(behind)
    moments = [
        {"step": 2},
        {"step": 6, "operation": dice.randrange(8)},
        {"step": 9, "operation": dice.randrange(8)},
    ]
    job = Job(tmp_path / "job", ("--async-save",) if behind else ())
    job.faults = [{"what": "kill", "rank": dice.randrange(WORLD), **moment} for moment in moments]
    for fault in job.faults:
        codes = job.run("--distributed-timeout-minutes", "0.05")
        assert codes[fault["rank"]] == KILLED
        assert codes[1 - fault["rank"]] == errors.EXIT_RANK_LOST
        assert f"error: rank {fault['rank']} gave no sign of life" in job.said()
    finish(job, whole)


@pytest.mark.slow
def test_the_next_start_says_where_it_goes_on(whole, tmp_path):
    job = Job(tmp_path / "job", faults=[{"what": "kill", "rank": 0, "step": 8}])
    assert job.run("--distributed-timeout-minutes", "0.1") == [KILLED, errors.EXIT_RANK_LOST]
    assert "holds no checkpoint yet, so this is the start of the run" in job.said()
    finish(job, whole)
    assert re.search(r"resumes from \S*/step_0000006: iteration 6, 24 samples consumed", job.said())


def test_folders_that_are_no_shared_storage_are_known_before_iteration_1(tmp_path):
    """Each rank has its own folder, as --save ./ckpt on local disks: empty, then with a checkpoint."""
    job = Job(tmp_path / "job", ("--save", "ckpt"), env={"RANK_FOLDERS": "1"})
    assert job.run() == [errors.EXIT_USER_ERROR] * 2
    assert (
        "error: --save ckpt: rank 1 cannot save there: it does not see a file that rank 0 made" in job.said()
    )
    (job.folder / "0" / "ckpt" / "step_0000003").mkdir()
    assert job.run() == [errors.EXIT_USER_ERROR] * 2
    told = (
        "rank 0: --load ckpt, checkpoints in --load and --save; rank 1: --load None, checkpoints in neither"
    )
    assert (
        f"error: the ranks do not see the same files there: {told}; --save and --load must be on storage"
        in job.said()
    )
    assert not (job.folder / "curve").exists()
    assert "Traceback" not in job.said()


# --- signals and the clock


@pytest.mark.parametrize(
    ("what", "who"),
    [("usr1", 1), *(pytest.param(*case, marks=SLOW) for case in (("term", 1), ("usr1", 0), ("term", 0)))],
)
def test_a_signal_to_any_one_rank_saves_and_stops_all(whole, tmp_path, what, who):
    job = Job(tmp_path / "job", faults=[{"what": what, "rank": who, "step": 5}])
    assert job.run() == [errors.EXIT_STOPPED] * 2
    assert job.steps() == ["step_0000003", "step_0000005"]
    output = job.said()
    assert f"SIG{what.upper()} to rank {who}: stopped after iteration 5" in output
    assert re.search(r"^to continue: .* --auto-resume\b", output, re.MULTILINE)
    finish(job, whole)


@pytest.mark.slow
def test_the_clock_and_the_interval_stop_with_code_0(whole, tmp_path):
    job = Job(tmp_path / "job")
    assert job.run("--exit-duration", "1e-9") == [0, 0]
    assert job.steps() == ["step_0000001"]
    assert "--exit-duration-in-mins 1e-09: stopped after iteration 1" in job.said()
    assert job.run("--exit-interval", "5") == [0, 0]
    finish(job, whole)
    assert job.said().count("to continue: ") == 2  # and not when there is nothing left


# --- a rank that is gone


STOPPED_TIMEOUT = 0.05
"""Minutes without a sign of life, for ranks that are stopped."""


@pytest.fixture(scope="module")
def stopped_job(tmp_path_factory) -> Iterator[tuple[Job, list, float]]:
    """A job whose ranks stop themselves, its ranks, and the time; another test runs until it is over."""
    stops = [{"what": "stop", "rank": r, "step": 5} for r in range(WORLD)]
    job = Job(tmp_path_factory.mktemp("stopped") / "job", faults=stops)
    ranks = job.start("--distributed-timeout-minutes", str(STOPPED_TIMEOUT))
    while len(list(job.folder.glob("happened*"))) < WORLD:
        assert all(process.is_alive() for process in ranks), job.said()
        time.sleep(0.05)
    yield job, ranks, time.monotonic()
    for process in ranks:
        process.kill()


@pytest.mark.slow
@pytest.mark.usefixtures("stopped_job")
@pytest.mark.parametrize("who", [0, pytest.param(1, marks=SLOW)])
def test_a_stopped_rank_is_named_and_nobody_stays(whole, tmp_path, who):
    job = Job(tmp_path / "job", faults=[{"what": "stop", "rank": who, "step": 5}])
    ranks = job.start("--distributed-timeout-minutes", str(STOPPED_TIMEOUT))
    ranks[1 - who].join(60)
    assert ranks[1 - who].exitcode == errors.EXIT_RANK_LOST, job.said()
    assert re.search(
        rf"error: rank {who} gave no sign of life for \d+ s \(of 2 ranks\); all leave", job.said()
    )
    assert ranks[who].is_alive()
    os.kill(ranks[who].pid, signal.SIGCONT)  # whatever it dreamed of: it leaves too
    assert ended(ranks, job)[who] != 0
    finish(job, whole)


@pytest.mark.parametrize(
    ("what", "who"), [pytest.param(*case, marks=SLOW) for case in (("kill", 1), ("kill", 0), ("stop", 2))]
)
def test_a_lost_rank_is_known_to_ranks_that_never_hear_it(tmp_path, what, who):
    """Four of them: signs of life go by way of rank 0, and so does the word that one is gone."""
    job = Job(tmp_path / "job", faults=[{"what": what, "rank": who, "step": 5}], world=4)
    ranks = job.start("--distributed-timeout-minutes", "0.05")
    for number in set(range(4)) - {who}:
        ranks[number].join(60)
        assert ranks[number].exitcode == errors.EXIT_RANK_LOST, job.said()
        output = (job.folder / f"rank{number}.log").read_text()
        assert re.search(
            rf"error: rank {who} gave no sign of life for \d+ s \(of 4 ranks\); all leave", output
        )
    ranks[who].kill()
    assert job.run() == [0] * 4, job.said()
    assert len(job.curve()) == ITERS  # what was done twice was the same twice


@pytest.mark.slow
def test_a_job_that_was_stopped_as_a_whole_goes_on(whole, stopped_job):
    """Ctrl-Z for longer than the timeout, and fg: nobody takes the others for dead."""
    job, ranks, since = stopped_job
    time.sleep(max(0.0, since + 1.5 * 60 * STOPPED_TIMEOUT - time.monotonic()))
    for process in ranks:
        os.kill(process.pid, signal.SIGCONT)
    assert ended(ranks, job) == [0, 0], job.said()
    assert job.curve() == whole


@pytest.mark.slow
def test_the_last_words_of_a_rank_are_passed_on(whole, tmp_path):
    job = Job(tmp_path / "job", faults=[{"what": "wrong", "rank": 1, "step": 5}])
    codes = job.run()
    assert codes == [1, 1]
    output = job.said()
    assert "error: rank 1 left: a mistake in the program (of 2 ranks); all leave" in output
    assert output.count("Traceback") == 1  # of the one that made it
    finish(job, whole)


def test_a_port_that_is_taken_is_named(tmp_path):
    job = Job(tmp_path / "job")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        job.port = taken.getsockname()[1]
        ranks = job.start()
        ranks[0].join(60)
        ranks[1].kill()  # a launcher would; it waits for an answer
    assert ranks[0].exitcode == errors.EXIT_USER_ERROR
    assert f"error: rank 0 of 2 did not meet the others at 127.0.0.1:{job.port}: " in job.said()
    assert "Traceback" not in job.said()


# --- a disk that is full


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "behind"),
    [
        ("no space", True),
        pytest.param("small files", True, marks=SLOW),
        pytest.param("no space", False, marks=SLOW),
        pytest.param("small files", False, marks=SLOW),
    ],
)
def test_a_full_disk_leaves_the_last_good_one(whole, tmp_path, what, behind):
    more = {"operation": 0} if what == "no space" else {}
    job = Job(
        tmp_path / "job",
        ("--async-save",) if behind else (),
        faults=[{"what": what, "rank": 1, "step": 6, "after": "step_0000003", **more}],
    )
    assert job.run() == [errors.EXIT_USER_ERROR] * 2
    assert re.search(
        r"error: \S*step_0000006 was not saved: rank 1: .*(No space left on device|File too large)",
        job.said(),
    )
    assert job.good() == 3
    finish(job, whole)


# --- numbers that are none


def test_every_skip_names_rank_and_samples(whole, tmp_path):
    """By hand: samples 21 and 29 are those of rank 1 in iterations 6 and 8, second and first micro-batch."""
    job = Job(tmp_path / "job", env={"TOY_BAD": "[22, 23, 29]"})
    assert job.run() == [0, 0]
    output = job.said()
    assert re.search(
        r"iteration 6 skipped, nothing was updated: loss NAN; rank 0: samples 22-22; rank 1: samples 23-23;",
        output,
    )
    assert re.search(r"iteration 8 skipped, nothing was updated: loss NAN; rank 1: samples 29-29;", output)
    assert output.count(" skipped, nothing") == 2
    assert {i: values for i, values in job.curve().items() if i < 6} == {
        i: values for i, values in whole.items() if i < 6
    }


def test_too_many_skips_stop_and_name_the_last_good_checkpoint(tmp_path):
    job = Job(
        tmp_path / "job",
        ("--async-save", "--max-skipped-steps", "3"),
        env={"TOY_BAD": json.dumps(list(range(24, 99)))},
    )
    assert job.run() == [errors.EXIT_USER_ERROR] * 2
    last = r"3 iterations in a row were skipped \(last: 9\); the last good checkpoint is \S*step_0000006;"
    assert re.search(last, job.said())
    assert job.good() == 6


# --- the real engine


ENGINES = {f"zero {stage}": {"deepspeed": True, "zero_stage": stage} for stage in range(4)}
ENGINES |= {"megatron": {}, "megatron, shards": {"use_distributed_optimizer": True}}
PRECISE = [(name, "fp32") for name in ENGINES] + [(name, "bf16") for name in ENGINES if name != "zero 0"]
DEFAULT = [("zero 1", "fp32"), ("megatron, shards", "fp32")]


@pytest.mark.parametrize(
    ("name", "dtype"), [case if case in DEFAULT else pytest.param(*case, marks=SLOW) for case in PRECISE]
)
@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.0], ids=["NaN", "infinite", "control"])
def test_a_loss_that_is_none_updates_nothing_though_its_gradients_are_finite(
    cpu, tmp_path, name, dtype, loss
):
    """A constant added to the loss of one micro-batch leaves gradients alone. The control adds 0."""
    import torch

    from ascendspeed.config import schema
    from ascendspeed.data.dataset import Batch
    from ascendspeed.distributed import process_groups
    from ascendspeed.distributed.fused_kernels import Kernels
    from ascendspeed.models import families
    from ascendspeed.models.param_mapping import random_tensors
    from ascendspeed.training import engines

    run = schema.Run(
        families.preset("internlm-tiny"),
        schema.ParallelConfig(**ENGINES[name]),
        schema.OptimConfig(bf16=dtype == "bf16"),
        schema.DataConfig(seq_length=8),
        schema.TrainConfig(global_batch_size=2, train_iters=4, log_dir=str(tmp_path)),
    )
    grid = process_groups.initialize(cpu, run.parallel, 1)
    engine = engines.engine_builder(run, grid, cpu, Kernels())(random_tensors(run.model, 1))
    ids = torch.arange(8)[None]
    batches = [Batch(ids + i, ids + i + 1, torch.ones(1, 8), ids) for i in range(2)]

    def state():
        return [f.tensor.clone() for f in engine.fragments()]

    assert not engine.step(batches, 1e-3).skipped
    before = state()
    put_right = add_to_losses(engine, [0.0, loss])
    result = engine.step(batches, 1e-3)
    put_right()
    good = math.isfinite(loss)
    assert (result.skipped, result.bad) == ((False, ()) if good else (True, (1,)))
    assert engine.updates == 1 + good
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)) != good
    assert not engine.step(batches, 1e-3).skipped
    assert engine.updates == 2 + good


def add_to_losses(engine, constants: list[float]) -> Callable[[], None]:
    """Changes the next micro-batches as an engine sees them; returns a function that restores the engine."""
    left = iter(constants)
    if hasattr(engine, "_token_losses"):  # DeepSpeed's
        name, real = "_loss_sums", engine._loss_sums

        def loss_sums(batch):
            constant = next(left)
            return type(sums := real(batch))(*(value + constant for value in sums))

        engine._loss_sums = loss_sums
    else:
        name, real = "_forward", engine._forward

        def forward(*args):
            output, loss = real(*args)
            constant = next(left)
            return output, lambda losses: (
                lambda total, tokens, reported: (total, tokens, reported + constant)
            )(*loss(losses))

        engine._forward = forward
    return lambda: setattr(engine, name, real)
