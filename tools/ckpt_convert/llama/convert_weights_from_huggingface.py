"""Splits the weights of a Hugging Face directory for tensor- and pipeline-parallel ranks.

python tools/ckpt_convert/llama/convert_weights_from_huggingface.py --input-model-dir internlm-7b --output-model-dir weights \
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --type 7B --bias --deepspeed
"""

from dataclasses import dataclass, field

from ascendspeed.cli import parser
from ascendspeed.cli.compat import Claims
from ascendspeed.utils import errors


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
    claims: Claims = field(default_factory=Claims)


def main() -> None:
    """Parses, checks, splits."""
    options = parser.parse(Options, description=Options.__doc__)
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    source = convert.open_reader(options.input_model_dir)
    options.claims.check(options.input_model_dir, source.config)
    convert.write_megatron(
        source,
        options.output_model_dir,
        options.tensor_model_parallel_size,
        options.pipeline_model_parallel_size,
        options.deepspeed,
        options.make_vocab_size_divisible_by,
    )
    print(
        f"for TP {options.tensor_model_parallel_size} x PP {options.pipeline_model_parallel_size}: {options.output_model_dir}"
    )


if __name__ == "__main__":
    errors.run(main, clean_up=True)
