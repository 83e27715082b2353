"""Files that others wrote: whatever is wrong with one is one line that names it, and nothing in it is run."""

import contextlib
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers.conversion import command
from helpers.shapes import hf_shapes
from hypothesis import strategies as st
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion.load_files import load_pt, load_safetensors, read_index, read_json
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils import errors, safe_io
from ascendspeed.utils.errors import UserError

MODEL = ModelConfig(
    "internlm", num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, vocab_size=64
)


class Payload:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def entry(start: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def safetensors_bytes(header: dict | bytes, data: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * data


ENTRY = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
TWICE = b"{" + ENTRY + b"," + ENTRY + b"}"
SAFETENSORS = {
    "a header of 100 MB": (safetensors_bytes(b"", 0, 100_000_001), "header too large"),
    "a header of 2**63 bytes": (safetensors_bytes(b"{}", 0, 2**63), "header too large"),
    "overlapping offsets": (
        safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, 12),
        "invalid offset for tensor `b`",
    ),
    "holes": (safetensors_bytes({"a": entry(0, 8), "b": entry(12, 20)}, 20), "invalid offset for tensor `b`"),
    "more than the header says": (safetensors_bytes({"a": entry(0, 8)}, 12), "file not fully covered"),
    "a shape that is not its bytes": (
        safetensors_bytes({"a": entry(0, 8, shape=[3])}, 8),
        "invalid shape, data type, or offset",
    ),
    "a shape that overflows": (safetensors_bytes({"a": entry(0, 8, shape=[2**62, 4])}, 8), "overflow"),
    "a negative shape": (safetensors_bytes({"a": entry(0, 8, shape=[-2])}, 8), "invalid JSON in header"),
    "a name that occurs twice": (safetensors_bytes(TWICE, 4), "it has the key 'a' twice"),
    "an element type that nobody knows": (
        safetensors_bytes({"a": entry(0, 8, "F99")}, 8),
        "unknown variant `F99`",
    ),
    "a type that torch does not know": (
        safetensors_bytes({"a": entry(0, 6, "F6_E2M3", [8])}, 6),
        "Dtype not understood",
    ),
    "a header that is no JSON": (safetensors_bytes(b"\xff\xfe", 0), "invalid UTF-8"),
    "a header of a million brackets": (safetensors_bytes(b"[" * 10**6, 0), "invalid JSON in header"),
    "offsets that are none": (
        safetensors_bytes({"a": entry(0, 8) | {"data_offsets": [0, 1e300]}}, 8),
        "invalid JSON in header",
    ),
}
WHOLE = safetensors_bytes({"a": entry(0, 8)}, 8)
CUT = {
    "an empty file": (b"", "0 of 8 bytes"),
    "a few bytes": (WHOLE[:5], "5 of "),
    "a cut header": (WHOLE[:20], f"20 of {len(WHOLE) - 8} bytes"),
    "a header longer than the file": (
        safetensors_bytes({"a": entry(0, 8)}, 8, 5000),
        f"{len(WHOLE)} of 5008 bytes",
    ),
    "one byte less": (WHOLE[:-1], f"{len(WHOLE) - 1} of {len(WHOLE)} bytes"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case, tmp_path):
    raw, message = SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        load_safetensors(path)
    assert str(error.value).startswith(f"{path} is damaged or no safetensors file (")
    assert message in str(error.value)
    assert str(error.value).endswith("download or copy it again")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", CUT)
def test_safetensors_that_are_cut_off(case, tmp_path):
    raw, message = CUT[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        load_safetensors(path)
    assert str(error.value).startswith(f"{path} is cut off, it has {message}")
    assert str(error.value).endswith("bytes: download or copy it again")
    path.write_bytes(WHOLE)
    assert load_safetensors(path)["a"].shape == (2,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.model"])
def test_what_git_keeps_in_place_of_large_files(name, tmp_path):
    folder = model_folder(tmp_path / "source")
    (folder / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 14600000000\n"
    )
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=rf"{name} is a Git LFS pointer, not the file itself: run git lfs pull"
    ):
        command("convert.py", *f"--from {folder} --to {tmp_path}/out --format hf".split())
    (folder / name).write_text("version https://git-lfs")  # control: any other text is not taken for it
    with pytest.raises(UserError) as error:
        command("convert.py", *f"--from {folder} --to {tmp_path}/out --format hf".split())
    assert "git lfs" not in str(error.value)


def test_control_what_is_whole_is_read(tmp_path):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.zeros(0),
        "c": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    for is_zip in (True, False):
        torch.save(tensors, tmp_path / f"{is_zip}.bin", _use_new_zipfile_serialization=is_zip)
        stored = load_pt(tmp_path / f"{is_zip}.bin")
        assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    stored = load_safetensors(tmp_path / "m.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    with open(tmp_path / "m.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\0\0")
    assert stored["c"] == 0  # it is mapped: nothing was read


@pytest.mark.parametrize("how", ["zip", "before torch 1.6", "bare pickle", "beside tensors"])
def test_a_hostile_pickle_does_not_run(how, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    stored = (
        {"weight": torch.zeros(2), "extra": Payload(marker)} if how == "beside tensors" else Payload(marker)
    )
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(stored, 2))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=how != "before torch 1.6")
    with pytest.raises(
        UserError,
        match=r"more than tensors \(then it is not loaded: it could run code\): \w+\.system is not plain",
    ):
        load_pt(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "bare pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # control: it would have


def test_a_damaged_pickle(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for raw in (b"", b"PK\x03\x04", whole[:1000], whole[:-100]):
        path.write_bytes(raw)
        with pytest.raises(
            UserError, match=r"pytorch_model\.bin is cut off, it.*: download or copy it again"
        ):
            load_pt(path)
    for raw in (whole[100:], b"\x80\x02" + b"(" * 1000, pickle.dumps({}, 5)[:-1]):
        path.write_bytes(raw)
        with pytest.raises(
            UserError, match=r"pytorch_model\.bin is damaged \(download or copy it again\)"
        ) as error:
            load_pt(path)
        assert "weights_only" not in str(error.value)  # torch advises to load it all the same
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(UserError, match=r"'archive/data\.pkl' in it is compressed"):
        load_pt(path)


INDICES = {
    "a file above": (
        {"a": "../x.safetensors"},
        "names '../x.safetensors', which is not a file of its folder",
    ),
    "an absolute path": ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
    "a file below": ({"a": "sub/x.safetensors"}, "names 'sub/x.safetensors'"),
    "NUL": ({"a": "x\0.safetensors"}, "names 'x\\x00.safetensors'"),
    "backslashes": ({"a": "..\\x"}, r"names '..\\x'"),
    "the folder": ({"a": "."}, "names '.'"),
    "nothing": ({"a": ""}, "names ''"),
    "a number": ({"a": 7}, "names 7"),
    "a list": ({"a": ["x"]}, "names ['x']"),
    "no names": ({}, "has no weight_map"),
    "no table": (["x"], "has no weight_map"),
    "a file that is not there": (
        {"a": "absent.safetensors"},
        "lacks absent.safetensors, which model.safetensors.index.json names",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index(case, tmp_path):
    where, message = INDICES[case]
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError) as error:
        read_index(path)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "x.safetensors").touch()
    path.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    assert read_index(path) == {"a": "x.safetensors"}


JSON = {
    "too deep": (b"[" * 10**6, "nested too deeply"),
    "too deep, closed": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "nested too deeply"),
    "not UTF-8": (b'{"a": "\xff"}', "invalid start byte"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "can't decode"),
    "half a character": (b'{"a": "\\ud800"}', "surrogates not allowed"),
    "a name twice": (b'{"a": 1, "b": 2, "a": 3}', "it has the key 'a' twice"),
    "a number without end": (b"1" * 10**5, "digits"),
    "NaN": (b'{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"rope_theta": [-Infinity]}', "-Infinity is not a JSON number"),
    "a number beyond all floats": (b'{"rope_theta": 1e400}', "1e400 is not a JSON number"),
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": [1, 2', "Expecting"),
}


@pytest.mark.parametrize("case", JSON)
def test_json(case, tmp_path):
    raw, message = JSON[case]
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert f"{path} cannot be read, it is not JSON: " in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(safe_io.MAX_JSON_BYTES + 1)
    with pytest.raises(UserError, match="64 MiB of JSON is more than any checkpoint needs"):
        read_json(tmp_path / "config.json")
    (tmp_path / "emoji.json").write_text('"\\ud83d\\ude00"')  # control: a whole character, escaped
    assert read_json(tmp_path / "emoji.json") == "😀"
    (tmp_path / "numbers.json").write_text(
        '{"NaN": [1e300, -0.5, 1e-400]}'
    )  # the word alone is none of the numbers
    assert read_json(tmp_path / "numbers.json") == {"NaN": [1e300, -0.5, 0.0]}


@pytest.mark.parametrize("load", [load_safetensors, load_pt, read_json])
def test_what_is_no_file_of_the_folder(load, tmp_path, monkeypatch):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError) as error:
            load(path)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1

    (tmp_path / "outside").write_bytes(b"secret")
    folder = tmp_path / "checkpoint"
    (folder / "directory").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (folder / "out").symlink_to(tmp_path / "outside")
    (folder / "nowhere").symlink_to("absent")
    (folder / "circle").symlink_to("circle")
    (folder / "device").symlink_to("/dev/zero")
    refused(folder / "directory", "is a directory, not a file")
    refused(folder / "pipe", "is a device or pipe, not a file")
    refused(
        folder / "out",
        f"is a link that leads out of {folder}, to {tmp_path / 'outside'}: put the file itself there",
    )
    refused(folder / "device", "is a link that leads out of")
    refused(folder / "nowhere", "cannot be read: ")
    refused(folder / "circle", "cannot be read: ")
    refused(folder / "a\0b", "cannot be read: ")
    refused(folder / ("x" * 5000), "cannot be read: ")
    (folder / "locked").touch(0o000)
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "locked")  # root may read everything
    refused(folder / "locked", "locked cannot be read: no permission")


def test_links_within_a_checkpoint_and_within_a_cache(tmp_path):
    """huggingface_hub keeps files as blobs/SHA and links to them from snapshots/REVISION; its own blobs, no
    others.
    """
    tensors = {"a": torch.ones(3)}
    mine, others = (tmp_path / f"hub/models--x--{name}" for name in ("mine", "others"))
    for repository in (mine, others):
        (repository / "blobs").mkdir(parents=True)
        (repository / "snapshots/1/release").mkdir(parents=True)
        save_file(tensors, repository / "blobs/cafe")
    snapshot = mine / "snapshots/1"
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    (snapshot / "release/model.safetensors").symlink_to("../../../blobs/cafe")
    (snapshot / "again.safetensors").symlink_to("model.safetensors")
    (tmp_path / "by another name").symlink_to(snapshot)
    for path in (
        snapshot / "model.safetensors",
        snapshot / "release/model.safetensors",
        snapshot / "again.safetensors",
        tmp_path / "by another name/model.safetensors",
    ):
        assert torch.equal(load_safetensors(path)["a"], tensors["a"])
    (snapshot / "stolen.safetensors").symlink_to(others / "blobs/cafe")
    (snapshot / "above.safetensors").symlink_to(mine / "config")
    (mine / "config").write_bytes((mine / "blobs/cafe").read_bytes())
    for name in ("stolen", "above"):
        with pytest.raises(UserError, match="is a link that leads out of"):
            load_safetensors(snapshot / f"{name}.safetensors")


# --- by the command line


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    tensors = {
        n: torch.zeros(s) for p in param_mapping.parameters(MODEL) for n, s in hf_shapes(MODEL, p).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FAMILIES["internlm"].write_config(MODEL)))
    return folder


def hostile_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(folder / "ran")}, folder / "pytorch_model.bin")


