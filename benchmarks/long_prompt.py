"""Measures time and memory of prompts up to InternLM2's 200K tokens with a tiny model, one process per
length.

    python benchmarks/long_prompt.py --out benchmarks/results/long-prompt-cpu.md

Memory is the increase of the peak after the model is loaded: the KV cache, one chunk of the prompt, and the
mask of one block of queries. It must grow with the cache only. Without chunks it would include the whole
prompt's activations, and without SDPA length x length scores (200K: 160 GB per head).
"""

import datetime
import platform
import resource
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

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


def measure(length: int, new_tokens: int) -> tuple[float, int, int]:
    """Returns seconds, bytes beyond the model, and bytes of the KV cache."""
    from ascendspeed.distributed import device as devices

    device, layout = devices.prepare("cpu"), ParallelConfig()
    import torch

    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel, SamplingParams, sample
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    torch.set_num_threads(1)
    grid = process_groups.initialize(device, layout, 1)
    gpt = gpt_model.build_model(MODEL, layout, layer_spec.transformer_config(MODEL, layout, TrainConfig()))
    gpt_model.load_weights(gpt, MODEL, layout, param_mapping.random_tensors(MODEL, 1))
    model = LanguageModel(gpt, MODEL, grid, device)
    sample(model, [[1, 2, 3]], SamplingParams(max_new_tokens=2))
    before = peak()
    prompt = torch.randint(
        5, MODEL.vocab_size, (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    start = time.perf_counter()
    ((completion,),) = sample(model, [prompt], SamplingParams(max_new_tokens=new_tokens))
    assert len(completion.tokens) == new_tokens
    cache = MODEL.num_layers * 2 * MODEL.kv_heads * (length + new_tokens) * MODEL.head_dim * 4
    return time.perf_counter() - start, peak() - before, cache


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    lines = [
        "| tokens | s | tokens/s | peak memory beyond the model | bytes per token | of which the cache |",
        "|---|---|---|---|---|---|",
    ]
    for length in options.lengths:
        with get_context("spawn").Pool(1) as pool:
            seconds, memory, cache = pool.apply(measure, (length, options.new_tokens))
        size = length + options.new_tokens
        row = (
            f"{length:,}",
            f"{seconds:.0f}",
            f"{size / seconds:.0f}",
            f"{memory / 2**20:.0f} MiB",
            f"{memory / size:.0f}",
            f"{cache / size:.0f}",
        )
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    from ascendspeed.distributed import device as devices

    text = (
        f"# A long prompt\n\n{datetime.date.today()}, {devices.prepare('cpu').name}, 1 thread; Python "
        f"{platform.python_version()}, {versions}. A tiny InternLM2: {MODEL.num_layers} layers, hidden "
        f"{MODEL.hidden_size}, {MODEL.num_attention_heads} heads, {MODEL.kv_heads} of keys and values, fp32; "
        f"{options.new_tokens} new tokens.\n\n" + "\n".join(lines) + "\n"
    )
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
