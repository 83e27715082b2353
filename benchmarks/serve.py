"""Compares continuous batching over the paged cache with batches, on the same weights, in alternating runs.

    python benchmarks/serve.py --threads 1 --out benchmarks/results/serve-cpu.md
    python benchmarks/serve.py --threads 1 --vllm-python ~/vllm/bin/python --out ...

Peers: the project's own batches of 16 (longest prompts first), Hugging Face's `generate` in the same batches,
transformers' continuous batching, and vLLM if an environment has it. The result is the ratio of CPU time,
peer / paged engine: above 1 the engine is faster. In fp32 the project's and Hugging Face's batches must
generate the same tokens as the engine; of the others it is printed how many answers are the same.
"""

import datetime
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import generate
from clock import timed
from vllm_peer import VllmPeer, Work

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

BATCH = 16
BLOCK_SIZE = 32
NUM_BLOCKS = 1024
CONTINUOUS_BATCHING = "transformers' continuous batching"
MAX_LENGTH = 2048
"""Longest sequence that vLLM is told of; the requests are shorter."""

Side = Callable[[Work], list[list[int]]]
"""Returns the new tokens of every request."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    model: str = "44m"
    """44m, or a preset such as internlm2-7b."""
    layers: int | None = None
    """Number of layers, if the whole model does not fit into memory twice."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Device to run on."""
    rounds: int = 3
    """Measured runs of each side, after a warm-up run."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    shorten: int = 1
    """Divide the lengths of prompts and answers by this, where the CPU emulates the number format."""
    vllm_python: str | None = None
    """Python of an environment with vLLM, which becomes a peer; None: without."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def workloads(vocab_size: int, shorten: int = 1) -> dict[str, Work]:
    """Returns the requests of every case, with random tokens, and lengths divided by `shorten`."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(5, vocab_size, (count // shorten,), generator=generator).tolist()

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    head, fewest, most = tokens(384), max(16 // shorten, 1), 128 // shorten
    return {
        f"32 ragged: prompts of {32 // shorten} to {512 // shorten}, {fewest} to {most} new": [
            (tokens(between(32, 512)), between(fewest, most)) for _ in range(32)
        ],
        f"32 with a common head of {len(head)}": [
            ([*head, *tokens(between(16, 128))], fewest) for _ in range(32)
        ],
        f"16 equal: prompts of {256 // shorten}, {48 // shorten} new": [
            (tokens(256), 48 // shorten) for _ in range(BATCH)
        ],
        f"1 request: prompt of {256 // shorten}, {48 // shorten} new": [(tokens(256), 48 // shorten)],
    }


def submit(engine: Any, work: Work, first: int = 0) -> None:
    """Adds requests to a paged engine, with numbers from `first` on."""
    from ascendspeed.inference.engine import SamplingParams
    from ascendspeed.inference.serving.request import Events, RequestParams, Submission

    engine.apply(
        Events(
            tuple(
                Submission(number, prompt, RequestParams(SamplingParams(max_new_tokens=count)))
                for number, (prompt, count) in enumerate(work, first)
            )
        )
    )


def paged(model: Any, work: Work) -> list[list[int]]:
    """Runs the requests through the paged engine; its cache begins empty."""
    from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine

    engine = PagedEngine(model, EngineSettings(NUM_BLOCKS, BLOCK_SIZE))
    submit(engine, work)
    outputs: dict[int, list[int]] = {}
    while not engine.scheduler.is_idle:
        for result in engine.step():
            outputs[result.request.id] = result.request.output
    model.free_cache()
    return [outputs[number] for number in range(len(work))]


def batches(model: Any, work: Work) -> list[list[int]]:
    """Runs the requests in batches, longest prompts first; every row ends at its own length."""
    from ascendspeed.inference.batching import length_sorted_batches
    from ascendspeed.inference.engine import SamplingParams, sample

    outputs: dict[int, list[int]] = {}
    for batch in length_sorted_batches([prompt for prompt, _ in work], BATCH):
        limits = [work[i][1] for i in batch]
        counts = [0] * len(batch)

        def ends(row: int, token: int, counts: list[int] = counts, limits: list[int] = limits) -> bool:
            counts[row] += 1
            return counts[row] >= limits[row]

        completions = sample(
            model, [work[i][0] for i in batch], SamplingParams(max_new_tokens=max(limits)), ends
        )
        outputs |= {i: completion.tokens for i, (completion,) in zip(batch, completions, strict=True)}
    return [outputs[number] for number in range(len(work))]


def hugging_face_batches(model: Any, work: Work) -> list[list[int]]:
    """Runs the requests through `generate` in the same batches, padded on the left."""
    import torch

    from ascendspeed.inference.batching import length_sorted_batches

    outputs: dict[int, list[int]] = {}
    for batch in length_sorted_batches([prompt for prompt, _ in work], BATCH):
        longest = max(len(work[i][0]) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            prompt = torch.tensor(work[i][0])
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(work[i][1] for i in batch),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        for row, i in enumerate(batch):
            outputs[i] = out[row, longest : longest + work[i][1]].tolist()
    return [outputs[number] for number in range(len(work))]


def continuous_batching(model: Any, work: Work) -> list[list[int]]:
    """Runs the requests through transformers' continuous batching."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    longest = max(count for _, count in work)
    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=False, max_new_tokens=longest
    )
    settings = ContinuousBatchingConfig(
        page_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_batch_tokens=256,
        use_cuda_graph=False,
        max_requests_per_batch=32,
    )
    outputs: dict[int, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, warmup=False
    ) as manager:
        numbers = {
            manager.add_request(prompt, max_new_tokens=count): number
            for number, (prompt, count) in enumerate(work)
        }
        while len(outputs) < len(work):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                outputs[numbers[result.request_id]] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise UserError("transformers' continuous batching has ended without an answer")
    return [outputs[number] for number in range(len(work))]


