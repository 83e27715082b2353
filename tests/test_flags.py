"""Command-line parser: spellings, errors of one line, `--help`, and the reference of all flags in `docs`."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.cli import parser
from ascendspeed.commands import flag_reference
from ascendspeed.commands.flag_reference import ENGLISH, FlagRow, escaped
from ascendspeed.commands.intern import options_class
from ascendspeed.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PreferenceConfig,
    Run,
    TrainConfig,
    alias,
)
from ascendspeed.utils.errors import EXIT_USER_ERROR, UserError
from ascendspeed.utils.run_record import ROOT


@dataclass(frozen=True)
class Flags:
    """The groups of `Run` that flags set."""

    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)


DEFAULT = Flags(ModelConfig(), ParallelConfig(), OptimConfig(), DataConfig(), TrainConfig())


@dataclass(frozen=True)
class Inner:
    layer_count: Annotated[int, alias("layers")] = 2
    """Number of layers."""
    style: Literal["plain", "fancy"] = "plain"
    """Style."""


@dataclass(frozen=True)
class Options:
    input: tuple[str, ...]
    """Files."""
    inner: Inner = field(default_factory=Inner)
    fast: bool = False
    """Hurry."""
    rate: float | None = None
    """Rate."""


def parse(*args: str) -> Options:
    return parser.parse(Options, args)


@pytest.mark.parametrize(
    "args",
    [
        ["--input", "a", "b", "--layer-count", "5", "--fast"],
        ["--input", "a", "b", "--layer_count", "5", "--fast"],
        ["--layer-count=5", "--fast", "--input", "a", "b"],
        ["--layer_count=5", "--fast", "--input", "a", "b"],
        ["--layers", "5", "--fast", "--input", "a", "b"],
        ["--no-fast", "--layers=5", "--input", "a", "b", "--fast"],
    ],
    ids=" ".join,
)
def test_spellings_mean_the_same(args):
    assert parse(*args) == Options(("a", "b"), Inner(5), True)
    assert parser.typed_fields(Options, args) == {"input", "layer_count", "fast"}


def test_defaults_and_typed_fields():
    assert parse("--input", "a") == Options(("a",))
    assert parser.typed_fields(Options, ["--input", "a"]) == {"input"}
    assert parser.spellings(Options) == {
        "--input": "input",
        "--layer-count": "layer_count",
        "--layers": "layer_count",
        "--style": "style",
        "--fast": "fast",
        "--no-fast": "fast",
        "--rate": "rate",
    }
    assert parser.parse(Options, ["--rate", "2"], default=Options(("x",))) == Options(("x",), rate=2.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "a", "--layer-cuont", "3"], "unknown flag --layer-cuont; did you mean --layer-count?"),
        (["--input", "a", "--fasst"], "unknown flag --fasst; did you mean --fast?"),
        (["--input", "a", "--zzzzzz=1"], "unknown flag --zzzzzz; see --help"),
        (["stray", "--input", "a"], "'stray'"),
        (["--input", "a", "--layers", "many"], "--layer-count"),
        (["--input", "a", "--style", "grand"], "fancy"),
        (["--input", "a", "--rate"], "--rate"),
        ([], "--input"),
    ],
    ids=str,
)
def test_errors_are_one_line(args, message):
    with pytest.raises(UserError) as error:
        parse(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@given(st.text(alphabet="abcdefghijklmnop-", min_size=3, max_size=20).filter(lambda t: t.strip("-") == t))
def test_no_unknown_flag_slips_through(name):
    known = {spelling.lstrip("-") for spelling in parser.spellings(Options)} | {"h", "help"}
    if name not in known:
        with pytest.raises(UserError, match="unknown flag"):
            parse("--input", "a", f"--{name}=1")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    shown = capsys.readouterr().out
    assert not stop.value.code
    assert all(
        text in shown for text in ("--layer-count", "--layers", "Number of layers.", "plain", "Hurry.")
    )


def test_every_field_of_a_run_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        parser.parse(Flags, ["--help"], default=DEFAULT)
    shown = capsys.readouterr().out.replace("_", "-")
    # what a run finds out by itself
    unseen = {"family", "lora_base_fingerprint", "reference_fingerprint", "reward_head", "scored_token_id"}
    for group in (f.type for f in dataclasses.fields(Flags)):
        for f in dataclasses.fields(group):
            if f.name not in unseen:
                assert f"--{f.name.replace('_', '-')}" in shown
    assert {f.name for f in dataclasses.fields(Run)} == {f.name for f in dataclasses.fields(Flags)} | {
        "inputs"
    }
    assert set(parser.spellings(Flags).values()) == {
        f.name for g in dataclasses.fields(Flags) for f in dataclasses.fields(g.type) if f.name not in unseen
    }


def test_a_run_from_the_recipes_flags():
    architecture = ["--num-layers", "2", "--norm-epsilon", "1e-6", "--tp", "2"]
    training = [
        "--lr=1e-3",
        "--bf16",
        "--zero-stage=1",
        "--data-path",
        "0.3",
        "a",
        "0.7",
        "b",
        "--train-iters",
        "5",
    ]
    run = parser.parse(Flags, architecture + training, default=DEFAULT)
    assert (run.model.num_layers, run.model.norm_epsilon, run.optim.lr, run.optim.dtype) == (
        2,
        1e-6,
        1e-3,
        "bf16",
    )
    assert (run.parallel.zero_stage, run.parallel.tensor_model_parallel_size) == (1, 2)
    assert run.data.data_path == ("0.3", "a", "0.7", "b")
    assert run == dataclasses.replace(
        DEFAULT,
        model=run.model,
        optim=run.optim,
        parallel=run.parallel,
        data=run.data,
        train=TrainConfig(train_iters=5),
    )


@pytest.mark.parametrize("rank", ["", "1"])
def test_a_program_ends_on_one_line(rank):
    code = (
        "import time; time.sleep = lambda s: None\n"
        "from ascendspeed.cli import parser\n"
        "from ascendspeed.config import schema\n"
        "from ascendspeed.utils import errors\n"
        "def main():\n    parser.parse(schema.TrainConfig, ['--trian-iters', '3'])\n"
        "errors.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"RANK": rank} if rank else {}
    )
    assert done.returncode == EXIT_USER_ERROR
    who = "[rank 1] " if rank else ""
    assert done.stderr == f"{who}error: unknown flag --trian-iters; did you mean --train-iters?\n"
    assert done.stdout == ""


@pytest.fixture(scope="module")
def commands():
    return flag_reference.read_commands()


@pytest.fixture(scope="module")
def scripts():
    return flag_reference.read_scripts()


def test_the_reference_is_up_to_date(commands, scripts):
    """Mended by `python -m ascendspeed.commands.flag_reference`."""
    for language in flag_reference.LANGUAGES:
        page = flag_reference.ROOT / "docs" / language.file
        assert page.read_text() == flag_reference.page(language, commands, scripts), language.file


def test_every_flag_of_every_command_is_listed(commands):
    listed = set(re.findall(r"`(--[\w-]+)`", flag_reference.page(ENGLISH, commands, [])))
    for flags in commands:
        expected = set(parser.spellings(options_class(flags.command)))
        rows = {name for group in flags.groups for row in group.rows for name in row.names}
        flag_names = {name for name in rows if name.startswith("--")}
        positional = {f"--{name.lower()}" for name in rows - flag_names}
        assert flag_names <= expected
        assert {name for name in expected - positional if not name.startswith("--no-")} <= listed & rows


def test_every_script_is_a_command_or_listed(scripts):
    """Every Python file with a program is a front of a command, or has its flags in the reference."""
    files = [path for folder in ("tools", "tasks", "examples") for path in (ROOT / folder).rglob("*.py")]
    programs = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    programs = {name: text for name, text in programs.items() if "__main__" in text}
    fronts = {
        name for name, text in programs.items() if re.search(r"from ascendspeed.commands.\w+ import", text)
    }
    assert programs.keys() - fronts == {script.path for script, _ in scripts}
    page = flag_reference.page(ENGLISH, [], scripts)
    for script, groups in scripts:
        section = page.partition(f"### {script.path}\n")[2].partition("\n###")[0]
        assert "| `" in section, script.path
        rows = {name for group in groups for row in group.rows for name in row.names}
        positional = [name for name in rows if not name.startswith("--")]
        unlisted = set(parser.spellings(script.options, pairs=False)) - rows
        assert len(unlisted) == len(positional), script.path


def test_control_a_changed_help_changes_the_reference(commands):
    first = commands[0]
    group = first.groups[0]
    changed = replace(group, rows=(replace(group.rows[0], help="Other."), *group.rows[1:]))
    other = [replace(first, groups=(changed, *first.groups[1:])), *commands[1:]]
    assert flag_reference.page(ENGLISH, other, []) != flag_reference.page(ENGLISH, commands, [])


@pytest.mark.parametrize(
    ("metavar", "value"),
    [
        ("{None}|STR", "STR"),
        ("[INT [INT ...]]", "INT ..."),
        ("{None,all,last}", "all, last"),
        ("[{a,b} [...]]", "a, b, ..."),
        ("{None}|{INT INT INT}", "INT INT INT"),
    ],
)
def test_values_in_the_reference(metavar, value):
    assert flag_reference._value(metavar) == value


def test_markdown_of_the_reference():
    assert escaped("<s>, *.py and `a*b` | c") == r"&lt;s>, \*.py and `a*b` \| c"
    row = FlagRow(("--x",), "", "False", True, "Hurry.")
    group = flag_reference.FlagGroup("", "", (row, replace(row, names=("FILE",), default="required")))
    table = list(flag_reference._table(ENGLISH, replace(group, rows=(row,))))
    assert table[-1] == "| `--x` |  |  | Hurry. |"
