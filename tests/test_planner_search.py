"""Planner: legal layouts, the order of their estimates, commands to paste, and the model of the links."""

import dataclasses
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import launch, tiny_run
from torch.distributed import GroupMember

from ascendspeed.cli import train_args
from ascendspeed.config.schema import ParallelConfig
from ascendspeed.models import estimates
from ascendspeed.planning import command, fake_world, report, search
from ascendspeed.planning.device_table import DEVICES, LATENCY, rates_of
from ascendspeed.planning.links import Group, gather_seconds, reduce_seconds, send_seconds
from ascendspeed.planning.time_estimate import estimate
from ascendspeed.utils.errors import UserError
from benchmarks import device_growth

H200 = rates_of("h200")
TOKENIZER = "--tokenizer-name-or-path $TOKENIZER_PATH"
CASES = {
    "7B on 8": ("--model internlm2-7b --bf16 --global-batch-size 256", 8, 64),
    "20B on 8": ("--model internlm2-20b --bf16 --global-batch-size 256", 8, 64),
    "65B on 32": ("--model internlm-65b --bf16 --global-batch-size 128", 32, 64),
}


def legal(words: str, devices: int) -> list[search.Candidate]:
    base, typed = command.resolve_base(words.split())
    return search.candidates(base, typed, devices, H200)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if n else []) for n, name in enumerate(CASES)]
)
def test_commands_are_legal(name, monkeypatch):
    """Training accepts every command that a search can print, and reads the planned run from it."""
    words, devices, memory = CASES[name]
    monkeypatch.setenv("WORLD_SIZE", str(devices))
    found = [candidate for candidate in legal(words, devices) if search.can_fit(candidate, devices, memory)]
    assert len(found) > 5
    for candidate in found[::20]:
        line = search.command_line(candidate, words.split(), devices)
        flags = shlex.split(line.replace("$DATA", "data").replace("$TOKENIZER_PATH", "tokenizer"))
        flags = flags[flags.index("pretrain_intern.py") + 1 :]
        run, _ = train_args.resolve(flags, devices)
        planned = dataclasses.replace(candidate.run, data=run.data)
        assert run == planned
        assert ("CUDA_DEVICE_MAX_CONNECTIONS" in line) == (run.parallel.tensor_model_parallel_size > 1)


def test_illegal_layouts_are_left_out():
    sizes = {c.run.parallel.tensor_model_parallel_size for c in legal("--model internlm2-7b --bf16", 8)}
    assert sizes == {1, 2, 4, 8}
    fixed = legal("--model internlm2-7b --bf16 --tp 2 --sequence-parallel --micro-batch-size 2", 8)
    assert {c.run.parallel.tensor_model_parallel_size for c in fixed} == {2}
    assert {c.run.train.micro_batch_size for c in fixed} == {2}
    with pytest.raises(UserError, match="no layout of 8 devices is legal"):
        legal("--model internlm2-7b --bf16 --tp 1 --pp 1 --global-batch-size 3", 8)


def test_fastest_that_fit():
    """A search executes in the order of the estimate and stops when it has enough."""
    words, devices, memory = CASES["7B on 8"]
    candidates = legal(words, devices)
    steps = [candidate.time.step for candidate in candidates]
    assert steps == sorted(steps)
    options = command.options_of(
        [*words.split(), "--devices", "8", "--device-memory", "64", "--search", "--top", "2"]
    )
    executed = []

    def plan(run):
        executed.append(run)
        return SimpleNamespace(peak=(100 if len(executed) == 1 else 60) * 2**30)

    fitting, count = search.fastest_that_fit(candidates, options, plan)
    possible = [c.run for c in candidates if search.can_fit(c, devices, memory)]
    assert executed == possible[:3]
    assert (len(fitting), count) == (2, 3)
    assert "torchrun --nproc_per_node 8" in report.search_text(fitting, words.split(), options)
    for devices, launcher in ((12, "--nproc_per_node 6 --nnodes 2"), (7, "--nproc_per_node 7 pretrain")):
        assert launcher in search.command_line(fitting[0].candidate, [], devices)  # 12 processes, not 16
    assert [row["peak"] for row in report.search_json(fitting, words.split(), options)] == [60 * 2**30] * 2
    assert "none fits" in report.search_text([], words.split(), options)


def test_the_search_does_not_grow_with_the_devices():
    """Many devices have about as many layouts as a few; a prime number has the fewest."""
    words = "--model internlm-tiny --bf16 --seq-length 64"
    few, many, prime = (len(legal(words, devices)) for devices in (16, command.MAX_DEVICES, 16381))
    assert 0 < prime < min(few, many)
    assert max(few, many) < 200


def test_a_plan_makes_the_groups_of_its_rank_only():
    made: list[list[int]] = []
    create = fake_world.own_groups_only(lambda ranks, timeout=None: made.append(ranks) or len(made), 5)
    answers = [create([rank], timeout=1) for rank in range(1000)] + [create(list(range(1000)))]
    assert made == [[5], list(range(1000))]
    assert [answer for answer in answers if answer != GroupMember.NON_GROUP_MEMBER] == [1, 2]


def test_words_of_training():
    words = "--model a --devices 8 --json --device-memory=64 --tp 2 --search --top 3".split()  # noqa: SIM905
    assert command.training_words(words) == ["--model", "a", "--tp", "2"]


