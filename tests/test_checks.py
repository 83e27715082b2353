"""Validation of runs: every illegal combination is an error of one line with the numbers and the legal
choices."""

from dataclasses import replace

import pytest

from ascendspeed.cli import validation
from ascendspeed.config.schema import DataConfig, OptimConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

MODEL = replace(families.preset("internlm-7b"), num_layers=12, num_attention_heads=32)
RUN = Run(
    MODEL, ParallelConfig(), OptimConfig(), DataConfig(data_path=("data",)), TrainConfig(global_batch_size=48)
)
GROUPED = {"family": "llama", "num_query_groups": 8, "add_qkv_bias": False, "add_dense_bias": False}
EXPERTS = {"family": "mixtral", "num_experts": 8, "add_qkv_bias": False, "add_dense_bias": False}
TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
VPP = "num_virtual_stages_per_pipeline_rank"
CP = "context_parallel_size"
EP = "expert_model_parallel_size"
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
COPIES = {"use_distributed_optimizer": True, "num_distributed_optimizer_instances": 2}
ZERO = {"deepspeed": True, "zero_stage": 3}


def run_of(changes):
    run = RUN
    for group, values in changes.items():
        run = replace(run, **{group: replace(getattr(run, group), **values)})
    return run


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (8, {"parallel": {TP: 8, "sequence_parallel": True}}),
        (16, {"model": GROUPED, "parallel": {TP: 16}}),  # fewer key/value heads than ranks
        (24, {"parallel": {TP: 2, PP: 3, VPP: 4, CP: 2}}),
        (
            4,
            {"parallel": {PP: 4}, "train": {"global_batch_size": 3}},
        ),  # fewer micro-batches than stages: slow, not wrong
        (8, {"model": EXPERTS, "parallel": {EP: 8}}),
        (8, {"model": EXPERTS, "parallel": {TP: 2, EP: 4, "sequence_parallel": True}}),
        (4, {"model": EXPERTS, "parallel": {CP: 2, EP: 4}}),  # experts are shared over sequences too
        (4, {"parallel": ZERO | {"zero_hpz_partition_size": 2, "zero_offload": "cpu"}}),
        (4, {"parallel": ZERO | {"zero_offload": "nvme", "zero_offload_nvme_path": "/nvme"}}),
        (
            2,
            {
                "parallel": {
                    "use_distributed_optimizer": True,
                    "overlap_grad_reduce": True,
                    "overlap_param_gather": True,
                }
            },
        ),
        (2, {"parallel": {PP: 2}, "train": {"recompute_granularity": "full", "recompute_num_layers": 3}}),
        (
            2,
            {
                "train": {
                    "recompute_granularity": "full",
                    "recompute_method": "block",
                    "recompute_num_layers": 12,
                }
            },
        ),
        (1, {"train": {"recompute_granularity": "selective"}}),
        (4, {"model": GROUPED, "parallel": {TP: 2, CP: 2, "cp_comm_type": "a2a"}}),
        (2, {"parallel": ZERO | {CP: 2, "cp_comm_type": "a2a", "zero_hpz_partition_size": 2}}),
        (4, {"parallel": {PP: 4, FIRST: 2, LAST: 4}}),
        (4, {"parallel": {PP: 2, VPP: 2, FIRST: 4}}),
        (8, {"parallel": {CP: 2, **COPIES}}),
        (
            32,
            {
                "model": {
                    "num_layers": 80,
                    "hidden_size": 8192,
                    "ffn_hidden_size": 22016,
                    "num_attention_heads": 64,
                },
                "parallel": {TP: 8, PP: 4, "sequence_parallel": True},
                "optim": {"bf16": True},
                "train": {"micro_batch_size": 2, "global_batch_size": 128},
            },
        ),
    ],
)
def test_legal_combinations(world, changes):
    validation.check_run(run_of(changes), world)


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (
            3,
            {"parallel": {TP: 3}},
            "32 attention heads, 32 key/value heads and an FFN width of 11008 do not split over 3 .* choose "
            "1, 2",
        ),
        (
            3,
            {"model": GROUPED, "parallel": {TP: 3}},
            "32 attention heads, 8 key/value heads .* choose 1, 2, 4, 8, 16, 32",
        ),
        (5, {"parallel": {PP: 5}}, "12 layers do not split over 5 pipeline stages; choose 1, 2, 3, 4, 6, 12"),
        (
            4,
            {"parallel": {PP: 4, VPP: 2}},
            "the 3 layers of each of 4 pipeline stages do not split into 2 virtual stages; choose 1, 3",
        ),
        (1, {"parallel": {FIRST: 2}}, "--decoder-first-pipeline-num-layers 2: there is one pipeline stage"),
        (
            4,
            {"parallel": {PP: 4, FIRST: 2, LAST: 3}},
            "-first-pipeline-num-layers 2 and .*: of 12 layers 7 are left for 2 stages",
        ),
        (2, {"parallel": {PP: 2, FIRST: 6, LAST: 5}}, "of 12 layers 1 are left for no stage"),
        (2, {"parallel": {PP: 2, FIRST: 12}}, "of 12 layers 0 are left for 1 stages"),
        (2, {"parallel": {PP: 2, FIRST: 0}}, "of 12 layers 12 are left"),
        (
            4,
            {"parallel": {PP: 2, VPP: 2, FIRST: 5}},
            "the 5 layers of each of 2 pipeline stages do not split into 2 virtual stages; choose 1, 5",
        ),
        (
            2,
            {
                "parallel": {PP: 2, FIRST: 8},
                "train": {"recompute_granularity": "full", "recompute_num_layers": 8},
            },
            "--recompute-num-layers 8 does not divide the 4 layers .*; choose 1, 2, 4",
        ),
        (
            2,
            {"parallel": {"cp_comm_type": "a2a"}},
            "--cp-comm-type a2a needs --context-parallel-size",
        ),
        (
            16,
            {"model": GROUPED, "parallel": {TP: 4, CP: 4, "cp_comm_type": "a2a"}},
            "8 key/value heads / TP 4 = 2 do not split over 4 .* choose --context-parallel-size 1, 2, or",
        ),
        (3, {"parallel": COPIES}, "--num-distributed-optimizer-instances 2 does not divide the 3 replicas"),
        (
            4,
            {"model": EXPERTS, "parallel": {EP: 4, **COPIES}},
            "does not divide the 4 replicas .DP x CP., 1 of the experts; choose 1$",
        ),
        (
            2,
            {"parallel": {"num_distributed_optimizer_instances": 2}},
            "--num-distributed-optimizer-instances 2 needs --use-distributed-optimizer",
        ),
        (2, {"parallel": COPIES | {"overlap_grad_reduce": True}}, "does not go with --overlap-grad-reduce"),
        (2, {"parallel": {VPP: 2}}, "--num-virtual-stages-per-pipeline-rank 2 needs pipeline stages"),
        (
            2,
            {"parallel": {PP: 2, VPP: 2}, "train": {"global_batch_size": 3}},
            "3 micro-batches per iteration are not a multiple of 2 pipeline stages.* multiple of 2",
        ),
        (
            8,
            {"parallel": {PP: 2, VPP: 2}, "train": {"global_batch_size": 12}},
            "3 micro-batches per iteration .* 2 pipeline stages.* --global-batch-size that is a multiple of "
            "8",
        ),
        (
            6,
            {"parallel": {TP: 4}},
            r"6 processes do not split into groups of 4 for TP 4; start a multiple of 4 \(NPROC=4\)",
        ),
        (
            12,
            {"parallel": {TP: 2, PP: 2, CP: 2}},
            "12 processes do not split into groups of 8 for TP 2 x PP 2 x CP 2; start a multiple",
        ),
        (
            8,
            {"train": {"micro_batch_size": 4}},
            "--global-batch-size 48 .* --micro-batch-size 4 x 8 data-parallel ranks = 32; choose 32 or 64$",
        ),
        (
            4,
            {"parallel": {CP: 2}, "train": {"micro_batch_size": 32}},
            "--micro-batch-size 32 x 2 data-parallel ranks = 64; choose 64$",
        ),
        (
            2,
            {"parallel": {TP: 2, "sequence_parallel": True}, "data": {"seq_length": 33}},
            "--seq-length 33 does not split over 2 ranks for --sequence-parallel; choose 32 or 34$",
        ),
        (
            2,
            {"parallel": {CP: 2}, "data": {"seq_length": 30}},
            "--seq-length 30 does not split into 2 x CP = 4 chunks .*; choose 28 or 32$",
        ),
        (
            8,
            {"parallel": {TP: 4, CP: 2, "sequence_parallel": True}, "data": {"seq_length": 36}},
            "--seq-length 36 / CP 2 = 18 does not split over 4 ranks .*; choose 32 or 40$",
        ),
        (
            3,
            {"model": EXPERTS, "parallel": {EP: 3}},
            "8 experts do not split over 3 expert-parallel ranks; choose 1, 2, 4, 8",
        ),
        (
            2,
            {"parallel": {EP: 2}},
            "a model without experts does not split over 2 expert-parallel ranks; choose 1",
        ),
        (
            6,
            {"model": EXPERTS, "parallel": {EP: 4}},
            r"the 6 ranks \(DP 6 x CP 1\) .* groups of 4; choose 1, 2, 3, 6 or start more",
        ),
        (2, {"model": EXPERTS, "parallel": {TP: 2}}, "add --sequence-parallel"),
        (
            2,
            {"model": EXPERTS, "parallel": {EP: 2}, "optim": {"fp16": True}},
            "--fp16 with --expert-model-parallel-size 2: .*--bf16",
        ),
        (
            2,
            {"parallel": ZERO | {PP: 2}},
            "--pipeline-model-parallel-size 2: the DeepSpeed engine has no pipeline stages .ZeRO-2 and 3",
        ),
        (
            2,
            {"parallel": ZERO | {"num_distributed_optimizer_instances": 2}},
            "--num-distributed-optimizer-instances 2: the DeepSpeed engine shards the states",
        ),
        (
            2,
            {"model": EXPERTS, "parallel": ZERO | {EP: 2}},
            "--expert-model-parallel-size 2: the DeepSpeed engine does not share experts",
        ),
        (
            2,
            {"parallel": ZERO | {"use_distributed_optimizer": True}},
            "--use-distributed-optimizer: the DeepSpeed engine has ZeRO",
        ),
        (
            2,
            {"parallel": ZERO | {"overlap_grad_reduce": True}},
            "--overlap-grad-reduce: the DeepSpeed engine overlaps by itself",
        ),
        (
            2,
            {"parallel": {"overlap_param_gather": True}},
            "needs --use-distributed-optimizer and --overlap-grad-reduce",
        ),
        (
            2,
            {"parallel": {"deepspeed_config": "ds.json"}},
            "--deepspeed-config ds.json: only the DeepSpeed engine has it; add --deepspeed",
        ),
        (2, {"parallel": {"zero_offload": "cpu"}}, "--zero-offload cpu: only the DeepSpeed engine has it"),
        (
            2,
            {"parallel": {"zero_hpz_partition_size": 2}},
            "--zero-hpz-partition-size 2: only the DeepSpeed engine has it",
        ),
        (
            2,
            {"parallel": ZERO | {"zero_stage": 2, "zero_hpz_partition_size": 2}},
            "needs --zero-stage 3 and TP 1, not 2 and TP 1",
        ),
        (
            4,
            {"parallel": ZERO | {TP: 2, "zero_hpz_partition_size": 2}},
            "needs --zero-stage 3 and TP 1, not 3 and TP 2",
        ),
        (
            6,
            {"parallel": ZERO | {"zero_hpz_partition_size": 4}},
            "4 does not divide 6 ranks .DP 6 x CP 1.; choose 1, 2, 3, 6",
        ),
        (
            2,
            {"parallel": ZERO | {"zero_stage": 0, "zero_offload": "cpu"}},
            "--zero-offload cpu needs --zero-stage 1, 2 or 3, not 0",
        ),
        (
            2,
            {"parallel": ZERO | {"zero_stage": 2, "zero_offload": "nvme", "zero_offload_nvme_path": "/n"}},
            "needs --zero-stage 3, not 2",
        ),
        (
            2,
            {"parallel": ZERO | {"zero_offload": "nvme"}},
            "--zero-offload-nvme-path, a folder on a local disk, belong together",
        ),
        (2, {"parallel": ZERO | {"zero_offload_nvme_path": "/n"}}, "belong together"),
        (
            1,
            {"parallel": ZERO | {"zero_stage": 0}, "optim": {"bf16": True}},
            "--zero-stage 0 does not keep fp32 masters for --bf16",
        ),
        (2, {"parallel": {CP: 0}}, "--context-parallel-size 0: must be at least 1"),
        (2, {"parallel": {EP: -1}}, "--expert-model-parallel-size -1: must be at least 1"),
        (1, {"train": {"recompute_method": "block"}}, "belong to --recompute-granularity full; add it"),
        (
            1,
            {"train": {"recompute_granularity": "selective", "recompute_num_layers": 2}},
            "belong to --recompute-granularity full",
        ),
        (
            2,
            {"parallel": {PP: 2}, "train": {"recompute_granularity": "full", "recompute_num_layers": 4}},
            "--recompute-num-layers 4 does not divide the 6 layers .* choose 1, 2, 3, 6",
        ),
        (
            2,
            {
                "parallel": {PP: 2, VPP: 3},
                "train": {
                    "recompute_granularity": "full",
                    "recompute_method": "block",
                    "recompute_num_layers": 3,
                },
            },
            "--recompute-num-layers 3 is more than the 2 layers .* choose 1 to 2",
        ),
        (
            1,
            {"train": {"recompute_granularity": "full", "recompute_num_layers": 0}},
            "--recompute-num-layers 0: must be at least 1",
        ),
    ],
)
def test_illegal_combinations_are_errors_of_one_line(world, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        validation.check_run(run_of(changes), world)
    assert "\n" not in str(caught.value)
