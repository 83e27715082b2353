"""Parallel layouts by short names, and cases of the engine worker."""

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
COPIES = SHARDS | {"num_distributed_optimizer_instances": 2}
