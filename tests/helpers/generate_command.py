"""Fixtures of the generation command with a tiny model."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ascendspeed.inference import args
from ascendspeed.models import families
from ascendspeed.models.families import FAMILIES
from helpers import oracle
from helpers.chat import vocabulary

MODEL = replace(families.preset("internlm-tiny"), num_layers=2, vocab_size=512)
"""The embedding has more rows than the tokenizer below has ids."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory: a tiny InternLM with random weights, and a tokenizer with <eoh> and <eoa>."""
    path = vocabulary(tmp_path_factory.mktemp("model") / "hf", ["<eoh>", "<eoa>"])
    _, tensors = oracle.native(MODEL)
    save_file(tensors, path / "model.safetensors")
    (path / "left.partial").write_text("{}\n")
    (path / "config.json").write_text(
        json.dumps(FAMILIES["internlm"].write_config(MODEL) | {"bos_token_id": 1, "eos_token_id": 2})
    )
    return path


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's model class with these weights."""
    return oracle.native(MODEL)[0]


@pytest.fixture
def run(cpu, folder, monkeypatch, capsys):
    """Runs the command in this process: run(*flags, stdin=...) returns its stdout."""
    from ascendspeed.inference import runner

    def run(*flags, stdin=""):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()))
        )
        job, notes = args.resolve(["--load", str(folder), "--device", "cpu", *map(str, flags)], 1)
        capsys.readouterr()
        runner.run(job, cpu, notes)
        run.stderr = ""
        out = capsys.readouterr()
        run.stderr = out.err
        return out.out

    return run


def hf_continuation(reference, ids, **params):
    """New tokens of Hugging Face's greedy or beam search."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        out = reference.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, pad_token_id=2, **params
        )
    return out[0, len(ids) :].tolist()


def records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
