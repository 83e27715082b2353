"""Damaged, hostile and contradicting checkpoints are refused before anything is written."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.conversion import (
    BASE,
    MODELS,
    bits,
    hugging_face,
    same,
    written,
)
from helpers.conversion_folders import hf, ranks, sources, to_hf, to_ranks
from safetensors.torch import load_file, save_file

from ascendspeed.conversion import convert
from ascendspeed.utils.errors import UserError


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def edit(path: Path, change) -> None:
    """Changes the tensors of a shard."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refused(folder: Path, *message: str) -> None:
    """Opening it is a `UserError` of one line that says all of this, and a conversion writes nothing."""
    with pytest.raises(UserError) as caught:
        to_ranks(convert.open_reader(folder), folder.parent / "out", 1)
    assert all(text in str(caught.value) for text in message), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in folder.parent.iterdir() if "out" in path.name]


def test_truncated_shard(hf):
    path = first_shard(hf)
    os.truncate(path, path.stat().st_size - 100)
    refused(hf, path.name, "cut off")


def test_missing_shard(hf):
    path = first_shard(hf)
    path.unlink()
    refused(hf, path.name, "lacks")


def test_index_names_a_missing_tensor(hf):
    index = hf / "model.safetensors.index.json"
    edit_json(index, lambda i: i["weight_map"].update({"model.layers.9.x.weight": first_shard(hf).name}))
    refused(hf, "model.layers.9.x.weight", "lacks")


def test_index_without_a_tensor_that_the_model_needs(hf):
    edit(first_shard(hf), lambda t: t.pop("model.embed_tokens.weight"))
    edit_json(hf / "model.safetensors.index.json", lambda i: i["weight_map"].pop("model.embed_tokens.weight"))
    refused(hf, "lacks model.embed_tokens.weight")


def test_left_over_tensor(hf):
    def add(tensors):
        tensors["model.extra"] = torch.zeros(1)

    edit(first_shard(hf), add)
    refused(hf, "left over model.extra")
    edit_json(
        hf / "model.safetensors.index.json",
        lambda i: i["weight_map"].update({"model.extra": first_shard(hf).name}),
    )
    refused(hf, "left over model.extra")


def test_tensor_in_two_shards(hf):
    one, two = sorted(hf.glob("*.safetensors"))[:2]
    edit(two, lambda t: t.update({"model.embed_tokens.weight": load_file(one)["model.embed_tokens.weight"]}))
    refused(hf, two.name, "left over model.embed_tokens.weight")


def test_wrong_shape_and_type(hf):
    def cut(tensors):
        name = next(name for name in tensors if name.startswith("model.layers.1."))
        tensors[name] = tensors[name][:-1].contiguous()

    def whole(tensors):
        tensors["model.embed_tokens.weight"] = torch.zeros(131, 64, dtype=torch.int64)

    edit(first_shard(hf), cut)
    refused(hf, "model.layers.1.", "but config.json says [")
    edit(first_shard(hf), whole)
    refused(hf, "model.embed_tokens.weight", "int64")


def test_pieces_of_several_types_are_not_fused(hf):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(first_shard(hf), lambda t: t.update({name: t[name].bfloat16()}))
    refused(hf, name, "several types")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", ".."])
