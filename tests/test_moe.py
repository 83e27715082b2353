"""Mixtral and Qwen2-MoE against Hugging Face's classes: files, logits on every layout, training, refusals."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import oracle
from helpers.engines import DATA_SEED, RUN, run_cases, worst
from helpers.models import Case, ours, tokens_of, under
from helpers.moe import MIXTRAL, MODELS, QWEN2_MOE, hugging_face, loaded
from safetensors.torch import load_file

from ascendspeed.cli import validation
from ascendspeed.config import lr_schedule, schema
from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.models import estimates, param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS, family_of
from ascendspeed.utils.errors import UserError

NAMES = ("mixtral", "qwen2_moe")
EXPERT = "decoder.layers.{}.mlp.experts.local_experts.{}.linear_fc{}.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name -> (directory of `save_pretrained`, the saved model); random weights, every expert in use."""

    def make(name: str):
        folder = tmp_path_factory.mktemp("hf")
        model_class, settings = hugging_face(MODELS[name])
        torch.manual_seed(5)
        model = model_class(settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
            model.model.embed_tokens.weight.mul_(10)  # tokens that differ go to different experts
            for scores in model(tokens_of(MODELS[name]), output_router_logits=True).router_logits:
                assert (
                    scores.topk(MODELS[name].moe_router_topk).indices.unique().numel()
                    == MODELS[name].num_experts
                )
        model.save_pretrained(folder)
        return folder, model

    return {name: make(name) for name in MODELS}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(open_reader(folder).tensors())


def largest_difference(
    cpu, name: str, model: ModelConfig, tensors: dict[str, torch.Tensor], reference
) -> float:
    """Between our logits, of `model` with `tensors`, and those of Hugging Face's model `name`."""
    tokens = tokens_of(MODELS[name])
    with torch.no_grad():
        return float(
            (
                ours(cpu, model, tensors)(tokens, None, None)[..., : model.vocab_size]
                - reference(tokens).logits
            )
            .abs()
            .max()
        )


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_has_the_same_logits_here(cpu, saved, name):
    """Hugging Face's modules hold a layer's experts as one tensor; published files, one by one."""
    folder, reference = saved[name]
    source = open_reader(folder)
    assert replace(source.config, init_method_std=0.1) == MODELS[name]
    assert load_file(folder / "model.safetensors").keys() == {
        n for p in param_mapping.parameters(MODELS[name]) for n in p.hf_names
    }
    assert reference(tokens_of(MODELS[name])).logits.std() > 0.3
    assert largest_difference(cpu, name, MODELS[name], dict(source.tensors()), reference) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_gets_a_gradient(cpu, saved, name):
    """An expert without tokens gets zero gradients: optimizers and ranks need one for every parameter."""
    model, tokens = ours(cpu, MODELS[name], tensors_of(saved[name][0])), tokens_of(MODELS[name])
    model(tokens, None, None, labels=tokens.roll(-1, 1)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.zero_grad()
    model(tokens[:1, :1], None, None, labels=tokens[:1, :1]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    unused = [
        i
        for i, expert in enumerate(model.decoder.layers[0].mlp.experts.local_experts)
        if not expert.linear_fc2.weight.grad.any()
    ]
    assert len(unused) == MODELS[name].num_experts - MODELS[name].moe_router_topk


def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two experts of a layer in each other's place."""
    names = [(EXPERT.format(1, 0, i), EXPERT.format(1, 1, i)) for i in (1, 2)]
    return tensors | {a: tensors[b] for pair in names for a, b in (pair, pair[::-1])}


@pytest.mark.parametrize(
    ("name", "fields", "change"),
    [
        ("mixtral", {"moe_router_pre_softmax": True}, dict),
        ("qwen2_moe", {"moe_router_pre_softmax": False}, dict),
        ("mixtral", {}, swapped),
        ("qwen2_moe", {}, swapped),
        (
            "qwen2_moe",
            {},
            lambda tensors: {n: t * 0 if "shared_experts.linear_fc2" in n else t for n, t in tensors.items()},
        ),
        (
            "qwen2_moe",
            {},
            lambda tensors: {n: t * 0 if "gate_weight" in n else t for n, t in tensors.items()},
        ),
        ("mixtral", {"moe_router_topk": 3}, dict),
    ],
    ids=[
        "softmax first",
        "softmax last",
        "two experts swapped",
        "and here",
        "no shared expert",
        "its gate half open",
        "one more expert",
    ],
)
def test_controls_that_must_fail(cpu, saved, name, fields, change):
    folder, reference = saved[name]
    assert (
        largest_difference(cpu, name, replace(MODELS[name], **fields), change(tensors_of(folder)), reference)
        > 1e-2
    )


LAYOUTS = {
    2: {
        "tp2": ParallelConfig(2),
        "tp2-sp": ParallelConfig(2, sequence_parallel=True),
        "pp2": ParallelConfig(1, 2),
    },
    4: {
        "tp4": ParallelConfig(4),
        "tp4-sp": ParallelConfig(4, sequence_parallel=True),
        "tp2-pp2-sp": ParallelConfig(2, 2, sequence_parallel=True),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_layouts_equal_hugging_face(saved, world, tmp_path):
    """Logits, losses; names, shapes, partitions of parameters; every parameter gets a gradient."""
    cases = {
        f"{layout} {name}": Case(
            parallel, MODELS[name], tensors_of(saved[name][0]), tokens_of(MODELS[name], 33)
        )
        for layout, parallel in LAYOUTS[world].items()
        for name in NAMES
    }
    for case, (logits, losses, _, facts) in under(cases, world, tmp_path).items():
        model, parallel, tokens = cases[case].model, cases[case].layout, cases[case].tokens
        reference = saved[model.family][1]
        with torch.no_grad():
            assert (logits - reference(tokens[:, :-1]).logits).abs().max() < 2e-5, case
            assert (
                losses - oracle.token_losses(reference, tokens[:, :-1], tokens[:, 1:])
            ).abs().max() < 2e-5, case
        padded = schema.padded_vocab_size(model, parallel)
        cuts = {
            p.name: p.shard_spec(parallel.tensor_model_parallel_size, padded)
            for p in param_mapping.parameters(model)
        }
        assert facts["shapes"] == {n: list(cut.shard_shape) for n, cut in cuts.items()}, case
        assert facts["cuts"] == {
            n: None if cut.dim is None else [cut.dim, cut.stride] for n, cut in cuts.items()
        }, case
        assert facts["finite"], case
        assert not [n for n in facts["idle"] if "layers" in n], (
            case
        )  # the last rank's vocabulary may be padding only


STEPS = 4


def trained(model: ModelConfig, folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a plain torch loop over Hugging Face's model."""
    data = oracle.batches(
        model.vocab_size, STEPS, RUN.train.global_batch_size, RUN.data.seq_length, DATA_SEED
    )
    lrs = [lr_schedule.lr_at(i, RUN.optim, RUN.train.train_iters) for i in range(STEPS)]
    reference = loaded(model, dict(param_mapping.random_tensors(model, RUN.train.seed)), folder)
    return oracle.train(reference, data, lrs, vars(RUN.optim))


def changes(name: str, stage: int, **parallel) -> dict:
    return {"model": dataclasses.asdict(MODELS[name]), "parallel": {"zero_stage": stage, **parallel}}


def compare(expected: dict[str, list], curves: dict[str, list]) -> None:
    """Cases are named after their model; those of the second half match the end of the expected curve."""
    for case, curve in curves.items():
        reference = expected[case.partition(",")[0]]
        loss, norm = worst(
            curve, reference[-len(curve) :] if "second half" in case else reference[: len(curve)]
        )
        print(f"{case}: {loss:.1e} {norm:.1e}")
        if "control" in case:
            assert loss > 1e-5, case
        else:
            assert loss < 1e-5, (case, loss)
            assert norm < 1e-5, (case, norm)


@pytest.mark.slow
def test_training_equals_hugging_face(tmp_path):
    """Four steps of DeepSpeed at TP 2 with sequence parallel: Hugging Face's curve within 1e-5."""
    cases = {f"{name}, zero 2": {"changes": changes(name, 2, sequence_parallel=True)} for name in NAMES}
    lost = {"changes": changes("mixtral", 2, sequence_parallel=True), "break": "sequence-parallel hook"}
    cases["mixtral, control: gradients of the router and the norms not summed"] = lost
    expected = {name: trained(MODELS[name], tmp_path / name) for name in NAMES}
    compare(expected, run_cases("tp2-dp1", cases, tmp_path, STEPS, train_iters=RUN.train.train_iters))


@pytest.mark.slow
def test_training_equals_hugging_face_under_every_stage(tmp_path):
    """At TP 1 and 2, recomputed, and over a checkpoint into another layout."""
    two, one = {}, {}
    for name in NAMES:
        at = str(tmp_path / f"{name}.ckpt")
        two[f"{name}, zero 3, first half"] = {
            "changes": changes(name, 3, sequence_parallel=True),
            "last": 2,
            "save": at,
        }
        one[f"{name}, zero 1, second half"] = {"changes": changes(name, 1), "first": 2, "load": at}
        two |= {f"{name}, zero {z}": {"changes": changes(name, z, sequence_parallel=True)} for z in (0, 1, 3)}
        one |= {f"{name}, zero {z}": {"changes": changes(name, z)} for z in range(4)}
        recomputed = changes(name, 1, sequence_parallel=True) | {"train": {"recompute_granularity": "full"}}
        two[f"{name}, recomputed"] = {"changes": recomputed}
    expected = {name: trained(MODELS[name], tmp_path / name) for name in NAMES}
    compare(expected, run_cases("tp2-dp1", two, tmp_path / "two", STEPS, train_iters=RUN.train.train_iters))
    compare(expected, run_cases("tp1-dp1", one, tmp_path / "one", STEPS, train_iters=RUN.train.train_iters))


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_exact(saved, tmp_path, name):
    folder = saved[name][0]
    convert.write_megatron(convert.open_reader(folder), tmp_path / "ranks", 4, 2)
    convert.write_hf(convert.open_reader(tmp_path / "ranks"), tmp_path / "back")
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    again = family_of(json.loads((tmp_path / "back" / "config.json").read_text()))
    assert again.name == name


def test_bf16_is_no_worse_than_hugging_face(cpu, saved):
    """With fp32 scores it selects Hugging Face's experts at least as often; most tokens agree closely."""
    for name in NAMES:
        folder, exact = saved[name]
        tokens = tokens_of(MODELS[name])
        with torch.no_grad():
            expected = exact(tokens).logits
            rounded = (
                hugging_face(MODELS[name])[0]
                .from_pretrained(folder, dtype=torch.bfloat16)(tokens)
                .logits.float()
                - expected
            ).abs()
            actual = (
                ours(cpu, MODELS[name], tensors_of(folder), "bf16")(tokens, None, None)[..., :125].float()
                - expected
            ).abs()
        assert 0 < actual.median() < 1.5 * rounded.median()


@pytest.mark.parametrize("name", [name for name, model in PRESETS.items() if model.num_experts])
def test_presets_have_the_parameters_of_the_real_models(name):
    model = PRESETS[name]
    model_class, settings = hugging_face(model)
    with torch.device("meta"):
        reference = model_class(settings)
    assert estimates.parameter_count(model) == sum(p.numel() for p in reference.parameters())
    written = json.loads(settings.to_json_string(use_diff=False))
    assert FAMILIES[model.family].read_config(written) == model


def test_published_sizes():
    assert estimates.parameter_count(PRESETS["mixtral-8x7b"]) == 46_702_792_704
    assert estimates.active_parameter_count(PRESETS["mixtral-8x7b"]) == 12_879_925_248
    assert estimates.parameter_count(PRESETS["mixtral-8x22b"]) == 140_620_634_112
    assert estimates.parameter_count(PRESETS["qwen1.5-moe-a2.7b"]) == 14_315_784_192


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_experts_per_tok": 1}, "router would learn nothing"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 of 4 experts"),
        ("mixtral", {"num_local_experts": 0}, "positive int"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "'sliding_attention'"),
        ("qwen2_moe", {"layer_types": 7}, "layer_types 7"),
        ("qwen2_moe", {"norm_topk_prob": 1}, "not a bool"),
        ("qwen2_moe", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
    ],
)
def test_what_cannot_be_expressed_is_refused(name, more, message):
    config = FAMILIES[name].write_config(MODELS[name])
    assert FAMILIES[name].read_config(config | {"sliding_window": None, "layer_types": None}) == MODELS[name]
    with pytest.raises(UserError, match=message):
        FAMILIES[name].read_config(config | more)


def test_mixtral_has_no_words_for_the_other_routing():
    with pytest.raises(UserError, match="moe_router_pre_softmax = True"):
        FAMILIES["mixtral"].write_config(replace(MIXTRAL, moe_router_pre_softmax=True))


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        (MIXTRAL, {"tensor_model_parallel_size": 2}, "add --sequence-parallel"),
        (
            replace(QWEN2_MOE, moe_ffn_hidden_size=25),
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "FFN width of 25 and 40",
        ),
        (replace(MIXTRAL, moe_router_topk=9), {}, "9 of 4 experts"),
        (replace(MIXTRAL, num_experts=0), {}, "--num-experts 0"),
        (replace(MIXTRAL, num_experts=None), {}, "always has experts"),
        (replace(MIXTRAL, family="llama"), {}, "never has experts"),
    ],
)
def test_runs_that_cannot_be(model, parallel, message):
    run = replace(RUN, model=model, parallel=replace(RUN.parallel, **parallel))
    with pytest.raises(UserError, match=message):
        validation.check_run(run, 2)


@pytest.mark.parametrize("name", NAMES)
def test_full_recomputation_changes_nothing(cpu, saved, name):
    tensors, tokens = tensors_of(saved[name][0]), tokens_of(MODELS[name])

    def gradients(granularity: str) -> list[torch.Tensor]:
        model = ours(cpu, MODELS[name], tensors, train=TrainConfig(recompute_granularity=granularity)).train()
        model(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients("none"), gradients("full"), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral-tiny", "qwen2_moe-tiny"])
def test_the_recipe_trains_them(name, tmp_path):
    from helpers.chain import TrainLine, lines, prepare_tokens, recipe

    prepare_tokens(tmp_path, rows=200)
    done = recipe(tmp_path, "run", tmp_path, "--sequence-parallel", MODEL=name, CHECKPOINT="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    losses = [line.loss for line in lines(tmp_path, "run") if isinstance(line, TrainLine)]
    assert losses[-1] < losses[0] - 0.2
    refused = recipe(tmp_path, "refused", tmp_path, MODEL=name, CHECKPOINT="")
    assert (refused.returncode != 0, "add --sequence-parallel" in refused.stderr + refused.stdout) == (
        True,
        True,
    )
