"""Rows of the parity matrix: layouts as data, and controls with one mistake each. No torch."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ascendspeed.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models.families import preset

SMALL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 125,  # so that the vocabulary needs padding
    "max_position_embeddings": 64,
    "init_method_std": 0.1,
}
MODELS: dict[str, ModelConfig] = {
    "internlm": replace(preset("internlm-tiny"), **SMALL),
    "internlm2": replace(preset("internlm2-tiny"), **SMALL, num_query_groups=2),
    "mixtral": replace(preset("mixtral-tiny"), **SMALL, num_query_groups=2, num_experts=4),
}
DENSE, SPARSE = ("internlm", "internlm2"), ("mixtral",)
STEPS, DATA_SEED = 20, 7


def base_run(model: ModelConfig, steps: int) -> Run:
    """Returns the settings common to all rows: accumulation, warmup, decay of learning rate and weights,
    clipping.
    """
    return Run(
        model,
        ParallelConfig(),
        OptimConfig(
            lr=1e-2, min_lr=1e-3, lr_warmup_iters=min(4, steps // 2), weight_decay=0.1, clip_grad=1.0
        ),
        DataConfig(data_path=("unused",), seq_length=32),
        TrainConfig(micro_batch_size=1, global_batch_size=4, train_iters=steps),
    )


@dataclass(frozen=True)
class MatrixRow:
    """A layout of one engine in one precision, or a control."""

    engine: str
    name: str
    world: int
    """Number of processes."""
    parallel: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = DENSE
    control: str | None = None
    """Description of the mistake of a control; None: a regular row, which must be within bounds."""
    mistake: str | None = None
    """Mistake that the worker makes."""
    weights: str | None = None
    """Key of `reference.WEIGHT_MISTAKES` for the initial weights."""
    as_bf16: bool = False
    """Judge by the bounds of bf16, whatever the precision."""

    @property
    def precision(self) -> str:
        """Precision whose bounds apply: fp32 or bf16."""
        return "bf16" if self.as_bf16 or self.optim.get("bf16") else "fp32"

    @property
    def title(self) -> str:
        """Unique title."""
        kind = ", bf16" if self.optim.get("bf16") else ""
        return f"{self.engine} {self.name}{kind}" + (f"; control: {self.control}" if self.control else "")

    def run(self, model: ModelConfig, steps: int) -> Run:
        """Returns the complete run of this row."""
        run = base_run(model, steps)
        for group, changes in self.changes.items():
            run = replace(run, **{group: replace(getattr(run, group), **changes)})
        return run

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Group of the `Run` -> fields that differ from `base_run`."""
        return {"parallel": self.parallel, "train": self.train, "optim": self.optim}

    def with_mistake(self, control: str, **how: Any) -> "MatrixRow":
        """Returns a control: this row with a mistake."""
        return replace(self, control=control, **how)