def test_index_that_leaves_the_folder(hf, file):
    edit_json(
        hf / "model.safetensors.index.json", lambda i: i["weight_map"].update({"model.norm.weight": file})
    )
    refused(hf, file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_none(hf, text):
    (hf / "model.safetensors.index.json").write_text(text)
    refused(hf, "model.safetensors.index.json")


def test_config_that_contradicts_the_tensors(hf):
    edit_json(hf / "config.json", lambda c: c.update(bias=False))
    refused(hf, "config.json says bias = false, but the tensors have a model.layers.0.self_attn.q_proj.bias")
    edit_json(hf / "config.json", lambda c: c.update(bias=True, num_hidden_layers=5))
    refused(hf, "config.json says num_hidden_layers = 5, but the tensors have 4 layers")


def test_missing_config_and_two_sets_of_weights(hf):
    shutil.copyfile(first_shard(hf), hf / "model.safetensors")
    refused(hf, "model.safetensors and model.safetensors.index.json")
    (hf / "config.json").unlink()
    refused(hf, "no config.json")


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_hostile_pickle_does_not_run(hf, ranks, tmp_path):
    evil, mark = Evil(tmp_path / "it-ran"), tmp_path / "it-ran"
    for path in hf.glob("model*"):
        path.unlink()
    torch.save({"a": evil}, hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin", "not loaded")
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({"a": evil}))
    refused(hf, "pytorch_model.bin", "not loaded")
    path = ranks / "release/mp_rank_00_000/model_optim_rng.pt"
    torch.save({"model": {}, "x": evil}, path)
    refused(ranks, "model_optim_rng.pt", "not loaded")
    assert not mark.exists()
    torch.load(path, weights_only=False)  # control
    assert mark.exists()


def test_truncated_and_missing_rank_files(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    os.truncate(path, path.stat().st_size - 1000)
    refused(ranks, "mp_rank_01_001", "cut off")
    path.unlink()
    refused(ranks, "lacks mp_rank_01_001/model_optim_rng.pt", "TP 2 x PP 2")
    (ranks / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
    refused(ranks, "128 rows", "131")
    shutil.rmtree(ranks / "release")
    refused(ranks, "no rank files")


def test_rank_file_with_other_tensors(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    final = content["model"].pop("decoder.final_layernorm.weight")
    torch.save(content, path)
    refused(ranks, "lacks decoder.final_layernorm.weight")
    content["model"] |= {
        "decoder.final_layernorm.weight": final,
        "decoder.final_layernorm._extra_state": torch.zeros(1),
    }
    torch.save(content, path)
    assert len(convert.open_reader(ranks).names()) == 35
    content["model"]["decoder.final_layernorm.weight"] = final[:-1]
    torch.save(content, path)
    refused(ranks, "final_layernorm.weight is [63]")
    torch.save([1], path)
    refused(ranks, "no table of tensors")
    (ranks / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    refused(ranks, "../elsewhere")


def test_nothing_that_is_known(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(
        UserError, match=r"looked for .*safetensors.*rank files.*training checkpoint \(.*\); found a.txt"
    ):
        convert.open_reader(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        convert.open_reader(tmp_path / "b")


def test_a_tied_model_may_hold_its_embedding_twice(tmp_path):
    tied = replace(MODELS["llama, 2 groups"], tie_embeddings=True)
    tensors = hugging_face(tmp_path / "hf", tied)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "hf/model.safetensors")
    to_hf(convert.open_reader(tmp_path / "hf"), tmp_path / "back")
    assert same(written(tmp_path / "back"), tensors)
    other = embedding.clone()
    bits(other)[70, 3] ^= 1  # control
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "hf/model.safetensors")
    refused(tmp_path / "hf", "tie_word_embeddings = true", "lm_head.weight")


def test_a_rank_that_holds_another_ones_weights(ranks):
    files = ranks / "release"
    shutil.copyfile(files / "mp_rank_00_000/model_optim_rng.pt", files / "mp_rank_01_000/model_optim_rng.pt")
    refused(
        ranks, "rank 1, stage 0 holds the weights of rank 0, stage 0: was one file copied over the other?"
    )


def test_a_rank_whose_copy_differs(ranks):
    path = ranks / "release/mp_rank_01_001/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["decoder.final_layernorm.weight"][0] += 1
    torch.save(content, path)
    refused(ranks, "decoder.final_layernorm.weight of rank 1, stage 1 is not the copy of another's")


def test_rows_beyond_the_vocabulary(tmp_path, capsys):
    """Non-zero padding is reported; more of it than padding can be (128 rows) is refused: config.json
    is a stale one.
    """
    config = replace(BASE, vocab_size=250)
    tensors = hugging_face(tmp_path / "hf", config)
    to_ranks(convert.open_reader(tmp_path / "hf"), tmp_path / "ranks", 1)

    def set_vocabulary(size: int) -> None:
        edit_json(tmp_path / "ranks/config.json", lambda values: values.update(vocab_size=size))

    for size, has_note in ((250, False), (200, True)):
        set_vocabulary(size)
        capsys.readouterr()
        convert.open_reader(tmp_path / "ranks")
        note = f"{256 - size} rows of padding in embedding.word_embeddings.weight hold values"
        assert (note in capsys.readouterr().out) == has_note
    set_vocabulary(120)
    refused(tmp_path / "ranks", "136 rows beyond the vocab_size = 120 of config.json", "correct vocab_size")
    path = tmp_path / "ranks/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=True)
    for name, hf_name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        content["model"][name] = torch.cat(
            [tensors[hf_name], tensors[hf_name][-6:]]
        )  # as AscendSpeed's converter padded
    torch.save(content, path)
    set_vocabulary(250)
    capsys.readouterr()
    convert.open_reader(tmp_path / "ranks")
    assert "padding" not in capsys.readouterr().out


def test_layers_of_another_number(ranks):
    edit_json(ranks / "config.json", lambda values: values.update(num_hidden_layers=2_000_000))
    refused(ranks, "holds 4 layers on 2 pipeline stages, config.json says 2000000")


def test_two_checkpoints_in_one_folder(ranks, hf):
    for path in hf.glob("model*"):
        shutil.copy(path, ranks)
    refused(
        ranks, "holds Hugging Face weights and Megatron rank files: move one of them to a folder of its own"
    )
    (ranks / "trainer_state.json").write_text("{}")
    assert convert.open_reader(ranks).description == "Hugging Face directory"


@pytest.mark.parametrize("name", ["..", "\u00b2", "a/b", ""])
def test_a_tracker_that_leads_elsewhere(ranks, name):
    (ranks / "latest_checkpointed_iteration.txt").write_text(name)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt|has no rank files"):
        convert.open_reader(ranks)


def test_infinity_is_said(sources, tmp_path, capsys):
    tensors = hugging_face(tmp_path / "hf", BASE, "finite")
    tensors["model.norm.weight"][3] = float("-inf")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert.write_megatron(convert.open_reader(tmp_path / "hf"), tmp_path / "out", 2)
    assert "holds infinity in decoder.final_layernorm.weight\n" in capsys.readouterr().out
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"holds NaN in decoder.final_layernorm.weight; nothing was written"):
        convert.write_megatron(convert.open_reader(tmp_path / "hf"), tmp_path / "again", 2)
