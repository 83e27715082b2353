"""The Megatron engine against a plain torch loop over Hugging Face's model, on every layout; its checkpoints, from one to another."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import launch
import oracle
import pytest
from test_engine_deepspeed import DATA_SEED, RUN, STEPS, Curve, worst
from test_moe import MODELS as MOE
from test_moe import loaded

from ascendspeed import config, schedule, weights
from ascendspeed.config import ModelConfig, ParallelConfig

MODEL = replace(RUN.model, num_layers=4)
RUN = replace(RUN, model=MODEL, parallel=ParallelConfig())
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
SP, SHARDS = {"sequence_parallel": True}, {"use_distributed_optimizer": True}
OVERLAP = SHARDS | {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": {},
        "dp2, shards": SHARDS,
        "dp2, overlap": OVERLAP,
        "tp2": TP,
        "tp2 sp": TP | SP,
        "pp2": PP,
        "pp2 vpp2": PP | VPP,
        "cp2": CP,
        "cp2, shards": CP | SHARDS,
    },
    4: {
        "pp4": {"pipeline_model_parallel_size": 4},
        "tp2 pp2": TP | PP,
        "tp2 cp2 sp": TP | CP | SP,
        "pp2 vpp2 dp2, overlap": PP | VPP | OVERLAP,
        "cp2 pp2": CP | PP,
        "cp4": {"context_parallel_size": 4},
        "tp2 dp2 sp, shards": TP | SP | SHARDS,
        "cp2 dp2, shards": CP | SHARDS,
    },
    8: {"tp2 pp2 dp2, shards": TP | PP | SHARDS, "tp2 cp2 pp2 vpp2 sp": TP | CP | PP | VPP | SP},
}
CONTROLS = {  # mistakes that must be seen, and where
    "tp2 sp": "sequence-parallel sum",
    "pp2 vpp2": "batched messages",
    "cp2": "chunks in a row",
    "dp2": "mean of means",
    "dp2, shards": "weight decay on all",
}


def run_cases(world: int, cases: dict[str, Any], folder: Path, steps: int = STEPS, **changes: Any) -> dict[str, Curve]:
    """Every case in one start of processes: case -> [[loss, gradient norm], ...]."""
    run = replace(RUN, train=replace(RUN.train, **changes))
    job = {"run": config.to_dict(run), "steps": steps, "data_seed": DATA_SEED, "cases": cases}
    return launch.ranks(world, "engine_worker.py", job, folder, timeout=900)


def case(parallel: dict[str, Any], *, optim: dict | None = None, train: dict | None = None, **more: Any) -> dict[str, Any]:
    return {"changes": {"parallel": parallel, "optim": optim or {}, "train": train or {}}, **more}


def trained(model: Any, vocab: int, steps: int = STEPS) -> Curve:
    """Plain torch over Hugging Face's model, one process, the global batch at once."""
    data = oracle.batches(vocab, steps, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)
    lrs = [schedule.lr_at(i, RUN.optim, STEPS) for i in range(steps)]
    return oracle.train(model, data, lrs, vars(RUN.optim))


def reference(model: ModelConfig = MODEL) -> Any:
    return oracle.hugging_face(model, dict(weights.random_tensors(model, RUN.train.seed)))


@pytest.fixture(scope="module")
def expected() -> Curve:
    return trained(reference(), MODEL.vocab_size)


def compare(expected: Curve, curves: dict[str, Curve]) -> None:
    """Every curve within 1e-5 of its part of the expected one; a control is not."""
    for name, curve in curves.items():
        if name.endswith(": evaluated"):
            assert curve[0][0] == pytest.approx(expected[0][0], rel=1e-6), name
            continue
        loss, norm = worst(curve, expected[-len(curve) :] if "then" in name else expected[: len(curve)])
        print(f"{name}: {loss:.1e} {norm:.1e}")
        if "control" in name:
            assert loss > 1e-5, name
        else:
            assert loss < 1e-5, (name, loss)
            assert norm < 1e-5, (name, norm)


def controls() -> dict[str, Any]:
    return {
        f"control: {name}, {mistake}": case(LAYOUTS[2][name], **{"break": mistake}, last=8) for name, mistake in CONTROLS.items()
    }


