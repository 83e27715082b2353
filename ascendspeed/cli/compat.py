"""Legacy flags of every command: tables from a flag to its effect, applied before the command line is parsed.

A new legacy flag is one line here: the command accepts it, and `docs/legacy-flags.md` must list it, with the
row that `python -m ascendspeed.cli.compat` prints.
"""

from collections.abc import Iterator
from typing import Any

from ascendspeed.cli.legacy_flags import (
    WORDS,
    Alias,
    Converted,
    Ignored,
    LegacyFlag,
    MustAgree,
    Renamed,
    Table,
    documentation,
)
from ascendspeed.cli.source_checks import (
    bias_mismatches,
    config_mismatches,
    layout_mismatches,
    no_added_tokens,
    size_mismatches,
)
from ascendspeed.config.schema import ModelConfig

HINT = "Legacy flags are accepted too: see docs/legacy-flags.md."
"""Line of every `--help`."""


def _negatable(flag: str, entry: Ignored | MustAgree) -> dict[str, LegacyFlag]:
    """Returns the entries of a switch and of its `--no-` form, which states the default."""
    reason = entry.reason if isinstance(entry, Ignored) else "the default"
    return {flag: entry, f"--no-{flag.removeprefix('--')}": Ignored(reason, note=False)}


TOKENIZER_TYPE: Table = {"--tokenizer-type": MustAgree("only `PretrainedFromHF`", ("PretrainedFromHF",))}

MODEL: Table = {  # of all commands that run a model
    "--use-flash-attn": Ignored("attention is torch's SDPA, which never stores s x s scores"),
    "--triangle-attn": Ignored("causal attention never computes the masked half"),
    "--DDP-impl": Ignored("the engine implements data parallelism", ("local", "torch")),
    "--no-contiguous-buffers-in-local-ddp": Ignored("the engine manages its buffers"),
    "--tokenizer-not-use-fast": Ignored("`tokenizer.model` is always read by sentencepiece"),
    "--local-rank": Ignored("`LOCAL_RANK` of the launcher is used", int),
    "--lora-register-forward-hook": Ignored("the embedding output always requires a gradient", WORDS),
    "--row-col-parallel-linear-bias": Alias("--add-qkv-bias --add-dense-bias"),
    "--position-embedding-type": MustAgree("only `rope`", ("rope",)),
    "--normalization": MustAgree("only `RMSNorm`", ("RMSNorm",)),
    "--data-impl": MustAgree(
        "`mmap` or `infer`; data are memory-mapped `.bin`/`.idx` pairs", ("mmap", "infer")
    ),
    **TOKENIZER_TYPE,
    "--layernorm-epsilon": Renamed("--norm-epsilon"),
    "--rms-norm-eps": Renamed("--norm-epsilon"),
    "--apply-layernorm-1p": Renamed("--zero-centered-norm"),
}


def _several_stages(parallel: Any) -> Iterator[str]:
    if parallel.pipeline_model_parallel_size > 1:
        yield "--no-pipeline-parallel contradicts --pipeline-model-parallel-size above 1; drop one of them"


def _other_activation(model: ModelConfig) -> Iterator[str]:
    if model.activation != "silu":
        yield f"--swiglu: the model has the activation {model.activation}; drop the flag"


def _tied_embeddings(model: ModelConfig) -> Iterator[str]:
    if model.tie_embeddings:
        yield "--untie-embeddings-and-output-weights: the model ties its embeddings; drop the flag"


FULL_RECOMPUTATION = "--recompute-granularity full"

