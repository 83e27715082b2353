"""Merges rank files of this project, AscendSpeed, ModelLink, MindSpeed-LLM or Megatron-LM for Hugging Face.

python tools/ckpt_convert/llama/convert_weights_to_huggingface.py --input-model-dir weights \\
    --output-model-dir internlm-7b-hf --config model_from_hf/internlm-7b
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import RANKS_TO_HF
from ascendspeed.cli.source_checks import check_source, require_rank_files
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Merges rank files into a Hugging Face directory; their layout and parameter names are detected."""

    input_model_dir: str
    """Folder of rank files: with the tracker (latest_checkpointed_iteration.txt or latest), or of one
    iteration."""
    output_model_dir: Annotated[str, parser.output_flag("output-model-dir")]
    """Folder to write; must be empty or absent."""
    config: str | None = None
    """Folder with the model's config.json and tokenizer; None: --input-model-dir."""
    format: Literal["hf", "hf-llama"] = "hf"
    """hf: the class and names of the model's family; hf-llama: LlamaForCausalLM."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Data type of the written tensors; keep: unchanged."""
    max_shard_size: str = "10GB"
    """Largest size of a safetensors file."""
    verify: bool = False
    """Read the result back and compare every tensor with the source."""


def main() -> None:
    """Runs the command."""
    line = command.parse(Options, table=RANKS_TO_HF, description=__doc__ or "")
    options = line.options
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.models import families
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    folder = options.input_model_dir
    source = convert.with_tokenizer(convert.open_reader(folder, options.config), None)
    require_rank_files(folder, source)
    check_source(line.legacy, folder, source)
    convert.write_hf(
        source,
        options.output_model_dir,
        families.REFERENCE.name if options.format == "hf-llama" else None,
        convert.DTYPES.get(options.dtype),
        options.max_shard_size,
        options.verify,
    )
    print(f"from {source.description}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
