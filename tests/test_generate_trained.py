"""A model that was trained here: its checkpoint and its export generate what stock transformers generate from the export.

Two likeliest tokens that are equal to the last bit are decided alike, the first one wins on both sides. What could part them is a
near tie, closer than the rounding of fp32: so the smallest gap along the compared texts is asserted to be far above that.
"""

import functools
import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import launch
from helpers.chat import vocabulary
from helpers.corpus import words
from helpers.generation import logs_of, texts, theirs

from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.tokenization import tokenizer

FLAGS = """--model internlm-tiny --num-layers 2 --vocab-size 512 --seq-length 64 --micro-batch-size 4 --global-batch-size 4
    --lr 5e-3 --min-lr 5e-4 --split 100,0,0 --device cpu"""
ITERS = "110"
ROUNDING = 1e-5
"""Of log-probabilities in fp32, on either side."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """tokenizer/, ckpt/ of the real entry, and export/."""
    work = tmp_path_factory.mktemp("trained")
    vocabulary(work / "tokenizer", ["<eoh>", "<eoa>"])
    encode = tokenizer.load(work / "tokenizer").encode
    documents = [[1, *encode(text).tolist(), 2] for text in words(400)]
    with PairWriter(work / "data", np.dtype(np.uint16)) as pair:
        pair.add(np.concatenate(documents), np.array([len(one) for one in documents], np.int32))
        pair.commit({"tokens": pair.tokens, "max_token": max(map(max, documents))})
    files = ["--data-path", work / "data", "--save", work / "ckpt", "--log-dir", work / "logs"]
    launch.must(
        "pretrain_intern.py",
        *FLAGS.split(),
        *files,
        "--train-iters",
        ITERS,
        "--lr-decay-iters",
        ITERS,
        "--save-interval",
        ITERS,
    )
    folders = ["--from", work / "ckpt", "--to", work / "export", "--tokenizer", work / "tokenizer"]
    launch.must("tools/ckpt_convert/convert.py", *folders, "--format", "hf-llama")
    return work


@pytest.fixture
def reference(trained):
    """The export in stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        trained / "export", dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(params=["ckpt", "export"])
def asked(cpu, trained, request):
    """What `--load` gives of each."""
    from ascendspeed.inference import engine

    return engine.load(trained / request.param, dtype="fp32", device=cpu)


@pytest.fixture
def prompts(trained) -> list[list[int]]:
    encode = tokenizer.load(trained / "tokenizer").encode
    return [
        [1, *encode(text).tolist()]
        for text in ("Document 7 says", "It ends", "Document 12 says that 5 is not 3", "D")
    ]


PARAMS = {
    "greedy": {"max_new_tokens": 40},
    "greedy, stops": {"max_new_tokens": 40, "stop_ids": (2,)},
    "beams": {"max_new_tokens": 30, "num_beams": 3, "num_return_sequences": 3, "stop_ids": (2,)},
    "longer beams": {"max_new_tokens": 30, "num_beams": 4, "length_penalty": 1.5, "stop_ids": (2,)},
}


def test_token_for_token(asked, reference, prompts):
    from ascendspeed.inference.engine import SamplingParams, sample

    for name, params in PARAMS.items():
        found = texts(sample(asked, prompts, SamplingParams(**params)))
        assert found == [theirs(reference, prompt, **params) for prompt in prompts], name
        if name == "greedy, stops":
            assert any(len(one) < 40 for (one,) in found)  # it has learnt where a document ends
    gaps = [gap for prompt in prompts for gap in gaps_of(reference, prompt, 40)]
    assert min(gaps) > 10 * ROUNDING


def gaps_of(reference, prompt: list[int], steps: int) -> list[float]:
    """How far the second best token is behind, along the greedy text."""
    whole = [*prompt, *theirs(reference, prompt, max_new_tokens=steps)[0]]
    best = logs_of(reference, whole)[len(prompt) - 1 : -1].topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def test_log_probabilities(asked, reference, prompts, trained):
    """Control: rope by a base that is 1 % off."""
    from ascendspeed.inference.engine import token_logprobs

    held_out = tokenizer.load(trained / "tokenizer").encode(words(1, start=900)[0]).tolist()
    rows = [*prompts, [1, *held_out]]
    off = max(
        largest(reference, row, mine) for row, mine in zip(rows, token_logprobs(asked, rows), strict=True)
    )
    assert off < ROUNDING
    mean = float(token_logprobs(asked, rows[-1:])[0].mean())
    assert -mean < math.log(420) / 2  # it was trained: half of what knowing nothing costs
    reference.model.rotary_emb.inv_freq *= 0.99
    reference.model.rotary_emb.original_inv_freq = reference.model.rotary_emb.inv_freq
    assert (
        max(
            largest(reference, row, mine) for row, mine in zip(rows, token_logprobs(asked, rows), strict=True)
        )
        > 10 * ROUNDING
    )


