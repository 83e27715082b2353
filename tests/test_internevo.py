"""Training folders of InternEvo, compared tensor by tensor with an oracle in plain torch (`evo_oracle`)."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.conversion import same
from helpers.evo_oracle import (
    Shape,
    Trained,
    hugging_face,
    model_config,
    pairs,
    parts_of,
    save,
    save_config,
    states,
)
from helpers.internevo import BIASED, GROUPED, PLAIN, config_json, config_of, directory, equal
from safetensors.torch import load_file, save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.internevo import config as evo_config
from ascendspeed.conversion.formats.internevo import reading
from ascendspeed.models.families.internevo_names import InternEvoOptions, InternEvoStyle
from ascendspeed.utils.errors import UserError

EVEN = {1: (4,), 2: (2, 2), 4: (1, 1, 1, 1)}
LAYOUTS = [(tp, pp) for tp in (1, 2, 4, 8) for pp in EVEN]
KINDS = {  # family, sizes, what it is trained as
    "internlm": ("internlm", BIASED, "INTERNLM"),
    "internlm without bias": ("internlm", PLAIN, "LLAMA2"),
    "internlm2": ("internlm2", GROUPED, "INTERNLM2"),
    "internlm2 unfused": ("internlm2", GROUPED, "LLAMA2"),
    "internlm3": ("internlm3", GROUPED, "LLAMA2"),
    "llama": ("llama", GROUPED, "LLAMA2"),
    "llama with bias": ("llama", replace(GROUPED, bias=True), "LLAMA2"),
}


def trained(folder: Path, shape: Shape, how: Trained, **more) -> Path:
    """A training folder of the oracle's, with its model_config.pt and without config.json."""
    save(folder, shape, how, parts_of(shape), model_config(shape, how, **more))
    return folder


def back(source: convert.CheckpointReader, family: str) -> dict[str, torch.Tensor]:
    """Tensors of a reader under the Hugging Face names of a family."""
    from ascendspeed.models import param_mapping

    config = replace(source.config, family=family)
    full = dict(source.tensors())
    return {
        n: t
        for p in param_mapping.parameters(config)
        for n, t in param_mapping.megatron_to_hf(config, p, full[p.name]).items()
    }


def right(source: convert.CheckpointReader, family: str, shape: Shape) -> bool:
    """True if a reader holds the oracle's model, bit by bit."""
    return same(back(source, family), hugging_face(family, shape, parts_of(shape)))


def there_and_back(tmp_path: Path, kind: str, layouts: list[tuple[int, int]]) -> None:
    """Hugging Face -> InternEvo is the oracle's folder, and back byte for byte."""
    family, shape, model_type = KINDS[kind]
    tensors = directory(tmp_path / "hf", family, shape)
    source = convert.open_reader(tmp_path / "hf")
    for tp, pp in layouts:
        out = tmp_path / f"{tp} {pp}"
        convert.convert(source, out, convert.InternEvoWriter(tp, pp, model_type=model_type))
        assert equal(out, shape, Trained(model_type, tp, EVEN[pp]))
        convert.write_hf(convert.open_reader(out), tmp_path / f"back {tp} {pp}")
        assert same(load_file(tmp_path / f"back {tp} {pp}/model.safetensors"), tensors)


@pytest.mark.breadth
@pytest.mark.parametrize("number", range(3))
def test_every_layout(tmp_path, number):
    """Each naming in a third of the layouts; a slow test has every family in all."""
    there_and_back(tmp_path, ("internlm", "internlm2", "llama")[number], LAYOUTS[number::3])


