"""Int8 quantisation in plain torch, as an oracle."""

import torch
from torch import Tensor


def fake_int8(values: Tensor, shift: int = 0) -> Tensor:
    """Rounds every row to 255 levels, from its largest magnitude; `shift`: takes the scale of a neighbour."""
    scale = (values.abs().max(dim=-1, keepdim=True)[0] / 127).clamp(min=1e-30)
    steps = torch.clamp(torch.round(values / scale), -127, 127)
    return steps * (scale.roll(shift, -2) if shift else scale)


def is_layer_matrix(name: str, tensor: Tensor) -> bool:
    """True for the weights that are quantised; routers and gates of experts are not."""
    is_router = name.endswith(("router.weight", "gate_weight"))
    return name.startswith("decoder.layers.") and tensor.dim() == 2 and not is_router


def with_int8_weights(tensors: dict[str, Tensor], shift: int = 0) -> dict[str, Tensor]:
    """The tensors of a model with rounded weights of its layers."""
    return {
        name: fake_int8(tensor, shift) if is_layer_matrix(name, tensor) else tensor
        for name, tensor in tensors.items()
    }
