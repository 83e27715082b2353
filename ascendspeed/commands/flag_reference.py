"""Reference of every flag of commands and scripts, `docs/flags.md` and `docs/flags_zh.md`, from the parsers
that print `--help`.

python -m ascendspeed.commands.flag_reference
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from ascendspeed.cli.config_file import reading as config_file
from ascendspeed.commands.intern import Subcommand, available, options_class
from ascendspeed.commands.script_flags import Script, scripts
from ascendspeed.utils import errors
from ascendspeed.utils.atomic import write_file
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.run_record import ROOT

DEFAULT = re.compile(r"\s*\((?:default: (?P<value>[^\n]*)|(?P<word>required|repeatable))\)\s*$")
"""End of a help text, which states the default."""
CODE = re.compile(r"(`[^`]*`)")
HELP = "--help"


@dataclass(frozen=True)
class Language:
    """Words of the page in one language; the help of the flags is English in all of them."""

    file: str
    title: str
    switch: str
    introduction: str
    full_stop: str
    comma: str
    columns: tuple[str, str, str, str]
    """Flag, value, default, meaning."""
    required: str
    repeatable: str
    summaries: dict[str, str]
    """Command -> its summary; a command without one has that of `intern --help`."""
    also: str
    """Names the flags that the command line takes before it is parsed."""
    preset: str
    """States that a command has the flags of another one."""
    superset: str
    """States that a command has all flags of another one, and more."""
    repeated: str
    """Refers to an earlier table."""
    no_flags: str
    scripts: str
    """Heading of the scripts that are no command."""
    about_scripts: str


ENGLISH = Language(
    file="flags.md",
    title="Flag reference",
    switch="[简体中文](flags_zh.md) | **English**",
    introduction="""Every flag of every command of [`intern`](intern.md) and of the other scripts, as `--help`
prints it. This page is written by `python -m ascendspeed.commands.flag_reference`, from the dataclasses that
hold the parsed flags.

Hyphens and underscores are equivalent, and so are `--tp 2` and `--tp=2`. `...` means several values.
A flag without a value is a switch, and a `--no-verify` beside `--verify` turns it off.
[Legacy flags](legacy-flags.md) of other programs are accepted too, and the recipes take their values from
[variables](recipes.md).""",
    full_stop=". ",
    comma=", ",
    columns=("flag", "value", "default", "meaning"),
    required="required",
    repeatable="may be repeated",
    summaries={},
    also="It also takes {flags}.",
    preset="The flags of [`intern {other}`](#intern-{other}), with {flags}.",
    superset="All flags of [`intern {other}`](#intern-{other}), and these:",
    repeated="The table of [intern {other}: {group}](#intern-{other}-{group}).",
    no_flags="It has no flags.",
    scripts="Scripts",
    about_scripts="Scripts that are no command of `intern`; the other ones are fronts of a command.",
)
CHINESE = Language(
    file="flags_zh.md",
    title="参数大全",
    switch="**简体中文** | [English](flags.md)",
    introduction="""[`intern`](intern_zh.md) 每个命令以及其他脚本的全部参数，与 `--help` 的输出一致。
本页由 `python -m ascendspeed.commands.flag_reference` 根据定义命令行的 dataclass 生成。
参数说明没有译文，保留英文。

