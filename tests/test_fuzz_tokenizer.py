"""Mutated tokenizer folders and chat inputs: read, or refused with one line."""

import json
import random
import shutil
from pathlib import Path

import pytest
from helpers.fuzz import Findings, dump, mutate_bytes, mutate_json
from helpers.tokenizers import chat_files, folder_with, trained

from ascendspeed.conversion.tokenizer import export
from ascendspeed.inference import prompts
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import ChatFormat

TEXT = "Hello wörld <s> \x00 日本 <|im_end|>"
ADDED = {"<x>": 900, "<|end|>": 901}
DECODER = {
    "902": {
        "content": "<y>",
        "special": True,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A chat tokenizer in both kinds of files."""
    model = trained(user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)])
    files = chat_files(model)
    folder = folder_with(tmp_path_factory.mktemp("source") / "t", model, **files)
    assert export.write(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps(files["config"]))
    return folder


def use(folder: Path, writes: bool) -> str | None:
    """Encodes and decodes with the tokenizer of a folder; compares or converts it too if `writes`."""
    loaded = tokenizer.load(folder)
    ids = loaded.encode(TEXT)
    if ids.min() < 0 or ids.max() >= loaded.vocab_size:
        return "ids out of range"
    loaded.decode(ids)
    for number in range(0, min(loaded.vocab_size, 1100), 7):
        loaded.token_bytes(number)
        loaded.resets_decoder(number)
    if writes and (folder / "tokenizer.model").exists():
        if (folder / "tokenizer.json").exists():
            tokenizer.JsonTokenizer(folder)  # conversion reads every file before it compares two
            export.check(folder)
        export.write(folder)
    return None


def spoil(folder: Path, kind: str, generator: random.Random) -> None:
    names = {"model": "tokenizer.model", "json": "tokenizer.json"}
    other = {"model": "tokenizer.json", "json": "tokenizer.model"}
    if kind in names:
        path = folder / names[kind]
        content = path.read_bytes()
        if kind == "json" and generator.random() < 0.6:
            path.write_bytes(dump(mutate_json(json.loads(content), generator)))
        else:
            path.write_bytes(mutate_bytes(content, generator))
        if generator.random() < 0.8:
            (folder / other[kind]).unlink()
        return
    if generator.random() < 0.5:
        (folder / "tokenizer.model").unlink()
    name = generator.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {"unk_token": "<unk>"}
    if name == "added_tokens.json":
        values = dict(ADDED)
    if name == "tokenizer_config.json":
        values |= {"added_tokens_decoder": DECODER, "additional_special_tokens": ["<z>"]}
    content = dump(mutate_json(values, generator))
    (folder / name).write_bytes(mutate_bytes(content, generator) if generator.random() < 0.1 else content)


@pytest.mark.breadth
@pytest.mark.parametrize("kind", ["model", "json", "tables"])
@pytest.mark.parametrize("cases", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_folders(kind, cases, source, tmp_path):
    generator = random.Random(7)
    findings = Findings()
    for number in range(cases):
        folder = tmp_path / "t"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        spoil(folder, kind, generator)
        writes = number % 10 == 0  # a conversion takes a hundred times longer
        findings.case(f"{kind} {number}", lambda folder=folder, writes=writes: use(folder, writes))
    findings.check()


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
INPUTS = (
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo", "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "content": "a", "code": "print(1)"},
            {"role": "environment", "content": "x", "name": "y"},
            {"role": "user", "content": "q <|im_end|>"},
        ],
        "tools": [TOOL],
    },
    {"prompt": "hello"},
    "text",
    [{"role": "user", "content": "q"}],
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
)
ROLES = ("user", "assistant", "system", "environment", "tool")


@pytest.mark.parametrize("cases", [300, pytest.param(4000, marks=pytest.mark.slow)])
def test_chat_inputs(cases, source):
    loaded = tokenizer.load(source)
    formats = [ChatFormat(loaded, name) for name in ("v1", "v2.5")]
    generator = random.Random(8)
    findings = Findings()
    for number in range(cases):
        value = generator.choice(INPUTS)
        if generator.random() < 0.85:
            line = dump(mutate_json(value, generator, ROLES))
        else:
            line = mutate_bytes(dump(value), generator)
        for chat_format in formats:
            findings.case(
                f"{number}: {line[:200]!r}", lambda line=line, f=chat_format: encode(line, loaded, f)
            )
    findings.check(accepted=30, refused=30)


def encode(line: bytes, loaded: tokenizer.Tokenizer, chat_format: ChatFormat) -> None:
    for prompt in prompts.prompts_from_json_lines(line, "f"):
        prompts.encode_prompt(prompt, loaded, chat_format)
