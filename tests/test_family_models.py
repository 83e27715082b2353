"""Every family's model against Hugging Face's, in every layout: names, logits, losses, gradients; controls.

A family is found by its preset whose name ends in -tiny.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from helpers import oracle
from helpers.family_models import LONG, MODELS, TINY
from helpers.models import Case, under
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ascendspeed.config import schema
from ascendspeed.config.schema import ModelConfig, ParallelConfig, TrainConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.models import families, param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError


@cache
def theirs(name: str):
    """Hugging Face's model, the Megatron-core tensors of its checkpoint, and its logits and losses."""
    model = MODELS[name]
    reference, published = oracle.native(model)
    assert {n for p in param_mapping.parameters(model) for n in p.hf_names} == set(
        published
    )  # names that are right, none left over
    tensors = {
        p.name: param_mapping.hf_to_megatron(model, p, published) for p in param_mapping.parameters(model)
    }
    with torch.no_grad():
        logits = reference(tokens()[:, :-1]).logits
        losses = oracle.token_losses(reference, tokens()[:, :-1], tokens()[:, 1:])
    assert logits.std() > 0.2
    return published, tensors, logits, losses


def tokens(length: int = LONG) -> torch.Tensor:
    return torch.randint(0, 125, (2, length + 1), generator=torch.Generator().manual_seed(3))


def logits_of(model: ModelConfig, tensors: dict[str, torch.Tensor], kernels=None) -> torch.Tensor:
    from ascendspeed.models.gpt import gpt_model, layer_spec

    layout = ParallelConfig()
    built = gpt_model.build_model(
        model, layout, layer_spec.transformer_config(model, layout, TrainConfig(), kernels=kernels)
    ).eval()
    gpt_model.load_weights(built, model, layout, tensors.items())
    with torch.no_grad():
        return built(tokens()[:, :-1].contiguous(), None, None)[..., :125]


def off(name: str, tensors: dict | None = None, kernels=None, **changes) -> float:
    """Largest difference of our logits from Hugging Face's, with other tensors or an altered model."""
    _, right, logits, _ = theirs(name)
    return float(
        (logits_of(replace(MODELS[name], **changes), tensors or right, kernels) - logits).abs().max()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_tiny_preset(family):
    assert family in TINY


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("cpu")
def test_logits_equal_hugging_face(name):
    assert off(name) < 2e-5


@pytest.mark.breadth
@pytest.mark.parametrize("name", MODELS)
def test_published_tensors_come_back_from_rank_files(name, tmp_path):
    """Hugging Face's directory -> ranks of TP 4 x PP 2 -> Hugging Face's directory: equal names and bits."""
    published = theirs(name)[0]
    source = directory(name, tmp_path / "hf")
    convert.write_megatron(open_reader(source), tmp_path / "ranks", 4, 2)
    convert.write_hf(open_reader(tmp_path / "ranks"), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(published)
    assert all(torch.equal(back[n], published[n]) for n in published)


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n.startswith("internlm") and n != "internlm3-bias-but-qkv"]
)
def test_the_internlm_families_are_llama_to_stock_transformers(name, tmp_path):
    """Also beyond the trained length. Llama has one switch for the biases of q, k, v and o."""
    convert.write_hf(open_reader(directory(name, tmp_path / "hf")), tmp_path / "llama", family="llama")
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)(
            tokens()[:, :-1]
        ).logits
    assert (logits - theirs(name)[2]).abs().max() < 2e-5


def test_biases_that_llama_cannot_say_are_refused(tmp_path):
    source = open_reader(directory("internlm3-bias-but-qkv", tmp_path / "hf"))
    with pytest.raises(UserError, match="cannot express add_dense_bias = True"):
        convert.write_hf(source, tmp_path / "llama", family="llama")
    assert not (tmp_path / "llama").exists()


def directory(name: str, folder: Path) -> Path:
    """The published checkpoint as a directory."""
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in theirs(name)[0].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FAMILIES[MODELS[name].family].write_config(MODELS[name])))
    return folder


# --- layouts


LAYOUTS = {  # by the number of ranks
    2: {
        "tp2": ParallelConfig(2),
        "tp2-sp": ParallelConfig(2, sequence_parallel=True),
        "pp2": ParallelConfig(1, 2),
    },
    4: {
        "tp4": ParallelConfig(4),
        "tp4-sp": ParallelConfig(4, sequence_parallel=True),
        "tp2-pp2": ParallelConfig(2, 2),
    },
}
EVERYWHERE = ("internlm", "internlm3-bias", "gemma", "qwen3")  # between them all that a layout can touch
VARIANTS = ("internlm-no-bias", "internlm2-bias", "internlm3-bias-but-qkv", "llama-bias", "qwen3-yarn")
DEFAULT = {
    "tp2": tuple(name for name in MODELS if name not in VARIANTS),
    "pp2": ("internlm", "internlm2", "gemma", "qwen2-tied"),
    "tp4": ("internlm2",),
    "tp4-sp": (),
    "tp2-pp2": (),
}
"""Models of the default run; TP 2 has every family. The other models on stages and four ranks are slow."""