TP, PP, VPP, CP, EP = (
    {name: 2}
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
        "context_parallel_size",
        "expert_model_parallel_size",
    )
)
A2A = {"cp_comm_type": "a2a"}
SP, SHARDS = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
HYBRID = SHARDS | {"num_distributed_optimizer_instances": 2}
FSDP = {"use_torch_fsdp2": True}
OVERLAP = SHARDS | {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full"}
GROUPS_OF_2, BLOCK_1 = FULL | {"recompute_num_layers": 2}, FULL | {"recompute_method": "block"}
SELECTIVE = {"recompute_granularity": "selective"}
BF16 = {"bf16": True}


def megatron(name: str, world: int, parallel: dict[str, Any], **more: Any) -> MatrixRow:
    return MatrixRow("Megatron", name, world, parallel, **more)


def zero(name: str, world: int, stage: int, parallel: dict[str, Any] | None = None, **more: Any) -> MatrixRow:
    return MatrixRow(
        "DeepSpeed", name, world, {"deepspeed": True, "zero_stage": stage} | (parallel or {}), **more
    )


LAYOUTS = (
    megatron("DP2", 2, {}, families=DENSE + SPARSE),
    megatron("ZeRO-1 (distributed optimizer)", 2, SHARDS),
    megatron("ZeRO-1, overlapped", 2, OVERLAP),
    megatron("DP2, FSDP2", 2, FSDP, families=DENSE + SPARSE),
    megatron("CP2, FSDP2", 2, CP | FSDP),
    megatron("TP2", 2, TP),
    megatron("TP2+SP", 2, TP | SP, families=DENSE + SPARSE),
    megatron("PP2", 2, PP),
    megatron("PP2xVPP2", 2, PP | VPP),
    megatron("CP2", 2, CP),
    megatron("CP2, all-to-all", 2, CP | A2A, families=DENSE + SPARSE),
    megatron("EP2", 2, EP, families=SPARSE),
    megatron("EP2, ZeRO-1", 2, EP | SHARDS, families=SPARSE),
    megatron("TP2+SP, recompute full", 2, TP | SP, train=FULL),
    megatron("CP2, recompute full in groups of 2", 2, CP, train=GROUPS_OF_2),
    megatron("PP2, recompute block 1", 2, PP, train=BLOCK_1),
    megatron("PP2xVPP2, recompute full", 2, PP | VPP, train=FULL),
    megatron("TP2, recompute selective", 2, TP, train=SELECTIVE),
    megatron("PP2, 3 and 1 layers", 2, PP | {"decoder_first_pipeline_num_layers": 3}),
    megatron("PP4", 4, {"pipeline_model_parallel_size": 4}),
    megatron("DP2, ZeRO-1 in 2 copies (hybrid)", 2, HYBRID),
    megatron("DP4, ZeRO-1 in 2 copies (hybrid)", 4, HYBRID, families=DENSE + SPARSE),
    megatron("CP2xDP2, ZeRO-1 in 2 copies (hybrid)", 4, CP | HYBRID),
    megatron("TP2xDP4+SP, ZeRO-1 in 2 copies (hybrid)", 8, TP | SP | HYBRID),
    megatron("CP2xDP2, FSDP2, recompute full", 4, CP | FSDP, train=FULL),
    megatron("CP4", 4, {"context_parallel_size": 4}),
    megatron("TP2xCP2+SP", 4, TP | CP | SP),
    megatron("CP2xDP2, all-to-all, ZeRO-1", 4, CP | A2A | SHARDS),
    megatron("TP2xDP2+SP, ZeRO-1", 4, TP | SP | SHARDS),
    megatron("PP2xVPP2xDP2, ZeRO-1, overlapped", 4, PP | VPP | OVERLAP),
    megatron("EP2xDP2, ZeRO-1 in 2 copies (hybrid)", 4, EP | HYBRID, families=SPARSE),
    megatron("EP2xPP2", 4, EP | PP, families=SPARSE),
    megatron("EP2xTP2+SP", 4, EP | TP | SP, families=SPARSE),
    megatron("TP2xPP2xDP2", 8, TP | PP),
    megatron("TP2xPP2xDP2, ZeRO-1", 8, TP | PP | SHARDS),
    megatron("TP2xCP2xPP2xVPP2+SP", 8, TP | CP | PP | VPP | SP),
    *(zero(f"ZeRO-{stage}", 2, stage) for stage in range(3)),
    zero("ZeRO-3", 2, 3, families=DENSE + SPARSE),
    zero("ZeRO-2, optimizer off the device", 2, 2, {"zero_offload": "cpu"}),
    zero("ZeRO-3, optimizer off the device", 2, 3, {"zero_offload": "cpu"}),
    zero("TP2, ZeRO-2", 2, 2, TP),
    zero("TP2+SP, ZeRO-2", 2, 2, TP | SP),
    zero("ZeRO-3, recompute full", 2, 3, train=FULL),
    *(zero(f"CP2, ZeRO-{stage}", 2, stage, CP) for stage in range(4)),
    zero("CP2, all-to-all, ZeRO-3 (ISP)", 2, 3, CP | A2A, families=DENSE + SPARSE),
    zero("TP2xCP2+SP, ZeRO-2", 4, 2, TP | CP | SP),
    zero("CP2xDP2, all-to-all, ZeRO-3 (ISP)", 4, 3, CP | A2A),
    zero("TP2xDP2, ZeRO-1", 4, 1, TP),
    zero("TP2xDP2+SP, ZeRO-3", 4, 3, TP | SP),
    zero(
        "ZeRO-3 with hpz 2", 4, 3, {"zero_hpz_partition_size": 2}
    ),  # last of its start: a process can create this group only once
)
HALVES = (
    megatron("ZeRO-1 (distributed optimizer)", 2, SHARDS, optim=BF16),
    megatron("TP2+SP", 2, TP | SP, optim=BF16),
    megatron("PP2xVPP2", 2, PP | VPP, optim=BF16),
    megatron("CP2", 2, CP, optim=BF16),
    megatron("DP2, FSDP2", 2, FSDP, optim=BF16),
    *(zero(f"ZeRO-{stage}", 2, stage, optim=BF16) for stage in (1, 2, 3)),
    zero("TP2+SP, ZeRO-2", 2, 2, TP | SP, optim=BF16),
)
NAMED = {row.title: row for row in (*LAYOUTS, *HALVES)}
CONTROLS = (
    NAMED["Megatron DP2"].with_mistake("mean of means", mistake="mean of means"),
    NAMED["Megatron DP2"].with_mistake("beta2 0.94 for 0.95", optim={"adam_beta2": 0.94}),
    NAMED["Megatron DP2"].with_mistake(
        "one attention output transposed", weights="transposed", families=DENSE
    ),
    NAMED["Megatron DP2"].with_mistake("two key/value heads exchanged", weights="heads", families=DENSE),
    NAMED["Megatron DP2"].with_mistake("gate and up exchanged in one layer", weights="gate", families=DENSE),
    NAMED["Megatron EP2"].with_mistake("two experts exchanged", weights="experts"),
    NAMED["Megatron ZeRO-1 (distributed optimizer)"].with_mistake(
        "weight decay on all", mistake="weight decay on all"
    ),
    NAMED["Megatron TP2+SP"].with_mistake("sequence-parallel sum missing", mistake="sequence-parallel sum"),
    NAMED["Megatron DP2, FSDP2"].with_mistake("weight decay on all", mistake="weight decay on all"),
    NAMED["Megatron PP2xVPP2"].with_mistake("messages batched", mistake="batched messages"),
    NAMED["Megatron CP2"].with_mistake("chunks in a row", mistake="chunks in a row"),
    NAMED["Megatron CP2, all-to-all"].with_mistake("chunks in a row", mistake="chunks in a row"),
    NAMED["DeepSpeed CP2, ZeRO-2"].with_mistake("chunks in a row", mistake="chunks in a row"),
    NAMED["Megatron DP2, ZeRO-1 in 2 copies (hybrid)"].with_mistake(
        "sum over the copies missing", mistake="sum over the copies"
    ),
    NAMED["DeepSpeed ZeRO-2"].with_mistake("no clipping", optim={"clip_grad": 0.0}),
    NAMED["DeepSpeed TP2+SP, ZeRO-2"].with_mistake(
        "sequence-parallel sum missing", mistake="sequence-parallel hook"
    ),
    NAMED["Megatron DP2"].with_mistake("fp32 where bf16 is said", as_bf16=True, families=DENSE),
    # bf16 repeats the controls that exceed its rounding; a missing sum under sequence parallelism shows in
    # fp32 only.
    NAMED["Megatron ZeRO-1 (distributed optimizer), bf16"].with_mistake(
        "mean of means", mistake="mean of means"
    ),
    NAMED["Megatron CP2, bf16"].with_mistake("chunks in a row", mistake="chunks in a row"),
    NAMED["DeepSpeed ZeRO-2, bf16"].with_mistake("two key/value heads exchanged", weights="heads"),
)


def select_rows(families: Iterable[str], parts: Iterable[str]) -> dict[tuple[str, int], list[MatrixRow]]:
    """Returns (family, number of processes) -> rows of one start, controls last.

    `parts`: substrings of titles; none: all.
    """
    wanted = [part.lower() for part in parts]
    starts: dict[tuple[str, int], list[MatrixRow]] = {}
    for family in families:
        for row in (*LAYOUTS, *HALVES, *CONTROLS):
            if family in row.families and (not wanted or any(part in row.title.lower() for part in wanted)):
                starts.setdefault((family, row.world), []).append(row)
    return dict(sorted(starts.items(), key=lambda start: (start[0][1], start[0][0])))


def worker_case(row: MatrixRow, steps: int, weights: str, save: str) -> dict[str, Any]:
    """Returns the worker's description of a row."""
    description = {"changes": row.changes, "last": steps, "weights": weights, "save": save}
    return description | ({"break": row.mistake} if row.mistake else {})


def worker_job(model: ModelConfig, steps: int, cases: dict[str, Any]) -> dict[str, Any]:
    """Returns the worker's input."""
    return {"run": asdict(base_run(model, steps)), "steps": steps, "data_seed": DATA_SEED, "cases": cases}