@pytest.mark.breadth
@pytest.mark.parametrize("kind", KINDS)
def test_every_family(tmp_path, kind):
    there_and_back(tmp_path, kind, [(2, 2), (8, 1)])


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_the_reference_checkpoints(reference, tmp_path, name):
    """The original's own files, with the config.json and the shards that they came with."""
    tensors = {
        n: t for path in (reference / name).glob("model-*.safetensors") for n, t in load_file(path).items()
    }
    source = convert.open_reader(reference / name)
    convert.convert(source, tmp_path / "evo", convert.InternEvoWriter(2, 2, qk_interleaved=True))
    convert.write_hf(convert.open_reader(tmp_path / "evo"), tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    assert same(written, {n: tensors[n] for n in written})
    assert all("inv_freq" in n for n in tensors.keys() - written.keys())
    assert json.loads((tmp_path / "back/config.json").read_text())["bos_token_id"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_in_every_layout(tmp_path, kind):
    there_and_back(tmp_path, kind, LAYOUTS)


TRAINED_AS = [("INTERNLM", 2, 0), ("INTERNLM2", 4, 0), ("LLAMA2", 1, 2), ("INTERNLM", 1, 4)]
SWITCHES = list(product(TRAINED_AS, [False, True], [1, 2], [False, True]))
"""(model type, TP, WP), split embedding, version, interleaved pairs."""
QUICK_SWITCHES = [s for s in SWITCHES if (TRAINED_AS.index(s[0]) + s[1] + s[2] + s[3]) % 4 == 0]
"""Each combination of the switches, with one of the models; the others are slow."""


@pytest.mark.parametrize(
    ("model_type", "tp", "wp", "embed_split", "version", "interleaved"),
    [
        pytest.param(*how, *switches, marks=[] if (how, *switches) in QUICK_SWITCHES else pytest.mark.slow)
        for how, *switches in SWITCHES
    ],
)
def test_every_switch_both_ways(tmp_path, model_type, tp, wp, embed_split, version, interleaved):
    """Uneven stages, version 1, either cut of the embedding, rotated pairs, weight parallel; read without
    config.json.
    """
    shape = BIASED if model_type == "INTERNLM" else GROUPED
    how = Trained(
        model_type,
        tp,
        (1, 1, 2),
        wp,
        version=version,
        embed_split=embed_split,
        flash_embedding=not embed_split,
        interleaved=interleaved,
    )
    family = "internlm" if model_type == "INTERNLM" else "llama"
    directory(tmp_path / "hf", family, shape)
    to = convert.InternEvoWriter(
        tp, 3, wp, version=version, embed_split=embed_split, qk_interleaved=interleaved, model_type=model_type
    )
    if model_type == "INTERNLM2":
        config_json(tmp_path / "hf", "internlm2", shape)
        save_file(hugging_face("internlm2", shape, parts_of(shape)), tmp_path / "hf/model.safetensors")
        family = "internlm2"
    convert.convert(convert.open_reader(tmp_path / "hf"), tmp_path / "out", to)
    assert equal(tmp_path / "out", shape, how)
    source = convert.open_reader(
        trained(tmp_path / "theirs", shape, how), internevo=InternEvoOptions(max_pos=32)
    )
    assert right(source, family, shape)
    assert replace(source.config, family=family) == config_of(family, shape)


@pytest.mark.breadth
@pytest.mark.parametrize(
    "how",
    [
        Trained("INTERNLM", 2, (2, 2), prefix="model."),
        Trained("INTERNLM", 2, (1, 1, 1, 1), chunks=2, prefix="model."),
        Trained("INTERNLM", 1, (4,), 8),
        Trained("INTERNLM", 2, (2, 2), 4, early=True),
        Trained("INTERNLM", 4, (4,), 2, early=True, embed_split=False, flash_embedding=True),
        Trained("INTERNLM", 1, (4,), 4, fused_mlp=True),
        Trained("INTERNLM", 4, (4,), fused_mlp=True),
        Trained("INTERNLM", 4, (4,), embed_split=False),
        Trained("INTERNLM2", 1, (1, 3), 4, early=True),
        Trained("INTERNLM2", 2, (3, 1), prefix="model."),
        Trained("LLAMA2", 4, (2, 2), save_hook=True),
        Trained("LLAMA2", 1, (4,), 8, save_hook=True, fused_mlp=True, interleaved=True),
        Trained("LLAMA2", 8, (4,), interleaved=True),
        Trained("LLAMA2", 8, (1, 1, 1, 1), 2, early=True),
    ],
    ids=str,
)
def test_whatever_trained_it_is_read(tmp_path, how):
    """Wrappers, interleaved pipelines, isp of both times and what some releases save differently from what
    they train.
    """
    shape = BIASED if how.kind == "INTERNLM" else GROUPED
    settings = {"mlp_layer_fusion": how.fused_mlp} | (
        {"enable_qkv_fusion": how.save_hook} if how.kind == "LLAMA2" else {}
    )
    source = convert.open_reader(
        trained(tmp_path / "evo", shape, how, **settings), internevo=InternEvoOptions(max_pos=32)
    )
    family = {"INTERNLM": "internlm", "INTERNLM2": "internlm2", "LLAMA2": "llama"}[how.kind]
    assert right(source, family, shape)


@pytest.mark.parametrize(
    "lie", [{"qk_interleaved": True}, {"enable_qkv_fusion": True}, {"mlp_layer_fusion": True}], ids=str
)
def test_a_folder_that_is_told_wrongly_is_another_model(tmp_path, lie):
    """Control: no shape tells these, so the bits must."""
    how = Trained("LLAMA2", wp=2)
    assert right(
        convert.open_reader(trained(tmp_path / "a", GROUPED, how), internevo=InternEvoOptions(max_pos=32)),
        "llama",
        GROUPED,
    )
    assert not right(
        convert.open_reader(
            trained(tmp_path / "b", GROUPED, how, **lie), internevo=InternEvoOptions(max_pos=32)
        ),
        "llama",
        GROUPED,
    )


def test_parallel_modes_cut_differently(tmp_path):
    """Control: Wqkv of two ranks is q, k and v of each one's heads, or (isp) the halves of [q; k; v]: of the
    same shapes.
    """
    whole, each = (
        states(BIASED, how, parts_of(BIASED)) for how in (Trained("INTERNLM", wp=2), Trained("INTERNLM", 2))
    )
    name = "blocks.0.mixer.Wqkv.weight"
    a, b = whole["model_wp0_pp0.pt"][name], each["model_tp0_pp0.pt"][name]
    assert a.shape == b.shape
    assert not torch.equal(a, b)
    directory(tmp_path / "hf", "internlm", BIASED)
    convert.convert(convert.open_reader(tmp_path / "hf"), tmp_path / "out", convert.InternEvoWriter(2))
    assert not equal(tmp_path / "out", BIASED, Trained("INTERNLM", wp=2))
    assert not equal(tmp_path / "out", BIASED, Trained("INTERNLM", 2, version=1))


def rotate(x: torch.Tensor, neighbours: bool) -> torch.Tensor:
    """Rotary embedding [s, heads, d], of neighbours or of halves, plain."""
    s, _, d = x.shape
    angle = torch.outer(torch.arange(s).float(), 10000.0 ** (-torch.arange(0, d, 2).float() / d))[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    rotated = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(rotated, -1).flatten(-2) if neighbours else torch.cat(rotated, -1)


def test_interleaved_rows_compute_the_same_attention():
    """Attention scores: those under a rotation of neighbours equal those of ours under one of
    halves.
    """
    shape = Shape()
    parts = {name: tensor.float() for name, tensor in parts_of(shape).items()}
    x = torch.randn(7, shape.hidden, generator=torch.Generator().manual_seed(3))

    def scores(q: torch.Tensor, k: torch.Tensor, neighbours: bool) -> torch.Tensor:
        q, k = (rotate((x @ w.T).view(7, shape.heads, shape.d), neighbours) for w in (q, k))
        return torch.einsum("shd,thd->hst", q, k)

    q, k = parts["0.q"], parts["0.k"]
    ours = scores(q, k, False)
    assert torch.allclose(scores(pairs(shape.d, q), pairs(shape.d, k), True), ours, atol=1e-3, rtol=1e-5)
    assert (scores(q, k, True) - ours).abs().max() > 1  # control: rows left as they are
    assert torch.equal(pairs(4, torch.arange(8)), torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]))


def test_the_folder_that_is_written(tmp_path):
    """Plain values only, the mark of a whole save, and InternEvo's own formula gives back the width of the
    MLP.
    """
    for i, (hidden, ffn) in enumerate(
        [(64, 96), (4096, 11008), (4096, 14336), (5120, 13824), (48, 101), (96, 257)]
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = ModelConfig("llama", hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=8)
        evo_config.write(folder, config, InternEvoStyle("LLAMA2"), True, "bfloat16")
        saved_config = torch.load(folder / "model_config.pt", weights_only=True)
        width = saved_config["multiple_of"] * math.ceil(
            int(hidden * saved_config["mlp_ratio"]) / saved_config["multiple_of"]
        )
        assert width == ffn
    directory(tmp_path / "hf", "internlm", BIASED)
    convert.convert(
        convert.open_reader(tmp_path / "hf"), tmp_path / "out", convert.InternEvoWriter(2), verify=True
    )
    saved_config = torch.load(tmp_path / "out/model_config.pt", weights_only=True)
    assert all(isinstance(value, (int, float, str, bool)) for value in saved_config.values())
    assert (
        saved_config["no_bias"],
        saved_config["qk_interleaved"],
        saved_config["adapt_hf"],
        saved_config["vocab_size"],
    ) == (
        False,
        False,
        True,
        128,
    )
    assert torch.load(tmp_path / "out/0.step", weights_only=True) == {"step": 0}
    assert (tmp_path / "out/config.json").is_file()
    stored = [torch.load(tmp_path / f"out/model_tp{t}_pp0.pt", weights_only=True) for t in range(2)]
    assert ["blocks.0.mixer.out_proj.bias" in tensors for tensors in stored] == [True, False]


def read(
    folder: Path, options: InternEvoOptions | None = None, home: Path | None = None
) -> convert.CheckpointReader:
    return reading.open_training_folder(folder, home, options)


def test_what_a_folder_does_not_say_is_asked(tmp_path, capsys):
    how = Trained("LLAMA2", 2)
    folder = trained(tmp_path / "evo", GROUPED, how)
    with pytest.raises(UserError, match=r"--max_pos N"):
        read(folder)
    assert read(folder, InternEvoOptions(max_pos=16)).config.max_position_embeddings == 16
    source = read(folder, InternEvoOptions(max_pos=16, rotary_type="dynamic", scaling_factor=3.0))
    assert (source.config.rope_scaling_type, source.config.rope_scaling_factor) == ("dynamic", 3.0)
    assert not capsys.readouterr().out
    (folder / "model_config.pt").unlink()
    with pytest.raises(UserError, match=r"number of heads \(model_config.pt\) nor .*--max_pos"):
        read(folder)
    config_json(folder, "llama", GROUPED)  # it says all but one thing
    assert right(read(folder), "llama", GROUPED)
    assert "does not say qk_interleaved or adapt_hf" in capsys.readouterr().out
    assert not right(read(folder, InternEvoOptions(qk_interleaved="yes")), "llama", GROUPED)
    assert (
        read(folder, InternEvoOptions(max_pos=16, rotary_type="origin")).config.max_position_embeddings == 16
    )
    (folder / "config.json").rename(tmp_path / "config.json")
    assert read(folder, home=tmp_path).assets_dir == tmp_path


def test_versions_are_told_by_shapes(tmp_path):
    square = replace(BIASED, ffn=64)
    for version in (1, 2):
        folder = trained(tmp_path / str(version), square, Trained("INTERNLM", version=version))
        with pytest.raises(
            UserError, match=r"--version 1 \(w2 is up, w3 is down\) or --version 2 \(w3 is up"
        ):
            read(folder, InternEvoOptions(max_pos=32))
        assert right(read(folder, InternEvoOptions(version, max_pos=32)), "internlm", square)
        assert not right(read(folder, InternEvoOptions(3 - version, max_pos=32)), "internlm", square)
    folder = trained(tmp_path / "3", BIASED, Trained("INTERNLM", version=1))
    with pytest.raises(UserError, match="not of version 2, where w3 is up, w2 is down: it has w1"):
        read(folder, InternEvoOptions(2, max_pos=32))


def test_old_and_new_words_for_the_same(tmp_path, capsys):
    """adapt_hf is the opposite of qk_interleaved; the training configuration's text says what was trained."""
    folder = trained(tmp_path / "evo", GROUPED, Trained("LLAMA2", 2, interleaved=True))
    table = model_config(GROUPED, Trained("LLAMA2", 2))
    del table["qk_interleaved"]
    save_config(folder / "model_config.pt", table | {"adapt_hf": False})
    assert right(read(folder, InternEvoOptions(max_pos=32)), "llama", GROUPED)
    save_config(folder / "model_config.pt", table | {"adapt_hf": False, "qk_interleaved": False})
    with pytest.raises(UserError, match="adapt_hf = False, which is its opposite"):
        read(folder, InternEvoOptions(max_pos=32))
    hooked = trained(tmp_path / "hooked", GROUPED, Trained("LLAMA2", 2, save_hook=True))
    assert not right(read(hooked, InternEvoOptions(max_pos=32)), "internlm2", GROUPED)  # control
    assert right(read(hooked, InternEvoOptions(qkv_fused="yes", max_pos=32)), "internlm2", GROUPED)
    config_json(hooked, "internlm2", GROUPED)
    assert not right(read(hooked), "internlm2", GROUPED)
    assert "does not say enable_qkv_fusion" in capsys.readouterr().out
    (hooked / "config.json").unlink()
    torch.save('JOB_NAME = "7b"\nmodel_type = "INTERNLM2_PUBLIC"\n', hooked / "config_file.pt")
    source = read(hooked, InternEvoOptions(max_pos=32))
    assert source.config.family == "internlm2"
    assert right(source, "internlm2", GROUPED)


def test_a_save_that_was_cut_short(tmp_path, capsys):
    folder = trained(tmp_path / "evo", BIASED, Trained("INTERNLM", 2))
    (folder / "100.step").unlink()
    assert right(read(folder, InternEvoOptions(max_pos=32)), "internlm", BIASED)
    assert "no STEP.step, which InternEvo writes last" in capsys.readouterr().out
    (folder / "model_tp1_pp0.pt").write_bytes((folder / "model_tp1_pp0.pt").read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model_tp1_pp0\.pt"):
        read(folder, InternEvoOptions(max_pos=32))
    (folder / "model_tp1_pp0.pt").rename(folder / "model_tp2_pp0.pt")
    with pytest.raises(UserError):
        read(folder, InternEvoOptions(max_pos=32))


def edit(folder: Path, name: str, change) -> None:
    tensors = dict(torch.load(folder / name, weights_only=True))
    change(tensors)
    torch.save(tensors, folder / name)


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.breadth
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model_tp1_pp0.pt").unlink(), "lacks model_tp1_pp0.pt"),
        (lambda f: edit(f, "model_tp1_pp1.pt", lambda h: h.pop("norm.weight")), "lacks norm.weight"),
        (lambda f: edit(f, "model_tp0_pp0.pt", lambda h: h.update(odd=torch.ones(1))), "has left over odd"),
        (
            lambda f: edit(
                f,
                "model_tp1_pp0.pt",
                lambda h: h.update({"blocks.0.norm1.weight": torch.ones(64).bfloat16()}),
            ),
            "not the copy",
        ),
        (
            lambda f: edit(
                f, "model_tp1_pp0.pt", lambda h: h.update({"blocks.0.mlp.w1.weight": torch.ones(3, 64)})
            ),
            r"\[3, 64\]",
        ),
        (lambda f: torch.save({}, f / "model_wp0_pp0.pt"), "several parallel modes"),
        (lambda f: torch.save({}, f / "model_tp0_pp0_dp0.pt"), "shards of FSDP"),
        (lambda f: torch.save({}, f / "model_moe_layer0_expert0_tp0.pt"), "mixtures of experts"),
        (lambda f: torch.save(Hostile(), f / "model_config.pt"), "could run code"),
        (lambda f: torch.save(Hostile(), f / "model_tp0_pp0.pt"), "model_tp0_pp0.pt"),
        (
            lambda f: save_config(f / "model_config.pt", {"norm_head": True}),
            "norm_head = True is not supported",
        ),
        (lambda f: torch.save([1], f / "model_config.pt"), "holds a list"),
        (
            lambda f: config_json(f, "internlm", replace(BIASED, layers=5)),
            "has 4 layers, but .*config.json says 5",
        ),
        (
            lambda f: config_json(f, "internlm", BIASED, rotary={"base": 500, "type": "origin"}),
            "rope_base = 10000, config.json 500",
        ),
        (lambda f: config_json(f, "internlm2", BIASED), "names of INTERNLM, which is no internlm2 model"),
    ],
)
def test_damaged_and_contradicting_folders(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    folder = trained(tmp_path / "evo", BIASED, Trained("INTERNLM", 2, (2, 2)), rope_base=10000)
    assert right(read(folder, InternEvoOptions(max_pos=32)), "internlm", BIASED)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        convert.open_reader(folder, internevo=InternEvoOptions(max_pos=32))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("family", "shape", "to", "message"),
    [
        ("internlm", BIASED, convert.InternEvoWriter(3), "do not split over 3 ranks; choose 1, 2, 4, 8"),
        ("llama", Shape(heads=8, kv=2), convert.InternEvoWriter(4), "do not split over 4 ranks; choose 1, 2"),
        ("internlm", BIASED, convert.InternEvoWriter(1, 5), "4 layers do not give 5 stages"),
        ("internlm", BIASED, convert.InternEvoWriter(2, wp=2), "leave --tp 2 out"),
        ("internlm", BIASED, convert.InternEvoWriter(version=3), "--version 3 does not exist"),
        ("internlm", PLAIN, convert.InternEvoWriter(model_type="INTERNLM"), "always has biases"),
        ("llama", GROUPED, convert.InternEvoWriter(model_type="INTERNLM2"), "choose LLAMA2"),
        ("gemma", Shape(), convert.InternEvoWriter(), "gemma"),
    ],
)
def test_what_cannot_be_written(tmp_path, family, shape, to, message):
    source = convert.CheckpointReader(
        "test", tmp_path, config_of(family, shape), {}, {}, lambda name, tile: torch.ones(1), None
    )
    with pytest.raises(UserError, match=message):
        to.check(source)
