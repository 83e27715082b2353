"""Part `serving` of `gpu_first_run.py`: decode steps of the paged engine by its three ways to read the cache,
and products with int8 weights."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from first_run_parts import Part

LEAST_MEMORY = 24 * 2**30
"""Bytes of a device that holds the 7B in bf16 with the cache of 32 requests; others take `FEW_LAYERS`."""
RUNNING = (1, 8, 32)
"""Requests at a time."""
BOUND = 0.1
"""Largest difference of log-probabilities between two ways to read the cache: three steps of a logit of 4 to
8 in bf16. Attention that leaves out a key, or is a tenth too small, differs by more."""
INT8_BOUND = 1e-2
"""Largest relative difference of a product in bf16 from fp64 with the same int8 weight."""
ROWS = (1, 8, 32, 256)
"""Rows of a product."""
COMPARED = 128
"""Columns of a product that are compared."""


@dataclass(frozen=True)
class Way:
    """One way to read the paged cache."""

    name: str
    kernel: Any = None
    """None: keys are gathered."""
    capture: Any = None
    """None: no graphs."""


@dataclass(frozen=True)
class Decoding:
    """Answers to all requests, and the time of a step that decodes them."""

    milliseconds: float
    tokens: list[list[int]]
    logprobs: list[list[float]]


def serving(part: "Part") -> None:
    """Decode steps with gathered keys, with the device's kernel and with graphs; then int8 products."""
    from ascendspeed.distributed import fused_kernels

    kernels = fused_kernels.select_kernels(part.here)
    kernels = fused_kernels.with_inference_kernels(kernels, part.here, "bf16")
    if wrong := _decode(part, kernels) + _multiply(part, kernels):
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


def _decode(part: "Part", kernels: Any) -> list[str]:
    """Measures decode steps, and compares every way with the one before; returns what is wrong."""
    model = _model(part, kernels)
    rows = part.table(
        f"Decode steps of the paged engine in bf16, {model.config.num_layers} layers, greedy; "
        f"log-probabilities differ from those of the row above by at most {BOUND}; kernels: "
        f"{str(kernels) or 'torch'}",
        *("requests", "attention", "ms/step", "tokens/s", "equal answers", "difference", "result"),
    )
    ways = _ways(part, kernels)
    for count in RUNNING:
        before = None
        for way in ways:
            try:
                decoding = _run(part, model, way, count)
            except RuntimeError as error:
                rows.append([count, way.name, f"{str(error).splitlines()[0][:80]}", *[""] * 3, "FAILED"])
                continue
            equal, difference = _compare(decoding, before or decoding)
            # On a CPU both ways do the same.
            must_be_equal = part.is_dry and way.capture is not None
            is_right = difference <= BOUND and (equal == count or not must_be_equal)
            rate = 1e3 * count / decoding.milliseconds
            measured = [f"{decoding.milliseconds:.2f}", f"{rate:.0f}", f"{equal} of {count}"]
            rows.append([count, way.name, *measured, f"{difference:.4f}", "right" if is_right else "WRONG"])
            before = decoding
    return [f"{row[1]} with {row[0]} requests" for row in rows if row[-1] != "right"]


def _model(part: "Part", kernels: Any) -> Any:
    """The 7B with random weights, whose products keep the size of their input."""
    from first_run_parts import FEW_LAYERS

    from ascendspeed.config.schema import ParallelConfig, TrainConfig
    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model
    from ascendspeed.models.gpt.layer_spec import transformer_config

    torch, here, config, layout = part.torch, part.here, part.model, ParallelConfig()
    if not part.is_dry:
        memory = getattr(torch, here.kind).get_device_properties(here.index).total_memory
        config = config if memory >= LEAST_MEMORY else replace(config, num_layers=FEW_LAYERS)
    grid = process_groups.initialize(here, layout, 1)
    torch.manual_seed(1)
    settings = transformer_config(config, layout, TrainConfig(), "bf16", kernels)
    gpt = gpt_model.build_model(config, layout, settings)
    parameters = param_mapping.parameters(config)
    weights = ((parameter.name, _weight(part, parameter.shape)) for parameter in parameters)
    gpt_model.load_weights(gpt, config, layout, weights)
    return LanguageModel(gpt, config, grid, here)


def _weight(part: "Part", shape: tuple[int, ...]) -> Any:
    if len(shape) == 1:
        return part.torch.ones(shape, device=part.here.torch)
    return part.random(*shape).mul_(1.5 * shape[-1] ** -0.5)


def _ways(part: "Part", kernels: Any) -> list[Way]:
    """The ways that there are on this device."""
    from ascendspeed.distributed import cuda_graphs
    from ascendspeed.distributed.inference_kernels import PagedAttention

    ways = [Way("gathered keys")]
    if part.is_dry:  # no graphs on a CPU: a pass is called again
        kernel = PagedAttention("stand-in", 1, gathered)
        return [*ways, Way(kernel.source, kernel), Way("stand-in for graphs", kernel, lambda call: call)]
    if kernels.paged is None:
        return ways
    ways.append(Way(kernels.paged.source, kernels.paged))
    if part.here.has_graphs:
        ways.append(Way("CUDA graphs", kernels.paged, cuda_graphs.open_capture()))
    return ways


