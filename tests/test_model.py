"""The model against Hugging Face: losses, rope, types, dropout, padding. Families: test_family_models.py."""

from dataclasses import replace
from zlib import crc32

import pytest
import torch
from helpers import oracle
from helpers.models import INTERNLM, ours, tensors_of, tokens_of

from ascendspeed.config.schema import ParallelConfig, TrainConfig
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES, PRESETS

GROUPED = replace(
    INTERNLM,
    family="llama",
    num_attention_heads=8,
    num_query_groups=2,
    add_qkv_bias=False,
    add_dense_bias=False,
    kv_channels=16,
)


@pytest.mark.parametrize("model", [INTERNLM, GROUPED], ids=["internlm", "llama-gqa"])
def test_logits_and_losses_equal_hugging_face(cpu, model):
    tensors, tokens = tensors_of(model), tokens_of(model)
    reference = oracle.hugging_face(model, tensors)
    actual = ours(cpu, model, tensors)
    expected = reference(tokens).logits
    assert expected.std() > 0.3  # logits that say something
    assert (actual(tokens, None, None)[..., : model.vocab_size] - expected).abs().max() < 2e-5
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = actual(inputs, None, None, labels=labels)
    assert (losses - oracle.token_losses(reference, inputs, labels)).abs().max() < 2e-5


def test_a_plainly_concatenated_qkv_is_seen(cpu):
    """Control: the mistake that people make - [q; k; v] where Megatron wants [q, k, v] per group."""
    tensors, tokens = tensors_of(INTERNLM), tokens_of(INTERNLM)
    wrong = dict(tensors)
    for parameter in param_mapping.parameters(INTERNLM):
        if parameter.mapping.fusion == "qkv":
            wrong[parameter.name] = torch.cat(
                list(param_mapping.megatron_to_hf(INTERNLM, parameter, tensors[parameter.name]).values())
            )
    expected = oracle.hugging_face(INTERNLM, tensors)(tokens).logits
    assert (ours(cpu, INTERNLM, wrong)(tokens, None, None)[..., :125] - expected).abs().max() > 0.1


ROPES = [  # every spelling of config.json, and what Hugging Face calls it
    ("internlm", {"rotary": {"base": 20000, "type": "dynamic"}}, ("dynamic", 20000.0, 1.0)),
    (
        "internlm",
        {"rotary": {"base": 20000, "type": "dynamic", "scaling_factor": 3}},
        ("dynamic", 20000.0, 3.0),
    ),
    (
        "internlm",
        {"rotary": {"base": 20000, "type": "linear", "scaling_factor": 2.0}},
        ("linear", 20000.0, 2.0),
    ),
    ("internlm", {"rotary": {"base": 20000, "type": "origin"}}, ("default", 20000.0, 1.0)),
    ("internlm", {"rotary": None}, ("dynamic", 10000.0, 1.0)),
    (
        "internlm2",
        {"rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("dynamic", 1e6, 2.0),
    ),
    (
        "internlm2",
        {"rope_theta": 1000000, "rope_scaling": {"type": "linear", "factor": 2}},
        ("linear", 1e6, 2.0),
    ),
    ("internlm2", {"rope_theta": 1000000, "rope_scaling": None}, ("default", 1e6, 1.0)),
    (
        "internlm3",
        {"rope_theta": 50000000, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
        ("dynamic", 5e7, 6.0),
    ),
    (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ("linear", 5e5, 4.0),
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}},
        ("dynamic", 5e5, 2.0),
    ),
]
SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 125,
}


@pytest.mark.breadth
@pytest.mark.parametrize("length", [24, 32, 33, 48])
@pytest.mark.parametrize(("family", "spelling", "meaning"), ROPES, ids=str)
def test_rope_equals_hugging_face(cpu, family, spelling, meaning, length):
    """Within the trained length (32) and up to one and a half of it, as config.json spells it."""
    config = SHAPE | {"model_type": family, "max_position_embeddings": 32, "bias": False} | spelling
    read = replace(
        FAMILIES[family].read_config(config), family="llama", init_method_std=0.1, norm_epsilon=1e-6
    )
    tensors, tokens, (kind, base, factor) = tensors_of(read), tokens_of(read, length), meaning
    rope = {"rope_type": kind, "rope_theta": base} | ({} if kind == "default" else {"factor": factor})
    expected = oracle.hugging_face(read, tensors, rope=rope)(tokens).logits
    assert (ours(cpu, read, tensors)(tokens, None, None)[..., :125] - expected).abs().max() < 2e-5
    if kind == "linear" or (
        kind == "dynamic" and length > 32
    ):  # control: without scaling it is another model
        plain = replace(read, rope_scaling_type="none")
        assert (ours(cpu, plain, tensors)(tokens, None, None)[..., :125] - expected).abs().max() > (
            1e-2 if length > 33 else 1e-4
        )