def largest(reference, row: list[int], mine: torch.Tensor) -> float:
    wanted = logs_of(reference, row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return float((mine - wanted).abs().max())


def test_gate_and_up_changed_over_show(asked, reference, prompts):
    """The control of the texts."""
    from ascendspeed.inference.engine import SamplingParams, sample

    for layer in reference.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    found = texts(sample(asked, prompts, SamplingParams(max_new_tokens=40)))
    assert found != [theirs(reference, prompt, max_new_tokens=40) for prompt in prompts]


# ---------------------------------------------------------------- the checkpoint, verified


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files of a training checkpoint, as they are hashed."""
    from ascendspeed.checkpoint import safetensors_io

    names, digest = [], safetensors_io.file_sha256
    monkeypatch.setattr(safetensors_io, "digest", lambda path: names.append(path.name) or digest(path))
    return names


def listed(trained) -> list[str]:
    (folder,) = (trained / "ckpt").glob("step_*")
    return sorted(json.loads((folder / "manifest.json").read_text())["files"])


def test_a_command_verifies_every_file_once(cpu, trained, tmp_path, monkeypatch, hashed, capsys):
    """Needles need the architecture, the model and the hash of its weights."""
    from ascendspeed.evaluation import needle
    from ascendspeed.inference import engine

    flags = [
        "--load",
        str(trained / "ckpt"),
        "--tokenizer-name-or-path",
        str(trained / "tokenizer"),
        "--device",
        "cpu",
    ]
    flags += ["--lengths", "400", "--depths", "50", "--output-dir", str(tmp_path / "out")]
    asked = []

    def blind(model, prompts, params):
        asked.append(model)
        return [[engine.Completion([5], "length", 0.0)]]

    monkeypatch.setattr(engine, "sample", blind)
    needle.run(needle.resolve(flags, 1)[0], cpu, [])
    assert isinstance(asked[0], engine.LanguageModel)
    assert sorted(hashed) == listed(trained)
    said = capsys.readouterr()
    assert said.err.count("verifying ") == 1
    assert "verifying" not in said.out


def together(world: int, work) -> list:
    """What `work(readers)` gives, or raises, on each of some threads that gather as ranks do."""
    from ascendspeed.checkpoint.discovery import Readers

    barrier, given = threading.Barrier(world, timeout=60), [[] for _ in range(world)]

    def gather(rank: int, mine: list[str]) -> list[str]:
        given[rank] = mine
        barrier.wait()
        every = [text for texts in given for text in texts]
        barrier.wait()
        return every

    with ThreadPoolExecutor(world) as pool:
        readers = [Readers(rank, world, functools.partial(gather, rank)) for rank in range(world)]
        return [future.result() for future in [pool.submit(work, one) for one in readers]]


def test_ranks_share_the_reading(trained, hashed, monkeypatch):
    """Every file is hashed by one of them, every tensor's hash is made by one; the results are those of one process."""
    from ascendspeed.conversion import weights_identity
    from ascendspeed.conversion.formats.registry import open_reader

    alone = weights_identity.full_bytes(open_reader(trained / "ckpt"))
    hashed.clear()
    sources = together(2, lambda readers: open_reader(trained / "ckpt", readers=readers))
    assert sorted(hashed) == listed(trained)
    made, digest = [], weights_identity._tensor_digest
    monkeypatch.setattr(
        weights_identity, "_tensor_digest", lambda named: made.append(named[0]) or digest(named)
    )
    assert together(2, lambda readers: weights_identity.full_bytes(sources[readers.rank], readers)) == [
        alone,
        alone,
    ]
    assert sorted(made) == sorted(sources[0].names())


def test_stdout_is_the_answers_alone(trained):
    """From a training checkpoint and from its export: the same bytes."""
    flags = [
        "--tokenizer-name-or-path",
        trained / "tokenizer",
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        "--prompt",
        "It ends",
    ]
    done = []
    for name in ("ckpt", "export"):
        command = [sys.executable, "tasks/inference/generate.py", "--load", trained / name, *flags]
        done.append(
            subprocess.run(
                list(map(str, command)), env=launch.environment(), cwd=launch.ROOT, capture_output=True
            )
        )
    assert done[0].stdout.startswith(b"== greedy 1/1: ")
    assert done[0].stdout == done[1].stdout
    assert [one.stderr.count(b"verifying ") for one in done] == [1, 0]


def test_layouts_of_training_are_refused(cpu, trained):
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.inference import engine
    from ascendspeed.utils.errors import UserError

    for more in (
        {"sequence_parallel": True},
        {"context_parallel_size": 2},
        {"num_virtual_stages_per_pipeline_rank": 2},
    ):
        with pytest.raises(
            UserError, match="leave sequence_parallel, virtual stages, context and expert parallel out"
        ):
            engine.load(
                trained / "export", parallel=ParallelConfig(tensor_model_parallel_size=2, **more), device=cpu
            )
