"""Parameter names of other training programs in rank files, one table each.

The content of a tensor is the same under every name: `query_key_value` is stored per key/value group [q...,
k, v] (Megatron's order since version 2 of its checkpoints); `mlp.proj` and Megatron's `dense_h_to_4h` are
[gate; up] on each rank. Only AscendSpeed's `dense_h_to_4h` beside a `gate_proj` is up alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.rank_files import NamingScheme
from ascendspeed.models.families import FAMILIES, ParamMapping

Names = Mapping[str, tuple[str, ...]]
"""Megatron-core name -> names in the file: one for each block, or one that holds all blocks."""
IGNORED = (r"(.*\.)?_extra_state", r".*rotary_(pos_)?emb\.inv_freq")
TIED_HEAD = ("word_embeddings_for_head.weight",)
"""Megatron-LM's copy of tied embeddings on the last of several stages."""
LAYER = "decoder.layers.{l}."
ATTENTION = LAYER + "self_attention."
MLP = LAYER + "mlp."
KINDS = ("weight", "bias")


def rows(config: ModelConfig, names: Names) -> Iterator[ParamMapping]:
    """Yields the mappings of a model under `names`; a parameter that is not there keeps its Megatron-core
    name.
    """
    for row in FAMILIES[config.family].param_mappings:
        stored_names = names.get(row.megatron_param, (row.megatron_param,))
        if (
            row.megatron_param == "output_layer.weight"
            and row.megatron_param in names
            and config.tie_embeddings
        ):
            stored_names = TIED_HEAD
        fusion = "qkv" if len(stored_names) == 3 else "glu" if row.fusion == "glu" else "one"
        yield replace(row, hf_params=stored_names, fusion=fusion)


def naming_scheme(program: str, names: Names) -> NamingScheme:
    """Returns the naming scheme of a program that differs from Megatron-core in `names`."""
    return NamingScheme(program, lambda config: rows(config, names), IGNORED)


def _names(
    layer: str, attention: str, norm: str, gate_up: tuple[str, ...], down: str, ends: tuple[str, str, str]
) -> Names:
    """Builds a table from a layer's prefix, the names of its modules, and `ends`: embedding, final norm and
    head.
    """
    modules = {
        "embedding.word_embeddings": (ends[0],),
        LAYER + "input_layernorm": (f"{layer}input_{norm}",),
        ATTENTION + "linear_qkv": (f"{layer}{attention}.query_key_value",),
        ATTENTION + "linear_proj": (f"{layer}{attention}.dense",),
        LAYER + "pre_mlp_layernorm": (f"{layer}post_attention_{norm}",),
        MLP + "linear_fc1": tuple(f"{layer}mlp.{name}" for name in gate_up),
        MLP + "linear_fc2": (f"{layer}mlp.{down}",),
        "decoder.final_layernorm": (ends[1],),
        "output_layer": (ends[2],),
    }
    return {
        f"{module}.{kind}": tuple(f"{name}.{kind}" for name in stored_names)
        for module, stored_names in modules.items()
        for kind in KINDS
    }


def _nested(norm: str, *gate_up: str) -> Names:
    """Megatron-LM before Megatron-core, and programs built on it."""
    top = "language_model."
    inner = "language_model.encoder."
    ends = (top + "embedding.word_embeddings", f"{inner}final_{norm}", top + "output_layer")
    return _names(inner + "layers.{l}.", "self_attention", norm, gate_up, "dense_4h_to_h", ends)


def _flat(*gate_up: str) -> Names:
    """AscendSpeed's first Llama."""
    ends = ("embedding.word_embeddings", "language_model.final_layernorm", "lm_head.lm_head")
    return _names("language_model.layers.{l}.", "attention", "layernorm", gate_up, "down_proj", ends)


TRANSFORMER_ENGINE = {
    LAYER + "input_layernorm.weight": (ATTENTION + "linear_qkv.layer_norm_weight",),
    LAYER + "pre_mlp_layernorm.weight": (MLP + "linear_fc1.layer_norm_weight",),
}
BEFORE_MEGATRON_CORE = (
    naming_scheme("Megatron-LM before Megatron-core, ModelLink", _nested("norm", "dense_h_to_4h")),
    naming_scheme("Megatron-LM until 2023", _nested("layernorm", "dense_h_to_4h")),
    naming_scheme(
        "AscendSpeed and ModelLink around 2024", _nested("layernorm", "gate_proj", "dense_h_to_4h")
    ),
    naming_scheme("AscendSpeed and ModelLink around 2024, --merge-mlp", _nested("layernorm", "proj")),
    naming_scheme("AscendSpeed of 2023", _flat("gate_proj", "up_proj")),
    naming_scheme("AscendSpeed of 2023, --merge-mlp", _flat("proj")),
)
"""Names of programs before Megatron-core, and of those built on them."""
ALL = (naming_scheme("Megatron-core with Transformer Engine", TRANSFORMER_ENGINE), *BEFORE_MEGATRON_CORE)
"""All naming schemes but Megatron-core's own; they are read, not written."""


def query_order_warning(scheme: NamingScheme, config: ModelConfig, tp: int) -> str:
    """A warning about files whose query heads may have another order, which their tensors do not show; empty:
    none.
    """
    if "AscendSpeed" in scheme.name and config.num_attention_heads > config.kv_heads > tp:
        return (
            "AscendSpeed's converter of November 2023 to January 2024 gave grouped queries another order if "
            "a rank has several "
            "groups; if these files come from it, convert the Hugging Face model again"
        )
    return ""