连字符与下划线等价，`--tp 2` 与 `--tp=2` 等价。`...` 表示可以有多个值。
没有值的参数是开关，与 `--verify` 并列的 `--no-verify` 将其关闭。
其他程序的[兼容参数](legacy-flags_zh.md)同样可用；配方脚本通过[变量](recipes_zh.md)取值。""",
    full_stop="。",
    comma="、",
    columns=("参数", "值", "默认值", "说明"),
    required="必填",
    repeatable="可重复",
    summaries={
        "train": "预训练或微调模型",
        "data": "把文本或对话转换为 token",
        "convert": "把检查点转换为另一种格式",
        "generate": "续写提示词",
        "chat": "在终端与模型对话",
        "serve": "通过 HTTP 提供 OpenAI 接口的推理服务",
        "eval": "用评测文件给模型打分",
        "plan": "在训练启动之前估算显存和时间",
        "report": "生成一次训练的页面，或两次训练的对比页面",
        "compare": "比较两次训练的 loss",
        "doctor": "检查安装和机器",
        "quickstart": "用极小模型跑通全流程",
    },
    also="另外还接受 {flags}。",
    preset="参数与 [`intern {other}`](#intern-{other}) 相同，并带有 {flags}。",
    superset="包含 [`intern {other}`](#intern-{other}) 的全部参数，另外还有：",
    repeated="见 [intern {other}: {group}](#intern-{other}-{group}) 的表格。",
    no_flags="没有参数。",
    scripts="脚本",
    about_scripts="以下脚本不属于 `intern` 的命令；仓库中的其他脚本只是某个命令的入口。",
)
LANGUAGES = (ENGLISH, CHINESE)


@dataclass(frozen=True)
class FlagRow:
    """A flag as `--help` describes it."""

    names: tuple[str, ...]
    value: str
    default: str
    """Text of the default; "required" or "repeatable" if there is none."""
    has_default: bool
    help: str


@dataclass(frozen=True)
class FlagGroup:
    """Flags of a (nested) dataclass."""

    name: str
    """Empty for the flags of the command itself."""
    summary: str
    rows: tuple[FlagRow, ...]


@dataclass(frozen=True)
class CommandFlags:
    """A command with its groups of flags."""

    command: Subcommand
    groups: tuple[FlagGroup, ...]
    others: tuple[str, ...] = field(default=())
    """Flags that are taken from the command line before it is parsed."""


def read_commands() -> list[CommandFlags]:
    """Returns the flags of every command, in the order of `intern --help`."""
    return [_read(command) for command in available()]


def read_scripts() -> list[tuple[Script, tuple[FlagGroup, ...]]]:
    """Returns the scripts that are no command, and their flags."""
    return [(script, _groups(script.options)) for script in scripts()]


def _read(command: Subcommand) -> CommandFlags:
    cls = options_class(command)
    others = ["--nproc"] if command.ranks else []
    others += [config_file.CONFIG, config_file.DUMP] if _reads_config(command, cls) else []
    return CommandFlags(command, _groups(cls), tuple(others))


def _groups(cls: Any) -> tuple[FlagGroup, ...]:
    """Flags of a dataclass, by nested dataclass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other access to its parser
        parser = tyro.extras.get_parser(cls, config=(tyro.conf.OmitArgPrefixes,))
    groups: list[FlagGroup] = []
    for group in parser._action_groups:
        rows = tuple(_row(action) for action in group._group_actions if HELP not in action.option_strings)
        name = (group.title or "").removesuffix("options").removesuffix("positional arguments").strip()
        if rows and groups and groups[-1].name == name:  # positional arguments, then flags
            groups[-1] = FlagGroup(name, groups[-1].summary, groups[-1].rows + rows)
        elif rows:
            groups.append(FlagGroup(name, " ".join((group.description or "").split()), rows))
    return tuple(groups)


def _reads_config(command: Subcommand, cls: type) -> bool:
    """True if the command is parsed with --config."""
    return (command.ranks or command.name in ("data", "plan")) and config_file.supports(cls)


def _row(action: Any) -> FlagRow:
    text = action.help or ""
    end = DEFAULT.search(text)
    meaning = " ".join(text[: end.start()].split()) if end else " ".join(text.split())
    names = tuple(action.option_strings) or (str(action.metavar),)
    default = (end["value"] if end["value"] is not None else end["word"]) if end else ""
    value = "" if action.nargs == 0 or not action.option_strings else _value(str(action.metavar))
    return FlagRow(names, value, default.strip(), bool(end and end["value"] is not None), meaning)


def _value(metavar: str) -> str:
    """Returns `STR`, `INT ...` or `a, b` for the notations of tyro: `{None}|STR`, `[INT [INT ...]]`,
    `{None,a,b}`.
    """
    text = metavar.removeprefix("{None}|")
    several = re.fullmatch(r"\[(.+?) \[.*\.\.\.\]\]", text)
    text = several[1] if several else text
    text = text.removeprefix("{").removesuffix("}").removeprefix("None,").replace(",", ", ")
    return f"{text}{', ' if ', ' in text else ' '}..." if several else text