@pytest.mark.parametrize("family", ["internlm", "gemma", "baichuan"])
def test_bf16_is_no_worse_than_hugging_face(cpu, family):
    model = replace(
        PRESETS[{"baichuan": "baichuan2"}.get(family, family) + "-tiny"],
        num_layers=2,
        vocab_size=125,
        init_method_std=0.1,
    )
    reference, published = oracle.native(model)
    tensors = {
        p.name: param_mapping.hf_to_megatron(model, p, published) for p in param_mapping.parameters(model)
    }
    tokens = tokens_of(model)
    with torch.no_grad():
        exact = reference(tokens).logits
        expected = reference.bfloat16()(tokens).logits.float()
        actual = ours(cpu, model, tensors, "bf16")(tokens, None, None)[..., :125].float()
    assert 0 < (actual - exact).abs().mean() < 2 * (expected - exact).abs().mean()
    assert (actual - exact).abs().max() < 2 * (expected - exact).abs().max()


def test_full_recomputation_changes_nothing(cpu):
    tensors, tokens = tensors_of(INTERNLM), tokens_of(INTERNLM)

    from ascendspeed.distributed import process_groups

    def gradients(train: TrainConfig) -> list[torch.Tensor]:
        process_groups.initialize(cpu, ParallelConfig(), seed=11)  # the same masks both times
        model = ours(cpu, INTERNLM, tensors, train=train).train()
        torch.manual_seed(11)
        model(tokens[:, :-1].contiguous(), None, None, labels=tokens[:, 1:].contiguous()).sum().backward()
        return [p.grad for p in model.parameters()]

    for dropout in (0.0, 0.2):
        plain = gradients(TrainConfig(attention_dropout=dropout, hidden_dropout=dropout))
        again = gradients(
            TrainConfig(attention_dropout=dropout, hidden_dropout=dropout, recompute_granularity="full")
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_out_of_reach_in_every_type(kind):
    from ascendspeed.models.gpt.gpt_model import _MaskPadding

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
    from ascendspeed.models.gpt.attention import attend

    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16)
    v = torch.ones(2, 2, 300, 16)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attend(q, k, v, dropout=1e-9), exact, atol=1e-5)
    torch.manual_seed(1)
    dropped = attend(q, k, v, dropout=0.25)
    assert abs(dropped.mean() - 1) < 0.01  # what is left is scaled up
    assert (
        dropped[:, :, 0].unique().numel() == 2
    )  # the first position has one probability: dropped, or 1 / 0.75
    shares = attend(
        torch.zeros(64, 4, 1, 16), torch.zeros(64, 2, 1, 16), torch.ones(64, 2, 1, 16), dropout=0.25
    )[..., 0]
    assert abs(float((shares == 0).float().mean()) - 0.25) < 0.1


def test_random_weights_do_not_depend_on_the_layout():
    tensors = dict(param_mapping.random_tensors(INTERNLM, 7))
    again = dict(param_mapping.random_tensors(INTERNLM, 7))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    other = dict(param_mapping.random_tensors(INTERNLM, 8))
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    assert not torch.equal(tensors[name], other[name])
    assert not torch.equal(tensors["decoder.layers.0.mlp.linear_fc2.weight"], tensors[name])
    assert tensors["decoder.layers.0.mlp.linear_fc1.weight"].std() == pytest.approx(0.1, rel=0.05)
    assert tensors[name].std() == pytest.approx(0.1 / 2, rel=0.05)  # / sqrt(2 * layers)


@pytest.mark.parametrize("numbers", [1, 15, 16, 17, 47, 48, 63, 64, 65, 79, 80, 1000])
def test_random_weights_drawn_in_chunks_are_those_drawn_at_once(numbers):
    """Torch draws groups of 16, the last one twice."""
    whole = torch.randn(numbers, generator=torch.Generator().manual_seed(3))
    for chunk in (16, 32, 48):
        drawn = param_mapping._normal((numbers,), torch.Generator().manual_seed(3), "cpu", chunk)
        assert torch.equal(drawn, whole), chunk
    odd = torch.Generator().manual_seed(3)
    control = torch.cat([torch.randn(n, generator=odd) for n in (8, numbers)])[:numbers]
    assert not torch.equal(control, whole) or numbers < 16  # chunks of 8 are other numbers


def test_random_weights_are_those_of_earlier_versions():
    """As every version has drawn them on a CPU."""
    drawn = dict(param_mapping.random_tensors(INTERNLM, 7))
    for name, std in {
        "embedding.word_embeddings.weight": 0.1,
        "decoder.layers.1.mlp.linear_fc2.weight": 0.1 / 2,
    }.items():
        generator = torch.Generator().manual_seed(crc32(f"7 {name}".encode()))
        assert torch.equal(drawn[name], torch.randn(drawn[name].shape, generator=generator).mul_(std))


def test_weights_that_lack_a_parameter_are_refused(cpu):
    from ascendspeed.utils.errors import UserError

    tensors = tensors_of(INTERNLM)
    del tensors["decoder.layers.1.self_attention.linear_proj.bias"]
    with pytest.raises(UserError, match=r"lack decoder\.layers\.1\.self_attention\.linear_proj\.bias"):
        ours(cpu, INTERNLM, tensors)