def runs(name: str, parallel: ParallelConfig) -> bool:
    """Experts are trained under sequence parallel only; a few dense models cover the common code."""
    tp, pp, sp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.sequence_parallel,
    )
    if MODELS[name].num_experts:
        return (tp > 1) == sp
    return name in EVERYWHERE or not (sp or tp * pp > max(tp, pp))


def is_default(name: str, layout: str) -> bool:
    return name in DEFAULT.get(layout, MODELS)


CASES = [
    pytest.param(name, layout, marks=() if is_default(name, layout) else pytest.mark.slow)
    for layouts in LAYOUTS.values()
    for layout, parallel in layouts.items()
    for name in MODELS
    if runs(name, parallel)
]


def original(
    family: str,
) -> dict[str, tuple[ModelConfig, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]]:
    """Checkpoint of InternLM's own code, tokens (short, trained length, longer) and logits."""
    if not (SHARED / family).is_dir():
        return {}
    model, known = (
        families.read_config(SHARED / family / "config.json"),
        load_file(SHARED / family / "reference.safetensors"),
    )
    published = {
        n: t for shard in (SHARED / family).glob("model-*.safetensors") for n, t in load_file(shard).items()
    }
    tensors = {
        p.name: param_mapping.hf_to_megatron(model, p, published) for p in param_mapping.parameters(model)
    }
    ids = {name: torch.atleast_2d(known[f"ids_{name}"]) for name in ("short", "full", "long")}
    return {
        n: (model, tensors, torch.cat([i, i[:, :1]], 1), known[f"logits_{n}"].view(*i.shape, -1))
        for n, i in ids.items()
    }


ORIGINAL = [(family, length) for family in ("internlm", "internlm2") for length in ("short", "full", "long")]


OF_LAYOUTS = ("test_every_layout_equals_hugging_face", "test_parameters_are_those_of_the_rows")
"""Tests of `CASES`."""


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Every selected case of every layout: one start of processes for each number of ranks."""
    selected = {
        (item.callspec.params["name"], item.callspec.params["layout"])
        for item in request.session.items
        if item.path == request.path and item.originalname in OF_LAYOUTS
    }
    found = {}
    for world, layouts in LAYOUTS.items():
        cases = {
            f"{name}.{layout}": Case(layouts[layout], MODELS[name], theirs(name)[1], tokens())
            for layout in layouts
            for name in MODELS
            if (name, layout) in selected
        }
        plain = f"tp{world}"
        for family in ("internlm", "internlm2"):
            for n, (model, tensors, ids, _) in original(family).items():
                cases[f"{family}-original-{n}.{plain}"] = Case(layouts[plain], model, tensors, ids)
        found |= under(cases, world, tmp_path_factory.mktemp(plain))
    return found


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_equals_hugging_face(results, name, layout):
    logits, losses, padding, facts = results[f"{name}.{layout}"]
    _, _, right, right_losses = theirs(name)
    assert (logits - right).abs().max() < 2e-5
    assert (losses - right_losses).abs().max() < 2e-5
    assert facts["finite"]  # every parameter has a gradient
    assert padding.numel()
    assert (padding == -1e9).all()  # never sampled, never in the softmax


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_parameters_are_those_of_the_rows(results, name, layout):
    """Names, shapes and cuts of the built model are what the family's rows say."""
    facts, model = results[f"{name}.{layout}"][3], MODELS[name]
    parallel = next(layouts[layout] for layouts in LAYOUTS.values() if layout in layouts)
    tp, padded = parallel.tensor_model_parallel_size, schema.padded_vocab_size(model, parallel)
    cuts = {p.name: p.shard_spec(tp, padded) for p in param_mapping.parameters(model)}
    if model.tie_embeddings and parallel.pipeline_model_parallel_size > 1:
        cuts["output_layer.weight"] = cuts["embedding.word_embeddings.weight"]  # the last stage's copy
    assert facts["shapes"] == {n: list(cut.shard_shape) for n, cut in cuts.items()}
    assert facts["cuts"] == {n: None if cut.dim is None else [cut.dim, cut.stride] for n, cut in cuts.items()}


@pytest.mark.usefixtures("reference", "cpu")
@pytest.mark.parametrize(("family", "length"), ORIGINAL)
def test_the_original_code_gives_the_same_logits(results, family, length):
    """Logits of InternLM's own modeling code; beyond the trained length its rope is rescaled."""
    from ascendspeed.models.gpt import gpt_model, layer_spec

    model, tensors, ids, expected = original(family)[length]
    built = gpt_model.build_model(
        model, ParallelConfig(), layer_spec.transformer_config(model, ParallelConfig(), TrainConfig())
    ).eval()
    gpt_model.load_weights(built, model, ParallelConfig(), tensors.items())
    with torch.no_grad():
        alone = built(ids[:, :-1].contiguous(), None, None)[..., : model.vocab_size]
    for mine in (
        alone,
        results[f"{family}-original-{length}.tp2"][0],
        results[f"{family}-original-{length}.tp4"][0],
    ):
        assert (mine - expected).abs().max() < 1e-4


# --- mistakes that must be seen


