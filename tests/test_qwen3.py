"""Qwen3 and Qwen3-MoE trained by both engines against plain torch over Hugging Face's classes."""

from dataclasses import asdict, replace

import pytest
from helpers import oracle
from helpers.engines import DATA_SEED, RUN, run_cases, worst
from helpers.family_models import MODELS
from helpers.published_configs import QWEN3_8B
from safetensors.torch import save_file

from ascendspeed.cli.train_args import resolve
from ascendspeed.config import lr_schedule
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS, family_of
from ascendspeed.utils.errors import UserError

STEPS = 3
QWEN3_30B = QWEN3_8B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
}


def expected(name: str, folder) -> list:
    """Curve of a plain torch loop; the weights are saved in `folder`."""
    reference, published = oracle.native(MODELS[name])
    weights = {
        p.name: param_mapping.hf_to_megatron(MODELS[name], p, published).contiguous()
        for p in param_mapping.parameters(MODELS[name])
    }
    save_file(weights, folder / name)
    data = oracle.batches(125, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED)
    lrs = [lr_schedule.lr_at(i, RUN.optim, STEPS) for i in range(STEPS)]
    return oracle.train(reference.train(), data, lrs, vars(RUN.optim))


def case(name: str, folder, mistake: str = "", **parallel) -> dict:
    changes = {"model": asdict(MODELS[name]), "parallel": {"zero_stage": 1, **parallel}}
    return {"weights": str(folder / name), "changes": changes} | ({"break": mistake} if mistake else {})


def compare(cases: dict, layout: str, references: dict, folder) -> None:
    for name, curve in run_cases(layout, cases, folder, STEPS, train_iters=STEPS).items():
        loss, norm = worst(curve, references[name.partition(",")[0]])
        print(f"{name}: {loss:.1e} {norm:.1e}")
        assert (norm > 1e-4) if "control" in name else (loss < 1e-5 and norm < 1e-5), (name, loss, norm)


@pytest.mark.slow
def test_tensor_parallel_equals_hugging_face(tmp_path):
    """Heads of other ranks contribute to the gradients of the norms of q and k, with sequence parallel or
    not."""
    cases = {
        "qwen3, zero 1": case("qwen3", tmp_path),
        "qwen3, megatron": case("qwen3", tmp_path, deepspeed=False),
        "qwen3, control: own heads only": case("qwen3", tmp_path, "sequence-parallel hook"),
        "qwen3_moe, megatron": case("qwen3_moe", tmp_path, deepspeed=False, sequence_parallel=True),
    }
    references = {name: expected(name, tmp_path) for name in ("qwen3", "qwen3_moe")}
    compare(cases, "tp2-dp1", references, tmp_path / "run")


@pytest.mark.slow
def test_other_layouts_equal_hugging_face(tmp_path):
    references = {name: expected(name, tmp_path) for name in ("qwen3", "qwen3_moe")}
    two, four = {}, {}
    for name in references:
        two[f"{name}, pp 2"] = case(name, tmp_path, deepspeed=False, pipeline_model_parallel_size=2)
        two[f"{name}, zero 3"] = case(name, tmp_path, zero_stage=3)
        four[f"{name}, tp 4"] = case(
            name, tmp_path, deepspeed=False, tensor_model_parallel_size=4, sequence_parallel=True
        )
        four[f"{name}, tp 2 pp 2"] = case(
            name, tmp_path, deepspeed=False, pipeline_model_parallel_size=2, sequence_parallel=True
        )
    two["qwen3_moe, ep 2"] = case("qwen3_moe", tmp_path, deepspeed=False, expert_model_parallel_size=2)
    compare(two, "tp1-dp2", references, tmp_path / "two")
    compare(four, "tp2-dp2", references, tmp_path / "four")


@pytest.mark.parametrize(
    ("published", "preset"), [(QWEN3_8B, "qwen3-8b"), (QWEN3_30B, "qwen3-30b-a3b")], ids=["dense", "experts"]
)
def test_a_published_config(published, preset):
    config = family_of(published).read_config(published)
    assert config == replace(PRESETS[preset], moe_aux_loss_coeff=published.get("router_aux_loss_coef", 0.0))
    written = FAMILIES[config.family].write_config(config)
    same = {name: published[name] for name in written if name in published and name != "architectures"}
    assert {name: written[name] for name in same} == same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model qwen3-tiny --no-qk-layernorm",
            "--no-qk-layernorm: the models of the family qwen3 have them",
        ),
        ("--model llama-tiny --qk-layernorm", "--qk-layernorm: the models of the family llama have no norms"),
    ],
)
def test_norms_are_those_of_the_family(words, message):
    with pytest.raises(UserError, match=message):
        resolve(["--mock-data", *words.split()], 1)
