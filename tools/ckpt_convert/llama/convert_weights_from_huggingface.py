"""Splits the weights of a Hugging Face directory for tensor- and pipeline-parallel ranks.

python tools/ckpt_convert/llama/convert_weights_from_huggingface.py --input-model-dir internlm-7b --output-model-dir weights \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --type 7B --bias --deepspeed
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ascendspeed import errors, families, flags

if TYPE_CHECKING:
    from ascendspeed.config import ModelConfig


@dataclass(frozen=True)
class Options:
    """Splits the weights of a Hugging Face directory. The architecture is that of config.json: flags that name it are checked."""

    input_model_dir: str
    """Hugging Face directory."""
    output_model_dir: str
    """Folder to write; must not hold anything yet."""
    tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this x the tensor-parallel size."""
    deepspeed: bool = False
    """Write the layout that the DeepSpeed recipe loads (no pipeline stages); else Megatron's."""
    type: str | None = None
    """Size of the model (7B, 20B, ...): checked against config.json."""
    bias: bool = False
    """The attention has biases: checked against config.json."""
    num_layers: int | None = None
    """Checked against config.json, as are the next three."""
    num_heads: int | None = None
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key/value heads."""
    hidden_size: int | None = None
    """Width of the model."""
    added_token_num: int = 0
    """Tokens added to the vocabulary: only 0, see the error."""
    merge_mlp: bool = False
    """Accepted; gate and up projection always lie in one tensor in Megatron-core."""


def check(options: Options, config: "ModelConfig") -> None:
    """Raises `UserError` when a flag contradicts config.json, naming both."""
    said = {
        "num_layers": ("--num_layers", options.num_layers, config.num_layers),
        "num_heads": ("--num_heads", options.num_heads, config.num_attention_heads),
        "num_kv_heads": ("--num_kv_heads", options.num_kv_heads, config.kv_heads),
        "hidden_size": ("--hidden_size", options.hidden_size, config.hidden_size),
    }
    if options.type is not None:
        preset = families.preset(f"{config.family}-{options.type.lower()}")
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            said[f"type {name}"] = (f"--type {options.type}: {name}", getattr(preset, name), getattr(config, name))
    if options.bias:
        said["bias"] = ("--bias", True, config.add_qkv_bias and config.add_dense_bias)
    wrong = [f"{flag} {mine}, config.json {theirs}" for flag, mine, theirs in said.values() if mine is not None and mine != theirs]
    if wrong:
        raise errors.UserError(f"{options.input_model_dir} is another model: {'; '.join(wrong)}")
    if options.added_token_num:
        raise errors.UserError(
            f"--added-token-num {options.added_token_num} would make another model, and a conversion changes nothing: "
            "resize the Hugging Face model (resize_token_embeddings), save it, and convert that"
        )


def main() -> None:
    """Parses, checks, splits."""
    options = flags.parse(Options, description=Options.__doc__)
    from ascendspeed import convert  # after parsing, so that --help does not wait for torch

    source = convert.open_source(options.input_model_dir)
    check(options, source.config)
    if options.merge_mlp:
        print("--merge-mlp changes nothing: Megatron-core always holds gate and up projection in one tensor")
    convert.write_megatron(
        source,
        options.output_model_dir,
        options.tensor_model_parallel_size,
        options.pipeline_model_parallel_size,
        options.deepspeed,
        options.make_vocab_size_divisible_by,
    )
    print(f"for TP {options.tensor_model_parallel_size} x PP {options.pipeline_model_parallel_size}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main)