def swapped(published: dict, first: str, other: str) -> dict:
    return {
        n: published[n.replace(first, "\0").replace(other, first).replace("\0", other)] for n in published
    }


def plain_qkv(published: dict, name: str) -> dict:
    """[q; k; v] one after the other, where the checkpoint has them per key/value head."""
    model, changed = MODELS[name], dict(published)
    groups, d = model.kv_heads, model.head_dim
    for wqkv in (n for n in published if "wqkv" in n):
        parts = (
            published[wqkv]
            .unflatten(0, (groups, -1))
            .split([model.num_attention_heads // groups * d, d, d], 1)
        )
        changed[wqkv] = torch.cat([part.flatten(0, 1) for part in parts])
    return changed


def interleaved_qkv(published: dict, name: str) -> dict:
    """Per head, where the checkpoint has [q; k; v] one after the other."""
    packs = (n for n in published if "W_pack" in n)
    heads = MODELS[name].num_attention_heads
    return published | {
        n: torch.cat([x.unflatten(0, (heads, -1)) for x in published[n].chunk(3)], 1).flatten(0, 1)
        for n in packs
    }


def no_bias(published: dict, which: str) -> dict:
    return {n: t * 0 if n.endswith(which + ".bias") else t for n, t in published.items()}


MISTAKES = {
    "internlm: no bias on o": ("internlm", lambda p: no_bias(p, "o_proj")),
    "internlm: no bias on v": ("internlm", lambda p: no_bias(p, "v_proj")),
    "internlm: gate and up swapped": ("internlm", lambda p: swapped(p, "gate_proj", "up_proj")),
    "internlm2: w1 and w3 swapped": ("internlm2", lambda p: swapped(p, "w1", "w3")),
    "internlm2: wqkv split plainly": ("internlm2", lambda p: plain_qkv(p, "internlm2")),
    "internlm2: bias of wqkv split plainly": (
        "internlm2-bias",
        lambda p: p | {n: t for n, t in plain_qkv(p, "internlm2").items() if n.endswith(".bias")},
    ),
    "internlm3: no bias on gate": ("internlm3-bias", lambda p: no_bias(p, "gate_proj")),
    "internlm3: no bias on down": ("internlm3-bias", lambda p: no_bias(p, "down_proj")),
    "qwen2: no bias on q": ("qwen2", lambda p: no_bias(p, "q_proj")),
    "qwen3: norms of q and k swapped": ("qwen3", lambda p: swapped(p, "q_norm", "k_norm")),
    "baichuan: W_pack split per head": ("baichuan", lambda p: interleaved_qkv(p, "baichuan")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("cpu")
def test_a_wrong_reading_of_the_checkpoint_is_seen(mistake):
    name, change = MISTAKES[mistake]
    wrong = change(theirs(name)[0])
    assert (
        off(
            name,
            {
                p.name: param_mapping.hf_to_megatron(MODELS[name], p, wrong)
                for p in param_mapping.parameters(MODELS[name])
            },
        )
        > 1e-2
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("internlm", {"rope_scaling_type": "none"}),
        ("internlm2", {"rope_scaling_type": "none"}),
        ("internlm3", {"rope_scaling_factor": 1.0}),
        ("llama-bias", {"rope_scaling_type": "none"}),
        ("gemma", {"zero_centered_norm": False}),
        ("gemma", {"scale_embeddings": False}),
        ("gemma", {"activation": "silu"}),
        ("baichuan", {"normalize_head": False}),
        ("qwen2", {"norm_epsilon": 1e-2}),
        ("qwen3", {"norm_epsilon": 1e-2}),
        ("qwen3_moe", {"moe_router_pre_softmax": True}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("cpu")
def test_a_model_that_is_not_the_same_is_seen(name, changes):
    assert off(name, **changes) > 1e-3


@pytest.mark.usefixtures("cpu")
def test_the_other_gelu_is_seen():
    from ascendspeed.distributed.fused_kernels import Kernels

    def erf(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.gelu(gate) * up

    assert off("gemma", kernels=Kernels(geglu=erf)) > 1e-4


@pytest.mark.usefixtures("cpu")
def test_one_plus_w_is_not_rounded_to_bf16():
    """Bit for bit Hugging Face's; the sum in bf16 loses most of a small w."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    from ascendspeed.models.gpt import layer_spec

    norm = layer_spec.ZeroCenteredRMSNorm(
        layer_spec.transformer_config(MODELS["gemma"], ParallelConfig(), TrainConfig(), "bf16"),
        128,
        MODELS["gemma"].norm_epsilon,
    )
    reference = GemmaRMSNorm(128, MODELS["gemma"].norm_epsilon).bfloat16()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (norm.weight, reference.weight):
            weight.copy_(1e-2 * torch.randn(128, generator=generator.manual_seed(1)))
        x = torch.randn(64, 128, generator=generator).bfloat16()
        assert torch.equal(norm(x), reference(x))
        rounded = torch.nn.functional.rms_norm(x, (128,), 1 + norm.weight, norm.eps)
        assert (rounded - reference(x)).abs().max() > 1e-3