def test_losses_equal_a_plain_torch_loop(expected, tmp_path):
    """20 steps, masks that differ from sample to sample, accumulation, clipping, decay, warmup: 1e-5 relative in fp32."""
    cases = {name: case(parallel, evaluate="vpp2" in name or "cp2" in name) for name, parallel in LAYOUTS[2].items()}
    compare(expected, run_cases(2, cases | controls(), tmp_path))


def test_losses_on_four_ranks(expected, tmp_path):
    """The same for three layouts and fewer steps; the slow test has them all."""
    compare(expected, run_cases(4, {name: case(LAYOUTS[4][name], last=6) for name in list(LAYOUTS[4])[:3]}, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [4, 8])
def test_every_layout_equals_a_plain_torch_loop(world, expected, tmp_path):
    compare(expected, run_cases(world, {name: case(parallel) for name, parallel in LAYOUTS[world].items()}, tmp_path))


TIED = {"family": "llama", "tie_embeddings": True, "add_qkv_bias": False, "add_dense_bias": False}
GROUPED = {"family": "llama", "num_query_groups": 1, "add_qkv_bias": False, "add_dense_bias": False}


@pytest.mark.slow
def test_other_architectures_equal_a_plain_torch_loop(tmp_path):
    """Embeddings tied over stages; fewer key/value heads than tensor-parallel ranks, and shared sequences."""
    of = {"tied": replace(MODEL, **TIED), "grouped": replace(MODEL, **GROUPED)}
    layouts = {"pp2": PP, "pp2 vpp2": PP | VPP, "cp2": CP, "tp2 sp": TP | SP, "dp2, shards": SHARDS}
    cases = {f"{m}, {n}": case(p, last=8) for m in of for n, p in layouts.items()}
    for name in cases:
        cases[name]["changes"]["model"] = TIED if name.startswith("tied") else GROUPED
    curves = run_cases(2, cases, tmp_path)
    for name, model in of.items():
        compare(trained(reference(model), model.vocab_size, 8), {n: c for n, c in curves.items() if n.startswith(name)})


EXPERTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"ep2": EP, "ep2, shards": EP | SHARDS, "pp2": PP, "cp2": CP},
    4: {"ep2 pp2": EP | PP, "ep2 tp2 sp": EP | TP | SP, "ep2 dp4, shards": EP | SHARDS, "ep4": {"expert_model_parallel_size": 4}},
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_experts_equal_hugging_face(world, tmp_path):
    """Experts on different ranks, and over a checkpoint from some to others."""
    model, at = replace(MOE["mixtral"], num_layers=2), str(tmp_path / "ckpt")
    steps = 6
    wanted = trained(loaded(model, dict(weights.random_tensors(model, RUN.train.seed)), tmp_path / "hf"), model.vocab_size, steps)
    cases = {name: case(parallel) for name, parallel in EXPERTS[world].items()}
    first, *others = cases
    cases[f"{first}, first"] = case(EXPERTS[world][first], last=3, save=at)
    cases |= {f"then {name}": case(EXPERTS[world][name], first=3, load=at) for name in others}
    cases |= {"then dp": case({}, first=3, load=at)}
    for one in cases.values():
        one["changes"]["model"] = asdict(model)
    compare(wanted, run_cases(world, cases, tmp_path / "run", steps))


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full"},
    "full, groups of 2": {"recompute_granularity": "full", "recompute_num_layers": 2},
    "block 1": {"recompute_granularity": "full", "recompute_method": "block"},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize(
    "layout",
    [
        "cp2",
        "tp2 sp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "pp2", "pp2 vpp2", "dp2, shards")),
    ],
)
def test_recomputation_changes_not_a_bit(layout, tmp_path):
    """With dropout in the attention and on the residual: the second pass draws the masks of the first."""
    methods = {name: train for name, train in RECOMPUTE.items() if not ("vpp2" in layout and "2" in name)}
    cases = {name: case(LAYOUTS[2][layout], train=train) for name, train in methods.items()}
    cases["control: other masks"] = case(LAYOUTS[2][layout], train={"seed": 5})
    curves = run_cases(2, cases, tmp_path, 3, attention_dropout=0.2, hidden_dropout=0.2)
    for name in methods:
        assert curves[name] == curves["none"], name
    assert curves["control: other masks"] != curves["none"]
