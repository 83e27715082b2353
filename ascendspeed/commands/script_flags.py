"""Scripts of the repository that parse flags and are no command of `intern`."""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

from ascendspeed.utils.run_record import ROOT

SCRIPTS = {
    "tools/random_model.py": "Options",
    "tools/lora/merge_lora.py": "Options",
    "tools/lora/export_lora.py": "Options",
    "tools/ckpt_convert/llama/convert_weights_from_huggingface.py": "Options",
    "tools/ckpt_convert/llama/convert_weights_to_huggingface.py": "Options",
    "tools/ckpt_convert/llama/convert_weights_when_tp_pp_change.py": "Options",
    "tools/transformers/convert2hf_internlm.py": "Options",
    "tools/transformers/convert2hf_internlm2.py": "Options",
    "tools/transformers/revert_internlm.py": "Options",
    "tools/transformers/revert_internlm2.py": "Options",
    "tools/convert_internevo_data.py": "Options",
    "tools/alpaca_tokenizer.py": "Options",
    "tools/perf_table.py": "Options",
    "tasks/evaluation/needle.py": "needle.NeedleCommand",
    "tasks/inference/benchmark.py": "BenchmarkCommand",
    "examples/intern/make_quickstart_data.py": "Options",
    "examples/intern/quickstart_report.py": "Options",
    "examples/intern/parity_origin.py": "Options",
}
"""File -> its dataclass of flags, an attribute of the module."""


@dataclass(frozen=True)
class Script:
    """A script that parses flags."""

    path: str
    """File, relative to the repository."""
    summary: str
    """First sentence of its docstring."""
    options: Any
    """Dataclass of the flags."""


def scripts() -> list[Script]:
    """Imports the scripts, which must not do anything then, and returns them in the order of `SCRIPTS`."""
    return [_read(path, attribute) for path, attribute in SCRIPTS.items()]


def _read(path: str, attribute: str) -> Script:
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where the types of a dataclass are looked up
    spec.loader.exec_module(module)
    options: Any = module
    for part in attribute.split("."):
        options = getattr(options, part)
    paragraph = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    return Script(path, paragraph.split(" (`")[0].split("; ")[0].rstrip("."), options)
