"""Reshards rank files for other tensor- and pipeline-parallel sizes, under Megatron-core's parameter names.

python tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py --input-model-dir weights \\
    --output-model-dir weights-tp2-pp4 --src-tensor-model-parallel-size 8 \\
    --tgt-tensor-model-parallel-size 2 --tgt-pipeline-model-parallel-size 4 --type 7B
"""

from dataclasses import dataclass
from typing import Annotated

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import RANKS_TO_RANKS
from ascendspeed.cli.source_checks import check_source, require_rank_files
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Reshards rank files for other tensor- and pipeline-parallel sizes; keeps biases and the vocabulary."""

    input_model_dir: str
    """Folder of rank files: with the tracker (latest_checkpointed_iteration.txt or latest), or of one
    iteration."""
    output_model_dir: Annotated[str, parser.output_flag("output-model-dir")]
    """Folder to write; must be empty or absent."""
    config: str | None = None
    """Folder with the model's config.json and tokenizer; None: --input-model-dir."""
    tgt_tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks to write for."""
    tgt_pipeline_model_parallel_size: int = 1
    """Pipeline stages to write for."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this x the tensor-parallel size."""
    deepspeed: bool = False
    """Write the layout of the DeepSpeed recipe (no pipeline stages) instead of Megatron-LM's."""
    verify: bool = False
    """Read the result back and compare every tensor with the source."""


def main() -> None:
    """Runs the command."""
    line = command.parse(Options, table=RANKS_TO_RANKS, description=__doc__ or "")
    options = line.options
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    folder = options.input_model_dir
    tp = options.tgt_tensor_model_parallel_size
    pp = options.tgt_pipeline_model_parallel_size
    source = convert.open_reader(folder, options.config)
    require_rank_files(folder, source)
    check_source(line.legacy, folder, source)
    convert.write_megatron(
        source,
        options.output_model_dir,
        tp,
        pp,
        options.deepspeed,
        options.make_vocab_size_divisible_by,
        verify=options.verify,
    )
    print(f"from {source.description} to TP {tp} x PP {pp}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
