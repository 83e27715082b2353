"""Checkpoints of AscendSpeed, ModelLink, MindSpeed-LLM and Megatron-LM: built here as their own converters
cut them, and read back.

Nothing of the library makes these folders: plain torch, names and slices written out once more.
"""

import pickle
import sys
import types
from argparse import Namespace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import corpus
from helpers.old_formats import LAYERS, PROGRAMS, Cut, old_folder, same
from torch import Tensor

from ascendspeed.conversion import convert
from ascendspeed.utils.errors import UserError

LAYOUTS = [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4)]


# --- the other programs' converters


# --- read back, byte by byte


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("program", "tp", "pp"),
    [
        pytest.param(
            program,
            tp,
            pp,
            marks=[] if tp == (2 * pp if "AscendSpeed" in program else pp) else pytest.mark.slow,
        )
        for program in PROGRAMS
        for tp, pp in LAYOUTS
    ],
)
def test_every_name_and_layout(tmp_path, program, tp, pp):
    tensors = old_folder(tmp_path / "old", program, "internlm", tp, pp)
    assert same(tmp_path / "old", tensors, tmp_path)


@pytest.mark.breadth
@pytest.mark.parametrize(("tp", "pp"), [(1, 4), (2, 1), (4, 2)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_grouped_queries_in_bf16(tmp_path, program, tp, pp):
    tensors = old_folder(tmp_path / "old", program, "llama", tp, pp, torch.bfloat16)
    assert same(tmp_path / "old", tensors, tmp_path)


@pytest.mark.parametrize("tp", [2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (1, 4, 8))])
@pytest.mark.parametrize("program", PROGRAMS)
def test_deepspeed_layout(tmp_path, program, tp):
    """`latest`, and the tensors under `module`; nested or not."""
    tensors = old_folder(tmp_path / "old", program, "internlm", tp, 1, torch.bfloat16, deepspeed=True)
    assert same(tmp_path / "old", tensors, tmp_path)


def test_it_says_whose_names_they_are(tmp_path):
    for i, program in enumerate(PROGRAMS):
        old_folder(tmp_path / str(i), program, "internlm", 2, 2)
        kind = convert.open_reader(tmp_path / str(i)).description
        assert kind == "Megatron rank files for TP 2 x PP 2" + (
            f", names of {program}" if program != "Megatron-core" else ""
        )


class PlainQkv(Cut):
    """Control: the mistake of [all q; all k; all v] on each rank."""

    def qkv(self, layer: str, kind: str) -> Tensor:
        return torch.cat([self.rows(f"{layer}self_attn.{x}_proj.{kind}") for x in "qkv"])


class Swapped(Cut):
    """Control: up before gate."""

    def gate_up(self, layer: str) -> Tensor:
        return torch.cat([self.rows(layer + "mlp.up_proj.weight"), self.rows(layer + "mlp.gate_proj.weight")])


@pytest.mark.parametrize("wrong", [PlainQkv, Swapped])
def test_control_another_order_is_seen(tmp_path, wrong):
    program = "AscendSpeed and ModelLink around 2024, --merge-mlp"
    assert not same(
        tmp_path / "old", old_folder(tmp_path / "old", program, "internlm", 2, 1, cut=wrong), tmp_path
    )


def test_the_converted_model_is_the_model(tmp_path):
    """Not only the bytes: transformers computes the same with what came back."""
    from transformers import LlamaForCausalLM

    tensors = old_folder(tmp_path / "old", "AscendSpeed of 2023", "llama", 2, 2)
    convert.write_hf(convert.open_reader(tmp_path / "old"), tmp_path / "hf", family="llama")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("program", "model", "tp", "doubted"),
    [
        ("AscendSpeed of 2023", "llama", 1, True),
        ("AscendSpeed of 2023", "llama", 4, False),  # one group on every rank
        ("AscendSpeed of 2023", "internlm", 1, False),
        ("Megatron-LM until 2023", "llama", 1, False),
    ],
)
def test_grouped_queries_of_ascendspeed_are_doubted(tmp_path, capsys, program, model, tp, doubted):
    """Its converter of a few weeks ordered them otherwise, which the files do not show."""
    old_folder(tmp_path / "old", program, model, tp, 1)
    convert.open_reader(tmp_path / "old")
    assert ("note: " in capsys.readouterr().out) == doubted


# --- what a training run leaves


def program_of_the_run() -> tuple[types.ModuleType, type]:
    """A module that only the training program has, with an enum and a class."""
    module = types.ModuleType("modellink.enums")
    kind = Enum("ModelType", {"encoder": 1}, module="modellink.enums")
    scaler = type("LossScaler", (), {"__module__": "modellink.enums"})
    module.ModelType, module.LossScaler = kind, scaler
    return module, scaler


