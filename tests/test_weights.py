"""Fusion and sharding in the other order: shard each Hugging Face tensor, then fuse with the rank's heads."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.shapes import hf_shapes

from ascendspeed.config.pipeline_stages import check_pipeline_parallel
from ascendspeed.config.schema import ModelConfig, check_tensor_parallel
from ascendspeed.models import param_mapping
from ascendspeed.models.families import PRESETS
from ascendspeed.utils.errors import UserError

CONFIG = ModelConfig(
    "llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=131,
)
D = CONFIG.head_dim


def numbered(rows: int) -> torch.Tensor:
    """[rows, 64], every element its own number."""
    return torch.arange(rows * 64).reshape(rows, 64)


def fused_by_hand(heads: int, groups: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head, as Megatron's attention takes them apart."""
    rows, each = [], heads // groups
    for g in range(groups):
        rows += [q[(g * each + i) * D : (g * each + i + 1) * D] for i in range(each)]
        rows += [k[g * D : (g + 1) * D], v[g * D : (g + 1) * D]]
    return torch.cat(rows)


def qkv() -> list[torch.Tensor]:
    return [numbered(8 * D), 100_000 + numbered(4 * D), 200_000 + numbered(4 * D)]


def parameter(suffix: str) -> param_mapping.Parameter:
    return next(p for p in param_mapping.parameters(CONFIG) if p.name.endswith(suffix))


def fused_qkv() -> torch.Tensor:
    qkv_weight = parameter("layers.1.self_attention.linear_qkv.weight")
    return param_mapping.hf_to_megatron(
        CONFIG, qkv_weight, dict(zip(qkv_weight.hf_names, qkv(), strict=True))
    )


def test_qkv_is_fused_group_by_group():
    fused = fused_qkv()
    assert torch.equal(fused, fused_by_hand(8, 4, *qkv()))
    assert not torch.equal(fused, torch.cat(qkv()))  # control
    back = param_mapping.megatron_to_hf(CONFIG, parameter("layers.1.self_attention.linear_qkv.weight"), fused)
    assert all(torch.equal(a, b) for a, b in zip(back.values(), qkv(), strict=True))


def test_one_name_holds_its_blocks_one_after_the_other():
    """Baichuan's W_pack, [gate; up] in one tensor, and InternEvo's ranks: [q; k; v] of their own heads."""
    packed = replace(parameter("layers.1.self_attention.linear_qkv.weight"), hf_names=("W_pack",))
    assert torch.equal(
        param_mapping.hf_to_megatron(CONFIG, packed, {"W_pack": torch.cat(qkv())}), fused_qkv()
    )
    for rank in range(2):
        (entry,) = param_mapping.stored_tensors(CONFIG, packed, 2, rank)
        expected_shard = torch.cat([t.chunk(2)[rank] for t in qkv()])
        assert entry.shape == tuple(expected_shard.shape)
        for tile in entry.slices:
            assert torch.equal(
                fused_qkv()[tile.row : tile.row + tile.rows],
                expected_shard[tile.local_row : tile.local_row + tile.rows],
            )


@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_has_the_fused_parts_of_its_own_heads(tp):
    fused = fused_qkv()
    cut = param_mapping.ShardSpec(tuple(fused.shape), 0, num_shards=tp)
    for rank in range(tp):
        expected_shard = fused_by_hand(8 // tp, 4 // tp, *(t.chunk(tp)[rank] for t in qkv()))
        assert torch.equal(cut.shard(fused, rank), expected_shard)


def test_fewer_groups_than_ranks_cuts_the_rows_of_a_group():
    """Megatron gathers such a group from its ranks and takes it apart whole."""
    fused = fused_qkv()
    cut = param_mapping.ShardSpec(tuple(fused.shape), 0, num_shards=8)
    assert torch.equal(torch.cat([cut.shard(fused, rank) for rank in (2, 3)]), fused.chunk(4)[1])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "suffix",
    ["linear_qkv.weight", "linear_fc1.weight", "linear_fc2.weight", "word_embeddings.weight", "norm.weight"],
)
def test_tiles_of_all_ranks_are_the_full_tensor_once(tp, suffix):
    p = parameter(suffix)
    config_vocab = 256 * tp
    hits = torch.zeros(p.shape[0], math.prod(p.shape[1:]))
    for rank in range(1 if p.mapping.partition == "replicated" else tp):
        for entry in param_mapping.stored_tensors(CONFIG, p, tp, rank, config_vocab):
            part = torch.zeros(entry.shape[0], math.prod(entry.shape[1:]))
            for tile in entry.slices:
                hits[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] += 1
                part[
                    tile.local_row : tile.local_row + tile.rows,
                    tile.local_column : tile.local_column + tile.columns,
                ] += 1
            assert p.mapping.partition == "vocab" or part.eq(1).all()
    assert hits.eq(1).all()


