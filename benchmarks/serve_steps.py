"""Measures the steps of the serving engine: decoding, a long prompt beside answers, prompt lookup, HTTP.

    python benchmarks/serve_steps.py --threads 1 --out benchmarks/results/serve-steps-cpu.md

- A decoding step of the paged engine against one of a batch, with equal and ragged lengths.
- The longest pass while a prompt of 2,048 tokens is read beside 8 answers, against the longest without them.
- Prompt lookup on prompts that the answer repeats, against decoding without it; the tokens must be equal.
- The CPU time of a server with 32 streaming clients, against the engine alone on the same requests.
"""

import asyncio
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import generate
from evaluate import write_model
from serve import BLOCK_SIZE, NUM_BLOCKS, Work, submit

from ascendspeed.cli import parser
from ascendspeed.utils import errors

ROOT = Path(__file__).resolve().parent.parent
BUDGET, ROWS, CLIENTS = 256, 16, 32
EQUAL, RAGGED = [512] * ROWS, [32 + 64 * i for i in range(ROWS)]


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format."""
    rounds: int = 3
    """Measured runs of each side, after a warm-up run."""
    steps: int = 24
    """Decoding steps of a run."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


class Tokens:
    """Random prompts."""

    def __init__(self, vocab_size: int) -> None:
        import torch

        self.vocab_size, self.generator = vocab_size, torch.Generator().manual_seed(7)

    def __call__(self, count: int) -> list[int]:
        import torch

        return torch.randint(5, self.vocab_size, (count,), generator=self.generator).tolist()


def new_engine(model: Any, lookup: int = 0) -> Any:
    """Returns a paged engine with an empty cache."""
    from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine

    return PagedEngine(model, EngineSettings(NUM_BLOCKS, BLOCK_SIZE, token_budget=BUDGET, lookup=lookup))


def run_steps(engine: Any) -> tuple[list[float], dict[int, list[int]]]:
    """Runs all requests; returns the CPU seconds of every step and the tokens of every request."""
    seconds, outputs = [], {}
    while not engine.scheduler.is_idle:
        start = time.process_time()
        results = engine.step()
        seconds.append(time.process_time() - start)
        outputs |= {result.request.id: result.request.output for result in results}
    return seconds, outputs