@pytest.mark.parametrize("deepspeed", [False, True])
def test_arguments_and_random_states_are_opened_as_nothing(tmp_path, monkeypatch, deepspeed):
    module, scaler = program_of_the_run()
    monkeypatch.setitem(sys.modules, "modellink", types.ModuleType("modellink"))
    monkeypatch.setitem(sys.modules, "modellink.enums", module)
    scaler_state = scaler()
    scaler_state.scale = 65536.0
    run = {
        "args": Namespace(
            num_layers=LAYERS,
            params_dtype=torch.float32,
            model_type=module.ModelType.encoder,
            where=Path("/x"),
        ),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "scaler": scaler_state},
        "np_rng_state": np.random.default_rng(0).bit_generator.state
        | {"old": np.random.RandomState(0).get_state()},
        "random_rng_state": (3, (1, 2), None),
        "iteration": 7,
    }
    tensors = old_folder(
        tmp_path / "old", "AscendSpeed of 2023", "internlm", 2, 1, deepspeed=deepspeed, **run
    )
    for name in ("modellink", "modellink.enums"):
        monkeypatch.delitem(sys.modules, name)
    assert same(tmp_path / "old", tensors, tmp_path)
    assert "modellink" not in sys.modules


class Bomb:
    """Pickled so that opening it carelessly writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('ran')",)


def test_what_could_run_code_is_refused_by_name(tmp_path):
    old_folder(
        tmp_path / "old", "AscendSpeed of 2023", "internlm", 1, 1, args=Namespace(x=Bomb(tmp_path / "ran"))
    )
    path = tmp_path / "old/release/mp_rank_00/model_optim_rng.pt"
    with pytest.raises(
        UserError,
        match=r"model_optim_rng\.pt .*not loaded: it could run code.*: builtins\.exec is not plain data",
    ):
        convert.open_reader(tmp_path / "old")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))  # control: it is armed
    assert (tmp_path / "ran").exists()
    assert path.exists()


# --- what lies about the files


def test_interleaved_pipeline(tmp_path):
    """`model0`, `model1`: two chunks on each of two stages hold the layers 0, 2 and 1, 3."""
    tensors = old_folder(tmp_path / "old", "Megatron-core", "internlm", 2, 4)
    release = tmp_path / "old/release"
    for t in range(2):
        stages = [release / f"mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt" for p in range(4)]
        stored = [torch.load(path, weights_only=True)["model"] for path in stages]
        for p in range(2):
            torch.save({"checkpoint_version": 3.0, "model0": stored[p], "model1": stored[p + 2]}, stages[p])
            stages[p + 2].unlink()
    assert same(tmp_path / "old", tensors, tmp_path)
    torch.save({"checkpoint_version": 3.0, "model0": stored[1]}, stages[1])
    with pytest.raises(UserError, match="different numbers of chunks"):
        convert.open_reader(tmp_path / "old")


def test_config_of_another_folder_and_an_iteration_by_name(tmp_path):
    tensors = old_folder(tmp_path / "old", "AscendSpeed of 2023", "internlm", 2, 2)
    (tmp_path / "model").mkdir()
    assert same(tmp_path / "old/release", tensors, tmp_path)  # config.json beside the tracker
    (tmp_path / "old/config.json").rename(tmp_path / "model/config.json")
    pieces = corpus.sentencepiece_dir(tmp_path / "model", 100) / "tokenizer.model"
    with pytest.raises(
        UserError, match=r"old has no config\.json: copy .* or name its folder \(--config DIR\)"
    ):
        convert.open_reader(tmp_path / "old")
    for i, folder in enumerate(("old", "old/release")):
        source = convert.open_reader(tmp_path / folder, tmp_path / "model")
        convert.write_megatron(source, tmp_path / f"{i}", 1)
        assert (tmp_path / f"{i}/tokenizer.model").read_bytes() == pieces.read_bytes()
        convert.compare(convert.open_reader(tmp_path / f"{i}"), source)


def change(path: Path, **more) -> None:
    torch.save(torch.load(path, weights_only=True) | more, path)


def test_what_is_not_read_is_said(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            convert.open_reader(tmp_path / "old")

    old_folder(tmp_path / "old", "Megatron-LM until 2023", "internlm", 1, 1)
    path = tmp_path / "old/release/mp_rank_00/model_optim_rng.pt"
    change(path, checkpoint_version=1.0)
    refused("version 1.0 of Megatron's format, which orders query_key_value differently")
    change(path, checkpoint_version=3.0, model={"transformer.h.0.attn.c_attn.weight": torch.zeros(2)})
    refused("tensors of unknown names: transformer.h.0.attn.c_attn.weight")
    change(path, model=[torch.zeros(2)])
    refused("no table of tensors under 'model'")
    (tmp_path / "old/release/.metadata").write_bytes(b"")
    refused("torch_dist format, which is not read here: .*--ckpt-convert-format torch")


def test_what_is_missing_or_left_over_is_named(tmp_path):
    old_folder(tmp_path / "old", "AscendSpeed and ModelLink around 2024", "internlm", 2, 1)
    path = tmp_path / "old/release/mp_rank_01/model_optim_rng.pt"
    stored = torch.load(path, weights_only=True)["model"]
    encoder = stored["language_model"]["encoder"]
    encoder["layers.2.mlp.extra.weight"] = encoder.pop("layers.2.mlp.gate_proj.weight")
    change(path, model=stored)
    with pytest.raises(
        UserError,
        match=r"rank 1.* lacks language_model\S+2\.mlp\.gate_proj\S+ it has left over \S+2\.mlp\.extra",
    ):
        convert.open_reader(tmp_path / "old")
