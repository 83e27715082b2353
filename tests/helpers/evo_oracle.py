"""InternEvo's training folders in plain torch, from how its modules are built, cut and saved; none of the
project's code.

A model is given by its separate matrices, as a plain Llama has them; from these both the Hugging Face tensors
of a family and the files of InternEvo's ranks are made.
"""

import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int = 4
    hidden: int = 64
    ffn: int = 96
    heads: int = 8
    kv: int = 8
    vocab: int = 128
    bias: bool = False

    @property
    def d(self) -> int:
        return self.hidden // self.heads


def parts_of(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Random bf16 matrices by their roles: `0.q`, `0.k.bias`, `embedding` and so on."""
    generator = torch.Generator().manual_seed(seed)
    h, q, kv = shape.hidden, shape.heads * shape.d, shape.kv * shape.d
    sizes = {
        "q": (q, h),
        "k": (kv, h),
        "v": (kv, h),
        "o": (h, q),
        "gate": (shape.ffn, h),
        "up": (shape.ffn, h),
        "down": (h, shape.ffn),
    }
    parts = {"embedding": (shape.vocab, h), "head": (shape.vocab, h), "norm": (h,)}
    for layer in range(shape.layers):
        parts |= {f"{layer}.{role}": size for role, size in sizes.items()}
        parts |= {f"{layer}.norm1": (h,), f"{layer}.norm2": (h,)}
        if shape.bias:
            parts |= {f"{layer}.{role}.bias": sizes[role][:1] for role in "qkvo"}
    return {role: torch.randn(size, generator=generator).bfloat16() for role, size in parts.items()}


def grouped(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InternLM2's wqkv, of which a forward pass takes `(h gs d)`: per key/value head its queries, its key,
    its value.
    """
    q, k, v = (t.view(shape.kv, -1, shape.d, *t.shape[1:]) for t in (q, k, v))
    return torch.cat([q, k, v], 1).flatten(0, 2)


def hugging_face(family: str, shape: Shape, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the family's directory."""
    if family != "internlm2":
        names = {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
        }
        names |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
        names |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        ends = {
            "embedding": "model.embed_tokens.weight",
            "head": "lm_head.weight",
            "norm": "model.norm.weight",
        }
    else:
        names = {
            "o": "attention.wo",
            "gate": "feed_forward.w1",
            "up": "feed_forward.w3",
            "down": "feed_forward.w2",
        }
        names |= {"norm1": "attention_norm", "norm2": "ffn_norm"}
        ends = {
            "embedding": "model.tok_embeddings.weight",
            "head": "output.weight",
            "norm": "model.norm.weight",
        }
    renamed = {name: parts[role] for role, name in ends.items()}
    for layer in range(shape.layers):
        here = f"model.layers.{layer}."
        for role, name in names.items():
            renamed[f"{here}{name}.weight"] = parts[f"{layer}.{role}"]
            if f"{layer}.{role}.bias" in parts:
                renamed[f"{here}{name}.bias"] = parts[f"{layer}.{role}.bias"]
        if family == "internlm2":
            renamed[f"{here}attention.wqkv.weight"] = grouped(shape, *(parts[f"{layer}.{x}"] for x in "qkv"))
    return renamed


@dataclass(frozen=True)
class Trained:
    """One way in which InternEvo trains and saves."""

    kind: str = "INTERNLM2"
    tp: int = 1
    pp: tuple[int, ...] = (4,)
    """Layers of every stage."""
    wp: int = 0
    early: bool = False
    """isp before the middle of 2024: head and embedding over the tensor-parallel ranks, both numbers in the
    names.
    """
    version: int = 2
    embed_split: bool = True
    flash_embedding: bool = False
    interleaved: bool = False
    prefix: str = ""
    save_hook: bool = False
    """A fused wqkv is saved as wq, wk and wv, by `torch.split` of what the rank has."""
    fused_mlp: bool = False
    """[w1; w3] is one matrix when training, saved as two halves of what the rank has."""
    chunks: int = 1


def pairs(d: int, w: Tensor) -> Tensor:
    """Rows for a rotary embedding of neighbours: row 2i is row i of ours, row 2i + 1 is row i + d/2."""
    return w.view(-1, 2, d // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def _attention(
    shape: Shape, how: Trained, parts: dict[str, Tensor], layer: int, kind: str
) -> dict[str, list[Tensor]]:
    """q, k and v of every rank; `kind` is weight or bias."""
    dot = "" if kind == "weight" else ".bias"
    q, k, v = (parts[f"{layer}.{x}{dot}"] for x in "qkv")
    if how.interleaved:
        q, k = pairs(shape.d, q), pairs(shape.d, k)
    n = how.wp or how.tp
    if how.kind == "INTERNLM" and how.wp:  # the gathered matrix is `(three h d)`
        return {f"mixer.Wqkv.{kind}": list(torch.cat([q, k, v]).chunk(n))}
    if how.kind == "INTERNLM":  # every rank's own matrix is `(three h d)` with its heads
        return {
            f"mixer.Wqkv.{kind}": [
                torch.cat(qkv) for qkv in zip(q.chunk(n), k.chunk(n), v.chunk(n), strict=True)
            ]
        }
    if how.kind == "INTERNLM2" or how.save_hook:
        wqkv = list(grouped(shape, q, k, v).chunk(n))
        if not how.save_hook:
            return {f"attention.wqkv.{kind}": wqkv}
        each = [shape.heads * shape.d // n, shape.kv * shape.d // n, shape.kv * shape.d // n]
        return {
            f"attention.w{x}.{kind}": list(cut)
            for x, cut in zip("qkv", zip(*(w.split(each) for w in wqkv), strict=True), strict=True)
        }
    return {f"attention.w{x}.{kind}": list(w.chunk(n)) for x, w in zip("qkv", (q, k, v), strict=True)}


def _layer(shape: Shape, how: Trained, parts: dict[str, Tensor], layer: int) -> list[dict[str, Tensor]]:
    """Shards of one layer on every rank."""
    n = how.wp or how.tp
    first = how.kind == "INTERNLM"
    row = 0 if how.wp else 1  # the dimension that a row-parallel matrix is cut along
    mlp, out = ("mlp", "mixer.out_proj") if first else ("feed_forward", "attention.wo")
    norms = ("norm1", "norm2") if first else ("attention_norm", "ffn_norm")
    stored = _attention(shape, how, parts, layer, "weight")
    stored[f"{out}.weight"] = list(parts[f"{layer}.o"].chunk(n, row))
    gate, up = list(parts[f"{layer}.gate"].chunk(n)), list(parts[f"{layer}.up"].chunk(n))
    if how.fused_mlp:
        fused = (
            torch.cat([parts[f"{layer}.gate"], parts[f"{layer}.up"]]).chunk(n)
            if how.wp
            else [torch.cat(x) for x in zip(gate, up, strict=True)]
        )
        gate, up = (list(x) for x in zip(*(w.chunk(2) for w in fused), strict=True))
    w2, w3 = ("w2", "w3") if how.version == 2 else ("w3", "w2")
    stored |= {
        f"{mlp}.w1.weight": gate,
        f"{mlp}.{w3}.weight": up,
        f"{mlp}.{w2}.weight": list(parts[f"{layer}.down"].chunk(n, row)),
    }
    stored |= {f"{norm}.weight": [parts[f"{layer}.norm{i}"]] * n for i, norm in enumerate(norms, 1)}
    if shape.bias:
        stored |= _attention(shape, how, parts, layer, "bias")
        bias = parts[f"{layer}.o.bias"]
        stored[f"{out}.bias"] = (
            list(bias.chunk(n)) if how.wp else [bias] + [None] * (n - 1)
        )  # the sum's bias is the first rank's
    return [
        {name: tensors[r] for name, tensors in stored.items() if tensors[r] is not None} for r in range(n)
    ]


def states(shape: Shape, how: Trained, parts: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """File name -> what is in it."""
    n, first = how.wp or how.tp, how.kind == "INTERNLM"
    outer = how.tp if how.early else n
    stages = len(how.pp) // how.chunks
    embedding, head = ("embedding", "head") if first else ("tok_embeddings", "output")
    embedding += ".word_embeddings" if how.flash_embedding else ""
    files: dict[str, dict[str, Tensor]] = {}
    for r in range(max(n, outer)):
        for p in range(stages):
            state = {}
            for c in range(how.chunks):
                v = c * stages + p
                prefix = (f"{c}." if how.chunks > 1 else "") + how.prefix
                start = sum(how.pp[:v])
                for i in range(how.pp[v]):
                    layer = _layer(shape, how, parts, start + i)[r % n]
                    state |= {
                        f"{prefix}{'blocks' if first else 'layers'}.{i}.{name}": tensor
                        for name, tensor in layer.items()
                    }
                if v == 0:
                    state[f"{prefix}{embedding}.weight"] = parts["embedding"].chunk(
                        outer, int(how.embed_split)
                    )[r % outer]
                if v == len(how.pp) - 1:
                    state[f"{prefix}norm.weight"] = parts["norm"]
                    state[f"{prefix}{head}.weight"] = parts["head"].chunk(outer)[r % outer]
            name = (
                f"model_tp{r % outer}_wp{r % n}_pp{p}.pt"
                if how.early
                else f"model_wp{r}_pp{p}.pt"
                if how.wp
                else f"model_tp{r}_pp{p}.pt"
            )
            files[name] = state
    return files


def model_config(shape: Shape, how: Trained, **more) -> dict:
    """The `model` table of a training configuration, as people write it."""
    table = {
        "num_attention_heads": shape.heads,
        "embed_split_hidden": how.embed_split,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
        "mlp_ratio": 8 / 3,
        "norm_type": "rmsnorm",
        "layer_norm_epsilon": 1e-5,
        "dtype": torch.bfloat16,
        "num_chunks": how.chunks,
    }
    if how.kind != "INTERNLM":
        table |= {
            "num_kv_attention_heads": shape.kv,
            "no_bias": not shape.bias,
            "rope_base": 1000000,
            "qk_interleaved": how.interleaved,
        }
    elif how.interleaved:
        table["qk_interleaved"] = True
    return table | more


def save(
    folder: Path, shape: Shape, how: Trained, parts: dict[str, Tensor], config: dict | None = None
) -> None:
    """A folder as the trainer leaves it."""
    folder.mkdir()
    for name, stored in states(shape, how, parts).items():
        state = OrderedDict((key, tensor.contiguous().clone()) for key, tensor in stored.items())
        state._metadata = OrderedDict({"": {"version": 1}})  # as state_dict() leaves it
        torch.save(state, folder / name)
    if config is not None:
        save_config(folder / "model_config.pt", config)
    torch.save({"step": 100}, folder / "100.step")
    for other in ("optimizer_tp0_pp0_zo0.pt", "context.pt", "schedulder.pt", "topo_tp0_pp0.json"):
        (folder / other).write_bytes(b"not opened")


def save_config(path: Path, table: dict) -> None:
    """Saves a table of InternEvo's own class, under the name that pickle would look up."""
    names = ("internlm", "internlm.core", "internlm.core.context", "internlm.core.context.parallel_context")
    sys.modules |= {name: types.ModuleType(name) for name in names}

    class Config(dict):
        """A dict whose attributes are its entries."""

        def __setattr__(self, name: str, value) -> None:
            self[name] = value

    Config.__module__, Config.__qualname__ = names[-1], "Config"
    sys.modules[names[-1]].Config = Config
    torch.save(Config(table), path)
    for name in names:
        del sys.modules[name]
