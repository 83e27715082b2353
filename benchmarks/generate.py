"""Generation against Hugging Face's `generate`: the same weights, in the same process, in turns; prefill and decoding apart.

    python benchmarks/generate.py --out benchmarks/results/generate-cpu.md
    python benchmarks/generate.py --device cuda --dtype bf16 --model internlm2-7b --layers 8 --out benchmarks/results/generate.md

Prefill is the time to the first token, decoding what each further one takes: (all - prefill) / (new tokens - 1). What counts is the
ratio of neighbours, theirs / ours: above 1 ours is faster. Both must give the same tokens: sides that do not cannot be compared.
"""

import datetime
import os
import platform
import statistics
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from clock import Took, timed

from ascendspeed.cli import parser
from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.models import estimates
from ascendspeed.models.families import preset
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

SMALL = replace(
    preset("internlm2-1.8b"),
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1792,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=16000,
)
"""44M parameters; grouped heads as InternLM2 has them."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Where to run."""
    model: str = "44m"
    """44m, or a preset such as internlm2-7b."""
    layers: int | None = None
    """Layers, where the whole model does not fit twice."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute type."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Prompts side by side."""
    prompts: tuple[int, ...] = (64, 768)
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens generated for each prompt."""
    rounds: int = 5
    """Measured runs of each side, after one that warms up."""
    threads: int | None = None
    """CPU threads; None: torch's choice. 1 where the machine is shared."""
    out: Path | None = None
    """Markdown file to write; None: print only."""


def model_of(options: Options) -> ModelConfig:
    """The shape of both sides."""
    model = SMALL if options.model == "44m" else preset(options.model)
    return replace(model, num_layers=options.layers) if options.layers else model


def sides(options: Options, here: Any) -> tuple[Any, Any]:
    """Our model and theirs, with the same random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ascendspeed.distributed import fused_kernels, process_groups
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    model, alone = model_of(options), ParallelConfig()
    grid = process_groups.initialize(here, alone, 1)
    fused = fused_kernels.select_kernels(here, rms_norm=True, rotary=True, swiglu=True)
    built = gpt_model.build_model(
        model, alone, layer_spec.transformer_config(model, alone, TrainConfig(), options.dtype, fused)
    )
    gpt_model.load_weights(built, model, alone, param_mapping.random_tensors(model, 1, here.torch))
    config = LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
    )
    theirs = LlamaForCausalLM(config).to(here.torch, layer_spec.DTYPES[options.dtype]).eval()
    named = {}
    for parameter, (name, tensor) in zip(
        param_mapping.parameters(replace(model, family="llama")),
        param_mapping.random_tensors(model, 1, here.torch),
        strict=True,
    ):
        assert parameter.name == name
        named |= param_mapping.megatron_to_hf(replace(model, family="llama"), parameter, tensor)
    theirs.load_state_dict(named)
    return LanguageModel(built, model, grid, here), theirs


def measure(options: Options, here: Any) -> dict[tuple[int, int], dict[str, list[tuple[Took, Took]]]]:
    """(batch, prompt) -> side -> (to the first token, in all) of every round."""
    import torch

    from ascendspeed.inference.engine import SamplingParams, sample

    ours, theirs = sides(options, here)
    found: dict[tuple[int, int], dict[str, list[tuple[Took, Took]]]] = {}
    for length in options.prompts:
        for batch in options.batches:
            ids = torch.randint(
                5,
                ours.config.vocab_size,
                (batch, length),
                generator=torch.Generator().manual_seed(batch * length),
            )

            def mine(new: int, ids: Any = ids) -> list[list[int]]:
                return [
                    one.tokens for (one,) in sample(ours, ids.tolist(), SamplingParams(max_new_tokens=new))
                ]

            def their(new: int, ids: Any = ids) -> list[list[int]]:
                given = ids.to(here.torch)
                with torch.inference_mode():
                    out = theirs.generate(
                        given,
                        attention_mask=torch.ones_like(given),
                        max_new_tokens=new,
                        do_sample=False,
                        eos_token_id=None,
                        pad_token_id=0,
                    )
                return out[:, given.size(1) :].tolist()

            runs: dict[str, list[tuple[Took, Took]]] = {"ours": [], "theirs": []}
            for number in range(options.rounds + 1):
                turns = [("ours", mine), ("theirs", their)]
                said = {}
                for name, run in turns if number % 2 else turns[::-1]:
                    _, first = timed(lambda run=run: run(1), here.synchronize)
                    said[name], whole = timed(lambda run=run: run(options.new_tokens), here.synchronize)
                    if number:
                        runs[name].append((first, whole))
                if options.dtype == "fp32" and said["ours"] != said["theirs"]:
                    raise UserError(f"batch {batch}, prompt {length}: the sides do not give the same tokens")
            found[batch, length] = runs
            print(f"batch {batch}, prompt {length}: {row(runs, options)}", flush=True)
    return found


def parts(took: tuple[Took, Took], clock: str, new: int) -> tuple[float, float]:
    """Seconds to the first token, and for each further one."""
    first, whole = (getattr(one, clock) for one in took)
    return first, (whole - first) / (new - 1)


def row(runs: dict[str, list[tuple[Took, Took]]], options: Options) -> str:
    """ours, theirs and ratios (median, least, largest; of CPU time) of prefill, then of decoding."""
    cells = []
    for part in (0, 1):
        walls = {
            side: [parts(took, "wall", options.new_tokens)[part] for took in taken]
            for side, taken in runs.items()
        }
        cpus = {
            side: [parts(took, "cpu", options.new_tokens)[part] for took in taken]
            for side, taken in runs.items()
        }
        ratios = sorted(b / a for a, b in zip(walls["ours"], walls["theirs"], strict=True))
        cpu = statistics.median(b / a for a, b in zip(cpus["ours"], cpus["theirs"], strict=True))
        cells += [f"{1000 * statistics.median(walls[side]):.1f}" for side in ("ours", "theirs")]
        cells.append(f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f}; {cpu:.2f})")
    return " | ".join(cells)


def report(
    found: dict[tuple[int, int], dict[str, list[tuple[Took, Took]]]], options: Options, here: Any
) -> str:
    """The markdown file."""
    import torch

    model = model_of(options)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    lines = [f"| {batch} | {length} | {row(runs, options)} |" for (batch, length), runs in found.items()]
    head = "| batch | prompt | first: ours | theirs | theirs / ours | next: ours | theirs | theirs / ours |"
    same = " The tokens were the same." if options.dtype == "fp32" else ""
    return (
        f"# Generation against Hugging Face's generate\n\n{datetime.date.today()}, {here.name}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}.\n\n"
        f"{options.model}: {estimates.parameter_count(model) / 1e6:.0f}M parameters, {model.num_layers} layers, "
        f"hidden {model.hidden_size}, {model.num_attention_heads} heads, {model.kv_heads} of keys and values, {options.dtype}; "
        f"{options.new_tokens} new tokens, greedy; {options.rounds} rounds in turns, medians. Milliseconds to the first token, and "
        "for each further one (of the whole batch); theirs / ours with least and largest, then that of CPU time. Above 1 ours is "
        f"faster.{same}\n\n{head}\n|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    """Measures, prints, writes."""
    options = parser.parse(Options, description=__doc__ or "")
    model_of(options)
    from ascendspeed.distributed import device as devices

    here = devices.prepare(options.device)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    text = report(measure(options, here), options, here)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    errors.run(main)
