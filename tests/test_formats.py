"""Adding a checkpoint format: one class and one entry in `FORMATS` reach the command, the support table and
the round trips.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.conversion import command, hugging_face, load_script, same, written
from helpers.round_trips import BY_FAMILY, round_trip, supported_pairs
from safetensors.torch import load_file, save_file

from ascendspeed.conversion import hf_assets
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_stored, full_slice, read_config
from ascendspeed.conversion.formats import registry
from ascendspeed.conversion.formats.base import CheckpointFormat, ReadOptions, WriteOptions
from ascendspeed.conversion.output_files import create_safetensors
from ascendspeed.conversion.write import PlannedFile
from ascendspeed.models import param_mapping
from ascendspeed.models.families import FAMILIES
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parent.parent
NAME = "weights.toy"


@dataclass(frozen=True)
class ToyWriter:
    """Writes all parameters into one file under their Megatron-core names."""

    def check(self, reader):
        ToyFormat().check_family(reader.config.family, "write")

    def files(self, reader, dtype):
        entries = tuple(
            param_mapping.StoredTensor(p.name, p, p.shape, (full_slice(p),))
            for p in param_mapping.parameters(reader.config)
        )
        return [PlannedFile(NAME, entries, create_safetensors)]

    def finish(self, reader, folder, dtype):
        hf_assets.write(reader, folder, reader.config, dtype)


class ToyFormat(CheckpointFormat):
    """One safetensors file under Megatron-core names, of Llama and InternLM2."""

    name = "toy"
    summary = "a format of this test"
    contents = "a toy checkpoint"
    marker_files = NAME
    write_options = ("tp",)

    def supports(self, family, direction):
        return family in ("llama", "internlm2")

    def detect(self, folder: Path) -> bool:
        return (folder / NAME).is_file()

    def open(self, folder: Path, options: ReadOptions) -> CheckpointReader:
        config_json, config = read_config(options.config_dir)
        tensors = load_file(folder / NAME)
        stored = {
            p.name: [(param_mapping.as_matrix(tensors[p.name]), (full_slice(p),))]
            for p in param_mapping.parameters(config)
        }
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        return CheckpointReader("toy", folder, config, config_json, dtypes, from_stored(stored), folder)

    def writer(self, options: WriteOptions) -> ToyWriter:
        return ToyWriter()


@pytest.fixture
def with_toy(monkeypatch):
    """The registry with the toy format; the command, whose choices are those of its import, is new."""
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, ToyFormat()))
    sys.modules.pop("ascendspeed.commands.convert", None)
    yield
    sys.modules.pop("ascendspeed.commands.convert", None)


def test_the_command_offers_and_writes_it(with_toy, tmp_path, capsys):
    tensors = hugging_face(tmp_path / "hf", BY_FAMILY["llama"], "finite")
    command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/toy --format toy --tp 2 --verify".split())
    assert (tmp_path / "toy" / NAME).is_file()
    assert json.loads((tmp_path / "toy/conversion.json").read_text())["to"]["kind"] == "toy"
    command("convert.py", *f"--from {tmp_path}/toy --to {tmp_path}/back --format hf".split())
    assert same(written(tmp_path / "back"), tensors)
    with pytest.raises(UserError, match="--pp is for --format megatron or internevo, not for toy"):
        command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/x --format toy --pp 2".split())


def test_help_describes_it(with_toy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", "--help"])
    with pytest.raises(SystemExit):
        load_script(ROOT / "tools/ckpt_convert/convert.py").main()
    assert "toy: a format of this test" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_the_support_table_has_a_row(with_toy):
    cells = ["R W" if family in ("llama", "internlm2") else "–" for family in FAMILIES]
    assert registry.support_table()[-1] == f"| `toy` | {' | '.join(cells)} |"


def test_the_round_trips_include_it(with_toy, tmp_path):
    pairs = [pair.values for pair in supported_pairs(registry.FORMATS) if pair.values[0].name == "toy"]
    assert [family for _, family in pairs] == ["internlm2", "llama"]
    for form, family in pairs:
        round_trip(form, family, 1, 1, "bf16", tmp_path / family)


def test_families_and_folders_are_checked_for_it(with_toy, tmp_path):
    hugging_face(tmp_path / "hf", BY_FAMILY["gemma"], "finite")
    with pytest.raises(UserError, match="family gemma cannot be written as toy, only internlm2, llama"):
        command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/toy --format toy".split())
    save_file({"a": torch.zeros(1)}, tmp_path / "hf" / NAME)
    with pytest.raises(UserError, match="holds Hugging Face weights and a toy checkpoint: move one"):
        registry.open_reader(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"looked for .*a toy checkpoint \({NAME}\); found nothing"):
        registry.open_reader(tmp_path / "empty")


def test_control_without_the_entry_nothing_knows_it(tmp_path):
    hugging_face(tmp_path / "hf", BY_FAMILY["llama"], "finite")
    with pytest.raises(UserError, match="toy"):
        command("convert.py", *f"--from {tmp_path}/hf --to {tmp_path}/toy --format toy".split())
    assert not any("toy" in line for line in registry.support_table())
