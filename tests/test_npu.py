"""Commands and engines on a stand-in of an Ascend NPU, which refuses what torch_npu 2.13 refuses there.

The stand-in computes on the CPU, so results are those of a CPU, but for the gradient norms that it sums in
fp32 and the kernels that it calls.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import launch
from helpers.chat import vocabulary
from helpers.corpus import words
from helpers.engines import DATA_SEED, RUN, changes
from safetensors.torch import save_file

from ascendspeed.config import schema
from ascendspeed.data.indexed.megatron_pair import PairWriter
from ascendspeed.tokenization import tokenizer
from ascendspeed.training.metric_lines import TrainLine, read_lines

STEPS = 2
MEGATRON = {"deepspeed": False, "zero_stage": 2}
WORKER = "tests/helpers/npu_worker.py"


def bf16(**parallel):
    return {"changes": {"parallel": parallel, "optim": {"bf16": True}}}


LAYOUTS = {
    "zero 0": {"changes": changes(0)},
    "zero 1": bf16(zero_stage=1),
    "zero 2": bf16(zero_stage=2),
    "zero 3": bf16(zero_stage=3),
    "distributed optimizer": bf16(**MEGATRON, use_distributed_optimizer=True),
    "tp2 sp": bf16(**MEGATRON, tensor_model_parallel_size=2, sequence_parallel=True),
}
"""Cases of two ranks."""


def job(cases, device: str = "npu"):
    return {
        "run": schema.to_dict(RUN),
        "steps": STEPS,
        "data_seed": DATA_SEED,
        "cases": cases,
        "device": device,
    }


def documents(path: Path, count: int) -> Path:
    """Packed rows of [steps, samples, s]: `count` documents in a row, the first one longer."""
    length = RUN.data.seq_length
    tokens = torch.randint(125, (STEPS, 4, length), generator=torch.Generator().manual_seed(5))
    first = length - count + 1
    positions = torch.cat((torch.arange(first), torch.zeros(count - 1, dtype=torch.long)))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, -1), "loss_mask": torch.ones(tokens.shape)}
    batch["position_ids"] = positions.expand_as(tokens).contiguous()
    save_file(batch, path)
    return path


@pytest.mark.parametrize(
    "names",
    [("zero 1", "zero 3", "distributed optimizer"), pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)],
    ids=["few", "all"],
)
def test_both_engines_have_the_cpus_losses(names, tmp_path, monkeypatch):
    data = str(documents(tmp_path / "packed", 9))
    layouts = {name: LAYOUTS[name] for name in names}
    packed = {
        f"{name}, packed": LAYOUTS[name] | {"data": data}
        for name in (("zero 1", "tp2 sp") if len(names) == len(LAYOUTS) else ("tp2 sp",))
    }
    expected = launch.ranks(2, "engine_worker.py", job(layouts | packed, "cpu"), tmp_path / "cpu")
    monkeypatch.setenv("NPU_STANDIN_LOG", str(tmp_path / "calls"))
    curves = launch.ranks(2, "npu_worker.py", job(layouts | packed), tmp_path / "npu")
    for name, curve in curves.items():
        tolerance = 2e-3 if "packed" in name else 1e-6  # bf16 in another kernel; fp32 norms
        losses = [loss for loss, _ in curve]
        assert losses == pytest.approx([loss for loss, _ in expected[name]], rel=tolerance), name
        assert [norm for _, norm in curve] == pytest.approx([n for _, n in expected[name]], rel=tolerance), (
            name
        )
    for name in ("zero 1", "distributed optimizer"):
        assert [loss for loss, _ in curves[name]] == [loss for loss, _ in expected[name]]
    calls = (tmp_path / "calls").read_text().split("\n")
    assert "torch_npu.npu_fusion_attention" in calls
    assert not any("float64" in call for call in calls)
    page = (launch.ROOT / "docs/npu.md").read_text()
    called = {call.removeprefix("torch.npu.") for call in calls if call.startswith("torch.npu.")}
    assert len(called) > 15
    assert [name for name in called if f"`{name}`" not in page] == []


@pytest.mark.parametrize(
    ("correction", "layout", "message"),
    [
        ("sums", bf16(**MEGATRON), "HCCL allreduce: Unsupported data type torch.float64"),
        ("norm", bf16(zero_stage=3), "HCCL allreduce: Unsupported data type torch.float64"),
        ("types", bf16(**MEGATRON), "torch.npu.BFloat16Tensor"),
    ],
)
def test_each_correction_is_needed(correction, layout, message, tmp_path, monkeypatch):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job({"case": layout}) | {"out": str(tmp_path / "out")}))
    monkeypatch.setenv("NPU_STANDIN_BREAK", correction)
    done = launch.script(WORKER, path)
    assert done.returncode
    assert message in done.stderr


def test_more_packed_sequences_than_the_kernel_takes_go_in_several_calls(monkeypatch):
    from ascendspeed.distributed import training_kernels

    calls = []

    def kernel(q, k, v, heads, layout, *, actual_seq_qlen, actual_seq_kvlen, **_):
        calls.append(actual_seq_qlen)
        assert actual_seq_qlen == actual_seq_kvlen
        assert len(q) == len(k) == len(v) == actual_seq_qlen[-1]
        return (q + v,)

    ends = [3, *range(4, 2054)]
    q = torch.arange(ends[-1] * 2.0).view(-1, 1, 2)
    bounds = training_kernels.SequenceBounds(ends, torch.tensor([0, *ends]), 3)
    assert torch.equal(training_kernels._varlen_npu(kernel, q, q, 2 * q, bounds), 3 * q)
    assert [len(call) for call in calls] == [1024, 1024, 3]
    assert [call[0] for call in calls] == [3, 1, 1]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with tokenizer/ and the tokens of short texts."""
    folder = tmp_path_factory.mktemp("npu")
    vocabulary(folder / "tokenizer", ["<eoh>", "<eoa>"])
    encode = tokenizer.load(folder / "tokenizer").encode
    texts = [[1, *encode(text).tolist(), 2] for text in words(100)]
    with PairWriter(folder / "data", np.dtype(np.uint16)) as pair:
        pair.add(np.concatenate(texts), np.array([len(item) for item in texts], np.int32))
        pair.commit({"tokens": pair.tokens, "max_token": max(map(max, texts))})
    return folder


