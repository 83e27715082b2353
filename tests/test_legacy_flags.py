"""Legacy flags: translation, tables of the commands, `--help`, documentation; flags of Megatron-LM."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ascendspeed.cli import command, compat, legacy_flags, parser
from ascendspeed.cli.legacy_flags import WORDS, Alias, Converted, Ignored, MustAgree, Renamed, translate
from ascendspeed.cli.megatron_flags import MEGATRON_FLAGS
from ascendspeed.cli.train_args import TrainCommand, resolve
from ascendspeed.evaluation.args import EvaluateCommand
from ascendspeed.evaluation.needle import NeedleCommand
from ascendspeed.inference.args import GenerateCommand
from ascendspeed.utils.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "legacy-flags.md").read_text()
CHINESE_PAGE = (ROOT / "docs" / "legacy-flags_zh.md").read_text()


@dataclass(frozen=True)
class Options:
    """A small command."""

    width: int = 1
    """Width."""
    depth: int = 1
    """Depth."""
    mode: str = "off"
    """Mode."""


def differs(options: Options, value: int) -> list[str]:
    return [] if value == options.width else [f"--must {value}, but the width is {options.width}"]


TABLE = {
    "--old-switch": Ignored("it has no use"),
    "--quiet-switch": Ignored("it is the default", note=False),
    "--old-words": Ignored("it has no use", WORDS),
    "--breadth": Renamed("--width"),
    "--deep": Alias("--depth 9", note=True),
    "--on": Alias("--mode on", int, yields_to=("half",)),
    "--strictly-on": Alias("--mode on", exclusive=True),
    "--layers-each": Converted("`--depth`, by layers", int),
    "--kind": MustAgree("only `plain`", ("plain",)),
    "--must": MustAgree("the width", int, differs),
}


def read(*words: str) -> tuple[Options, list[str]]:
    line = command.parse(Options, words, TABLE)
    line.legacy.check(line.options)
    return line.options, line.notes


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--old-switch --width 2", Options(width=2)),
        ("--old_switch", Options()),
        ("--old-words a b --width=2", Options(width=2)),
        ("--old-words --width=2", Options(width=2)),
        ("--breadth 3", Options(width=3)),
        ("--breadth=3 --width 4", Options(width=4)),
        ("--width 4 --breadth 3", Options(width=3)),
        ("--depth 2 --deep", Options(depth=9)),
        ("--on 5", Options(mode="on")),
        ("--on 5 --mode half", Options(mode="half")),
        ("--mode off --on=5", Options(mode="on")),
        ("--strictly-on --mode on", Options(mode="on")),
        ("--kind plain --must 1", Options()),
        ("--layers-each -3", Options()),
    ],
)
def test_legacy_flags_resolve_to_current_ones(words, options):
    assert read(*words.split())[0] == options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--old-switch stray", "'stray' does not belong to any flag; see --help"),
        ("--old-switch=1", "'1' does not belong to any flag; see --help"),
        ("--on", "--on needs a value (see --help)"),
        ("--on --mode half", "--on needs a value (see --help)"),
        ("--on many", "--on many is not a whole number"),
        ("--kind fancy", "--kind fancy: must be plain"),
        (
            "--strictly-on --mode half",
            "--strictly-on and --mode half contradict each other; drop one of them",
        ),
        ("--must 2", "--must 2, but the width is 1"),
        ("--old-swich", "unknown flag --old-swich; did you mean --old-switch?"),
    ],
)
def test_errors_name_the_flag_and_the_choices(words, message):
    with pytest.raises(UserError) as error:
        read(*words.split())
    assert str(error.value) == message


def test_notes_and_values():
    line = command.parse(
        Options, ["--deep", "--quiet-switch", "--old-switch", "--layers-each", "4", "--old-words", "x"], TABLE
    )
    assert line.notes == [
        "--old-switch is accepted and ignored: it has no use",
        "--old-words is accepted and ignored: it has no use",
        "--deep is accepted as --depth 9",
    ]
    assert line.legacy.values["--layers-each"] == 4
    assert line.typed == {"depth"}
    assert translate(["--width", "2"], TABLE).args == ("--width", "2")


def test_a_new_legacy_flag_is_one_line(monkeypatch):
    """The training command accepts a toy entry and notes it; the page of the documentation lacks it, and a
    test says so."""
    words = ["--deepspeed", "--data-path", "data", "--fuse-everything"]
    with pytest.raises(UserError, match="unknown flag --fuse-everything"):
        resolve(words, 1)
    monkeypatch.setitem(compat.TRAIN, "--fuse-everything", Ignored("`nothing` is left to fuse"))
    run, notes = resolve(words, 1)
    assert notes == ["--fuse-everything is accepted and ignored: nothing is left to fuse"]
    assert run == resolve(words[:-1], 1)[0]
    row = "| `--fuse-everything` | ignored: `nothing` is left to fuse |"
    assert row in legacy_flags.documentation(compat.TRAIN)
    assert row not in PAGE
    with pytest.raises(AssertionError):
        test_the_page_has_the_rows_of_the_tables("Training")


def rows_of(page: str, title: str) -> list[str]:
    section = re.search(rf"^## {title}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, title
    return [line for line in section[0].splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("title", compat.PAGE)
def test_the_page_has_the_rows_of_the_tables(title):
    assert rows_of(PAGE, title) == legacy_flags.documentation(*compat.PAGE[title])


def test_the_chinese_page_names_every_flag():
    for table, base in compat.PAGE.values():
        for row in legacy_flags.documentation(table, base):
            for flag in re.findall(r"`(--[\w-]+)`", row.split("|")[1]):
                assert f"`{flag}`" in CHINESE_PAGE, flag


COMMANDS = {
    "pretrain_intern.py": TrainCommand,
    "tasks/inference/generate.py": GenerateCommand,
    "tasks/evaluation/evaluation.py": EvaluateCommand,
    "tasks/evaluation/needle.py": NeedleCommand,
}


def script(path: str):
    """Imports a script as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[Path(path).stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_class(path: str) -> type:
    if path in COMMANDS:
        return COMMANDS[path]
    module = script(path)
    return getattr(module, "BenchmarkCommand", None) or module.Options


@pytest.mark.parametrize("path", compat.TABLES)
def test_help_shows_current_flags_only(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        command.parse(command_class(path), ["--help"], compat.TABLES[path])
    text = capsys.readouterr().out
    assert compat.HINT in " ".join(text.split())
    lines = re.findall(r"^\W*--[a-z].*", text, re.MULTILINE)
    shown = {parser.normalized(flag) for line in lines for flag in re.findall(r"--[A-Za-z][\w-]*", line)}
    assert len(shown) > 4
    assert not shown & set(compat.TABLES[path])


@pytest.mark.parametrize("path", compat.TABLES)
def test_legacy_flags_stand_for_current_ones(path):
    current = set(parser.spellings(command_class(path)))
    table = compat.TABLES[path]
    assert not current & set(table)
    for entry in table.values():
        if isinstance(entry, Renamed):
            assert entry.flag in current
        if isinstance(entry, Alias):
            assert {word for word in entry.flags.split() if word.startswith("--")} <= current


def test_every_group_of_training_in_the_order_of_use(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        resolve(["--help"], 1)
    text = capsys.readouterr().out
    flags = [
        "--model",
        "--data-path",
        "--micro-batch-size",
        "--lr",
        "--tensor-model-parallel-size",
        "--lora-rank",
    ]
    positions = [
        re.search(rf"^\W*(--\w+ \w+, )?{flag} ", text, re.MULTILINE).start()
        for flag in [*flags, "--num-layers"]
    ]
    assert positions == sorted(positions)


# --- flags of Megatron-LM


def test_megatron_flags_are_unknown_flags_with_an_answer_that_exists():
    known = {*parser.spellings(TrainCommand), *compat.TRAIN}
    assert not known & set(MEGATRON_FLAGS)
    converter = set(parser.spellings(script("tools/ckpt_convert/convert.py").Options))
    for answer in MEGATRON_FLAGS.values():
        assert set(re.findall(r"--[a-z][\w-]*", answer)) <= known | converter


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--log-throughput", "throughput is in every log line"),
        ("--no-load-optim", "--finetune takes the weights alone from --load"),
        ("--no_load_rng", "--finetune takes the weights alone from --load"),
        ("--ckpt-format=torch_dist", "checkpoints have one format"),
        ("--attention-backend", "attention is torch's SDPA"),
        ("--transformer-impl", "without Transformer Engine"),
        ("--use-mcore-models", "layers are Megatron-core's own"),
        ("--tokenizer-model", "--tokenizer-name-or-path names a directory"),
        ("--train-samples", "--train-iters or --train-epochs"),
    ],
)
def test_a_flag_of_megatron_is_answered(flag, answer):
    with pytest.raises(UserError) as error:
        resolve(["--data-path", "data", flag], 1)
    name = flag.partition("=")[0]
    assert str(error.value).startswith(f"{name} of Megatron-LM does not exist here: ")
    assert answer in str(error.value)


@pytest.mark.parametrize(
    ("flag", "ending"),
    [
        ("--trian-iters", "; did you mean --train-iters?"),
        ("--tensor-parallel-size", "; did you mean --tensor-model-parallel-size?"),
        ("--use-flash-atn", "; did you mean --use-flash-attn?"),
        ("--load-format", "; see --help"),
        ("--swap-space", "; see --help"),
        ("--gradient-checkpointing", "; see --help"),
    ],
)
def test_only_near_names_are_proposed(flag, ending):
    with pytest.raises(UserError) as error:
        resolve(["--data-path", "data", flag, "1"], 1)
    assert str(error.value) == f"unknown flag {flag}{ending}"


def test_an_answer_names_flags_of_the_command():
    with pytest.raises(UserError, match=r"^unknown flag --no-load-rng; see --help$"):
        command.parse(GenerateCommand, ["--no-load-rng"], compat.GENERATE)
