"""Frozen command lines: published commands and legacy flags resolve to the recorded runs, notes and errors.

`python tests/test_frozen_commands.py` prints `frozen_commands.json` as the current code resolves it. A new
command line is added to the file by hand; an expectation that changes is a change of behaviour.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ascendspeed.cli import train_args
from ascendspeed.evaluation import args as evaluation_args
from ascendspeed.evaluation import needle
from ascendspeed.inference import args as inference_args
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parents[1]
FROZEN = Path(__file__).with_name("frozen_commands.json")
COMMANDS = json.loads(FROZEN.read_text()) if FROZEN.exists() else []


def script(path: str) -> Any:
    """Imports a script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[Path(path).stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(value: Any, default: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of a (nested) dataclass that differ from those of `default`, by dotted name, as JSON has
    them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default_item = getattr(default, field.name)
        if dataclasses.is_dataclass(item):
            values |= changed(item, default_item, f"{prefix}{field.name}.")
        elif item != default_item:
            values[prefix + field.name] = item
    return json.loads(json.dumps(values, default=str))


def train(words: list[str], world: int) -> tuple[dict[str, Any], list[str]]:
    run, notes = train_args.resolve(words, world)
    parts = {f.name: f.type for f in dataclasses.fields(run)}
    return changed(run, type(run)(**{name: group() for name, group in parts.items()})), notes


ENGINE = [
    "load",
    "tokenizer_name_or_path",
    "bf16",
    "fp16",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "device",
    "distributed_backend",
    "use_fused_rmsnorm",
    "use_fused_rotary_pos_emb",
    "mlp_layer_fusion",
]


def engine(spec: Any) -> dict[str, Any]:
    """Checked weights and layout of an inference command."""
    values = {name: getattr(spec.args, name) for name in ENGINE}
    for name, model in (("model", spec.model), ("typed_model", spec.expected_model)):
        values[name] = model and changed(model, families.preset("internlm-7b"))
    values["tokenizer"] = spec.tokenizer
    return {name: value for name, value in values.items() if value not in (None, False)}


def arguments(group: Any) -> dict[str, Any]:
    return changed(group, type(group)())


def generate(words: list[str], world: int) -> tuple[dict[str, Any], list[str]]:
    job, notes = inference_args.resolve(words, world)
    return engine(job.spec) | arguments(job.generation) | {"tasks": list(job.tasks)}, notes


def evaluate(words: list[str], world: int) -> tuple[dict[str, Any], list[str]]:
    job, notes = evaluation_args.resolve(words, world)
    names = [benchmark.name for benchmark, _ in job.benchmarks]
    values = {"benchmarks": names, "shots": job.shots, "new_tokens": job.new_tokens}
    return engine(job.spec) | arguments(job.evaluation) | values, notes


def find_needle(words: list[str], world: int) -> tuple[dict[str, Any], list[str]]:
    job, notes = needle.resolve(words, world)
    return engine(job.spec) | arguments(job.needle) | {"cells": len(job.cells)}, notes


def benchmark(words: list[str], world: int) -> tuple[dict[str, Any], list[str]]:
    job, notes = script("tasks/inference/benchmark.py").resolve(words, world)
    return engine(job.spec) | {"cases": job.cases, "ranges": job.ranges}, notes


RESOLVERS = {
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "needle": find_needle,
    "benchmark": benchmark,
}


def outcome(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolves a command line: its run and the flags that its notes name, or its error."""
    words = [
        word.replace("{tiny}", str(folder)).replace("{root}", str(ROOT)) for word in entry["words"].split()
    ]
    try:
        run, notes = RESOLVERS[entry["command"]](words, entry.get("world", 1))
    except UserError as error:
        return {"error": str(error).replace(str(folder), "{tiny}")}
    text = json.dumps({"run": run, "notes": sorted(note.split()[0].rstrip(":") for note in notes)})
    return json.loads(text.replace(str(folder), "{tiny}").replace(str(ROOT), "{root}"))


def tiny(folder: Path) -> Path:
    """A folder whose config.json is that of internlm-tiny."""
    config = families.FAMILIES["internlm"].write_config(families.preset("internlm-tiny"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=pytest.mark.slow if number % 3 else []) for number, e in enumerate(COMMANDS)],
    ids=lambda entry: f"{entry['command']} {entry['words']}"[:70],
)
def test_a_command_line_resolves_as_it_did(entry, tmp_path, monkeypatch):
    # Which files exist is not the subject.
    monkeypatch.setattr("ascendspeed.inference.args.check_input_file", lambda path: None)
    expected = {name: entry[name] for name in ("run", "notes", "error") if name in entry}
    assert outcome(entry, tiny(tmp_path)) == expected


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for entry in json.loads(FROZEN.read_text() if len(sys.argv) < 2 else Path(sys.argv[1]).read_text()):
            command_line = {name: entry[name] for name in ("command", "words", "world") if name in entry}
            print(json.dumps(command_line | outcome(entry, tiny(Path(folder)))), flush=True)
