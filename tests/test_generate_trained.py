"""Generation from a checkpoint trained here and from its export, compared with stock transformers.

If the two best logits are equal, both sides choose the first token. A near tie within fp32's rounding could
go either way, so the smallest gap between them along the compared texts is asserted to be far larger.
"""

import functools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import launch
from helpers.chat import vocabulary
from helpers.corpus import words
from helpers.generation import hf_generate, hf_logprobs, token_lists

from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.tokenization import tokenizer

FLAGS = """--model internlm-tiny --num-layers 2 --vocab-size 512 --seq-length 64
    --micro-batch-size 4 --global-batch-size 4 --lr 5e-3 --min-lr 5e-4 --split 100,0,0 --device cpu"""
ITERS = "110"
ROUNDING = 1e-5
"""Rounding error of log-probabilities in fp32."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder with tokenizer/, ckpt/ (written by pretrain_intern.py) and export/."""
    folder = tmp_path_factory.mktemp("trained")
    vocabulary(folder / "tokenizer", ["<eoh>", "<eoa>"])
    encode = tokenizer.load(folder / "tokenizer").encode
    documents = [[1, *encode(text).tolist(), 2] for text in words(400)]
    with PairWriter(folder / "data", np.dtype(np.uint16)) as pair:
        pair.add(np.concatenate(documents), np.array([len(item) for item in documents], np.int32))
        pair.commit({"tokens": pair.tokens, "max_token": max(map(max, documents))})
    files = ["--data-path", folder / "data", "--save", folder / "ckpt", "--log-dir", folder / "logs"]
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
    folders = ["--from", folder / "ckpt", "--to", folder / "export", "--tokenizer", folder / "tokenizer"]
    launch.must("tools/ckpt_convert/convert.py", *folders, "--format", "hf-llama")
    return folder


@pytest.fixture
def reference(trained):
    """The export in stock transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        trained / "export", dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(params=["ckpt", pytest.param("export", marks=pytest.mark.slow)])
def lm(cpu, trained, request):
    """The model loaded from each."""
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


def test_token_for_token(lm, reference, prompts):
    from ascendspeed.inference.engine import SamplingParams, sample

    for name, params in PARAMS.items():
        results = token_lists(sample(lm, prompts, SamplingParams(**params)))
        assert results == [hf_generate(reference, prompt, **params) for prompt in prompts], name
        if name == "greedy, stops":
            assert any(len(item) < 40 for (item,) in results)  # it predicts the end of documents
    gaps = [gap for prompt in prompts for gap in gaps_of(reference, prompt, 40)]
    assert min(gaps) > 10 * ROUNDING


def gaps_of(reference, prompt: list[int], steps: int) -> list[float]:
    """Gaps between the two best log-probabilities along the greedy text."""
    tokens = [*prompt, *hf_generate(reference, prompt, max_new_tokens=steps)[0]]
    best = hf_logprobs(reference, tokens)[len(prompt) - 1 : -1].topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def test_log_probabilities(lm, reference, prompts, trained):
    """Control: inverse RoPE frequencies that are 1 % off."""
    from ascendspeed.inference.engine import token_logprobs

    held_out = tokenizer.load(trained / "tokenizer").encode(words(1, start=900)[0]).tolist()
    rows = [*prompts, [1, *held_out]]
    off = max(
        largest(reference, row, actual) for row, actual in zip(rows, token_logprobs(lm, rows), strict=True)
    )
    assert off < ROUNDING
    mean = float(token_logprobs(lm, rows[-1:])[0].mean())
    assert -mean < math.log(420) / 2  # half the loss of an untrained model: training had an effect
    reference.model.rotary_emb.inv_freq *= 0.99
    reference.model.rotary_emb.original_inv_freq = reference.model.rotary_emb.inv_freq
    assert (
        max(
            largest(reference, row, actual)
            for row, actual in zip(rows, token_logprobs(lm, rows), strict=True)
        )
        > 10 * ROUNDING
    )


def largest(reference, row: list[int], actual: torch.Tensor) -> float:
    expected = hf_logprobs(reference, row)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    return float((actual - expected).abs().max())


def test_swapped_gate_and_up_projections_show(lm, reference, prompts):
    """Control of the comparison of texts."""
    from ascendspeed.inference.engine import SamplingParams, sample

    for layer in reference.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
    results = token_lists(sample(lm, prompts, SamplingParams(max_new_tokens=40)))
    assert results != [hf_generate(reference, prompt, max_new_tokens=40) for prompt in prompts]


# ---------------------------------------------------------------- int8

INT8 = {"quantize": "w8a16", "kv_cache_dtype": "int8"}


def distributions(model, texts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities [tokens, V] after every token of the texts, read through the cache."""
    rows = []
    with torch.inference_mode():
        for text in texts:
            model.allocate_cache(1, len(text), [len(text)])
            positions = [list(range(len(text) - 1))]
            hidden = model.prefill([text[:3]], positions=[[0, 1, 2]])
            hidden += model.prefill([text[3:-1]], first_slot=3, positions=[positions[0][:-3]])
            rows.append(model.logits(torch.cat(hidden)).log_softmax(-1))
            model.free_cache()
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [{"quantize": "w8a16"}, {"kv_cache_dtype": "int8"}, INT8], ids=str)
def test_accuracy_of_int8(cpu, trained, settings, capsys):
    """Loss, Kullback-Leibler divergence and best token on texts that were not trained on.

    Control: the scales of neighbouring channels and tokens.
    """
    from ascendspeed.inference import engine
    from ascendspeed.models import int8

    encode = tokenizer.load(trained / "tokenizer").encode
    texts = [[1, *encode(text).tolist()][:64] for text in words(40, start=900)]
    targets = torch.tensor([token for text in texts for token in text[1:]])[:, None]

    def measure(**chosen) -> torch.Tensor:
        return distributions(engine.load(trained / "export", dtype="fp32", device=cpu, **chosen), texts)

    expected = measure()

    def differences(**chosen) -> tuple[float, float, float]:
        actual = measure(**chosen)
        loss = float((expected - actual).gather(1, targets).mean())
        divergence = float((expected.exp() * (expected - actual)).sum(-1).mean())
        return loss, divergence, float((actual.argmax(-1) == expected.argmax(-1)).float().mean())

    loss, divergence, same = differences(**settings)
    with capsys.disabled():
        print(f"{settings}: loss {loss:+.2e}, KL {divergence:.1e}, same {same:.4f} of {len(targets)}")
    assert abs(loss) <= 1e-3
    assert divergence <= 1e-4
    assert same >= 0.995
    quantize = int8.quantize

    def with_scales_of_neighbours(*args):
        numbers, scale = quantize(*args)
        return numbers, scale.roll(1, -2)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8, "quantize", with_scales_of_neighbours)
        loss, divergence, same = differences(**settings)
        with capsys.disabled():
            print(f"control: loss {loss:+.2e}, KL {divergence:.1e}, same {same:.4f}")
        assert divergence > 1e-4


