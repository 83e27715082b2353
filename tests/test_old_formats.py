"""Checkpoints of AscendSpeed, ModelLink, MindSpeed-LLM and Megatron-LM: built here as their own converters cut them, and read back.

Nothing of the library makes these folders: plain torch, names and slices written out once more.
"""

import json
import math
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
from safetensors.torch import load_file
from torch import Tensor

from ascendspeed.conversion import convert
from ascendspeed.utils.errors import UserError

LAYERS, HIDDEN, FFN, HEADS, VOCAB, DIVISOR = 4, 64, 96, 8, 131, 16
LAYOUTS = [(t, p) for t in (1, 2, 4, 8) for p in (1, 2, 4)]
MODELS = {  # config.json of a model with biases, and of one with grouped queries
    "internlm": {"model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
    "llama": {"model_type": "llama", "attention_bias": False, "num_key_value_heads": 4, "rope_theta": 1e4},
}
COMMON = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32,
}


def hugging_face(model: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors under the names of Hugging Face Llama."""
    generator, groups = torch.Generator().manual_seed(3), MODELS[model].get("num_key_value_heads", HEADS)
    kv = groups * (HIDDEN // HEADS)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": noise(VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = noise(rows, HIDDEN)
            if model == "internlm":
                tensors[f"{layer}self_attn.{name}_proj.bias"] = noise(rows)
        tensors[layer + "mlp.gate_proj.weight"] = noise(FFN, HIDDEN)
        tensors[layer + "mlp.up_proj.weight"] = noise(FFN, HIDDEN)
        tensors[layer + "mlp.down_proj.weight"] = noise(HIDDEN, FFN)
        tensors[layer + "input_layernorm.weight"] = noise(HIDDEN)
        tensors[layer + "post_attention_layernorm.weight"] = noise(HIDDEN)
    return tensors | {"model.norm.weight": noise(HIDDEN), "lm_head.weight": noise(VOCAB, HIDDEN)}


# --- the other programs' converters ------------------------------------------------------------------------------------------


class Cut:
    """One rank's share of the tensors of Hugging Face."""

    def __init__(self, tensors: dict[str, Tensor], tp: int, t: int, groups: int) -> None:
        self.tensors, self.tp, self.t, self.groups = tensors, tp, t, groups

    def whole(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def rows(self, name: str) -> Tensor:
        return self.tensors[name].chunk(self.tp, 0)[self.t].clone()

    def columns(self, name: str) -> Tensor:
        return self.tensors[name].chunk(self.tp, 1)[self.t].clone()

    def vocabulary(self, name: str) -> Tensor:
        """Padded by copies of the last real rows, as AscendSpeed did."""
        full, multiple = self.tensors[name], DIVISOR * self.tp
        missing = math.ceil(len(full) / multiple) * multiple - len(full)
        return torch.cat([full, full[-missing:]]).chunk(self.tp, 0)[self.t].clone()

    def qkv(self, layer: str, kind: str) -> Tensor:
        """For every key/value group of the rank: its query heads, its key, its value."""
        d, per_group = HIDDEN // HEADS, HEADS // self.groups
        q, k, v = (self.tensors[f"{layer}self_attn.{x}_proj.{kind}"].unflatten(0, (-1, d)) for x in "qkv")
        mine = range(self.t * self.groups // self.tp, (self.t + 1) * self.groups // self.tp)
        heads = [torch.cat([*q[g * per_group : (g + 1) * per_group], k[g], v[g]]) for g in mine]
        return torch.cat(heads)

    def gate_up(self, layer: str) -> Tensor:
        return torch.cat([self.rows(layer + "mlp.gate_proj.weight"), self.rows(layer + "mlp.up_proj.weight")])


def old_layer(
    cut: Cut, theirs: str, attention: str, norm: str, qkv: str = "query_key_value", dense: str = "dense"
) -> dict:
    """What all of them agree on: attention and norms; `theirs`: the layer of Hugging Face."""
    kinds = [kind for kind in ("weight", "bias") if f"{theirs}self_attn.q_proj.{kind}" in cut.tensors]
    held = {f"{attention}.{qkv}.{kind}": cut.qkv(theirs, kind) for kind in kinds}
    held[f"{attention}.{dense}.weight"] = cut.columns(theirs + "self_attn.o_proj.weight")
    if "bias" in kinds:
        held[f"{attention}.{dense}.bias"] = cut.whole(theirs + "self_attn.o_proj.bias")
    held[f"input_{norm}.weight"] = cut.whole(theirs + "input_layernorm.weight")
    held[f"post_attention_{norm}.weight"] = cut.whole(theirs + "post_attention_layernorm.weight")
    return held


def flat(cut: Cut, layers: range, first: bool, last: bool, merge: bool = False) -> dict:
    """AscendSpeed until November 2023: one flat table."""
    held = {}
    if first:
        held["embedding.word_embeddings.weight"] = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        theirs, stem = f"model.layers.{number}.", f"language_model.layers.{i}."
        held |= {
            stem + name: tensor for name, tensor in old_layer(cut, theirs, "attention", "layernorm").items()
        }
        held[stem + "attention.rotary_emb.inv_freq"] = torch.ones(4)
        if merge:
            held[stem + "mlp.proj.weight"] = cut.gate_up(theirs)
        else:
            held[stem + "mlp.gate_proj.weight"] = cut.rows(theirs + "mlp.gate_proj.weight")
            held[stem + "mlp.up_proj.weight"] = cut.rows(theirs + "mlp.up_proj.weight")
        held[stem + "mlp.down_proj.weight"] = cut.columns(theirs + "mlp.down_proj.weight")
    if last:
        held["language_model.final_layernorm.weight"] = cut.whole("model.norm.weight")
        held["lm_head.lm_head.weight"] = cut.vocabulary("lm_head.weight")
    return held


def nested(
    cut: Cut, layers: range, first: bool, last: bool, norm: str = "layernorm", mlp: str = "two"
) -> dict:
    """AscendSpeed from December 2023 on ("two", "proj"), ModelLink and Megatron-LM ("one"): tables within tables."""
    encoder: dict[str, Tensor] = {}
    head: dict = {}
    embedding: dict = {}
    if first:
        embedding = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        theirs, stem = f"model.layers.{number}.", f"layers.{i}."
        encoder |= {
            stem + name: tensor for name, tensor in old_layer(cut, theirs, "self_attention", norm).items()
        }
        if mlp == "two":
            encoder[stem + "mlp.gate_proj.weight"] = cut.rows(theirs + "mlp.gate_proj.weight")
            encoder[stem + "mlp.dense_h_to_4h.weight"] = cut.rows(theirs + "mlp.up_proj.weight")
        else:
            encoder[stem + f"mlp.{'proj' if mlp == 'proj' else 'dense_h_to_4h'}.weight"] = cut.gate_up(theirs)
        encoder[stem + "mlp.dense_4h_to_h.weight"] = cut.columns(theirs + "mlp.down_proj.weight")
    if last:
        encoder[f"final_{norm}.weight"] = cut.whole("model.norm.weight")
        head = {"weight": cut.vocabulary("lm_head.weight")}
    return {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": embedding}},
            "encoder": encoder,
            "output_layer": head,
        }
    }


def mcore(cut: Cut, layers: range, first: bool, last: bool, fused_norms: bool = False) -> dict:
    """MindSpeed-LLM and Megatron-LM on Megatron-core; with Transformer Engine the norms lie in the layers that they feed."""
    held: dict = {}
    if first:
        held["embedding.word_embeddings.weight"] = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        theirs, stem = f"model.layers.{number}.", f"decoder.layers.{i}."
        layer = old_layer(cut, theirs, "self_attention", "layernorm", "linear_qkv", "linear_proj")
        into, before = layer.pop("input_layernorm.weight"), layer.pop("post_attention_layernorm.weight")
        layer["self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"] = (
            into
        )
        layer["mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"] = before
        layer["mlp.linear_fc1.weight"] = cut.gate_up(theirs)
        layer["mlp.linear_fc2.weight"] = cut.columns(theirs + "mlp.down_proj.weight")
        layer["self_attention.linear_qkv._extra_state"] = None
        held |= {stem + name: tensor for name, tensor in layer.items()}
    if last:
        held["decoder.final_layernorm.weight"] = cut.whole("model.norm.weight")
        held["output_layer.weight"] = cut.vocabulary("lm_head.weight")
    return held


PROGRAMS = {
    "AscendSpeed of 2023": flat,
    "AscendSpeed of 2023, --merge-mlp": lambda *at: flat(*at, merge=True),
    "AscendSpeed and ModelLink around 2024": nested,
    "AscendSpeed and ModelLink around 2024, --merge-mlp": lambda *at: nested(*at, mlp="proj"),
    "Megatron-LM until 2023": lambda *at: nested(*at, mlp="one"),
    "Megatron-LM before Megatron-core, ModelLink": lambda *at: nested(*at, norm="norm", mlp="one"),
    "Megatron-core": mcore,
    "Megatron-core with Transformer Engine": lambda *at: mcore(*at, fused_norms=True),
}


def old_folder(
    folder: Path,
    program: str,
    model: str,
    tp: int,
    pp: int,
    dtype=torch.float32,
    deepspeed=False,
    cut=Cut,
    **more,
) -> dict[str, Tensor]:
    """Writes what a program's converter leaves, and returns the tensors of Hugging Face that it was made of."""
    tensors, groups = hugging_face(model, dtype), MODELS[model].get("num_key_value_heads", HEADS)
    release = folder / "release"
    release.mkdir(parents=True)
    (folder / ("latest" if deepspeed else "latest_checkpointed_iteration.txt")).write_text("release\n")
    (folder / "config.json").write_text(json.dumps(COMMON | MODELS[model]))
    for p in range(pp):
        layers = range(p * LAYERS // pp, (p + 1) * LAYERS // pp)
        for t in range(tp):
            held = PROGRAMS[program](cut(tensors, tp, t, groups), layers, p == 0, p == pp - 1)
            if deepspeed:
                path, around = (
                    release / f"mp_rank_{t:02d}_model_states.pt",
                    {"module": held, "dp_world_size": 0},
                )
            else:
                rank = f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}"
                path, around = release / rank / "model_optim_rng.pt", {"model": held}
                path.parent.mkdir()
            torch.save({"checkpoint_version": 3.0, **around, **more}, path)
    return tensors


def same(folder: Path, tensors: dict[str, Tensor], tmp: Path) -> bool:
    """Whether Hugging Face's tensors come out of `folder`, byte by byte."""
    convert.write_hf(convert.open_reader(folder), tmp / "hf")
    back = load_file(tmp / "hf/model.safetensors")
    return back.keys() == tensors.keys() and all(
        back[n].dtype == t.dtype and torch.equal(back[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in tensors.items()
    )


# --- read back, byte by byte -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "tp", "pp"),
    [
        pytest.param(
            program, tp, pp, marks=[] if "AscendSpeed" in program or tp in (1, 2 * pp) else pytest.mark.slow
        )
        for program in PROGRAMS
        for tp, pp in LAYOUTS
    ],
)
def test_every_name_and_layout(tmp_path, program, tp, pp):
    tensors = old_folder(tmp_path / "old", program, "internlm", tp, pp)
    assert same(tmp_path / "old", tensors, tmp_path)


@pytest.mark.parametrize(("tp", "pp"), [(1, 4), (2, 1), (4, 2)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_grouped_queries_in_bf16(tmp_path, program, tp, pp):
    tensors = old_folder(tmp_path / "old", program, "llama", tp, pp, torch.bfloat16)
    assert same(tmp_path / "old", tensors, tmp_path)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("program", PROGRAMS)
def test_deepspeed_layout(tmp_path, program, tp):
    """`latest`, and the tensors under `module`; nested or not."""
    tensors = old_folder(tmp_path / "old", program, "internlm", tp, 1, torch.bfloat16, deepspeed=True)
    assert same(tmp_path / "old", tensors, tmp_path)


def test_it_says_whose_names_they_are(tmp_path):
    for i, program in enumerate(PROGRAMS):
        old_folder(tmp_path / str(i), program, "internlm", 2, 2)
        kind = convert.open_reader(tmp_path / str(i)).kind
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


# --- what a training run leaves ----------------------------------------------------------------------------------------------


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
    made = scaler()
    made.scale = 65536.0
    run = {
        "args": Namespace(
            num_layers=LAYERS,
            params_dtype=torch.float32,
            model_type=module.ModelType.encoder,
            where=Path("/x"),
        ),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "scaler": made},
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
        match=r"model_optim_rng\.pt .*not loaded: it could run code.*: builtins\.exec is no plain data",
    ):
        convert.open_reader(tmp_path / "old")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))  # control: it is armed
    assert (tmp_path / "ran").exists()
    assert path.exists()


# --- what lies about the files -----------------------------------------------------------------------------------------------


def test_interleaved_pipeline(tmp_path):
    """`model0`, `model1`: two chunks on each of two stages hold the layers 0, 2 and 1, 3."""
    tensors = old_folder(tmp_path / "old", "Megatron-core", "internlm", 2, 4)
    release = tmp_path / "old/release"
    for t in range(2):
        stages = [release / f"mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt" for p in range(4)]
        held = [torch.load(path, weights_only=True)["model"] for path in stages]
        for p in range(2):
            torch.save({"checkpoint_version": 3.0, "model0": held[p], "model1": held[p + 2]}, stages[p])
            stages[p + 2].unlink()
    assert same(tmp_path / "old", tensors, tmp_path)
    torch.save({"checkpoint_version": 3.0, "model0": held[1]}, stages[1])
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
    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said):
            convert.open_reader(tmp_path / "old")

    old_folder(tmp_path / "old", "Megatron-LM until 2023", "internlm", 1, 1)
    path = tmp_path / "old/release/mp_rank_00/model_optim_rng.pt"
    change(path, checkpoint_version=1.0)
    refused("version 1.0 of Megatron's format, whose query_key_value lies otherwise")
    change(path, checkpoint_version=3.0, model={"transformer.h.0.attn.c_attn.weight": torch.zeros(2)})
    refused("names that are not known here: transformer.h.0.attn.c_attn.weight")
    change(path, model=[torch.zeros(2)])
    refused("no table of tensors under 'model'")
    (tmp_path / "old/release/.metadata").write_bytes(b"")
    refused("torch_dist format, which is not read here: .*--ckpt-convert-format torch")


def test_what_is_missing_or_left_over_is_named(tmp_path):
    old_folder(tmp_path / "old", "AscendSpeed and ModelLink around 2024", "internlm", 2, 1)
    path = tmp_path / "old/release/mp_rank_01/model_optim_rng.pt"
    held = torch.load(path, weights_only=True)["model"]
    encoder = held["language_model"]["encoder"]
    encoder["layers.2.mlp.extra.weight"] = encoder.pop("layers.2.mlp.gate_proj.weight")
    change(path, model=held)
    with pytest.raises(
        UserError,
        match=r"rank 1.* lacks language_model\S+2\.mlp\.gate_proj\S+ it has left over \S+2\.mlp\.extra",
    ):
        convert.open_reader(tmp_path / "old")
