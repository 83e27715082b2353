"""InternEvo's parameter names: one table per model type, and the variants of its training folders."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tyro.conf import Suppress

from ascendspeed.models.families.base import InternEvoModelType, ParamMapping, replace_mappings
from ascendspeed.models.families.llama import ATTENTION, MLP

B, A, F = "blocks.{l}.", "layers.{l}.attention.", "layers.{l}.feed_forward."
QKV = ATTENTION + "linear_qkv."

LLAMA2 = (
    ParamMapping("embedding.word_embeddings.weight", ("tok_embeddings.weight",), partition="columns"),
    ParamMapping("decoder.layers.{l}.input_layernorm.weight", ("layers.{l}.attention_norm.weight",)),
    ParamMapping(QKV + "weight", (A + "wq.weight", A + "wk.weight", A + "wv.weight"), "qkv", "rows"),
    ParamMapping(
        QKV + "bias", (A + "wq.bias", A + "wk.bias", A + "wv.bias"), "qkv", "rows", condition="add_qkv_bias"
    ),
    ParamMapping(ATTENTION + "linear_proj.weight", (A + "wo.weight",), partition="columns"),
    ParamMapping(ATTENTION + "linear_proj.bias", (A + "wo.bias",), condition="add_dense_bias"),
    ParamMapping("decoder.layers.{l}.pre_mlp_layernorm.weight", ("layers.{l}.ffn_norm.weight",)),
    ParamMapping(MLP + "linear_fc1.weight", (F + "w1.weight", F + "w3.weight"), "glu", "rows"),
    ParamMapping(MLP + "linear_fc2.weight", (F + "w2.weight",), partition="columns"),
    ParamMapping("decoder.final_layernorm.weight", ("norm.weight",)),
    ParamMapping("output_layer.weight", ("output.weight",), partition="rows"),
)
PARAM_MAPPINGS: dict[InternEvoModelType, tuple[ParamMapping, ...]] = {
    "INTERNLM": (
        ParamMapping("embedding.word_embeddings.weight", ("embedding.weight",), partition="columns"),
        ParamMapping("decoder.layers.{l}.input_layernorm.weight", (B + "norm1.weight",)),
        ParamMapping(QKV + "weight", (B + "mixer.Wqkv.weight",), "qkv", "rows"),
        ParamMapping(QKV + "bias", (B + "mixer.Wqkv.bias",), "qkv", "rows", condition="add_qkv_bias"),
        ParamMapping(ATTENTION + "linear_proj.weight", (B + "mixer.out_proj.weight",), partition="columns"),
        ParamMapping(
            ATTENTION + "linear_proj.bias", (B + "mixer.out_proj.bias",), condition="add_dense_bias"
        ),
        ParamMapping("decoder.layers.{l}.pre_mlp_layernorm.weight", (B + "norm2.weight",)),
        ParamMapping(MLP + "linear_fc1.weight", (B + "mlp.w1.weight", B + "mlp.w3.weight"), "glu", "rows"),
        ParamMapping(MLP + "linear_fc2.weight", (B + "mlp.w2.weight",), partition="columns"),
        ParamMapping("decoder.final_layernorm.weight", ("norm.weight",)),
        ParamMapping("output_layer.weight", ("head.weight",), partition="rows"),
    ),
    "INTERNLM2": replace_mappings(  # wqkv has [q ..., k, v] per key/value group, as Megatron-core
        LLAMA2,
        ParamMapping(QKV + "weight", (A + "wqkv.weight",), partition="rows"),
        ParamMapping(QKV + "bias", (A + "wqkv.bias",), partition="rows", condition="add_qkv_bias"),
    ),
    "LLAMA2": LLAMA2,
}
"""Names of version 2 (w3 is up, w2 is down), with an embedding that is cut along the hidden size."""
IGNORED_TENSORS = (r".*\.inv_freq",)
"""Regular expressions of tensors that hold no weights."""


@dataclass(frozen=True)
class InternEvoStyle:
    """Names and layout of the tensors of one training folder."""

    model_type: InternEvoModelType
    ranks: int = 1
    """Ranks that share every layer: tensor parallel, or weight parallel (isp)."""
    isp: bool = False
    """Weight parallel: cuts every matrix and bias along dimension 0, a fused matrix as one block."""
    outer: int = 0
    """Ranks that share embedding and head if their number differs (early isp); 0: equal to `ranks`."""
    version: Literal[1, 2] = 2
    """1: w2 is up and w3 is down (InternLM's releases of 2023)."""
    embed_split: bool = True
    """True: the embedding is cut along the hidden size, not along the vocabulary."""
    word_embeddings: bool = False
    """True: the embedding is flash-attention's module, with one more level of names."""
    qk_interleaved: bool = False
    """True: rows of every head of q and k are in the order of rotated pairs: 0, d/2, 1, d/2 + 1, ... of
    Megatron-core's rows."""
    cut_qkv: bool = False
    """True: wq, wk and wv are consecutive parts of a rank's fused wqkv (saved so by releases of 2024)."""
    cut_glu: bool = False
    """True: w1 and w3 are the halves of a rank's fused [w1; w3] (isp with `mlp_layer_fusion`)."""

    def rows(self) -> Iterator[ParamMapping]:
        """Yields the mappings with this folder's names."""
        swapped = {"w2.": "w3.", "w3.": "w2."} if self.version == 1 else {}
        for mapping in PARAM_MAPPINGS[self.model_type]:
            if mapping.megatron_param.startswith("embedding."):
                name = (
                    mapping.hf_params[0].replace(".weight", ".word_embeddings.weight")
                    if self.word_embeddings
                    else mapping.hf_params[0]
                )
                yield replace(mapping, hf_params=(name,), partition="columns" if self.embed_split else "rows")
            elif swapped and ".mlp." in mapping.megatron_param:
                yield replace(
                    mapping, hf_params=tuple(_exchange(name, swapped) for name in mapping.hf_params)
                )
            else:
                yield mapping

    def named(self, suffix: str) -> tuple[str, ...]:
        """InternEvo's names of a Megatron-core parameter in the first layer; `suffix`: end of its name."""
        return next(
            tuple(name.format(l=0) for name in mapping.hf_params)
            for mapping in self.rows()
            if mapping.megatron_param.endswith(suffix)
        )

    @property
    def family(self) -> str:
        """Name of the family, if only the tensor names identify it."""
        return {
            "INTERNLM": "internlm",
            "INTERNLM2": "internlm2",
            "LLAMA2": "internlm2" if self.cut_qkv else "llama",
        }[self.model_type]


def _exchange(name: str, words: dict[str, str]) -> str:
    return next((name.replace(word, other) for word, other in words.items() if word in name), name)


@dataclass(frozen=True)
class InternEvoOptions:
    """Options for reading a training folder whose files lack information; they override config.json and
    model_config.pt."""

    version: Literal[1, 2] | None = None
    """InternEvo folder to read: 1: w2 is up, w3 is down; 2: w3 is up, w2 is down; None: decided by shapes,
    unless equal."""
    qk_interleaved: Literal["yes", "no"] | None = None
    """InternEvo folder to read: rows of q and k are in rotated pairs (adapt_hf=False); None: as in its
    model_config.pt."""
    qkv_fused: Literal["yes", "no"] | None = None
    """InternEvo folder to read: wq, wk, wv are a fused wqkv cut in three (releases of 2024); None: as in
    model_config.pt."""
    max_pos: int | None = None
    """InternEvo folder to read: longest training sequence; None: as in its config.json or model_config.pt."""
    rotary_type: Literal["origin", "dynamic"] | None = None
    """InternEvo folder to read: plain rope, or dynamic NTK beyond --max-pos; None: as in its config.json or
    model_config.pt."""
    scaling_factor: float = 1.0
    """Factor of dynamic NTK; only with --rotary-type dynamic."""
    family: Suppress[str | None] = None
    """Name of the family, if the tensor names fit several; None: as in config.json, or decided by the
    names."""
