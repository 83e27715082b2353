"""Rank files of earlier programs, written by plain torch."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ascendspeed.conversion import convert

LAYERS, HIDDEN, FFN, HEADS, VOCAB, DIVISOR = 4, 64, 96, 8, 131, 16


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
        own_rows = range(self.t * self.groups // self.tp, (self.t + 1) * self.groups // self.tp)
        heads = [torch.cat([*q[g * per_group : (g + 1) * per_group], k[g], v[g]]) for g in own_rows]
        return torch.cat(heads)

    def gate_up(self, layer: str) -> Tensor:
        return torch.cat([self.rows(layer + "mlp.gate_proj.weight"), self.rows(layer + "mlp.up_proj.weight")])


def old_layer(
    cut: Cut, hf_layer: str, attention: str, norm: str, qkv: str = "query_key_value", dense: str = "dense"
) -> dict:
    """Attention and norms of one layer, equal in all programs; `theirs`: the layer of Hugging Face."""
    kinds = [kind for kind in ("weight", "bias") if f"{hf_layer}self_attn.q_proj.{kind}" in cut.tensors]
    stored = {f"{attention}.{qkv}.{kind}": cut.qkv(hf_layer, kind) for kind in kinds}
    stored[f"{attention}.{dense}.weight"] = cut.columns(hf_layer + "self_attn.o_proj.weight")
    if "bias" in kinds:
        stored[f"{attention}.{dense}.bias"] = cut.whole(hf_layer + "self_attn.o_proj.bias")
    stored[f"input_{norm}.weight"] = cut.whole(hf_layer + "input_layernorm.weight")
    stored[f"post_attention_{norm}.weight"] = cut.whole(hf_layer + "post_attention_layernorm.weight")
    return stored


def flat(cut: Cut, layers: range, first: bool, last: bool, merge: bool = False) -> dict:
    """AscendSpeed until November 2023: one flat table."""
    stored = {}
    if first:
        stored["embedding.word_embeddings.weight"] = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        hf_layer, stem = f"model.layers.{number}.", f"language_model.layers.{i}."
        stored |= {
            stem + name: tensor for name, tensor in old_layer(cut, hf_layer, "attention", "layernorm").items()
        }
        stored[stem + "attention.rotary_emb.inv_freq"] = torch.ones(4)
        if merge:
            stored[stem + "mlp.proj.weight"] = cut.gate_up(hf_layer)
        else:
            stored[stem + "mlp.gate_proj.weight"] = cut.rows(hf_layer + "mlp.gate_proj.weight")
            stored[stem + "mlp.up_proj.weight"] = cut.rows(hf_layer + "mlp.up_proj.weight")
        stored[stem + "mlp.down_proj.weight"] = cut.columns(hf_layer + "mlp.down_proj.weight")
    if last:
        stored["language_model.final_layernorm.weight"] = cut.whole("model.norm.weight")
        stored["lm_head.lm_head.weight"] = cut.vocabulary("lm_head.weight")
    return stored


def nested(
    cut: Cut, layers: range, first: bool, last: bool, norm: str = "layernorm", mlp: str = "two"
) -> dict:
    """AscendSpeed from December 2023 on ("two", "proj"), ModelLink and Megatron-LM ("one"): tables within
    tables.
    """
    encoder: dict[str, Tensor] = {}
    head: dict = {}
    embedding: dict = {}
    if first:
        embedding = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        hf_layer, stem = f"model.layers.{number}.", f"layers.{i}."
        encoder |= {
            stem + name: tensor for name, tensor in old_layer(cut, hf_layer, "self_attention", norm).items()
        }
        if mlp == "two":
            encoder[stem + "mlp.gate_proj.weight"] = cut.rows(hf_layer + "mlp.gate_proj.weight")
            encoder[stem + "mlp.dense_h_to_4h.weight"] = cut.rows(hf_layer + "mlp.up_proj.weight")
        else:
            encoder[stem + f"mlp.{'proj' if mlp == 'proj' else 'dense_h_to_4h'}.weight"] = cut.gate_up(
                hf_layer
            )
        encoder[stem + "mlp.dense_4h_to_h.weight"] = cut.columns(hf_layer + "mlp.down_proj.weight")
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
    """MindSpeed-LLM and Megatron-LM on Megatron-core; with Transformer Engine the norms lie in the layers
    that they feed.
    """
    stored: dict = {}
    if first:
        stored["embedding.word_embeddings.weight"] = cut.vocabulary("model.embed_tokens.weight")
    for i, number in enumerate(layers):
        hf_layer, stem = f"model.layers.{number}.", f"decoder.layers.{i}."
        layer = old_layer(cut, hf_layer, "self_attention", "layernorm", "linear_qkv", "linear_proj")
        into, before = layer.pop("input_layernorm.weight"), layer.pop("post_attention_layernorm.weight")
        layer["self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"] = (
            into
        )
        layer["mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"] = before
        layer["mlp.linear_fc1.weight"] = cut.gate_up(hf_layer)
        layer["mlp.linear_fc2.weight"] = cut.columns(hf_layer + "mlp.down_proj.weight")
        layer["self_attention.linear_qkv._extra_state"] = None
        stored |= {stem + name: tensor for name, tensor in layer.items()}
    if last:
        stored["decoder.final_layernorm.weight"] = cut.whole("model.norm.weight")
        stored["output_layer.weight"] = cut.vocabulary("lm_head.weight")
    return stored


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
    """Writes the output of a program's converter; returns the Hugging Face tensors of the same model."""
    tensors, groups = hugging_face(model, dtype), MODELS[model].get("num_key_value_heads", HEADS)
    release = folder / "release"
    release.mkdir(parents=True)
    (folder / ("latest" if deepspeed else "latest_checkpointed_iteration.txt")).write_text("release\n")
    (folder / "config.json").write_text(json.dumps(COMMON | MODELS[model]))
    for p in range(pp):
        layers = range(p * LAYERS // pp, (p + 1) * LAYERS // pp)
        for t in range(tp):
            stored = PROGRAMS[program](cut(tensors, tp, t, groups), layers, p == 0, p == pp - 1)
            if deepspeed:
                path, around = (
                    release / f"mp_rank_{t:02d}_model_states.pt",
                    {"module": stored, "dp_world_size": 0},
                )
            else:
                rank = f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}"
                path, around = release / rank / "model_optim_rng.pt", {"model": stored}
                path.parent.mkdir()
            torch.save({"checkpoint_version": 3.0, **around, **more}, path)
    return tensors


def same(folder: Path, tensors: dict[str, Tensor], tmp: Path) -> bool:
    """True if `folder` converts to the Hugging Face tensors, byte by byte."""
    convert.write_hf(convert.open_reader(folder), tmp / "hf")
    back = load_file(tmp / "hf/model.safetensors")
    return back.keys() == tensors.keys() and all(
        back[n].dtype == t.dtype and torch.equal(back[n].view(torch.uint8), t.view(torch.uint8))
        for n, t in tensors.items()
    )
