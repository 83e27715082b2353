"""Record of a run in its log: start line and errors, also of runs that end before they have a log."""

import re

import pytest

from ascendspeed.utils import errors, run_record
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.run_record import RunRecord


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ([], "logs"),
        (["--log-dir", "a"], "a"),
        (["--log_dir=b"], "b"),
        (["--log-dir", "a", "--lr", "1", "--log-dir", "c"], "c"),
        (["--log-dir"], "logs"),
    ],
)
def test_the_folder_of_the_log(flags, folder):
    assert RunRecord(["pretrain_intern.py", *flags]).log_dir() == folder


def test_an_error_follows_the_start_of_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPE", "bash recipe.sh")
    words = ["pretrain_intern.py", "--log-dir", str(tmp_path / "log"), "two words"]
    record = RunRecord(words)
    record.write_error("error: one")
    record.write_error("error: two")
    RunRecord(words).write_error("error: of another run")
    lines = (tmp_path / "log/train.log").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["start", "error", "error", "start", "error"]
    assert re.fullmatch(
        r"start: [\d-]+ [\d:]+, host \S+, commit \S+: bash recipe.sh: pretrain_intern.py --log-dir .* "
        r"'two words'",
        lines[0],
    )


def test_a_folder_that_cannot_be_made_hides_nothing(tmp_path):
    (tmp_path / "file").touch()
    RunRecord(["x", "--log-dir", str(tmp_path / "file" / "log")]).write_error("error: one")
    RunRecord(["x", "--log-dir", "a\0b"]).write_error("error: one")


def test_outside_of_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "ROOT", tmp_path)
    assert run_record.commit() == "unknown"


def test_every_error_is_recorded(capsys):
    """One line of a mistake, the traceback of an unexpected error; nothing of a success."""
    texts: list[str] = []

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit):
        errors.run(lambda: fail(UserError("a mistake")), record=texts.append)
    assert texts == ["error: a mistake"]
    assert capsys.readouterr().err == "error: a mistake\n"
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: fail(ZeroDivisionError("bug")), record=texts.append)
    assert texts[1].startswith("Traceback")
    assert texts[1].endswith("ZeroDivisionError: bug")
    with pytest.raises(SystemExit):
        errors.run(lambda: 0, record=texts.append)
    assert len(texts) == 2
