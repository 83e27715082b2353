"""Command lines of the published converters: they read the same files, check their flags, and lose
nothing."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.conversion import command, load_script
from helpers.old_formats import DIVISOR, HEADS, HIDDEN, LAYERS, VOCAB, old_folder, same
from safetensors.torch import load_file

from ascendspeed.cli.command import parse as parse_command_line
from ascendspeed.cli.compat import TABLES
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.registry import support_table
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parent.parent
OLD = "AscendSpeed of 2023"


def to_hugging_face(*args) -> None:
    command("llama/convert_weights_to_huggingface.py", *args)


def cut_anew(*args) -> None:
    command("llama/convert_weights_when_tp_pp_change.py", *args)


def folders(source, target) -> tuple:
    return "--input-model-dir", source, "--output-model-dir", target


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_back_to_hugging_face(tmp_path, capsys):
    """Conversion to Hugging Face accepts the flags of the opposite direction."""
    tensors = old_folder(tmp_path / "old", OLD, "internlm", 4, 2, torch.bfloat16)
    (tmp_path / "old/config.json").rename(tmp_path / "config.json")
    layout_flags = "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2"
    other_flags = "--bias --deepspeed --merge-mlp --added-token-num 0"
    sizes = f"--num_layers {LAYERS} --num-heads {HEADS} --hidden_size {HIDDEN}"
    options = ("--config", tmp_path, *layout_flags.split(), *other_flags.split(), *sizes.split())
    to_hugging_face(*folders(tmp_path / "old", tmp_path / "hf"), *options)
    assert f"TP 4 x PP 2, names of {OLD}" in capsys.readouterr().out
    assert equal(load_file(tmp_path / "hf/model.safetensors"), tensors)
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "internlm"
    to_hugging_face(
        *folders(tmp_path / "old", tmp_path / "llama"), *options, "--format", "hf-llama", "--dtype", "fp32"
    )
    config = json.loads((tmp_path / "llama/config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "float32")
    assert equal(
        load_file(tmp_path / "llama/model.safetensors"),
        {name: tensor.float() for name, tensor in tensors.items()},
    )


@pytest.mark.parametrize("deepspeed", [False, True])
def test_other_sizes_keep_biases_and_vocabulary(tmp_path, deepspeed):
    """Unlike the original script, which dropped the biases and cut the vocabulary to 32000."""
    tensors = old_folder(tmp_path / "old", OLD, "internlm", 8, 1, deepspeed=deepspeed)
    tp, pp = 2, 1 if deepspeed else 4
    cut_anew(
        *folders(tmp_path / "old", tmp_path / "new"),
        *["--src-tensor-model-parallel-size", "8", "--src-pipeline-model-parallel-size", "1"],
        *f"--tgt-tensor-model-parallel-size {tp} --tgt-pipeline-model-parallel-size {pp}".split(),
        *f"--orig-vocab-size {VOCAB} --make-vocab-size-divisible-by {DIVISOR}".split(),
        *(["--deepspeed"] if deepspeed else []),
    )
    kind = f"{'DeepSpeed' if deepspeed else 'Megatron'} rank files for TP {tp} x PP {pp}"
    assert convert.open_reader(tmp_path / "new").description == kind
    assert any(name.endswith("_proj.bias") for name in tensors)
    assert same(tmp_path / "new", tensors, tmp_path)
    cut_anew(*folders(tmp_path / "new", tmp_path / "again"), "--tgt-tensor-model-parallel-size", 8)
    convert.compare(convert.open_reader(tmp_path / "again"), convert.open_reader(tmp_path / "old"))


@pytest.mark.parametrize(
    ("run", "args", "message"),
    [
        (to_hugging_face, "--tensor-model-parallel-size 8", "tensor-parallel size 8, its files 2"),
        (to_hugging_face, "--pipeline-model-parallel-size 4", "pipeline-parallel size 4, its files 2"),
        (to_hugging_face, "--type 7B", "--type 7B: num_layers 32, config.json 4"),
        (to_hugging_face, "--num-kv-heads 2", "--num-kv-heads 2, config.json 8"),
        (cut_anew, "--src-tensor-model-parallel-size 1", "tensor-parallel size 1, its files 2"),
        (cut_anew, "--orig-vocab-size 32000", f"--orig-vocab-size 32000, config.json {VOCAB}"),
        (cut_anew, "--added-token-num 1", "resize_token_embeddings"),
        (cut_anew, "--tgt-tensor-model-parallel-size 3", "do not split over 3"),
        (cut_anew, "--tgt-pipeline-model-parallel-size 3", "3"),
        (
            cut_anew,
            "--tgt-tensor-parallel-size 2",
            "unknown flag --tgt-tensor-parallel-size; did you mean --tgt-tensor-model",
        ),
    ],
)
def test_contradicting_flags_are_refused(tmp_path, run, args, message):
    old_folder(tmp_path / "old", OLD, "internlm", 2, 2)
    with pytest.raises(UserError, match=message):
        run(*folders(tmp_path / "old", tmp_path / "out"), *args.split())
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("run", [to_hugging_face, cut_anew])
def test_they_are_for_rank_files(tmp_path, run):
    old_folder(tmp_path / "old", OLD, "internlm", 1, 1)
    to_hugging_face(*folders(tmp_path / "old", tmp_path / "hf"))
    with pytest.raises(
        UserError, match=r"hf holds no rank files: tools/ckpt_convert/convert\.py converts from any format"
    ):
        run(*folders(tmp_path / "hf", tmp_path / "out"))


def test_the_converter_of_everything_takes_the_folder_of_the_model(tmp_path):
    tensors = old_folder(tmp_path / "old", OLD, "internlm", 2, 1)
    (tmp_path / "old/config.json").rename(tmp_path / "config.json")
    run = ("--from", tmp_path / "old", "--to", tmp_path / "hf", "--format", "hf")
    with pytest.raises(UserError, match=r"no config\.json"):
        command("convert.py", *run)
    command("convert.py", *run, "--config", tmp_path)
    assert equal(load_file(tmp_path / "hf/model.safetensors"), tensors)


# --- docs/coming-from.md

PAGE = (ROOT / "docs/coming-from.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]


@pytest.mark.parametrize("page", ["coming-from.md", "coming-from_zh.md"])
def test_the_page_has_the_table_of_the_code(page):
    lines = (ROOT / "docs" / page).read_text().splitlines()
    header, *rows = support_table()
    _, *names = header.strip("|").split("|")
    table = [line for line in lines if line.startswith("|") and line.strip("|").split("|")[1:] == names]
    first = lines.index(table[0]) + 1
    assert lines[first : first + len(rows)] == rows


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_the_page_names_commands_and_flags_that_exist(line):
    words = shlex.split(line)
    assert words[0] == "python"
    parse_command_line(load_script(ROOT / words[1]).Options, words[2:], TABLES.get(words[1]))


def test_every_link_of_the_page_leads_somewhere():
    titles = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= titles
