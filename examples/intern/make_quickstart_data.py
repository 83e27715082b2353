"""Makes the quickstart's data without a network, from docstrings of the installed Python standard library.

    python examples/intern/make_quickstart_data.py --output-dir DIR [--rows 3000] [--vocab-size 2048]

The output has the same bytes every time on the same Python:

    DIR/train.parquet       Alpaca-shaped rows: instruction, input, output
    DIR/heldout.parquet     such rows from other modules, about one row in twenty
    DIR/heldout.txt         their outputs as plain text
    DIR/chat.jsonl          questions and short answers, for fine-tuning: also Alpaca-shaped rows
    DIR/chat_heldout.jsonl  such rows from other modules
    DIR/tokenizer/          tokenizer.model (sentencepiece BPE like InternLM's) and its JSON files
    DIR/made.json           settings; written last, so its presence marks complete data, which are reused

The sources are parsed, never imported. As a library: `make(output_dir, rows, vocab_size) -> Path`.
"""

import ast
import hashlib
import io
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ascendspeed.cli import parser
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
}
HELD_OUT_EVERY = 20  # modules
VERSION = 2
"""Version of the files; data of another version are made again."""
CHAT_ROWS, ANSWER_CHARS = 400, range(20, 100)
DOC_CHARS, CODE_CHARS = range(60, 2000), 1500
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "coroutine", ast.ClassDef: "class"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}

Row = dict[str, str]


@dataclass(frozen=True)
class Options:
    """Flags of make_quickstart_data.py."""

    output_dir: Annotated[Path, parser.output_flag("output-dir")]
    """Folder to write."""
    rows: int = 3000
    """Number of training rows."""
    vocab_size: int = 2048
    """Vocabulary size of the tokenizer."""


def modules() -> list[Path]:
    """Returns the sources of the standard library, relative to its folder, shuffled in a fixed order."""
    found = []
    for folder, folders, names in os.walk(STDLIB):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [Path(folder, name).relative_to(STDLIB) for name in names if name.endswith(".py")]
    return sorted(found, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())


def rows_of(path: Path, module: str) -> Iterator[Row]:
    """Yields one row per documented function and class of a source file; nothing if it cannot be parsed."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        doc = ast.get_docstring(node) if type(node) in KINDS else None
        if doc and len(doc) in DOC_CHARS:
            node.body = node.body[1:] or [ast.Pass()]  # the code without its docstring
            code = ast.unparse(node)
            yield {
                "instruction": f"Document the {KINDS[type(node)]} {node.name} of Python's module {module}.",
                "input": code if len(code) <= CODE_CHARS else "",
                "output": doc,
            }


def collect(wanted: int) -> tuple[list[Row], list[Row]]:
    """Returns (training rows, held-out rows); each module is in one of them.

    Raises UserError if there are too few.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for number, path in enumerate(modules()):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        (train if number % HELD_OUT_EVERY else held_out).extend(rows_of(STDLIB / path, name))
        if len(train) >= wanted and held_out:
            return train[:wanted], held_out
    raise UserError(
        f"--rows {wanted}: the standard library in {STDLIB} has only {len(train)} documented rows; ask for "
        "fewer"
    )


def chat_rows(rows: list[Row]) -> list[Row]:
    """Returns questions about documented functions and classes, answered by the first line of their
    docstring.
    """
    asked = {}
    for row in rows:
        first = row["output"].splitlines()[0].strip()
        if len(first) in ANSWER_CHARS and first.endswith("."):
            question = row["instruction"].replace("Document the", "What is the", 1).removesuffix(".") + "?"
            asked.setdefault(question, {"instruction": question, "input": "", "output": first})
    return list(asked.values())[:CHAT_ROWS]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Trains a tokenizer.model like InternLM's: BPE, byte fallback, single digits, no normalization; unk 0,
    bos 1, eos 2.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # so that the same text gives the same pieces
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--vocab-size {vocab_size} does not fit this text: {reason}") from error
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes) -> None:
    """Writes a Hugging Face directory around `tokenizer.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SPECIAL | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}, indent=2) + "\n"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL, indent=2) + "\n")


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes parquet in several row groups, like a real corpus."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)


def make(output_dir: Path, rows: int, vocab_size: int) -> Path:
    """Writes everything into `output_dir`, or reuses the output of the same settings. Returns the folder."""
    made = {
        "version": VERSION,
        "rows": rows,
        "chat_rows": CHAT_ROWS,
        "vocab_size": vocab_size,
        "python": platform.python_version(),
    }
    record = output_dir / "made.json"
    if record.is_file() and json.loads(record.read_text()) == made:
        print(f"reusing {output_dir}, of the same settings", flush=True)
        return output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    train, held_out = collect(rows)
    print(
        f"read {len(train)} training and {len(held_out)} held-out rows from the standard library", flush=True
    )
    write_rows(output_dir / "train.parquet", train)
    write_rows(output_dir / "heldout.parquet", held_out)
    for name, rows_of_chat in (("chat.jsonl", chat_rows(train)), ("chat_heldout.jsonl", chat_rows(held_out))):
        (output_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows_of_chat), "utf-8")
    (output_dir / "heldout.txt").write_text("\n\n".join(row["output"] for row in held_out) + "\n", "utf-8")
    write_tokenizer(
        output_dir / "tokenizer",
        train_tokenizer((text for row in train for text in row.values()), vocab_size),
    )
    print(f"trained a tokenizer of {vocab_size} pieces", flush=True)
    record.write_text(json.dumps(made) + "\n")
    print(f"wrote {output_dir}", flush=True)
    return output_dir


def main() -> None:
    """Runs the command."""
    options = parser.parse(Options, description=__doc__ or "")
    if options.rows < 1:
        raise UserError(f"--rows {options.rows}: at least 1 is needed")
    make(options.output_dir, options.rows, options.vocab_size)


if __name__ == "__main__":
    errors.run(main)