# ---------------------------------------------------------------- verification of the checkpoint


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the checkpoint files that are hashed, in order."""
    from ascendspeed.checkpoint import safetensors_io

    names, digest = [], safetensors_io.file_sha256
    monkeypatch.setattr(safetensors_io, "file_sha256", lambda path: names.append(path.name) or digest(path))
    return names


def listed(trained) -> list[str]:
    (folder,) = (trained / "ckpt").glob("step_*")
    return sorted(json.loads((folder / "manifest.json").read_text())["files"])


def test_a_command_verifies_every_file_once(cpu, trained, tmp_path, monkeypatch, hashed, capsys):
    """The needle test reads the architecture, the weights and their hash."""
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
    models = []

    def blind(model, prompts, params):
        models.append(model)
        return [[engine.Completion([5], "length", 0.0)]]

    monkeypatch.setattr(engine, "sample", blind)
    needle.run(needle.resolve(flags, 1)[0], cpu, [])
    assert isinstance(models[0], engine.LanguageModel)
    assert sorted(hashed) == listed(trained)
    captured = capsys.readouterr()
    assert captured.err.count("verifying ") == 1
    assert "verifying" not in captured.out


def on_threads(world: int, call) -> list:
    """Returns the results of `call(readers)` on threads that gather as ranks do; raises what it raises."""
    from ascendspeed.checkpoint.discovery import Readers

    barrier, given = threading.Barrier(world, timeout=60), [[] for _ in range(world)]

    def gather(rank: int, texts_of_rank: list[str]) -> list[str]:
        given[rank] = texts_of_rank
        barrier.wait()
        every = [text for texts in given for text in texts]
        barrier.wait()
        return every

    with ThreadPoolExecutor(world) as pool:
        readers = [Readers(rank, world, functools.partial(gather, rank)) for rank in range(world)]
        return [future.result() for future in [pool.submit(call, item) for item in readers]]


def test_ranks_share_the_reading(trained, hashed, monkeypatch):
    """Each file and each tensor is hashed by one rank; the results are those of one process."""
    from ascendspeed.conversion import weights_identity
    from ascendspeed.conversion.formats.registry import open_reader

    alone = weights_identity.full_bytes(open_reader(trained / "ckpt"))
    hashed.clear()
    sources = on_threads(2, lambda readers: open_reader(trained / "ckpt", readers=readers))
    assert sorted(hashed) == listed(trained)
    hashed_tensors, digest = [], weights_identity._tensor_digest
    monkeypatch.setattr(
        weights_identity, "_tensor_digest", lambda named: hashed_tensors.append(named[0]) or digest(named)
    )
    assert on_threads(2, lambda readers: weights_identity.full_bytes(sources[readers.rank], readers)) == [
        alone,
        alone,
    ]
    assert sorted(hashed_tensors) == sorted(sources[0].names())


def test_stdout_is_the_answers_alone(trained):
    """A training checkpoint and its export give the same text on stdout."""
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
        done.append(launch.script("tasks/inference/generate.py", "--load", trained / name, *flags))
    assert done[0].stdout.startswith("== greedy 1/1: ")
    assert done[0].stdout == done[1].stdout
    assert [item.stderr.count("verifying ") for item in done] == [1, 0]


def test_layouts_of_training_are_refused(cpu, trained):
    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.inference import engine
    from ascendspeed.utils.errors import UserError

    for settings in (
        {"sequence_parallel": True},
        {"context_parallel_size": 2},
        {"num_virtual_stages_per_pipeline_rank": 2},
    ):
        with pytest.raises(
            UserError, match="do not use sequence_parallel, virtual stages, context or expert parallelism"
        ):
            engine.load(
                trained / "export",
                parallel=ParallelConfig(tensor_model_parallel_size=2, **settings),
                device=cpu,
            )