TRAIN: Table = {  # checked against the `Run`
    **MODEL,
    "--auto-recompute-profiling-step": Ignored("nothing is profiled", int),
    "--checkpoint-activations": Alias(FULL_RECOMPUTATION, yields_to=("selective",), note=True),
    "--deepspeed-activation-checkpointing": Alias(FULL_RECOMPUTATION, yields_to=("selective",), note=True),
    "--no-pack": Alias("--packing none", exclusive=True),
    "--num-layers-per-virtual-pipeline-stage": Converted(
        "`--num-virtual-stages-per-pipeline-rank`, given by the layers of a virtual stage", int
    ),
    "--no-pipeline-parallel": MustAgree(
        "one pipeline stage", mismatches=lambda run, _: _several_stages(run.parallel)
    ),
    "--swiglu": MustAgree(
        "the activation of the model is silu", mismatches=lambda run, _: _other_activation(run.model)
    ),
    "--untie-embeddings-and-output-weights": MustAgree(
        "the embeddings of the model are not tied", mismatches=lambda run, _: _tied_embeddings(run.model)
    ),
    "--profiling": Alias("--profile"),
    "--use-pytorch-profiler": Ignored("torch.profiler is the only profiler", note=False),
    "--exit-duration": Renamed("--exit-duration-in-mins"),
    "--lora-r": Renamed("--lora-rank"),
}

NO_SHARDING = "without training there is no state to shard"
NO_BACKWARD = "no activations are stored for a backward pass"

INFERENCE: Table = {  # checked against the `EngineArgs`
    **MODEL,
    "--deepspeed": Ignored(NO_SHARDING),
    "--deepspeed-config": Ignored(NO_SHARDING, str),
    "--zero-stage": Ignored(NO_SHARDING, int),
    "--checkpoint-activations": Ignored(NO_BACKWARD),
    "--deepspeed-activation-checkpointing": Ignored(NO_BACKWARD),
    "--auto-recompute-device-size": Ignored(NO_BACKWARD, int),
    "--auto-recompute-profiling-step": Ignored(NO_BACKWARD, int),
    "--seq-length": Ignored(
        "the KV cache is as long as a prompt and its answer; `--max-input-length` limits prompts", int
    ),
    "--no-pack": Ignored("it concerns training data"),
    "--num-layers-per-virtual-pipeline-stage": Ignored("pipeline stages are not interleaved", int),
    "--swiglu": Ignored("the activation comes from `--load`", note=False),
    "--untie-embeddings-and-output-weights": Ignored("tied embeddings come from `--load`", note=False),
    "--no-pipeline-parallel": MustAgree(
        "one pipeline stage", mismatches=lambda args, _: _several_stages(args)
    ),
    "--checkpoint": Renamed("--load"),
}

GENERATE: Table = {
    **INFERENCE,
    "--max-output-length": Renamed("--max-new-tokens"),
    "--max-batch-size": Renamed("--batch-size"),
    "--micro-batch-size": Renamed("--batch-size"),
}

EVALUATE: Table = {
    **INFERENCE,
    "--seed": Ignored("nothing is sampled", int),
    "--no-load-rng": Ignored("only weights are loaded"),
    "--no-load-optim": Ignored("only weights are loaded"),
    "--exit-on-missing-checkpoint": Ignored("a missing checkpoint is always an error"),
    "--no-masked-softmax-fusion": Ignored("attention is torch's SDPA"),
    "--make-vocab-size-divisible-by": Ignored("padded vocabulary rows take no part", int),
    "--evaluation-batch-size": Renamed("--batch-size"),
    "--micro-batch-size": Renamed("--batch-size"),
}

NO_PADDING = "token ids do not depend on the padding of the model's vocabulary"

PREPROCESS: Table = {
    **_negatable(
        "--tokenizer-not-use-fast",
        Ignored("`tokenizer.model` is used wherever it exists, and its ids are those of the slow tokenizer"),
    ),
    **_negatable("--streaming", Ignored("rows are always streamed")),
    "--make-vocab-size-divisible-by": Ignored(NO_PADDING, int),
    "--pad-vocab-size-to": Ignored(NO_PADDING, int),
    **TOKENIZER_TYPE,
    "--dataset-impl": MustAgree("only `mmap`", ("mmap",)),
}


def _config_field(flag: str, name: str) -> MustAgree:
    return MustAgree(" against `config.json`", int, config_mismatches(flag, name))


def _rank_layout(name: str, index: int, script: str) -> MustAgree:
    return MustAgree(f" against the files by `{script}`", int, layout_mismatches(name, index))