def gathered(q: Any, keys: Any, values: Any, batch: Any, scale: float) -> Any:
    """A kernel in plain torch whose shapes do not depend on lengths: every query reads all blocks of its
    sequence's table."""
    import torch
    from torch.nn import functional as F

    ends, index = batch.cumulative[1:], torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(ends, index, right=True)
    position = batch.lengths[sequence] - (ends[sequence] - index)
    table = batch.table.long()[sequence]
    k, v = (cached[table].flatten(1, 2).transpose(1, 2) for cached in (keys, values))
    visible = torch.arange(k.size(2), device=q.device) <= position[:, None]
    mask = visible[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, mask, scale=scale, enable_gqa=True)[:, :, 0]


def _run(part: "Part", model: Any, way: Way, count: int) -> Decoding:
    """Answers `count` prompts of different lengths. Raises RuntimeError if there are no graphs."""
    from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine

    shortest, step, new_tokens = (8, 1, 4) if part.is_dry else (200, 6, 32)
    generator = part.torch.Generator().manual_seed(count)
    prompts = [
        part.torch.randint(model.config.vocab_size, (shortest + step * i,), generator=generator).tolist()
        for i in range(count)
    ]
    settings = model.gpt.config
    settings.kernels = replace(settings.kernels, paged=way.kernel)
    size, longest = model.paged_block_size, len(prompts[-1]) + new_tokens
    blocks = count * (-(-longest // size) + 1)
    sizes = EngineSettings(blocks, size, 2048, count, max_request_tokens=longest)
    engine = PagedEngine(model, sizes, way.capture)
    _submit(engine, prompts, new_tokens)
    decoding = _steps(part, engine, count)
    model.free_cache()
    if engine.graphs is not None and not engine.graphs.replays:
        raise RuntimeError(engine.graphs.problem or "no pass was a replay")
    return decoding


def _submit(engine: Any, prompts: list[list[int]], new_tokens: int) -> None:
    from ascendspeed.inference.engine import SamplingParams
    from ascendspeed.inference.serving.request import Events, RequestParams, Submission

    params = RequestParams(SamplingParams(max_new_tokens=new_tokens))
    engine.apply(Events(tuple(Submission(i, prompt, params) for i, prompt in enumerate(prompts))))


def _steps(part: "Part", engine: Any, count: int) -> Decoding:
    """Runs all steps; the median time of those that decode all requests, without the first quarter."""
    tokens: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    seconds = []
    while not engine.scheduler.is_idle:
        decodes_all = len(engine.scheduler.running) == count
        part.here.synchronize()
        began = time.perf_counter()
        results = engine.step()
        part.here.synchronize()
        if decodes_all:
            seconds.append(time.perf_counter() - began)
        for result in results:
            tokens[result.request.id].append(result.choice.token)
            logprobs[result.request.id].append(result.choice.logprob)
    return Decoding(1e3 * statistics.median(seconds[len(seconds) // 4 :]), tokens, logprobs)


def _compare(actual: Decoding, expected: Decoding) -> tuple[int, float]:
    """Number of answers with equal tokens; and the largest difference of log-probabilities up to the first
    other token of every answer, which is as likely up to rounding."""
    equal, largest = 0, 0.0
    for i, tokens in enumerate(expected.tokens):
        equal += actual.tokens[i] == tokens
        pairs = zip(actual.tokens[i], actual.logprobs[i], strict=True)
        others = zip(tokens, expected.logprobs[i], strict=True)
        for (token, logprob), (other_token, other) in zip(pairs, others, strict=True):
            largest = max(largest, abs(logprob - other))
            if token != other_token:
                break
    return equal, largest


def _multiply(part: "Part", kernels: Any) -> list[str]:
    """Measures and compares products with int8 weights; returns what is wrong."""
    h, f = part.model.hidden_size, part.model.ffn_hidden_size
    source = kernels.int8_linear.source if kernels.int8_linear else "torch"
    rows = part.table(
        f"Products of a layer with weights in bf16 and in int8 (w8a16: {source}), µs; difference from fp64 "
        f"with the same int8 weight, at most {INT8_BOUND}",
        *("product", "rows", "bf16", "int8", "bf16 / int8", "difference", "result"),
    )
    shapes = {"qkv": (3 * h, h), "proj": (h, h), "fc1": (2 * f, h), "fc2": (h, f)}
    for name, shape in shapes.items():
        rows += [[name, *row] for row in _products(part, kernels, part.random(*shape))]
    return [f"{row[0]} in int8 with {row[1]} rows" for row in rows if row[-1] != "right"]


def _products(part: "Part", kernels: Any, weight: Any) -> Iterator[list[Any]]:
    """Yields rows, µs with the weight in bf16 and in int8, their ratio, the difference and the result."""
    from ascendspeed.models import int8

    numbers, scale = int8.quantize(weight, part.torch.bfloat16)
    kernel = kernels.int8_linear.kernel if kernels.int8_linear else None
    few = numbers[:COMPARED].cpu().double() * scale[:COMPARED].cpu().double()

    def product(x: Any) -> Any:
        return int8.linear(x, numbers, scale, kernels.linear, kernel)

    for count in ROWS:
        x = part.random(count, weight.size(1))
        exact = x.cpu().double() @ few.t()
        difference = float((product(x)[:, : len(few)].cpu().double() - exact).norm() / exact.norm())
        plain = part.seconds(lambda x=x: kernels.linear(x, weight), 0.02)
        quantized = part.seconds(lambda x=x: product(x), 0.02)
        times = [f"{plain * 1e6:.0f}", f"{quantized * 1e6:.0f}", f"{plain / quantized:.2f}"]
        result = "right" if difference <= INT8_BOUND else "WRONG"
        yield [count, *times, f"{difference:.1e}", result]
