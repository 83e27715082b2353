"""Splits the weights of a Hugging Face directory for tensor- and pipeline-parallel ranks.

python tools/ckpt_convert/llama/convert_weights_from_huggingface.py --input-model-dir internlm-7b \\
    --output-model-dir weights --tensor-model-parallel-size 8 --pipeline-model-parallel-size 1 --type 7B \\
    --bias --deepspeed
"""

from dataclasses import dataclass
from typing import Annotated

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import ARCHITECTURE
from ascendspeed.cli.source_checks import check_source
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Splits the weights of a Hugging Face directory; the architecture comes from its config.json."""

    input_model_dir: str
    """Hugging Face directory."""
    output_model_dir: Annotated[str, parser.output_flag("output-model-dir")]
    """Folder to write; must be empty or absent."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this x the tensor-parallel size."""
    deepspeed: bool = False
    """Write the layout of the DeepSpeed recipe (no pipeline stages) instead of Megatron-LM's."""


def main() -> None:
    """Runs the command."""
    line = command.parse(Options, table=ARCHITECTURE, description=__doc__ or "")
    options = line.options
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    source = convert.open_reader(options.input_model_dir)
    check_source(line.legacy, options.input_model_dir, source)
    tp = options.tensor_model_parallel_size
    pp = options.pipeline_model_parallel_size
    convert.write_megatron(
        source,
        options.output_model_dir,
        tp,
        pp,
        options.deepspeed,
        options.make_vocab_size_divisible_by,
    )
    print(f"for TP {tp} x PP {pp}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
