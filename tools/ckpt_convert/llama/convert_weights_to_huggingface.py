"""Merges rank files into a Hugging Face directory: those of this project, of AscendSpeed, ModelLink, MindSpeed-LLM and Megatron-LM.

python tools/ckpt_convert/llama/convert_weights_to_huggingface.py --input-model-dir weights --output-model-dir internlm-7b-hf \
    --config model_from_hf/internlm-7b
"""

from dataclasses import dataclass, field
from typing import Literal

from ascendspeed.cli import parser
from ascendspeed.cli.compat import Claims, check_grid
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Merges rank files into a Hugging Face directory. Layout and names are recognised: flags that say them are checked."""

    input_model_dir: str
    """Rank files: the folder of the tracker (latest_checkpointed_iteration.txt or latest), or that of one iteration."""
    output_model_dir: str
    """Folder to write; must not hold anything yet."""
    config: str | None = None
    """Folder with the model's config.json and tokenizer; None: --input-model-dir."""
    format: Literal["hf", "hf-llama"] = "hf"
    """hf: the family's own names; hf-llama: plain LlamaForCausalLM."""
    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    """Type of the written tensors; keep: as they are."""
    max_shard_size: str = "10GB"
    """Size of a safetensors file."""
    verify: bool = False
    """Read the result back and compare it with the source."""
    tensor_model_parallel_size: int | None = None
    """Checked against the files, as is the next."""
    pipeline_model_parallel_size: int | None = None
    """Ranks that share the stack of layers."""
    deepspeed: bool = False
    """Accepted; the layout of the files is recognised."""
    claims: Claims = field(default_factory=Claims)


def main() -> None:
    """Parses, checks, merges."""
    options = parser.parse(Options, description=Options.__doc__)
    from ascendspeed.conversion import convert  # after parsing, so that --help does not wait for torch
    from ascendspeed.utils.atomic import require_empty_dir

    require_empty_dir(options.output_model_dir)
    where = options.input_model_dir
    source = convert.with_tokenizer(convert.open_reader(where, options.config), None)
    check_grid(where, options.tensor_model_parallel_size, options.pipeline_model_parallel_size, source.grid)
    options.claims.check(where, source.config)
    convert.write_hf(
        source,
        options.output_model_dir,
        "llama" if options.format == "hf-llama" else None,
        convert.DTYPES.get(options.dtype),
        options.max_shard_size,
        options.verify,
    )
    print(f"from {source.kind}: {options.output_model_dir}")


if __name__ == "__main__":
    errors.run(main, clean_up=True)
