"""Compares the speed of generation with Hugging Face's `generate` on the same weights, in alternating runs.

    python benchmarks/generate.py --out benchmarks/results/generate-cpu.md
    python benchmarks/generate.py --device cuda --dtype bf16 --model internlm2-7b --layers 8 \\
        --out benchmarks/results/generate.md

Prefill is the time to the first token, decoding the time of each further one, (total - prefill) / (new tokens
- 1). The result is the ratio of neighbouring runs, Hugging Face / project: above 1 the project is faster.
Both sides must generate the same tokens.
"""

import datetime
import functools
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import product_rates
from clock import Timing, timed

from ascendspeed.cli import parser
from ascendspeed.config.schema import CpuLinearChoice, ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.models import estimates
from ascendspeed.models.families import preset
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

Runs = dict[str, list[tuple[Timing, Timing]]]
"""Side -> (time to the first token, total time) of every round; "ours" is the project, "theirs" Hugging
Face."""

SMALL = replace(
    preset("internlm2-1.8b"),
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1792,
    num_attention_heads=8,
    num_query_groups=2,
    vocab_size=16000,
)
"""44M parameters, with grouped-query attention as in InternLM2."""


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Device to run on."""
    model: str = "44m"
    """44m, or a preset such as internlm2-7b."""
    layers: int | None = None
    """Number of layers, if the whole model does not fit into memory twice."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Batch sizes."""
    prompts: tuple[int, ...] = (64, 768)
    """Prompt lengths in tokens."""
    new_tokens: int = 32
    """New tokens per prompt."""
    rounds: int = 5
    """Measured runs of each side, after a warm-up run."""
    cpu_linear: CpuLinearChoice = "auto"
    """Matrix products of the project in fp32 on a CPU."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def model_of(options: Options) -> ModelConfig:
    """Returns the architecture of both sides."""
    model = SMALL if options.model == "44m" else preset(options.model)
    return replace(model, num_layers=options.layers) if options.layers else model


def build_models(options: Options, device: Any) -> tuple[Any, Any]:
    """Returns the project's model and Hugging Face's, with the same random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ascendspeed.distributed import fused_kernels, process_groups
    from ascendspeed.distributed.cpu_products import Products
    from ascendspeed.inference.engine import LanguageModel
    from ascendspeed.models import param_mapping
    from ascendspeed.models.gpt import gpt_model, layer_spec

    model, layout = model_of(options), ParallelConfig()
    grid = process_groups.initialize(device, layout, 1)
    products = Products.of_inference(options.cpu_linear, options.dtype, model, layout)
    kernels = fused_kernels.select_kernels(device, products=products, rms_norm=True, rotary=True, swiglu=True)
    settings = layer_spec.transformer_config(model, layout, TrainConfig(), options.dtype, kernels)
    gpt = gpt_model.build_model(model, layout, settings)
    gpt_model.load_weights(gpt, model, layout, param_mapping.random_tensors(model, 1, device.torch))
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
    hugging_face = LlamaForCausalLM(config).to(device.torch, layer_spec.DTYPES[options.dtype]).eval()
    llama = replace(model, family="llama")
    state_dict = {}
    for parameter, (name, tensor) in zip(
        param_mapping.parameters(llama), param_mapping.random_tensors(model, 1, device.torch), strict=True
    ):
        assert parameter.name == name
        state_dict |= param_mapping.megatron_to_hf(llama, parameter, tensor)
    hugging_face.load_state_dict(state_dict)
    return LanguageModel(gpt, model, grid, device), hugging_face


def generate_with_project(model: Any, ids: Any, new_tokens: int) -> list[list[int]]:
    """Returns the new tokens of every prompt, greedy."""
    from ascendspeed.inference.engine import SamplingParams, sample

    completions = sample(model, ids.tolist(), SamplingParams(max_new_tokens=new_tokens))
    return [completion.tokens for (completion,) in completions]


def generate_with_hugging_face(model: Any, ids: Any, new_tokens: int, device: Any) -> list[list[int]]:
    """Returns the new tokens of every prompt, greedy."""
    import torch

    inputs = ids.to(device.torch)
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[:, inputs.size(1) :].tolist()


