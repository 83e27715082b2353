"""The model against Hugging Face and InternLM's original code: logits, losses, layouts, rope, dropout, padding, random weights."""

from dataclasses import dataclass, replace
from pathlib import Path

import launch
import oracle
import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file

from ascendspeed import config, formats, weights
from ascendspeed.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, Run, TrainConfig

INTERNLM = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=125,
    max_position_embeddings=32,
    init_method_std=0.1,
)
GROUPED = replace(
    INTERNLM, family="llama", num_attention_heads=8, num_query_groups=2, add_qkv_bias=False, add_dense_bias=False, kv_channels=16
)


def tensors_of(model: ModelConfig, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random weights; biases and norms random too, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in weights.random_tensors(model, seed):
        made[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
    return made


def tokens_of(model: ModelConfig, length: int = 32) -> torch.Tensor:
    return torch.randint(0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


def ours(cpu, model: ModelConfig, tensors, dtype: str = "fp32", train: TrainConfig | None = None):
    from ascendspeed.model import gpt, spec

    layout = ParallelConfig()
    built = gpt.build(model, layout, spec.transformer_config(model, layout, train or TrainConfig(), dtype))
    gpt.fill(built, model, layout, tensors.items())
    return built


@dataclass(frozen=True)
class Case:
    """One model under one layout."""

    layout: ParallelConfig
    model: ModelConfig
    tensors: dict[str, torch.Tensor]
    tokens: torch.Tensor


def under(cases: dict[str, Case], world: int, folder: Path):
    """name -> (logits of the real vocabulary, losses, logits of the padding, facts), in processes of their own."""
    job = {"cases": {}}
    for name, case in cases.items():
        save_file({n: t.contiguous() for n, t in case.tensors.items()}, folder / f"{name}.safetensors")
        run = config.to_dict(Run(case.model, case.layout, OptimConfig(), DataConfig(), TrainConfig()))
        job["cases"][name] = {"run": run, "weights": str(folder / f"{name}.safetensors"), "tokens": case.tokens.tolist()}
    facts = launch.ranks(world, "model_worker.py", job, folder)
    found = load_file(folder / "out.json.safetensors")
    rows = {name: case.model.vocab_size for name, case in cases.items()}
    return {
        n: (found[f"{n}.logits"][..., : rows[n]], found[f"{n}.losses"], found[f"{n}.logits"][..., rows[n] :], facts[n])
        for n in cases
    }


@pytest.mark.parametrize("model", [INTERNLM, GROUPED], ids=["internlm", "llama-gqa"])
def test_logits_and_losses_equal_hugging_face(cpu, model):
    tensors, tokens = tensors_of(model), tokens_of(model)
    theirs = oracle.hugging_face(model, tensors)
    mine = ours(cpu, model, tensors)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # logits that say something
    assert (mine(tokens, None, None)[..., : model.vocab_size] - expected).abs().max() < 2e-5
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = mine(inputs, None, None, labels=labels)
    assert (losses - oracle.token_losses(theirs, inputs, labels)).abs().max() < 2e-5


def test_a_plainly_concatenated_qkv_is_seen(cpu):
    """Control: the mistake that people make - [q; k; v] where Megatron wants [q, k, v] per group."""
    tensors, tokens = tensors_of(INTERNLM), tokens_of(INTERNLM)
    wrong = dict(tensors)
    for parameter in weights.parameters(INTERNLM):
        if parameter.row.fuse == "qkv":
            wrong[parameter.name] = torch.cat(list(weights.part(INTERNLM, parameter, tensors[parameter.name]).values()))
    expected = oracle.hugging_face(INTERNLM, tensors)(tokens).logits
    assert (ours(cpu, INTERNLM, wrong)(tokens, None, None)[..., :125] - expected).abs().max() > 0.1


def case(layout: ParallelConfig, model: ModelConfig) -> Case:
    return Case(layout, model, tensors_of(model), tokens_of(model, 33))


def original(tp: int) -> dict[str, Case]:
    """The fixtures' checkpoint and its tokens: short, as long as it was trained (64), and longer."""
    if not (SHARED / "internlm").is_dir():
        return {}
    source = formats.open_source(SHARED / "internlm")
    tensors, known = dict(source.tensors()), load_file(SHARED / "internlm" / "reference.safetensors")
    ids = {name: torch.atleast_2d(known[f"ids_{name}"]) for name in ("short", "full", "long")}
    return {n: Case(ParallelConfig(tp), source.config, tensors, torch.cat([i, i[:, :1]], 1)) for n, i in ids.items()}


LAYOUTS = {
    "tp2": case(ParallelConfig(2), INTERNLM),
    "tp2-sp": case(ParallelConfig(2, sequence_parallel=True), INTERNLM),
    "tp2-gqa": case(ParallelConfig(2), GROUPED),
    "tp4-two-groups": case(ParallelConfig(4), GROUPED),
}


@pytest.fixture(scope="module")
def parallel_results(tmp_path_factory):
    """Every tensor-parallel case, one start of processes per size."""
    two = {name: c for name, c in LAYOUTS.items() if c.layout.tensor_model_parallel_size == 2} | original(2)
    four = {name: c for name, c in LAYOUTS.items() if c.layout.tensor_model_parallel_size == 4}
    return under(two, 2, tmp_path_factory.mktemp("tp2")) | under(four, 4, tmp_path_factory.mktemp("tp4"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensor_parallel_equals_hugging_face(parallel_results, name):
    c, (logits, losses, padding, facts) = LAYOUTS[name], parallel_results[name]
    theirs = oracle.hugging_face(c.model, c.tensors)
    assert (logits - theirs(c.tokens[:, :-1]).logits).abs().max() < 2e-5
    assert (losses - oracle.token_losses(theirs, c.tokens[:, :-1], c.tokens[:, 1:])).abs().max() < 2e-5
    assert facts["finite"]
    assert padding.numel()
    assert (padding == -1e9).all()  # never sampled, never in the softmax


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_those_of_the_rows(parallel_results, name):
    """Names, shapes and cuts of the built model are what the family's rows say."""
    c, facts = LAYOUTS[name], parallel_results[name][3]
    padded = config.padded_vocab_size(c.model, c.layout)
    cuts = {p.name: p.cut(c.layout.tensor_model_parallel_size, padded) for p in weights.parameters(c.model)}
    assert facts["shapes"] == {n: list(cut.part_shape) for n, cut in cuts.items()}
    assert facts["cuts"] == {n: None if cut.dim is None else [cut.dim, cut.stride] for n, cut in cuts.items()}


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", ["short", "full", "long"])
def test_the_original_code_gives_the_same_logits(cpu, parallel_results, name):
    """The fixtures' logits came from InternLM's own modeling code; beyond the trained length its rope is rescaled."""
    c = original(1)[name]
    expected = load_file(SHARED / "internlm" / "reference.safetensors")[f"logits_{name}"]
    mine = ours(cpu, c.model, c.tensors)(c.tokens[:, :-1].contiguous(), None, None)[..., : c.model.vocab_size]
    assert (mine - expected.view_as(mine)).abs().max() < 1e-4
    assert (parallel_results[name][0] - expected.view_as(mine)).abs().max() < 1e-4


def test_dynamic_rope_equals_hugging_face_beyond_the_trained_length(cpu):
    model = replace(INTERNLM, rope_scaling_type="dynamic", rope_scaling_factor=2.0)
    tensors, tokens = tensors_of(model), tokens_of(model, 48)
    scaled = oracle.hugging_face(model, tensors, rope={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    mine = ours(cpu, model, tensors)(tokens, None, None)[..., :125]
    assert (mine - scaled(tokens).logits).abs().max() < 2e-5
    plain = oracle.hugging_face(model, tensors)(tokens).logits
    assert (mine - plain).abs().max() > 1e-2  # control: without scaling it is another model


def test_linear_rope_equals_hugging_face(cpu):
    model = replace(INTERNLM, rope_scaling_type="linear", rope_scaling_factor=4.0)
    tensors, tokens = tensors_of(model), tokens_of(model)
    scaled = oracle.hugging_face(model, tensors, rope={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert (ours(cpu, model, tensors)(tokens, None, None)[..., :125] - scaled(tokens).logits).abs().max() < 2e-5


def test_bf16_is_no_worse_than_hugging_face(cpu):
    tensors, tokens = tensors_of(INTERNLM), tokens_of(INTERNLM)
    exact = oracle.hugging_face(INTERNLM, tensors)(tokens).logits
    theirs = oracle.hugging_face(INTERNLM, tensors).bfloat16()(tokens).logits.float()
    mine = ours(cpu, INTERNLM, tensors, "bf16")(tokens, None, None)[..., :125].float()
    assert 0 < (mine - exact).abs().mean() < 2 * (theirs - exact).abs().mean()
    assert (mine - exact).abs().max() < 2 * (theirs - exact).abs().max()


def test_full_recomputation_changes_nothing(cpu):
    tensors, tokens = tensors_of(INTERNLM), tokens_of(INTERNLM)

    from ascendspeed import parallel

    def gradients(train: TrainConfig) -> list[torch.Tensor]:
        parallel.initialize(cpu, ParallelConfig(), seed=11)  # the same masks both times
        model = ours(cpu, INTERNLM, tensors, train=train).train()
        torch.manual_seed(11)
        model(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        return [p.grad for p in model.parameters()]

    for dropout in (0.0, 0.2):
        plain = gradients(TrainConfig(attention_dropout=dropout, hidden_dropout=dropout))
        again = gradients(TrainConfig(attention_dropout=dropout, hidden_dropout=dropout, recompute_granularity="full"))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_out_of_reach_in_every_type(kind):
    from ascendspeed.model.gpt import _MaskPadding

    layer = torch.nn.Linear(1, 1)
    layer.output_size = 16
    logits = torch.zeros(3, 1, 8, dtype=kind)  # the second of two ranks: rows 8 ... 15, of which 10 are real
    _MaskPadding(10, 8)(layer, (), (logits, None))
    assert logits[..., :2].eq(0).all()
    assert logits.float().softmax(-1)[..., 2:].eq(0).all()


def test_attention_never_keeps_square_scores(cpu):
    """Nothing of s x s is saved for the backward pass or made on the way, with dropout neither."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length, largest = 1024, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    model = replace(INTERNLM, num_layers=1, max_position_embeddings=length)
    for dropout in (0.0, 0.1):
        largest = 0
        built = ours(cpu, model, tensors_of(model), train=TrainConfig(attention_dropout=dropout)).train()
        tokens = tokens_of(model, length + 1)[:1]
        with Watch():
            built(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        assert 0 < largest < model.num_attention_heads * length * length / 4


def test_attention_dropout_drops_the_share_it_should_and_keeps_the_mean(cpu):
    from ascendspeed.model.attention import attend_with_dropout

    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16)
    v = torch.ones(2, 2, 300, 16)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attend_with_dropout(q, k, v, 0.0), exact, atol=1e-5)
    dropped = attend_with_dropout(q, k, v, 0.25)
    assert abs(dropped.mean() - 1) < 0.01  # what is left is scaled up
    assert dropped[:, :, 0].unique().numel() == 2  # the first position has one probability: dropped, or 1 / 0.75
    shares = attend_with_dropout(torch.zeros(64, 4, 1, 16), torch.zeros(64, 2, 1, 16), torch.ones(64, 2, 1, 16), 0.25)[..., 0]
    assert abs(float((shares == 0).float().mean()) - 0.25) < 0.1


def test_random_weights_do_not_depend_on_the_layout():
    tensors = dict(weights.random_tensors(INTERNLM, 7))
    again = dict(weights.random_tensors(INTERNLM, 7))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    other = dict(weights.random_tensors(INTERNLM, 8))
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert not torch.equal(tensors[name], other[name])
    assert not torch.equal(tensors["decoder.layers.0.mlp.linear_fc2.weight"], tensors[name])
    assert tensors["decoder.layers.0.mlp.linear_fc1.weight"].std() == pytest.approx(0.1, rel=0.05)
    assert tensors[name].std() == pytest.approx(0.1 / 2, rel=0.05)  # / sqrt(2 * layers)


def test_weights_that_lack_a_parameter_are_refused(cpu):
    from ascendspeed.errors import UserError

    tensors = tensors_of(INTERNLM)
    del tensors["decoder.layers.1.self_attention.linear_proj.bias"]
    with pytest.raises(UserError, match=r"lack decoder\.layers\.1\.self_attention\.linear_proj\.bias"):
        ours(cpu, INTERNLM, tensors)