@contextmanager
def vllm_sides(options: Options, hugging_face: Any) -> Iterator[dict[str, Side]]:
    """Starts vLLM over the same weights, if an environment with it is named."""
    if options.vllm_python is None:
        yield {}
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        hugging_face.save_pretrained(folder)
        dtype = str(hugging_face.dtype).removeprefix("torch.")
        try:
            peer = VllmPeer(options.vllm_python, folder, dtype, MAX_LENGTH, torch.get_num_threads())
        except (OSError, RuntimeError) as error:
            raise UserError(f"--vllm-python {options.vllm_python}: {error}") from error
    try:
        yield {f"vLLM {peer.version}": peer}
    finally:
        peer.close()


def measure(options: Options, device: Any) -> tuple[dict[str, dict[str, list[float]]], str]:
    """Returns case -> side -> CPU seconds of every round, and the kernels of the project."""
    settings = generate.Options(model=options.model, layers=options.layers, dtype=options.dtype)
    project, hugging_face = generate.build_models(settings, device)
    results: dict[str, dict[str, list[float]]] = {}
    with vllm_sides(options, hugging_face) as vllm:
        for case, work in workloads(project.config.vocab_size, options.shorten).items():
            sides: dict[str, Side] = {
                "paged": partial(paged, project),
                "batches of 16": partial(batches, project),
                "generate": partial(hugging_face_batches, hugging_face),
            }
            if case.startswith("32 "):
                sides[CONTINUOUS_BATCHING] = partial(continuous_batching, hugging_face)
            results[case] = measure_case(case, work, sides | vllm, options, device)
            print(table({case: results[case]}), flush=True)
    return results, str(project.gpt.config.kernels)


def measure_case(
    case: str, work: Work, sides: dict[str, Side], options: Options, device: Any
) -> dict[str, list[float]]:
    """Runs all sides in alternating order. Raises `UserError` if their tokens differ in fp32."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        tokens = {}
        for side in order:
            tokens[side], timing = timed(partial(sides[side], work), device.synchronize)
            if number:  # the first round warms up
                cpu = getattr(sides[side], "cpu", timing.cpu)  # of a peer's own process
                seconds[side].append(cpu if device.kind == "cpu" else timing.wall)
        if options.dtype == "fp32":
            for side in sides:
                same = sum(theirs == ours for theirs, ours in zip(tokens[side], tokens["paged"], strict=True))
                if same < len(work) and side in ("batches of 16", "generate"):
                    raise UserError(f"{case}: {side} and the paged engine do not give the same tokens")
                if side not in ("paged", "batches of 16", "generate") and number == options.rounds:
                    print(f"{case}: {side}: {same} of {len(work)} answers as the other sides", flush=True)
    return seconds


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Formats the seconds of every side and the ratios to the paged engine (median, least, largest)."""
    lines = ["| requests | side | s | s / s of the paged engine |", "|---|---|---:|---:|"]
    for case, seconds in results.items():
        for side, values in seconds.items():
            ratios = sorted(b / a for a, b in zip(seconds["paged"], values, strict=True))
            spread = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            lines.append(f"| {case} | {side} | {statistics.median(values):.2f} | {spread} |")
    return "\n".join(lines)


def report(results: dict[str, dict[str, list[float]]], kernels: str, options: Options, device: Any) -> str:
    """Formats the markdown file."""
    import torch

    packages: Sequence[str] = ("torch", "megatron-core", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    clock = "CPU time" if device.kind == "cpu" else "wall time"
    same_tokens = " The first three sides gave the same tokens." if options.dtype == "fp32" else ""
    return (
        f"# Continuous batching against batches\n\n{datetime.date.today()}, {device.name}, {os.cpu_count()} "
        f"cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}. Kernels: "
        f"{kernels}.\n\n{options.model}, {options.dtype}, greedy; blocks of {BLOCK_SIZE}, at most 256 tokens "
        f"a pass and 32 sequences at a time; {options.rounds} rounds in turns, medians of {clock} with least "
        f"and largest; above 1 the paged engine is faster.{same_tokens}\n\n{table(results)}\n"
    )


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    generate.model_of(replace(generate.Options(), model=options.model, layers=options.layers))
    from ascendspeed.distributed import device as devices

    device = devices.prepare(options.device)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    text = report(*measure(options, device), options, device)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
