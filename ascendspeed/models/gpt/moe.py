"""Mixture of experts on megatron-core's MoE layer, with plain torch for the parts that need
TransformerEngine.

Tokens are never dropped. `router_losses` has the load-balancing loss and the z-loss.

Under tensor parallel every rank holds a part of every expert, and sequence parallel gives it a part of the
tokens: the dispatcher gathers them before the experts and scatters the outputs. Without sequence parallel
each rank would contribute all tokens, and the gradients of the experts would be too large by the number of
ranks; `cli.validation` refuses to train so.
"""

from copy import copy
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from ascendspeed.config.schema import ModelConfig
from ascendspeed.models.gpt.linear import ColumnLinear, RowLinear

LINEARS = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class Router(TopKRouter):
    """Megatron-core's router with scores in plain torch; its own need TransformerEngine."""

    def gating(self, input: Tensor) -> Tensor:
        """Router scores in fp32, whatever the model's dtype: [s, b, h] -> [s, b, experts]."""
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores [s, b, experts] -> probabilities and map [tokens, experts]; `padding_mask` [s, b] is true
        for tokens that count in the auxiliary losses."""
        if losses := self.config.router_losses:
            logits = losses.attach(logits, self.topk, padding_mask, self.tp_cp_group)
        return super().routing(logits)


class Expert(MLP):
    """One SwiGLU expert."""

    def __init__(self, config: Any, tp_group: Any) -> None:
        config = copy(config)
        config.ffn_hidden_size = (
            config.moe_ffn_hidden_size
        )  # Megatron-core's MLP reads the width of linear_fc2 from here
        super().__init__(
            config, LINEARS, is_expert=True, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group
        )

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """tokens [n, h], router weights [n] in fp32 -> [n, h], partial sums over the tensor-parallel
        ranks."""
        hidden = self.config.kernels.swiglu(self.linear_fc1(tokens)[0])
        return self.linear_fc2((hidden * weights[:, None]).to(hidden.dtype))[0]


class Experts(MegatronModule):
    """The experts of a layer, called one after the other. All are called, as ranks must agree on the order of
    collectives."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any) -> None:
        super().__init__(config)
        self.local_experts = torch.nn.ModuleList(
            Expert(config, pg_collection.expt_tp) for _ in range(num_local_experts)
        )

    def forward(self, tokens: Tensor, counts: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """tokens [n, h] and weights [n], sorted by expert; counts [experts] -> ([n, h], no bias)."""
        sizes = counts.tolist()
        parts = zip(self.local_experts, tokens.split(sizes), weights.split(sizes), strict=True)
        return torch.cat([expert(part, weight) for expert, part, weight in parts]), None


class SharedExpert(SharedExpertMLP):
    """Expert for every token, multiplied by a sigmoid gate."""

    def __init__(self, config: Any, pg_collection: Any, gate: bool) -> None:
        super().__init__(config, LINEARS, gate, pg_collection)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        out = self.linear_fc2(self.config.kernels.swiglu(self.linear_fc1(hidden_states)[0]))[0]
        return out * F.linear(hidden_states, self.gate_weight).sigmoid()


def settings(model: ModelConfig) -> dict[str, Any]:
    """Fields of megatron-core's configuration for experts; empty for a dense model."""
    if model.num_experts is None:
        return {}
    shared = model.moe_shared_expert_intermediate_size
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_ffn,
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": shared is not None,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


def moe_spec() -> ModuleSpec:
    """Spec of the MLP of a layer with experts."""
    return ModuleSpec(
        MoELayer, submodules=MoESubmodules(experts=Experts, shared_experts=SharedExpert, router=Router)
    )
