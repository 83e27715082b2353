"""What a family entry is made of: data only. The fusions and cuts that rows name live in `weights.py`, with torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ascendspeed.config import ModelConfig
from ascendspeed.errors import UserError

Fuse = Literal["one", "qkv", "glu"]
Split = Literal["replicated", "rows", "columns", "vocab"]
REQUIRED = object()


@dataclass(frozen=True)
class Row:
    """One parameter of the Megatron-core model and the Hugging Face tensors it is made of; `{l}` stands for the layer."""

    ours: str
    """Name in `GPTModel.named_parameters()`."""
    theirs: tuple[str, ...]
    """Hugging Face names, in the order in which `fuse` takes them."""
    fuse: Fuse = "one"
    """How `theirs` become `ours` (`weights.FUSIONS`)."""
    split: Split = "replicated"
    """How tensor parallel cuts `ours`: not at all, along dimension 0, along dimension 1, or 0 with a padded vocabulary."""
    when: str = ""
    """A boolean of `ModelConfig` without which the model has no such parameter; `!name`: with which it has none."""


@dataclass(frozen=True)
class Key:
    """One entry of config.json and the fields of `ModelConfig` that hold its value."""

    theirs: str
    ours: tuple[str, ...]
    default: Any = REQUIRED


@dataclass(frozen=True)
class Family:
    """One model family: presets, `config.json` <-> `ModelConfig`, and tensor names, each read both ways."""

    name: str
    """`model_type` of config.json."""
    architecture: str
    """`architectures[0]` of config.json."""
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]
    presets: Mapping[str, ModelConfig] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the family always is; another value in a config.json is refused."""
    rope: Literal["rotary", "rope_scaling"] = "rope_scaling"
    """How config.json spells the rotary embedding when it is written; every spelling is read."""
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    """The family's rope where config.json says nothing."""
    junk: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Regular expressions of Hugging Face tensors that carry nothing."""

    def rows_of(self, config: ModelConfig) -> Iterator[Row]:
        """The rows that a model of this configuration has."""
        for row in self.rows:
            if not row.when or getattr(config, row.when.lstrip("!")) != row.when.startswith("!"):
                yield row

    def read_config(self, theirs: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Raises `UserError` for what is missing or cannot be expressed."""
        for name, value in self.fixed.items():
            if theirs.get(name, value) != value:
                raise UserError(f"config.json: {name} = {theirs[name]!r} is not supported for {self.name}, only {value!r}")
        values: dict[str, Any] = {}
        for key in self.keys:
            if key.default is REQUIRED and key.theirs not in theirs:
                raise UserError(f"config.json of a {self.name} model lacks {key.theirs!r}")
            values |= dict.fromkeys(key.ours, theirs.get(key.theirs, key.default))
        return ModelConfig(family=self.name, **values | read_rope(theirs, self.rope_default))

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """ModelConfig -> config.json, without what only the source knows (token ids, dtype)."""
        theirs: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name, **self.fixed}
        for key in self.keys:
            values = {getattr(config, ours) for ours in key.ours}
            if len(values) > 1:
                both = ", ".join(f"{ours} = {getattr(config, ours)}" for ours in key.ours)
                raise UserError(f"{self.name} has one {key.theirs!r} for all of these: {both}")
            theirs[key.theirs] = values.pop()
        theirs["num_key_value_heads"] = config.kv_heads
        return theirs | write_rope(config, self.rope)


def read_rope(theirs: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary base and scaling from any of the spellings in use: `rotary`, `rope_theta` + `rope_scaling`, `rope_parameters`."""
    said = {
        **default,
        **(theirs.get("rotary") or {}),
        **(theirs.get("rope_scaling") or {}),
        **(theirs.get("rope_parameters") or {}),
    }
    kind = said.get("rope_type", said.get("type")) or "default"
    if kind == "origin":  # InternLM's word for no scaling
        kind = "default"
    if kind not in ("default", "linear", "dynamic"):
        raise UserError(f"config.json: rope scaling {kind!r} is not supported, only default, linear and dynamic")
    base = said.get("rope_theta", theirs.get("rope_theta", said.get("base", 10000.0)))
    factor = said.get("factor", said.get("scaling_factor", theirs.get("scaling_factor", 1.0)))
    return {
        "rotary_base": float(base),
        "rope_scaling_type": "none" if kind == "default" else kind,
        "rope_scaling_factor": 1.0 if kind == "default" else float(factor),
    }


def write_rope(config: ModelConfig, spelling: str) -> dict[str, Any]:
    """The rope entries of config.json in the family's own spelling."""
    kind, factor = config.rope_scaling_type, config.rope_scaling_factor
    if spelling == "rotary":
        rotary: dict[str, Any] = {"base": config.rotary_base, "type": "origin" if kind == "none" else kind}
        return {"rotary": rotary | ({} if factor == 1.0 else {"scaling_factor": factor})}
    return {"rope_theta": config.rotary_base, "rope_scaling": None if kind == "none" else {"type": kind, "factor": factor}}