def decode_paged(model: Any, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
    """Returns the median CPU seconds of a decoding step of the paged engine, and the tokens."""
    engine = new_engine(model)
    submit(engine, [(prompt, steps) for prompt in prompts])
    seconds, outputs = run_steps(engine)
    model.free_cache()
    return statistics.median(seconds[-steps // 2 :]), [outputs[i][: steps // 2] for i in range(len(prompts))]


def decode_batch(model: Any, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
    """Returns the median CPU seconds of a decoding step of a batch, and the tokens."""
    from ascendspeed.inference.engine import SamplingParams, sample

    times: list[float] = []

    def tick() -> bool:
        times.append(time.process_time())
        return False

    completions = sample(model, prompts, SamplingParams(max_new_tokens=steps), should_end=tick)
    steps_of = [end - start for start, end in pairwise(times)]
    return (
        statistics.median(steps_of[-steps // 2 :]),
        [completion.tokens[: steps // 2] for (completion,) in completions],
    )


def decoding(model: Any, options: Options) -> Iterator[str]:
    """Yields rows: a decoding step of the paged engine / one of a batch."""
    for name, lengths in ("equal", EQUAL), ("ragged", RAGGED):
        draw = Tokens(model.config.vocab_size)
        prompts = [draw(length) for length in lengths]
        rounds = []
        for number in range(options.rounds + 1):
            paged, ours = decode_paged(model, prompts, options.steps)
            batch, theirs = decode_batch(model, prompts, options.steps)
            if options.dtype == "fp32":
                assert ours == theirs, "the paged engine gives other tokens"
            if number:
                rounds.append((paged, batch))
        text = f"decoding step, {ROWS} rows, {name} lengths of {min(lengths)} to {max(lengths)}"
        yield row(text, "batch", rounds)


def long_prompt(model: Any, options: Options) -> Iterator[str]:
    """Yields rows: longest pass while a prompt of 2,048 is read beside answers / the longest without them."""
    draw = Tokens(model.config.vocab_size)
    prompt, answers = draw(2048), [(draw(32), 60) for _ in range(8)]
    longest, first = [], []
    for number in range(options.rounds + 1):
        engine = new_engine(model)
        submit(engine, [(prompt, 1)])
        alone, _ = run_steps(engine)
        engine = new_engine(model)
        submit(engine, answers)
        while len(engine.scheduler.running) < len(answers) or any(
            not request.output for request in engine.requests.values()
        ):
            engine.step()
        submit(engine, [(prompt, 1)], first=len(answers))
        reading = []
        while len(answers) in engine.requests:
            start = time.process_time()
            engine.step()
            reading.append(time.process_time() - start)
        model.free_cache()
        if number:
            longest.append((max(reading), max(alone)))
            first.append((sum(reading), sum(alone)))
    yield row(
        "longest pass while a prompt of 2,048 is read beside 8 answers",
        "longest pass of this prompt alone",
        longest,
    )
    yield row("first token of this prompt beside 8 answers", "the same prompt alone", first)


def lookup(model: Any, options: Options) -> Iterator[str]:
    """Yields a row: answers with prompt lookup / without, for answers that repeat their prompt.

    The model is random, and a greedy answer of it runs into a cycle: the prompt ends with several of its
    cycles, and so the answer repeats the prompt.
    """
    draw = Tokens(model.config.vocab_size)
    engine = new_engine(model)
    starts = [draw(32) for _ in range(4)]
    submit(engine, [(prompt, 256) for prompt in starts])
    _, outputs = run_steps(engine)
    work = [(prompt + outputs[i], 96) for i, prompt in enumerate(starts)]
    rounds = []
    for number in range(options.rounds + 1):
        seconds = {}
        tokens = {}
        for proposed in (8, 0):
            engine = new_engine(model, lookup=proposed)
            submit(engine, work)
            steps, tokens[proposed] = run_steps(engine)
            seconds[proposed] = sum(steps)
        assert tokens[8] == tokens[0], "prompt lookup gives other tokens"
        if number:
            rounds.append((seconds[8], seconds[0]))
    model.free_cache()
    yield row("4 answers of 96 tokens that repeat their prompts, lookup of 8", "without lookup", rounds)


@contextmanager
def served(folder: Path, options: Options) -> Iterator[tuple[int, int]]:
    """Serves the model while the context is open; yields the port and the process ID."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    memory = NUM_BLOCKS * BLOCK_SIZE * 2 * generate.SMALL.num_layers * generate.SMALL.kv_heads
    memory *= generate.SMALL.head_dim * {"fp32": 4, "bf16": 2}[options.dtype]
    words = ["tasks/inference/serve.py", "--load", str(folder), "--device", "cpu", "--port", str(port)]
    words += ["--cache-memory", str(memory / 2**30), "--served-model-name", "random"]
    words += ["--bf16"] if options.dtype == "bf16" else []
    words += ["--max-num-batched-tokens", str(BUDGET), "--max-num-seqs", str(CLIENTS)]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.DEVNULL
    )
    try:
        while not _is_open(port):
            assert process.poll() is None, "the server has ended"
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def ask(port: int, prompt: list[int], count: int) -> int:
    """Streams a completion; returns the number of its events."""
    fields = {"model": "random", "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": True}
    body = json.dumps(fields | {"ignore_eos": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*head, "Connection: close", "", ""]).encode() + body)
    answer = await reader.read()
    writer.close()
    assert b" 200 " in answer.split(b"\r\n", 1)[0], answer[:300]
    return answer.count(b"data: {")


async def stream_all(port: int, work: Work) -> int:
    """Streams all completions at the same time; returns the number of their events."""
    return sum(await asyncio.gather(*(ask(port, prompt, count) for prompt, count in work)))


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(folder: Path, options: Options) -> Any:
    """Loads the server's weights for the engine alone."""
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.conversion.formats.registry import open_reader
    from ascendspeed.distributed import device, fused_kernels
    from ascendspeed.distributed.cpu_products import Products
    from ascendspeed.inference import engine

    here, source = device.prepare("cpu"), open_reader(folder)
    products = Products.of_inference("auto", options.dtype, source.config, ParallelConfig())
    kernels = fused_kernels.select_kernels(here, products=products)
    return engine.load(source, dtype=options.dtype, device=here, kernels=kernels)


def over_http(model: Any, options: Options) -> Iterator[str]:
    """Yields a row: CPU time of the server for 32 streaming clients / the engine on the same requests.

    The model has as many rows as the tokenizer has ids.
    """
    rounds = []
    with tempfile.TemporaryDirectory() as home:
        write_model(Path(home), model.config, "gsm8k")
        folder = Path(home, "llama")
        alone = load(folder, options)
        draw = Tokens(alone.config.vocab_size)
        with served(folder, options) as (port, pid):
            for number in range(options.rounds + 1):
                # New prompts in every round, as the server keeps the keys and values of earlier ones.
                work = [(draw(32 + 15 * i), 16 + 3 * i) for i in range(CLIENTS)]
                before = cpu_seconds(pid)
                events = asyncio.run(stream_all(port, work))
                used = cpu_seconds(pid) - before
                assert events > CLIENTS, "nothing was streamed"
                engine = new_engine(alone)
                submit(engine, work)
                start = time.process_time()
                run_steps(engine)
                if number:
                    rounds.append((used, time.process_time() - start))
    alone.free_cache()
    yield row(f"{CLIENTS} streaming clients, CPU time of the server", "the engine alone", rounds)


def row(case: str, against: str, rounds: list[tuple[float, float]]) -> str:
    """Formats medians of both sides and of their ratio, with least and largest."""
    ratios = sorted(a / b for a, b in rounds)
    first, second = (statistics.median(side) for side in zip(*rounds, strict=True))
    spread = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    text = f"| {case} | {1000 * first:,.0f} | {against} | {1000 * second:,.0f} | {spread} |"
    print(text, flush=True)
    return text


PARTS: tuple[Callable[[Any, Options], Iterator[str]], ...] = (decoding, long_prompt, lookup, over_http)


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    from ascendspeed.distributed import device as devices

    device = devices.prepare("cpu")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    model, _ = generate.build_models(generate.Options(dtype=options.dtype), device)
    rows = [line for part in PARTS for line in part(model, options)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    text = (
        f"# Steps of the serving engine\n\n{datetime.date.today()}, {device.name}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}. Kernels: "
        f"{model.gpt.config.kernels}.\n\n44m, {options.dtype}, greedy; blocks of {BLOCK_SIZE}, at most "
        f"{BUDGET} tokens a pass; {options.rounds} rounds in turns, medians of CPU milliseconds; ratios with "
        "least and largest, below 1 the first is faster.\n\n"
        "| case | ms | against | ms | ratio |\n|---|---:|---|---:|---:|\n"
    )
    text += "\n".join(rows) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