def test_a_rectangle_is_gathered_from_tiles_or_seen_where_it_lies():
    full = torch.arange(60.0).view(10, 6)
    halves = [
        (full[:, c : c + 3].contiguous(), list(param_mapping.shard_slices([[(0, 10)]], 6, 1, 2, c // 3)))
        for c in (0, 3)
    ]
    assert torch.equal(
        param_mapping.assemble(halves, param_mapping.Slice2D(2, 1, 0, 0, 5, 4)), full[2:7, 1:5]
    )
    inside = param_mapping.assemble(halves, param_mapping.Slice2D(2, 3, 0, 0, 5, 2))
    assert inside.untyped_storage().data_ptr() == halves[1][0].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"10 elements .* in no stored tensor"):
        param_mapping.assemble(halves[:1], param_mapping.Slice2D(2, 1, 0, 0, 5, 4))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_has_its_gate_then_its_up(tp):
    gate, up = numbered(96), 100_000 + numbered(96)
    fc1 = parameter("layers.1.mlp.linear_fc1.weight")
    fused = param_mapping.hf_to_megatron(CONFIG, fc1, dict(zip(fc1.hf_names, (gate, up), strict=True)))
    cut = fc1.shard_spec(tp, 0)
    parts = [cut.shard(fused, rank) for rank in range(tp)]
    for rank, part in enumerate(parts):
        assert torch.equal(part, torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]))
        assert tuple(part.shape) == cut.shard_shape
    assert torch.equal(torch.cat([part.chunk(2)[i] for i in range(2) for part in parts]), fused)
    if tp > 1:
        assert not torch.equal(parts[0], fused.chunk(tp)[0])  # control: cut as one block


@pytest.mark.parametrize(("tp", "padded"), [(1, 131), (1, 256), (4, 256), (8, 1024)])
def test_padding_of_the_vocabulary_is_zero_and_goes_away(tp, padded):
    full = 1 + numbered(131)
    cut = param_mapping.ShardSpec((131, 64), 0, num_shards=tp, padded_rows=padded)
    parts = [cut.shard(full, rank) for rank in range(tp)]
    whole = torch.cat(parts)
    assert {tuple(part.shape) for part in parts} == {cut.shard_shape} == {(padded // tp, 64)}
    assert torch.equal(whole[:131], full)
    assert not whole[131:].any()


def test_names_and_splits_of_the_whole_model():
    with_bias = replace(CONFIG, num_query_groups=None, add_qkv_bias=True, add_dense_bias=True)
    names = [p.name for p in param_mapping.parameters(with_bias)]
    assert len(names) == len(set(names)) == 2 * 8 + 3
    without = [
        p.name for p in param_mapping.parameters(replace(with_bias, add_qkv_bias=False, add_dense_bias=False))
    ]
    assert set(names) - set(without) == {
        f"decoder.layers.{layer}.self_attention.linear_{what}.bias"
        for layer in (0, 1)
        for what in ("qkv", "proj")
    }
    tied = [p.name for p in param_mapping.parameters(replace(with_bias, tie_embeddings=True))]
    assert set(names) - set(tied) == {"output_layer.weight"}


@pytest.mark.parametrize("name", ["internlm-tiny", "internlm-20b"])
def test_shapes_come_from_the_fusions(name):
    config = PRESETS[name]
    shapes = {n: s for p in param_mapping.parameters(config) for n, s in hf_shapes(config, p).items()}
    h, layer = config.hidden_size, "model.layers.1."
    assert shapes[layer + "self_attn.k_proj.weight"] == (h, h)
    assert shapes[layer + "mlp.up_proj.weight"] == (config.ffn_hidden_size, h)
    assert shapes[layer + "mlp.down_proj.weight"] == (h, config.ffn_hidden_size)
    assert shapes["lm_head.weight"] == (config.vocab_size, h)


def test_a_wrong_shape_is_named():
    fc1 = parameter("layers.0.mlp.linear_fc1.weight")
    gate, up = fc1.hf_names
    with pytest.raises(UserError, match=r"up_proj.weight is \[95, 64\].*\[96, 64\]"):
        param_mapping.hf_to_megatron(CONFIG, fc1, {gate: torch.zeros(96, 64), up: torch.zeros(95, 64)})


def test_layouts_that_do_not_split_name_those_that_do():
    with pytest.raises(UserError, match=r"choose 1, 2, 4, 8$"):
        check_tensor_parallel(CONFIG, 3)
    check_tensor_parallel(CONFIG, 8)  # two ranks to a group
    with pytest.raises(
        UserError, match=r"choose 1, 3$"
    ):  # 6 heads: 2 ranks would not go into 3 groups, nor 3 groups into 2 ranks
        check_tensor_parallel(
            replace(CONFIG, num_attention_heads=6, num_query_groups=3, ffn_hidden_size=99), 2
        )
    with pytest.raises(UserError, match=r"2 layers do not split over 4 pipeline stages; choose 1, 2$"):
        check_pipeline_parallel(CONFIG, 4)
