"""Cuts rank files anew, for other tensor- and pipeline-parallel sizes; names of older programs become Megatron-core's.

python tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py --input-model-dir weights --output-model-dir weights-tp2-pp4 \
    --src-tensor-model-parallel-size 8 --tgt-tensor-model-parallel-size 2 --tgt-pipeline-model-parallel-size 4 --type 7B
"""

from dataclasses import dataclass, field

from ascendspeed.cli import parser
from ascendspeed.cli.compat import Claims, check_grid, refuse
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Cuts rank files anew, for other tensor- and pipeline-parallel sizes. Biases and the whole vocabulary come along."""

    input_model_dir: str
    """Rank files: the folder of the tracker (latest_checkpointed_iteration.txt or latest), or that of one iteration."""
    output_model_dir: str
    """Folder to write; must not hold anything yet."""
    config: str | None = None
    """Folder with the model's config.json and tokenizer; None: --input-model-dir."""
    src_tensor_model_parallel_size: int | None = None
    """Checked against the files, as is the next."""
    src_pipeline_model_parallel_size: int | None = None
    """Stages that the files were written for."""
    tgt_tensor_model_parallel_size: int = 1
    """Ranks that share every layer."""
    tgt_pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers."""
    orig_vocab_size: int | None = None
    """Checked against config.json: the vocabulary is never cut short."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this x the tensor-parallel size."""
    deepspeed: bool = False
    """Write the layout that the DeepSpeed recipe loads (no pipeline stages); else Megatron's."""
    verify: bool = False
    """Read the result back and compare it with the source."""
    claims: Claims = field(default_factory=Claims)


def main() -> None:
    """Parses, checks, cuts."""
    options = parser.parse(Options, description=Options.__doc__)
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    where, tp, pp = (
        options.input_model_dir,
        options.tgt_tensor_model_parallel_size,
        options.tgt_pipeline_model_parallel_size,
    )
    source = convert.open_reader(where, options.config)
    check_grid(
        where, options.src_tensor_model_parallel_size, options.src_pipeline_model_parallel_size, source.grid
    )
    options.claims.check(where, source.config)
    refuse(where, {"--orig-vocab-size": (options.orig_vocab_size, source.config.vocab_size)})
    convert.write_megatron(
        source,
        options.output_model_dir,
        tp,
        pp,
        options.deepspeed,
        options.make_vocab_size_divisible_by,
        verify=options.verify,
    )
    print(f"from {source.kind} to TP {tp} x PP {pp}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