def page(
    language: Language,
    commands: list[CommandFlags],
    others: list[tuple[Script, tuple[FlagGroup, ...]]],
) -> str:
    """Returns the page in a language. `others`: `read_scripts`."""
    lines = [f"# {language.title}", "", language.switch, "", language.introduction]
    seen: dict[FlagGroup, str] = {}
    for flags in commands:
        lines += ["", *_section(language, flags, commands, seen)]
    lines += ["", f"## {language.scripts}", "", language.about_scripts]
    for script, groups in others:
        lines += ["", f"### {script.path}", "", f"{escaped(script.summary)}."]
        for group in groups:
            if group in seen:
                lines += ["", language.repeated.format(other=seen[group], group=group.name)]
            else:
                lines += ["", *([f"**{group.name}**", ""] if group.name else []), *_table(language, group)]
    return "\n".join(lines) + "\n"


def _section(
    language: Language, flags: CommandFlags, commands: list[CommandFlags], seen: dict[FlagGroup, str]
) -> Iterator[str]:
    """Lines of a command; `seen`: groups of earlier ones, and the command that each is listed under."""
    command = flags.command
    summary = language.summaries.get(command.name, command.summary)
    others = language.comma.join(f"`{flag}`" for flag in flags.others)
    also = language.also.format(flags=others) if others else ""
    sentence = f"{summary[0].upper()}{summary[1:]}{language.full_stop}{also}"
    yield from (f"## intern {command.name}", "", sentence.strip())
    same = next((c for c in commands if c.groups == flags.groups and c is not flags), None)
    if command.preset and same:
        preset = " ".join(command.preset)
        yield from ("", language.preset.format(other=same.command.name, flags=f"`{preset}`"))
        return
    if not flags.groups:
        yield from ("", language.no_flags)
    groups = flags.groups
    base = next((c for c in commands if len(c.groups) > 1 and set(c.groups) < set(groups)), None)
    if base:
        yield from ("", language.superset.format(other=base.command.name))
        groups = tuple(group for group in groups if group not in base.groups)
    for group in groups:
        if group.name:
            yield from ("", f"### intern {command.name}: {group.name}")
        if group in seen:
            yield from ("", language.repeated.format(other=seen[group], group=group.name))
            continue
        seen[group] = command.name
        if group.summary and group.name:
            yield from ("", escaped(group.summary))
        yield from ("", *_table(language, group))


def _table(language: Language, group: FlagGroup) -> Iterator[str]:
    yield f"| {' | '.join(language.columns)} |"
    yield "|---|---|---|---|"
    words = {"required": language.required, "repeatable": language.repeatable}
    for row in group.rows:
        names = ", ".join(code(name) for name in row.names)
        default = (
            (code(row.default) if row.default else "") if row.has_default else words.get(row.default, "")
        )
        if not row.value and row.default == "False":
            default = ""  # a switch is off
        value = language.comma.join(code(choice) for choice in row.value.split(", ") if choice)
        yield f"| {names} | {value} | {default} | {escaped(row.help)} |"


def code(text: str) -> str:
    """Returns a code span for a table cell."""
    return f"`{text}`".replace("|", r"\|")


def escaped(text: str) -> str:
    """Returns plain text as Markdown; code spans stay."""
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = parts[i].replace("<", "&lt;").replace("*", r"\*").replace("[", r"\[")
    return "".join(parts).replace("|", r"\|")


def pages() -> dict[Path, str]:
    """Returns file -> contents, of every language."""
    commands, others = read_commands(), read_scripts()
    return {ROOT / "docs" / language.file: page(language, commands, others) for language in LANGUAGES}


def main() -> None:
    """Writes the pages. Raises UserError outside of the repository."""
    if not (ROOT / "docs").is_dir():
        raise UserError("the pages are part of the repository: clone it, and run this there")
    for path, text in pages().items():
        write_file(path, text)
        print(f"wrote {path}")


if __name__ == "__main__":
    errors.run(main)
