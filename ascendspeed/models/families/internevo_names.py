"""InternEvo's names of our parameters: a table for each kind of model that it trains, and the ways in which its folders differ."""

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
    "INTERNLM2": replace_mappings(  # wqkv lies per key/value group, as ours
        LLAMA2,
        ParamMapping(QKV + "weight", (A + "wqkv.weight",), partition="rows"),
        ParamMapping(QKV + "bias", (A + "wqkv.bias",), partition="rows", condition="add_qkv_bias"),
    ),
    "LLAMA2": LLAMA2,
}
"""Names of version 2 (w3 is up, w2 is down) and of an embedding that is cut along the hidden size."""
IGNORED_TENSORS = (r".*\.inv_freq",)
"""Regular expressions of tensors that carry nothing."""


@dataclass(frozen=True)
class InternEvoStyle:
    """How the tensors of one training folder are named and lie."""

    model_type: InternEvoModelType
    ranks: int = 1
    """That share every layer: tensor parallel, or weight parallel (isp)."""
    isp: bool = False
    """Weight parallel cuts every matrix and bias along dimension 0, and one that is fused, whole."""
    outer: int = 0
    """Ranks that share embedding and head, where that is another number (early isp); 0: the same."""
    version: Literal[1, 2] = 2
    """1: w2 is up and w3 is down (InternLM's releases of 2023)."""
    embed_split: bool = True
    """The embedding is cut along the hidden size, not along the vocabulary."""
    word_embeddings: bool = False
    """The embedding is flash-attention's module, which has one more level of names."""
    qk_interleaved: bool = False
    """The rows of every head of q and k lie in rotated pairs: 0, d/2, 1, d/2 + 1, ... of ours."""
    cut_qkv: bool = False
    """wq, wk and wv are only consecutive pieces of a rank's wqkv (releases of 2024 saved a fused one so)."""
    cut_glu: bool = False
    """w1 and w3 are only the halves of a rank's fused [w1; w3] (isp with `mlp_layer_fusion`)."""

    def rows(self) -> Iterator[ParamMapping]:
        """The table in this folder's names."""
        swapped = {"w2.": "w3.", "w3.": "w2."} if self.version == 1 else {}
        for row in PARAM_MAPPINGS[self.model_type]:
            if row.megatron_param.startswith("embedding."):
                name = (
                    row.hf_params[0].replace(".weight", ".word_embeddings.weight")
                    if self.word_embeddings
                    else row.hf_params[0]
                )
                yield replace(row, hf_params=(name,), partition="columns" if self.embed_split else "rows")
            elif swapped and ".mlp." in row.megatron_param:
                yield replace(row, hf_params=tuple(_exchange(name, swapped) for name in row.hf_params))
            else:
                yield row

    def named(self, ours: str) -> tuple[str, ...]:
        """The names of one of our parameters there, in the first layer."""
        return next(
            tuple(name.format(l=0) for name in row.hf_params)
            for row in self.rows()
            if row.megatron_param.endswith(ours)
        )

    @property
    def family(self) -> str:
        """Ours, where nothing but the names says it."""
        return {
            "INTERNLM": "internlm",
            "INTERNLM2": "internlm2",
            "LLAMA2": "internlm2" if self.cut_qkv else "llama",
        }[self.model_type]


def _exchange(name: str, words: dict[str, str]) -> str:
    return next((name.replace(word, other) for word, other in words.items() if word in name), name)


@dataclass(frozen=True)
class InternEvoOptions:
    """What the files of a training folder may not say; where it is said, it goes before what config.json or model_config.pt say."""

    version: Literal[1, 2] | None = None
    """InternEvo folder to read: 1, w2 is up and w3 is down; 2, the other way round; None: their shapes tell, unless equal."""
    qk_interleaved: Literal["yes", "no"] | None = None
    """InternEvo folder to read: the rows of q and k lie in pairs (once adapt_hf=False); None: as its model_config.pt says."""
    qkv_fused: Literal["yes", "no"] | None = None
    """InternEvo folder to read: wq, wk, wv are a fused wqkv cut in three (releases of 2024); None: as model_config.pt says."""
    max_pos: int | None = None
    """InternEvo folder to read: longest trained sequence; None: as its config.json or model_config.pt says."""
    rotary_type: Literal["origin", "dynamic"] | None = None
    """InternEvo folder to read: plain rope, or dynamic NTK beyond --max-pos; None: as its config.json or model_config.pt says."""
    scaling_factor: float = 1.0
    """Factor of dynamic NTK: with --rotary-type dynamic only."""
    family: Suppress[str | None] = None
    """Ours, where the names fit several; None: as config.json says, or the one that the names belong to."""