ARCHITECTURE: Table = {  # of tools/ckpt_convert/llama; checked against the reader of the source
    "--type": MustAgree(
        " against `config.json`: the size of the model (7B, 20B, ...)",
        str,
        lambda reader, size: size_mismatches(reader.config, size),
    ),
    **_negatable(
        "--bias",
        MustAgree(" against `config.json`: the attention has biases", mismatches=bias_mismatches),
    ),
    "--num-layers": _config_field("--num-layers", "num_layers"),
    "--num-heads": _config_field("--num-heads", "num_attention_heads"),
    "--num-kv-heads": _config_field("--num-kv-heads", "kv_heads"),
    "--hidden-size": _config_field("--hidden-size", "hidden_size"),
    "--added-token-num": MustAgree("only 0, because a conversion does not change the model", no_added_tokens),
    **_negatable(
        "--merge-mlp",
        Ignored(
            "the layout of gate and up projection is detected when reading, and is one tensor when writing"
        ),
    ),
}

TO_HF_SCRIPT = "convert_weights_to_huggingface.py"
RESIZE_SCRIPT = "convert_weights_when_tp_pp_change.py"

RANKS_TO_HF: Table = {
    **ARCHITECTURE,
    "--tensor-model-parallel-size": _rank_layout("tensor-parallel size", 0, TO_HF_SCRIPT),
    "--pipeline-model-parallel-size": _rank_layout("pipeline-parallel size", 1, TO_HF_SCRIPT),
    **_negatable(
        "--deepspeed",
        Ignored("`convert_weights_to_huggingface.py` detects the layout of the files", note=False),
    ),
}

RANKS_TO_RANKS: Table = {
    **ARCHITECTURE,
    "--src-tensor-model-parallel-size": _rank_layout("tensor-parallel size", 0, RESIZE_SCRIPT),
    "--src-pipeline-model-parallel-size": _rank_layout("pipeline-parallel size", 1, RESIZE_SCRIPT),
    "--orig-vocab-size": _config_field("--orig-vocab-size", "vocab_size"),
}

TO_INTERNEVO: Table = _negatable("--safetensors", Ignored("the type of the files is detected", note=False))


LLAMA_TOOLS = "tools/ckpt_convert/llama"
INTERNLM_TOOLS = "tools/transformers"

TABLES: dict[str, Table] = {
    "pretrain_intern.py": TRAIN,
    "tasks/inference/generate.py": GENERATE,
    "tasks/inference/benchmark.py": INFERENCE,
    "tasks/inference/serve.py": INFERENCE,
    "tasks/evaluation/needle.py": INFERENCE,
    "tasks/evaluation/evaluation.py": EVALUATE,
    "tools/preprocess_data.py": PREPROCESS,
    f"{LLAMA_TOOLS}/convert_weights_from_huggingface.py": ARCHITECTURE,
    f"{LLAMA_TOOLS}/{TO_HF_SCRIPT}": RANKS_TO_HF,
    f"{LLAMA_TOOLS}/{RESIZE_SCRIPT}": RANKS_TO_RANKS,
    f"{INTERNLM_TOOLS}/revert_internlm.py": TO_INTERNEVO,
    f"{INTERNLM_TOOLS}/revert_internlm2.py": TO_INTERNEVO,
}
"""Script -> its legacy flags."""


PAGE: dict[str, tuple[Table, Table]] = {
    "Training": (TRAIN, {}),
    "Generation": (GENERATE, MODEL),
    "Evaluation": (EVALUATE, INFERENCE),
    "Preprocessing": (PREPROCESS, {}),
    "Conversion": (RANKS_TO_HF | RANKS_TO_RANKS, {}),
    "InternLM's tools": (TO_INTERNEVO, {}),
}
"""Section of `docs/legacy-flags.md` -> its table, and the table of an earlier section that it adds to."""


def main() -> None:
    """Prints the rows of `docs/legacy-flags.md`."""
    for title, (table, base) in PAGE.items():
        print("\n".join(["", f"## {title}", *documentation(table, base)]))


if __name__ == "__main__":
    main()