def train(work: Path, name: str, *flags: object, save: str = "ckpt") -> list[float]:
    """Trains on the stand-in with the recipes' kernels; returns the losses of the log."""
    launch.must(
        *(WORKER, "pretrain_intern.py", "--device", "npu", "--distributed-backend", "nccl", "--bf16"),
        *("--model", "internlm-tiny", "--num-layers", 2, "--vocab-size", 512, "--seq-length", 64),
        *("--micro-batch-size", 2, "--global-batch-size", 4, "--lr", "5e-3", "--min-lr", "5e-4"),
        *("--use-fused-rmsnorm", "--use-fused-rotary-pos-emb", "--mlp-layer-fusion", "--split", "100,0,0"),
        *("--data-path", work / "data", "--log-dir", work / name, "--save", work / save, *flags),
    )
    return [line.loss for line in read_lines(work / name / "train.log") if isinstance(line, TrainLine)]


@pytest.mark.slow
def test_commands_train_resume_generate_and_evaluate(work, tmp_path, monkeypatch):
    monkeypatch.setenv("NPU_STANDIN_LOG", str(tmp_path / "calls"))
    losses = train(work, "megatron", "--train-iters", 3, "--exit-interval", 2, "--lr-decay-iters", 3)
    log = (work / "megatron" / "train.log").read_text()
    assert "device: npu (Ascend 910 stand-in), hccl" in log
    assert (
        "kernels: rms_norm: torch_npu.npu_rms_norm; rotary: torch_npu.npu_rotary_mul; "
        "swiglu: torch_npu.npu_swiglu; varlen: torch_npu.npu_fusion_attention" in log
    )
    calls = set((tmp_path / "calls").read_text().split("\n"))
    assert {"torch_npu.npu_rms_norm", "torch_npu.npu_rotary_mul", "torch_npu.npu_swiglu"} <= calls
    monkeypatch.delenv("NPU_STANDIN_LOG")
    deepspeed = ("--deepspeed", "--zero-stage", 1, "--load", work / "ckpt")
    losses += train(work, "deepspeed", "--train-iters", 3, "--lr-decay-iters", 3, *deepspeed)
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert "resumes from" in (work / "deepspeed" / "train.log").read_text()

    load = ("--load", work / "ckpt", "--tokenizer-name-or-path", work / "tokenizer")
    answers, scores = {}, {}
    for device, worker in {"npu": (WORKER,), "cpu": ()}.items():
        flags = ("--device", device, *load)
        generate = ("tasks/inference/generate.py", "--prompt", "Document 7", "--max-new-tokens", 8)
        answers[device] = launch.must(*worker, *generate, *flags)
        output = tmp_path / device
        evaluate = ("tasks/evaluation/evaluation.py", "--task", "mmlu", "--limit", 1, "--output-dir", output)
        data = ("--task-data-path", launch.ROOT / "tasks/evaluation/sample_mmlu")
        launch.must(*worker, *evaluate, *data, *flags)
        records = [json.loads(line) for line in (output / "questions.jsonl").read_text().splitlines()]
        scores[device] = [record["predicted"] for record in records if "predicted" in record]
    assert answers["npu"] == answers["cpu"]
    assert scores["npu"] == scores["cpu"]
    assert scores["npu"]


@pytest.mark.slow
def test_kernels_of_inference_are_called(work, tmp_path, monkeypatch):
    train(work, "served", "--train-iters", 2, save="served-ckpt")
    calls = {}
    for name, flags in {"lookup": ("--lookup", 2), "w8a16": ("--quantize", "w8a16")}.items():
        monkeypatch.setenv("NPU_STANDIN_LOG", str(tmp_path / name))
        generate = ("tasks/inference/generate.py", "--prompt", "Document 7", "--max-new-tokens", 8)
        load = ("--load", work / "served-ckpt", "--tokenizer-name-or-path", work / "tokenizer")
        launch.must(WORKER, *generate, "--device", "npu", "--bf16", *load, *flags)
        calls[name] = json.loads((tmp_path / f"{name}.json").read_text())
    attention, product = "torch_npu.npu_fused_infer_attention_score", "torch_npu.npu_weight_quant_batchmatmul"
    # Each is called once to compare its first result.
    assert calls["lookup"][attention] > 1
    assert calls["lookup"][product] == 1
    assert calls["w8a16"][product] > 1
    assert calls["w8a16"][attention] == 1  # one prompt without lookup has the cache of a batch
