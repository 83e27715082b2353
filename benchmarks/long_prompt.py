"""Measures time and memory of prompts up to InternLM2's 200K tokens with a tiny model, one process per
length and cache: that of a batch, and the paged one of the service.

    python benchmarks/long_prompt.py --out benchmarks/results/long-prompt-cpu.md

Memory is the increase of the peak after the model is loaded: the KV cache, one chunk of the prompt, and the
mask of one block of queries. It must grow with the cache only. Without chunks it would include the whole
prompt's activations, and without SDPA length x length scores (200K: 160 GB per head). Both caches must give
the same tokens.
"""

import datetime
import platform
import resource
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from serve import BLOCK_SIZE, submit

from ascendspeed.cli import parser
from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.models.families import preset
from ascendspeed.utils import errors

MODEL = replace(
    preset("internlm2-tiny"),
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=2,
    num_query_groups=1,
    vocab_size=1024,
)


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    lengths: tuple[int, ...] = (25_000, 50_000, 100_000, 200_000)
    """Prompt lengths in tokens."""
    new_tokens: int = 8
    """New tokens per prompt."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def peak() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def generate_paged(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Generates with the paged engine, whose cache is as large as this request."""
    from ascendspeed.inference.serving.paged_engine import EngineSettings, PagedEngine

    engine = PagedEngine(model, EngineSettings(-(-(len(prompt) + new_tokens) // BLOCK_SIZE) + 1, BLOCK_SIZE))
    submit(engine, [(prompt, new_tokens)])
    tokens: list[int] = []
    while not engine.scheduler.is_idle:
        tokens += [result.choice.token for result in engine.step()]
    model.free_cache()
    return tokens


def generate_batch(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Generates with the cache of a batch."""
    from ascendspeed.inference.engine import SamplingParams, sample

    return sample(model, [prompt], SamplingParams(max_new_tokens=new_tokens))[0][0].tokens


CACHES = {"batch": generate_batch, "paged": generate_paged}


def measure(cache: str, length: int, new_tokens: int) -> tuple[float, int, list[int]]:
    """Returns CPU seconds, bytes beyond the model, and the new tokens."""
    from ascendspeed.distributed import device as devices

    device, layout = devices.prepare("cpu"), ParallelConfig()
    import torch

    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    torch.set_num_threads(1)
    grid = process_groups.initialize(device, layout, 1)
    gpt = gpt_model.build_model(MODEL, layout, layer_spec.transformer_config(MODEL, layout, TrainConfig()))
    gpt_model.load_weights(gpt, MODEL, layout, param_mapping.random_tensors(MODEL, 1))
    model = LanguageModel(gpt, MODEL, grid, device)
    CACHES[cache](model, [1, 2, 3], 2)
    before = peak()
    prompt = torch.randint(
        5, MODEL.vocab_size, (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    start = time.process_time()
    tokens = CACHES[cache](model, prompt, new_tokens)
    assert len(tokens) == new_tokens
    return time.process_time() - start, peak() - before, tokens


def rows_of(length: int, new_tokens: int) -> list[str]:
    """Measures a length with both caches; returns their rows of the table."""
    size, lines, results = length + new_tokens, [], {}
    for cache in CACHES:
        with get_context("spawn").Pool(1) as pool:
            results[cache] = seconds, memory, _ = pool.apply(measure, (cache, length, new_tokens))
        row = (f"{length:,}", cache, f"{seconds:.0f}", f"{size / seconds:.0f}", f"{memory / 2**20:.0f} MiB")
        ratios = (
            f"{own / batch:.2f}" for own, batch in zip(results[cache][:2], results["batch"][:2], strict=True)
        )
        lines.append(f"| {' | '.join((*row, f'{memory / size:.0f}', *ratios))} |")
        print(lines[-1], flush=True)
    assert results["paged"][2] == results["batch"][2], f"{length} tokens: the caches give different tokens"
    return lines


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    lines = [
        "| tokens | cache | CPU s | tokens/s | peak memory beyond the model | bytes per token "
        "| s / batch | memory / batch |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for length in options.lengths:
        lines += rows_of(length, options.new_tokens)
    cache_bytes = MODEL.num_layers * 2 * MODEL.kv_heads * MODEL.head_dim * 4
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    from ascendspeed.distributed import device as devices

    text = (
        f"# A long prompt\n\n{datetime.date.today()}, {devices.prepare('cpu').name}, 1 thread; Python "
        f"{platform.python_version()}, {versions}. A tiny InternLM2: {MODEL.num_layers} layers, hidden "
        f"{MODEL.hidden_size}, {MODEL.num_attention_heads} heads, {MODEL.kv_heads} of keys and values, fp32; "
        f"{options.new_tokens} new tokens. Keys and values take {cache_bytes} bytes per token. Both "
        "caches gave the same tokens.\n\n" + "\n".join(lines) + "\n"
    )
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