def test_search_needs_a_memory():
    for words, text in (
        (["--search"], "--search needs --device-memory"),
        (["--device-type", "abacus"], "has no rates; choose from h200"),
        (["--top", "0"], "--top 0"),
    ):
        with pytest.raises(UserError, match=text):
            command.options_of(words)


def test_links():
    """By hand: a ring moves (n - 1) / n of the bytes; between nodes, one adapter per rank of the node."""
    inner, outer = Group(8, 1), Group(4, 8)
    assert gather_seconds(8e9, inner, H200) == pytest.approx(7e9 / 450e9 + 3 * LATENCY)
    assert gather_seconds(8e9, outer, H200) == pytest.approx(6e9 / 50e9 + 2 * LATENCY)
    assert gather_seconds(8e9, Group(16, 1), H200) == pytest.approx(7.5e9 / 400e9 + 4 * LATENCY)
    assert reduce_seconds(8e9, inner, H200) == 2 * gather_seconds(8e9, inner, H200)
    assert send_seconds(1e9, outer, H200) == pytest.approx(1e9 / 50e9 + LATENCY)
    assert gather_seconds(8e9, Group(1, 1), H200) == send_seconds(1, Group(1, 1), H200) == 0


def test_estimate():
    """One H200: the roofline of the products alone, and pointwise operations and gradients on top."""
    _, run, _ = command.resolve(["--model", "internlm-7b", "--bf16", "--global-batch-size", "256"])
    time = estimate(run, 1, H200)
    flops = estimates.flops_per_token(run.model, 2048)
    products = flops * 256 * 2048 / 788e12
    assert products < time.compute < 1.5 * products
    assert time.exchange == time.replicas == time.bubble == 0
    assert time.mfu == pytest.approx(flops * time.tokens_per_s / 989e12)
    _, more, _ = command.resolve(
        ["--model", "internlm-7b", "--bf16", "--global-batch-size", "256", "--recompute-granularity", "full"]
    )
    assert estimate(more, 1, H200).compute > 1.25 * products + 0.9 * (time.compute - products)


def test_bubble():
    """(PP - 1) / micro-batches of the rest, and half of it with two virtual stages."""
    words = "--model internlm2-7b --bf16 --pp 4 --global-batch-size 64 --devices 4"
    plain, interleaved = (
        estimate(command.resolve([*words.split(), "--vpp", str(vpp)])[1], 4, H200) for vpp in (1, 2)
    )
    assert plain.bubble == pytest.approx(3 / 64 * (plain.compute + plain.exchange))
    assert interleaved.bubble == pytest.approx(plain.bubble / 2, rel=0.1)


def test_sources():
    assert all(rates.source and rates.ceiling_tflops <= rates.tflops for rates in DEVICES.values())


@pytest.mark.slow
def test_growth_table_is_current():
    """The pages have the rows of the script; InternEvo's share on 1,024 devices is the published 89 %."""
    lines = device_growth.rows(device_growth.speeds())
    assert lines[-1].endswith("| 3,625 (89%) |")
    for page, header in device_growth.PAGES.items():
        text = page.read_text()
        assert device_growth.with_rows(text, header, lines) == text
        assert device_growth.with_rows(text, header, lines[:-1]) != text  # control
    assert device_growth.PLOT.exists()


def test_optimizer_instances():
    """By hand, 16 replicas in two nodes: gradients within a node, a share of them between, weights within."""
    words = "--model internlm-7b --bf16 --use-distributed-optimizer --devices 16"
    alone, halves = (
        estimate(command.resolve([*words.split(), *more.split()])[1], 16, H200)
        for more in ("", "--num-distributed-optimizer-instances 2")
    )
    count = estimates.parameters_per_device(command.resolve(words.split())[1].model, ParallelConfig())
    inner, outer = Group(8, 1), Group(2, 8)
    expected = gather_seconds(6 * count, inner, H200) + reduce_seconds(4 * count / 8, outer, H200)
    assert halves.replicas == pytest.approx(expected, rel=1e-3)
    assert halves.update == pytest.approx(2 * alone.update)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_printed_command_starts(name, tmp_path):
    """The first command of a search, with a tiny model and 32 layers: trained on 8 processes, dry on 32."""
    words, devices, memory = CASES[name]
    search_words = ["--devices", devices, "--device-memory", memory, "--search", "--top", 1]
    done = launch.script("tools/plan.py", *words.split(), *search_words, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    model = words.split()[1]
    line = done.stdout.splitlines()[-1].replace(f" {model} ", f" {model.split('-')[0]}-tiny ")
    line = line.replace("$DATA", str(tiny_run.token_pair(tmp_path))).replace(TOKENIZER, "")
    sizes = "--num-layers 32 --seq-length 32 --global-batch-size 64 --train-iters 1 --device cpu"
    words = f"{line} {sizes} --log-dir {tmp_path}".split("pretrain_intern.py")
    launcher = f"torchrun --master_port {launch.free_port()} --nproc_per_node 8"
    if devices > 8:
        launcher, words[1] = f"WORLD_SIZE={devices} {sys.executable}", f"{words[1]} --dry-run"
    variables = words[0].partition("torchrun")[0]
    started = subprocess.run(
        ["bash", "-c", f"{variables}{launcher} pretrain_intern.py{words[1]}"],
        cwd=launch.ROOT,
        env=launch.environment(),
        capture_output=True,
        text=True,
    )
    assert started.returncode == 0, started.stderr[-3000:]
    expected = "the run can start" if devices > 8 else "iteration        1/       1"
    assert expected in started.stdout
