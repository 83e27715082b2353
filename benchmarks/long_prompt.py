"""A prompt as long as InternLM2's 200K tokens through a tiny model: time and memory by length, each in a process of its own.

    python benchmarks/long_prompt.py --out benchmarks/results/long-prompt-cpu.md

Memory is the peak beyond what the process had when the model was ready: the cache of keys and values, one chunk of the prompt, and
the mask of one block of queries. It must grow as the cache does. A pass without chunks would hold the whole prompt's activations,
and one without SDPA length x length scores (200K: 160 GB per head).
"""

import datetime
import platform
import resource
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

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
    """Tokens of the prompts."""
    new_tokens: int = 8
    """Tokens generated after each."""
    out: Path | None = None
    """Markdown file to write; None: print only."""


def peak() -> int:
    """Bytes that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(length: int, new_tokens: int) -> tuple[float, int, int]:
    """Seconds, bytes beyond the model, bytes of the cache."""
    from ascendspeed.distributed import device as devices

    here, alone = devices.prepare("cpu"), ParallelConfig()
    import torch

    from ascendspeed.distributed import process_groups
    from ascendspeed.inference.engine import LanguageModel, SamplingParams, sample
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    torch.set_num_threads(1)
    grid = process_groups.initialize(here, alone, 1)
    built = gpt_model.build_model(MODEL, alone, layer_spec.transformer_config(MODEL, alone, TrainConfig()))
    gpt_model.load_weights(built, MODEL, alone, param_mapping.random_tensors(MODEL, 1))
    model = LanguageModel(built, MODEL, grid, here)
    sample(model, [[1, 2, 3]], SamplingParams(max_new_tokens=2))
    before = peak()
    prompt = torch.randint(
        5, MODEL.vocab_size, (length,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    began = time.perf_counter()
    ((found,),) = sample(model, [prompt], SamplingParams(max_new_tokens=new_tokens))
    assert len(found.tokens) == new_tokens
    cache = MODEL.num_layers * 2 * MODEL.kv_heads * (length + new_tokens) * MODEL.head_dim * 4
    return time.perf_counter() - began, peak() - before, cache


def main() -> None:
    """Measures, prints, writes."""
    options = parser.parse(Options, description=__doc__ or "")
    lines = [
        "| tokens | s | tokens/s | peak memory beyond the model | bytes per token | of which the cache |",
        "|---|---|---|---|---|---|",
    ]
    for length in options.lengths:
        with get_context("spawn").Pool(1) as pool:
            seconds, memory, cache = pool.apply(one, (length, options.new_tokens))
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
        f"# A long prompt\n\n{datetime.date.today()}, {devices.prepare('cpu').name}, 1 thread; Python {platform.python_version()}, "
        f"{versions}. A tiny InternLM2: {MODEL.num_layers} layers, hidden {MODEL.hidden_size}, {MODEL.num_attention_heads} heads, "
        f"{MODEL.kv_heads} of keys and values, fp32; {options.new_tokens} new tokens.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
