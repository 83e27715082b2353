"""What the published converters had to be told about a model. Here config.json says it; what is said beside it is checked."""

from dataclasses import dataclass

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
"""What a size of a model (7B) stands for."""


@dataclass(frozen=True)
class Claims:
    """Flags that name the architecture: none is needed, and one that contradicts config.json is an error."""

    type: str | None = None
    """Size of the model (7B, 20B, ...): checked against config.json."""
    bias: bool = False
    """The attention has biases: checked against config.json."""
    num_layers: int | None = None
    """Checked against config.json, as are the next three."""
    num_heads: int | None = None
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key/value heads."""
    hidden_size: int | None = None
    """Width of the model."""
    added_token_num: int = 0
    """Tokens added to the vocabulary: only 0, see the error."""
    merge_mlp: bool = False
    """Accepted; how gate and up projection lie is recognised when read, and always one tensor when written."""

    def check(self, where: str, config: ModelConfig) -> None:
        """Raises `UserError` when a flag contradicts the `config` of the model in `where`, naming both."""
        refuse(
            where,
            {
                "--num_layers": (self.num_layers, config.num_layers),
                "--num_heads": (self.num_heads, config.num_attention_heads),
                "--num_kv_heads": (self.num_kv_heads, config.kv_heads),
                "--hidden_size": (self.hidden_size, config.hidden_size),
                "--bias": (self.bias or None, config.add_qkv_bias and config.add_dense_bias),
                **self._size(config),
            },
        )
        if self.added_token_num:
            raise UserError(
                f"--added-token-num {self.added_token_num} would make another model, and a conversion changes nothing: "
                "resize the Hugging Face model (resize_token_embeddings), save it, and convert that"
            )
        if self.merge_mlp:
            print(
                "--merge-mlp changes nothing: how gate and up lie is recognised when read, and one tensor when written"
            )

    def _size(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        if self.type is None:
            return {}
        presets = families.FAMILIES[config.family].presets
        named = [preset for name, preset in presets.items() if name.endswith(f"-{self.type.lower()}")]
        if not named:
            raise UserError(
                f"--type {self.type}: the family {config.family} has no such size; there are {', '.join(presets)}"
            )
        # Several generations may have it: whichever has the most in common.
        said = {name: getattr(config, name) for name in SIZES}
        best = max(
            named, key=lambda preset: sum(getattr(preset, name) == size for name, size in said.items())
        )
        return {f"--type {self.type}: {name}": (getattr(best, name), size) for name, size in said.items()}


def check_grid(where: str, tp: int | None, pp: int | None, found: tuple[int, int] | None) -> None:
    """Raises `UserError` when rank files were not written for `tp` x `pp` ranks; None: nothing was said."""
    if found is None:
        raise UserError(
            f"{where} holds no rank files: tools/ckpt_convert/convert.py converts from any format"
        )
    refuse(
        where, {"tensor-parallel size": (tp, found[0]), "pipeline-parallel size": (pp, found[1])}, "its files"
    )


def refuse(where: str, said: dict[str, tuple[object, object]], by: str = "config.json") -> None:
    """Raises `UserError` naming every flag of `said` whose value, if it has one, is not the one that `by` says."""
    wrong = [
        f"{flag} {mine}, {by} {theirs}"
        for flag, (mine, theirs) in said.items()
        if mine is not None and mine != theirs
    ]
    if wrong:
        raise UserError(f"{where} is another model: {'; '.join(wrong)}")