def index_above(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "../x"}}')


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x")
    (folder / "model.safetensors").symlink_to("../x")


def nan(folder: Path) -> None:
    tensors = {
        n: torch.zeros(s) for p in param_mapping.parameters(MODEL) for n, s in hf_shapes(MODEL, p).items()
    }
    save_file(tensors | {"model.norm.weight": torch.full((16,), torch.nan)}, folder / "model.safetensors")


FAULTS = {
    "hostile pickle": (hostile_pickle, "it could run code"),
    "index ../x": (index_above, "names '../x', which is not a file of its folder"),
    "100 MB header": (
        lambda f: (f / "model.safetensors").write_bytes(SAFETENSORS["a header of 100 MB"][0]),
        "header too large",
    ),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 3000), "is cut off, it has 3000 of "),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "is cut off, it has 0 of 8 bytes"),
    "link out": (link_out, "is a link that leads out of"),
    "deep config": (lambda f: (f / "config.json").write_bytes(b"[" * 10**6), "config.json cannot be read"),
    "config is a directory": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"x"),
        "tokenizer.model is not a sentencepiece model",
    ),
    "NaN": (nan, "model.norm.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_says_one_line_and_exits_with_2(fault, tmp_path, capsys):
    change, message = FAULTS[fault]
    folder = model_folder(tmp_path / "source")
    change(folder)
    with pytest.raises(SystemExit) as end:
        errors.run(lambda: command("convert.py", *f"--from {folder} --to {tmp_path}/out --format hf".split()))
    err = capsys.readouterr().err
    assert end.value.code == errors.EXIT_USER_ERROR == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (folder / "ran").exists()
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# --- anything at all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
OFFSETS = st.integers(-4, 40) | st.integers(2**31, 2**66)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", "F64", "I8", "X", "BOOL", "F8_E8M0"]) | VALUES},
    optional={
        "shape": st.lists(OFFSETS, max_size=3) | VALUES,
        "data_offsets": st.lists(OFFSETS, max_size=3) | VALUES,
    },
)


