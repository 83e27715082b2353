"""Legacy flags of every command: a table from the flag to its effect, applied before the command line is parsed.

A new legacy flag is one line here; the command accepts it, and `docs/legacy-flags.md` must list it (`documentation` renders it).
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
    Translation,
)
from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

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
    "--auto-recompute-device-size": Alias(
        FULL_RECOMPUTATION, int, ("selective",), note=True, remark=", until a memory planner exists"
    ),
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

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
"""Fields of a configuration that a size such as 7B determines."""


def size_mismatches(config: ModelConfig, size: str) -> Iterator[str]:
    """Yields what `--type` contradicts in `config`. Raises UserError if the family has no such size."""
    presets = families.FAMILIES[config.family].presets
    candidates = [preset for name, preset in presets.items() if name.endswith(f"-{size.lower()}")]
    if not candidates:
        raise UserError(
            f"--type {size}: the family {config.family} has no such size; there are {', '.join(presets)}"
        )

    def agreement(preset: ModelConfig) -> int:
        return sum(getattr(preset, name) == getattr(config, name) for name in SIZES)

    nearest = max(candidates, key=agreement)  # several generations may have the size
    for name in SIZES:
        yield from mismatch(f"--type {size}: {name}", getattr(nearest, name), getattr(config, name))


def mismatch(name: str, value: Any, actual: Any, source: str = "config.json") -> Iterator[str]:
    """Yields a text if `value` is not the `actual` one, which `source` holds."""
    if value != actual:
        yield f"{name} {value}, {source} {actual}"


def _config_field(flag: str, name: str) -> MustAgree:
    def mismatches(reader: Any, value: Any) -> Iterator[str]:
        return mismatch(flag, value, getattr(reader.config, name))

    return MustAgree(" against `config.json`", int, mismatches)


def _missing_biases(reader: Any, value: bool) -> Iterator[str]:
    yield from mismatch("--bias", value, reader.config.add_qkv_bias and reader.config.add_dense_bias)


def _rank_layout(name: str, index: int, script: str) -> MustAgree:
    def mismatches(reader: Any, value: int) -> Iterator[str]:
        return mismatch(name, value, reader.grid[index], "its files")

    return MustAgree(f" against the files by `{script}`", int, mismatches)


def _no_added_tokens(word: str) -> int:
    """Parses `--added-token-num`. Raises UserError unless it is 0."""
    if count := int(word):
        raise UserError(
            f"--added-token-num {count} would make another model, and a conversion changes nothing: "
            "resize the Hugging Face model (resize_token_embeddings), save it, and convert that"
        )
    return 0


ARCHITECTURE: Table = {  # of the converters of tools/ckpt_convert/llama; checked against the reader of the source
    "--type": MustAgree(
        " against `config.json`: the size of the model (7B, 20B, ...)",
        str,
        lambda reader, size: size_mismatches(reader.config, size),
    ),
    **_negatable(
        "--bias",
        MustAgree(" against `config.json`: the attention has biases", mismatches=_missing_biases),
    ),
    "--num-layers": _config_field("--num-layers", "num_layers"),
    "--num-heads": _config_field("--num-heads", "num_attention_heads"),
    "--num-kv-heads": _config_field("--num-kv-heads", "kv_heads"),
    "--hidden-size": _config_field("--hidden-size", "hidden_size"),
    "--added-token-num": MustAgree(
        "only 0, because a conversion does not change the model", _no_added_tokens
    ),
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


def require_rank_files(folder: str, reader: Any) -> None:
    """Raises UserError unless the source consists of rank files."""
    if reader.grid is None:
        raise UserError(
            f"{folder} holds no rank files: tools/ckpt_convert/convert.py converts from any format"
        )


def check_source(legacy: Translation, folder: str, reader: Any) -> None:
    """Prints the notes, and raises UserError with all that the legacy flags contradict in the source in `folder`."""
    if texts := legacy.mismatches(reader):
        raise UserError(f"{folder} is another model: {'; '.join(texts)}")
    for note in legacy.notes:
        print(note)


LLAMA_TOOLS = "tools/ckpt_convert/llama"
INTERNLM_TOOLS = "tools/transformers"

TABLES: dict[str, Table] = {
    "pretrain_intern.py": TRAIN,
    "tasks/inference/generate.py": GENERATE,
    "tasks/inference/benchmark.py": INFERENCE,
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
