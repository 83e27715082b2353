"""Fault tolerance of a run that is killed at random moments, from outside and under the real launcher.

The curve of a killed and restarted run must equal, in hexadecimal, the curve of an undisturbed one.
benchmarks/faults.py does it under the real launcher, with the real engine, and kills runs at random moments
more than a hundred times.
"""

import random
import shutil
import subprocess
import sys
import time

import pytest
from helpers import launch
from helpers.fault_jobs import WORLD, Job

LONG = ("--train-iters", "60", "--save-interval", "2", "--keep", "3", "--distributed-timeout-minutes", "0.1")


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory) -> dict[int, str]:
    """The curve of an untouched run that is long enough for many kills."""
    job = Job(tmp_path_factory.mktemp("long"), LONG)
    assert job.run() == [0, 0], job.said()
    return job.curve()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_from_outside_at_random_moments(whole_long, tmp_path, seed):
    """At least 25 kills, 8 or more of them during a save; as many runs to their end as that takes."""
    dice, kills, inside = random.Random(seed), 0, 0
    for number in range(20):
        job = Job(tmp_path / str(number), LONG + (("--async-save",) if number % 2 else ()))
        while not (job.folder / "curve").exists() or 60 not in job.curve():
            hit, saving = one_kill(job, dice)
            kills, inside = kills + hit, inside + saving
        assert job.run() == [0, 0], job.said()  # a kill may have come in the last save
        assert job.curve() == whole_long
        assert job.good() == 60
        if kills >= 25 and inside >= 8:
            break
    print(f"seed {seed}: {kills} kills, {inside} of them inside a save, {number + 1} runs")
    assert kills >= 25
    assert inside >= 8


def one_kill(job: Job, dice: random.Random) -> tuple[bool, bool]:
    """One start; whether a rank was killed, and whether a checkpoint was being saved then."""

    def done() -> int:
        return len((job.folder / "curve").read_text().splitlines()) if (job.folder / "curve").exists() else 0

    def saving() -> bool:
        return any((job.folder / "ckpt").glob(".step_*.tmp"))

    early, at_save, more, moment = (
        dice.random() < 0.15,
        dice.random() < 0.6,
        dice.randrange(20),
        dice.random(),
    )
    victim, before, ranks = dice.randrange(WORLD), done(), job.start()
    while (
        not early
        and all(r.is_alive() for r in ranks)
        and not (done() > before + more and (saving() or not at_save))
    ):
        time.sleep(0.0005)
    time.sleep(moment * (2.0 if early else 0.03))
    hit = ranks[victim].is_alive()
    ranks[victim].kill()
    ranks[1 - victim].join(20)
    if ranks[1 - victim].is_alive():  # before they met; a launcher would end it
        assert early
        ranks[1 - victim].kill()
    [r.join() for r in ranks]
    return hit, hit and saving()


# --- several of them under the real launcher


@pytest.mark.slow
def test_under_the_real_launcher(tmp_path):
    """A few kills of the real recipe; `python benchmarks/faults.py` adds as many as one likes."""
    words = [
        sys.executable,
        str(launch.ROOT / "benchmarks/faults.py"),
        "--kills",
        "3",
        "--seed",
        "1",
        "--work",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "out.md")], capture_output=True, text=True, env=launch.environment()
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shutil.rmtree(tmp_path)
