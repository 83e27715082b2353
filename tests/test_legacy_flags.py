"""Legacy flags: translation, tables of the commands, `--help`, documentation; flags of other
projects."""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import ascendspeed
from ascendspeed.cli import command, compat, legacy_flags, parser
from ascendspeed.cli.foreign_flags import PROJECTS
from ascendspeed.cli.legacy_flags import WORDS, Alias, Converted, Ignored, MustAgree, Renamed, translate
from ascendspeed.cli.train_args import TrainCommand, resolve
from ascendspeed.evaluation.args import EvaluateCommand
from ascendspeed.evaluation.needle import NeedleCommand
from ascendspeed.inference.args import GenerateCommand
from ascendspeed.inference.serving.args import ServeCommand
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
    "tasks/inference/serve.py": ServeCommand,
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


# --- flags of other projects

TRAIN = "pretrain_intern.py"
GENERATE = "tasks/inference/generate.py"
SCRIPTS = [
    *compat.TABLES,
    "tools/ckpt_convert/convert.py",
    "tools/lora/merge_lora.py",
]


def known_flags(path: str) -> set[str]:
    return {*parser.spellings(command_class(path)), *compat.TABLES.get(path, {})}


@pytest.mark.parametrize("project", PROJECTS)
def test_every_answer_is_given_by_a_command(project):
    """Each flag is unknown to some command that has all flags which the answer names."""
    commands = [known_flags(path) for path in SCRIPTS]
    for answer, flags in PROJECTS[project]:
        named = set(re.findall(r"--[a-z][\w-]*", answer))
        for flag in flags.split():
            assert any(named <= known and flag not in known for known in commands), (flag, answer)


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
        ("--lr-warmup-init", "warmup begins at 0"),
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
        ("--version-check", "; see --help"),
        ("--log-throughput-now", "; see --help"),
    ],
)
def test_only_near_names_are_proposed(flag, ending):
    with pytest.raises(UserError) as error:
        resolve(["--data-path", "data", flag, "1"], 1)
    assert str(error.value) == f"unknown flag {flag}{ending}"


def answer_of(path: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        command.parse(command_class(path), words, compat.TABLES.get(path, {}))
    return str(error.value)


@pytest.mark.parametrize(
    ("path", "flag", "answer"),
    [
        (
            GENERATE,
            "--no-load-rng",
            "of Megatron-LM does not exist here: only the weights of --load",
        ),
        (GENERATE, "--no_load_optim", "only the weights of --load are read"),
        (GENERATE, "--exit-on-missing-checkpoint", "a missing --load is always an error"),
        (GENERATE, "--make-vocab-size-divisible-by", "padded rows of the vocabulary of --load"),
        (GENERATE, "--no-masked-softmax-fusion", "attention is torch's SDPA"),
        (GENERATE, "--attention-softmax-in-fp32", "attention is torch's SDPA"),
        (GENERATE, "--no-gradient-accumulation-fusion", "--use-fused-rmsnorm"),
        (GENERATE, "--disable-bias-linear", "--no-add-qkv-bias"),
        (GENERATE, "--use-rotary-position-embeddings", "--rotary-base"),
        (GENERATE, "--group-query-attention", "--num-query-groups N is enough"),
        (GENERATE, "--do-sample", "of Hugging Face's tools does not exist here: use --task sample"),
        (GENERATE, "--vocab-file", "--tokenizer-name-or-path names a directory"),
        (TRAIN, "--learning_rate", "--learning_rate of Hugging Face's tools does not exist here: use --lr"),
        (TRAIN, "--output_dir", "--save is the folder of checkpoints"),
        (TRAIN, "--num-workers", "there are no loader processes"),
        (TRAIN, "--config-file", "use --config, which reads the configuration files of both"),
        (TRAIN, "--seq_len", "of InternEvo or MindFormers does not exist here: use --seq-length"),
    ],
)
def test_a_habit_of_another_project_is_answered(path, flag, answer):
    assert answer in answer_of(path, flag, "1")


def test_an_answer_names_flags_of_the_command():
    path = "tools/lora/merge_lora.py"
    assert answer_of(path, "--no-load-rng") == "unknown flag --no-load-rng; see --help"


def test_all_unknown_flags_come_before_what_is_missing():
    path = "tools/preprocess_data.py"
    assert "Missing" in answer_of(path) or "required" in answer_of(path)  # control
    assert answer_of(path, "--mindrecord_schema", "a", "--workrs=2", "--seed", "1", "--launcher", "x") == (
        "unknown flags --mindrecord_schema, --workrs (did you mean --workers?), --seed; see --help; "
        "--launcher of InternEvo or MindFormers does not exist here: the recipes and `intern train` start "
        "the launcher; see docs/recipes.md"
    )


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_version(path, capsys):
    """A command with a --version of its own has the other one when it is the only word."""
    with pytest.raises(SystemExit) as stop:
        command.parse(command_class(path), ["--version"], compat.TABLES.get(path, {}))
    assert not stop.value.code
    assert capsys.readouterr().out == f"ascendspeed {ascendspeed.__version__}\n"


@pytest.mark.parametrize("word", ["caf\udcff", "a\0b"])
def test_a_word_that_is_no_text(word):
    assert repr(word) in answer_of(TRAIN, "--data-path", word)


@pytest.mark.parametrize("columns", ["1", "5", "0", "-3", "many"])
def test_help_ends_in_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        resolve(["--help"], 1)
    assert "--data-path" in capsys.readouterr().out
    assert os.environ["COLUMNS"] == columns