def measure(options: Options, device: Any) -> tuple[dict[tuple[int, int], Runs], str]:
    """Returns (batch, prompt length) -> runs of both sides, and the kernels of the project's side."""
    import torch

    project, hugging_face = build_models(options, device)
    results: dict[tuple[int, int], Runs] = {}
    for length in options.prompts:
        for batch in options.batches:
            generator = torch.Generator().manual_seed(batch * length)
            ids = torch.randint(5, project.config.vocab_size, (batch, length), generator=generator)
            sides = {
                "ours": functools.partial(generate_with_project, project, ids),
                "theirs": functools.partial(generate_with_hugging_face, hugging_face, ids, device=device),
            }
            results[batch, length] = measure_sides(options, device, sides, f"batch {batch}, prompt {length}")
            print(f"batch {batch}, prompt {length}: {row(results[batch, length], options)}", flush=True)
    return results, str(project.gpt.config.kernels)


def measure_sides(options: Options, device: Any, sides: dict[str, Callable], case: str) -> Runs:
    """Runs both sides in alternating order. Raises `UserError` if their tokens differ in fp32."""
    runs: Runs = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        order = list(sides) if number % 2 else list(sides)[::-1]
        tokens = {}
        for side in order:
            generate = sides[side]
            _, first = timed(functools.partial(generate, new_tokens=1), device.synchronize)
            tokens[side], total = timed(
                functools.partial(generate, new_tokens=options.new_tokens), device.synchronize
            )
            if number:  # the first round warms up
                runs[side].append((first, total))
        if options.dtype == "fp32" and tokens["ours"] != tokens["theirs"]:
            raise UserError(f"{case}: the sides do not give the same tokens")
    return runs


def parts(run: tuple[Timing, Timing], clock: str, new_tokens: int) -> tuple[float, float, float]:
    """Returns the seconds to the first token, of each further one, and of all."""
    first, total = (getattr(took, clock) for took in run)
    return first, (total - first) / (new_tokens - 1), total


def row(runs: Runs, options: Options) -> str:
    """Formats prefill, decoding and the whole: both times, and the ratio (median, minimum, maximum; that of
    CPU time)."""
    cells = []
    for part in range(3):
        seconds = {}
        for clock in ("wall", "cpu"):
            for side in runs:
                seconds[clock, side] = [parts(run, clock, options.new_tokens)[part] for run in runs[side]]
        wall_ratios = sorted(ratios(seconds["wall", "ours"], seconds["wall", "theirs"]))
        cpu_ratio = statistics.median(ratios(seconds["cpu", "ours"], seconds["cpu", "theirs"]))
        for side in ("ours", "theirs"):
            cells.append(f"{1000 * statistics.median(seconds['wall', side]):.1f}")
        median = statistics.median(wall_ratios)
        cells.append(f"**{median:.2f}** ({wall_ratios[0]:.2f} to {wall_ratios[-1]:.2f}; {cpu_ratio:.2f})")
    return " | ".join(cells)


def ratios(project: list[float], hugging_face: list[float]) -> list[float]:
    """Returns Hugging Face's seconds / the project's, run by run."""
    return [b / a for a, b in zip(project, hugging_face, strict=True)]


def report(results: dict[tuple[int, int], Runs], kernels: str, options: Options, device: Any) -> str:
    """Formats the markdown file."""
    import torch

    model = model_of(options)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    lines = [f"| {batch} | {length} | {row(runs, options)} |" for (batch, length), runs in results.items()]
    head = (
        "| batch | prompt | first: ours | theirs | theirs / ours | next: ours | theirs | theirs / ours "
        "| all: ours | theirs | theirs / ours |"
    )
    same_tokens = " The tokens were the same." if options.dtype == "fp32" else ""
    return (
        f"# Generation against Hugging Face's generate\n\n{datetime.date.today()}, {device.name}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"{versions}. Kernels: {kernels}.\n\n"
        f"{options.model}: {estimates.parameter_count(model) / 1e6:.0f}M parameters, {model.num_layers} "
        f"layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, {model.kv_heads} of keys "
        f"and values, {options.dtype}; {options.new_tokens} new tokens, greedy; {options.rounds} rounds in "
        "turns, medians. Milliseconds to the first token, for each further one (of the whole batch), and for "
        "all; theirs / ours with least and largest, then that of CPU time. Above 1 ours is "
        f"faster.{same_tokens}\n\n{head}\n{'|---' * 11}|\n" + "\n".join(lines) + f"\n{limit(options, device)}"
    )


def limit(options: Options, device: Any) -> str:
    """Returns the rates of the products of decoding; empty on a device or in bf16."""
    if device.kind != "cpu" or options.dtype != "fp32":
        return ""
    table = product_rates.decoding_table(product_rates.weights_of(model_of(options)), options.batches)
    return (
        "\n## Rates of the matrix products\n\nfp32, GFLOP/s of CPU time, medians in turns: decoding can gain "
        f"at most what its products gain. A batch of one row uses plain weights and torch.\n\n{table}\n"
    )


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    model_of(options)
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