def only_user_errors(path: Path, raw: bytes, *loads) -> None:
    path.write_bytes(raw)
    for load in loads:
        with contextlib.suppress(UserError):
            load(path)


@hypothesis.given(st.dictionaries(st.text(max_size=4), ENTRIES | VALUES, max_size=4), st.integers(0, 64))
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_header(tmp_path, header, data):
    only_user_errors(tmp_path / "x", safetensors_bytes(json.dumps(header).encode(), data), load_safetensors)


@hypothesis.given(VALUES | st.dictionaries(st.just("weight_map"), VALUES), st.integers(0, 30))
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_json(tmp_path, values, cut):
    raw = json.dumps(values).encode()
    only_user_errors(tmp_path / "x", raw[: len(raw) - cut], read_json, read_index)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[bytes]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    tensors = {"a": torch.ones(4), "b": torch.zeros(2, 2)}
    save_file(tensors, folder / "0")
    torch.save(tensors, folder / "1")
    torch.save(tensors, folder / "2", _use_new_zipfile_serialization=False)
    return [(folder / name).read_bytes() for name in "012"]


@hypothesis.given(
    st.integers(0, 2),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
@hypothesis.settings(max_examples=250, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_damage(tmp_path, whole, which, flips, cut):
    raw = bytearray(whole[which])
    for at, value in flips:
        raw[int(at * len(raw))] = value
    raw = raw[: int(cut * len(raw))] if cut < 0.5 else raw
    only_user_errors(tmp_path / "x", bytes(raw), load_pt if which else load_safetensors)


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path, raw):
    only_user_errors(tmp_path / "x", raw, load_safetensors, load_pt, read_json, read_index)
    only_user_errors(tmp_path / "x", b"PK\x03\x04" + raw, load_pt)
