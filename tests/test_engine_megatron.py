"""The Megatron engine against a plain torch loop over Hugging Face's model on every layout, and its checkpoints between them."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import launch
import oracle
import pytest
from test_engine_deepspeed import DATA_SEED, RUN, STEPS, Curve, worst
from test_moe import MODELS as MOE
from test_moe import loaded

from ascendspeed import checkpoint, config, schedule, weights
from ascendspeed.checkpoint import KINDS
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


def recomputed(layouts: list[str], folder: Path) -> None:
    """Every method on every layout, with dropout in the attention and on the residual, to the last bit."""
    cases = {}
    for layout in layouts:
        for method, train in RECOMPUTE.items():
            if not ("vpp2" in layout and "2" in method):  # stages of one layer
                cases[f"{layout}: {method}"] = case(LAYOUTS[2][layout], train=train)
    cases["control"] = case(CP, train=RECOMPUTE["full"], **{"break": "other masks in the second pass"})
    curves = run_cases(2, cases, folder, 2, attention_dropout=0.2, hidden_dropout=0.2)
    control = curves.pop("control")
    for name, curve in curves.items():
        assert curve == curves[f"{name.partition(':')[0]}: none"], name
    assert len({str(curves[f"{layout}: none"]) for layout in layouts}) == len(layouts)
    assert control != curves["cp2: none"]


def test_recomputation_changes_not_a_bit(tmp_path):
    """The second pass draws the masks of the first."""
    recomputed(["cp2", "tp2 sp"], tmp_path)


@pytest.mark.slow
def test_recomputation_changes_not_a_bit_on_any_layout(tmp_path):
    recomputed(["cp2", "tp2", "pp2", "pp2 vpp2", "dp2, shards"], tmp_path)


def test_bf16_stays_in_a_band_around_fp32(expected, tmp_path):
    """20 steps: bf16 rounding is there, and no more than it; masters and sums of gradients are fp32."""
    cases = {name: case(LAYOUTS[2][name], optim={"bf16": True}) for name in ("dp2", "dp2, shards", "tp2 sp", "pp2 vpp2", "cp2")}
    for name, curve in run_cases(2, cases, tmp_path).items():
        loss, norm = worst(curve, expected)
        assert 1e-6 < loss < 3e-3, (name, loss)
        assert norm < 5e-2, (name, norm)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    """NaN gradients on one rank: skipped on all, and what follows is bit for bit as if the step had not been."""
    modes = {f"{name} {kind}": (LAYOUTS[2][name], {kind: True} if kind != "fp32" else {})
             for name in ("dp2", "dp2, shards", "tp2 sp", "pp2") for kind in ("fp32", "bf16")}  # fmt: skip
    cases = {f"{name}: clean": case(parallel, optim=optim) for name, (parallel, optim) in modes.items()}
    cases |= {f"{name}: poisoned": case(parallel, optim=optim, poison=1) for name, (parallel, optim) in modes.items()}
    curves = run_cases(2, cases, tmp_path, 3)
    for name in modes:
        poisoned = curves[f"{name}: poisoned"]
        assert poisoned.pop(1) == [None, None], name
        assert poisoned == curves[f"{name}: clean"], name


def resumed(world: int, layouts: dict[str, dict[str, Any]], kinds: list[str], folder: Path) -> None:
    """4 steps at once = 2 steps, a checkpoint, and 2 more in new objects: every loss and norm to the last bit, dropout included."""
    cases, names = {}, [(layout, kind) for layout in layouts for kind in kinds]
    for layout, kind in names:
        optim, at = {"bf16": kind == "bf16"}, str(folder / f"{layout} {kind}")
        cases[f"{layout} {kind}: whole"] = case(layouts[layout], optim=optim)
        cases[f"{layout} {kind}: first"] = case(layouts[layout], optim=optim, last=2, save=at)
        cases[f"{layout} {kind}: then"] = case(layouts[layout], optim=optim, first=2, load=at)
    curves = run_cases(world, cases, folder / "run", 4, attention_dropout=0.1, hidden_dropout=0.1)
    for name in (f"{layout} {kind}" for layout, kind in names):
        assert curves[f"{name}: first"] + curves[f"{name}: then"] == curves[f"{name}: whole"], name
        assert curves[f"{name}: whole"][-1] != curves[f"{name}: whole"][-2]


def test_the_same_layout_resumes_bit_identically(tmp_path):
    resumed(2, {name: LAYOUTS[2][name] for name in ("dp2, shards", "pp2 vpp2")}, ["fp32", "bf16"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_same_layout_resumes_bit_identically(world, tmp_path):
    resumed(world, LAYOUTS[world], ["fp32", "bf16"], tmp_path)


def digests(folder: str) -> dict[str, str]:
    """SHA-256 of every full tensor in a checkpoint."""
    opened = checkpoint.open_checkpoint(folder, say=lambda text: None)
    found = {}
    for kind in KINDS:
        for name, tensor in opened.tensors(kind):
            found[f"{kind} {name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert len(found) == 3 * len(list(weights.parameters(opened.config)))
    return found


ENGINES: dict[str, dict[str, Any]] = {f"zero {stage}": {"deepspeed": True, "zero_stage": stage} for stage in (1, 3)}


def moved(
    world: int, pairs: list[tuple[str, str]], layouts: dict[str, dict], expected: Curve, folder: Path, kind: str = "fp32"
) -> None:
    """A run is saved on one layout and goes on on another: the state is the same to the last bit, the curve that of the oracle."""
    optim, cases = {"bf16": kind == "bf16"}, {}
    for name in dict.fromkeys(first for first, _ in pairs):
        cases[name] = case(layouts[name], optim=optim, last=3, save=str(folder / name))
    for first, then in pairs:
        again = {"load": str(folder / first), "resave": str(folder / f"{first} then {then}")}
        cases[f"{first} then {then}"] = case(layouts[then], optim=optim, first=3, **again)
    first, then = pairs[0]
    for mistake in ("moments", "shared step", "masters not published"):
        more = {"load": str(folder / first), "break": mistake}
        cases[f"control: {mistake}"] = case(layouts[then], optim=optim, first=3, **more)
    curves = run_cases(world, cases, folder / "run", 6)
    for first, then in pairs:
        assert digests(str(folder / f"{first} then {then}")) == digests(str(folder / first)), (first, then)
    for name, curve in curves.items():
        loss, norm = worst(curve, expected[3:6] if len(curve) == 3 and ("then" in name or "control" in name) else expected[:3])
        print(f"{name}: {loss:.1e} {norm:.1e}")
        limit = 1e-5 if kind == "fp32" else 3e-3
        assert (loss > limit) if "control" in name else (loss < limit), (name, loss)


def test_another_layout_or_engine_goes_on(expected, tmp_path):
    pairs = [("pp2 vpp2", "dp2, shards"), ("dp2, shards", "cp2"), ("zero 3", "pp2"), ("pp2 vpp2", "zero 3"), ("zero 3", "tp2 sp")]
    moved(2, pairs, LAYOUTS[2] | ENGINES, expected, tmp_path)


@pytest.mark.slow
def test_every_layout_goes_on_as_every_other(expected, tmp_path):
    """Each hands over to the next, in a circle, and back."""
    layouts = LAYOUTS[4] | {f"tp2 {n}": TP | p for n, p in ENGINES.items()} | {"zero 3": ENGINES["zero 3"]}
    names = list(layouts)
    pairs = [pair for a, b in zip(names, names[1:] + names[:1], strict=True) for pair in ((a, b), (b, a))]
    moved(4, pairs, layouts, expected, tmp_path)


@pytest.mark.slow
def test_another_layout_goes_on_in_bf16(expected, tmp_path):
    pairs = [("dp2, shards", "pp2"), ("pp2", "zero 1"), ("zero 3", "tp2 sp"), ("cp2", "dp2, shards")]
    moved(2, pairs, LAYOUTS[2] | ENGINES, expected, tmp_path, "bf16")
