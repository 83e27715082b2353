"""Names the command that replaces InternEvo's alpaca_tokenizer.py; writes nothing.

python tools/alpaca_tokenizer.py alpaca_data.json OUTPUT tokenizer.model
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ascendspeed.cli import parser
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Arguments of InternEvo's command."""

    dataset_path: Annotated[Positional[str], arg(metavar="DATASET")]
    """JSON file of Alpaca rows."""
    output_path: Annotated[Positional[str], arg(metavar="OUTPUT")]
    """Folder of the tokenized data; here the prefix of the files."""
    tokenizer_path: Annotated[Positional[str], arg(metavar="TOKENIZER")]
    """tokenizer.model, or its folder."""
    split_ratio: float = 0.1
    """Share of the validation data; here --split of the training command."""


def replacement(options: Options) -> str:
    """Returns the command lines that tokenize these data and train on them."""
    path = Path(options.tokenizer_path)
    folder = path.parent if path.suffix in (".model", ".json") else path
    flags = ["--input", options.dataset_path, "--output-prefix", options.output_path]
    flags += ["--tokenizer-name-or-path", str(folder), "--handler-name", "AlpacaStyleInstructionHandler"]
    flags += ["--chat-template", "v1"]
    return (
        f"{shlex.join(['python', 'tools/preprocess_data.py', *flags])} && "
        f"DATA={shlex.quote(options.output_path)} bash examples/intern/finetune_internlm_7b_alpaca.sh"
    )


def main() -> None:
    """Ends with the error that names the command."""
    options = parser.parse(Options, description=__doc__ or "")
    raise errors.UserError(f"alpaca_tokenizer.py is InternEvo's command; type here: {replacement(options)}")


if __name__ == "__main__":
    errors.run(main)
