"""Needle-in-a-haystack test: lengths, depths, judgement of answers, reports, and a model that finds every
needle.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import corpus, launch

from ascendspeed.evaluation import haystack
from ascendspeed.evaluation.haystack import Cell, make_cells
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("needle")
    words = corpus.sentencepiece_dir(folder / "words")
    flags = ("--model", "internlm2-tiny", "--tokenizer", words, "--output-dir", folder / "hf")
    launch.must("tools/random_model.py", *flags)
    return folder / "hf"


def test_cells():
    cells = make_cells((200, 100), (50, 0), 2)
    assert [(c.length, c.depth, c.trial) for c in cells] == [
        (n, d, t) for n in (100, 200) for d in (0, 50) for t in (0, 1)
    ]
    assert (
        len({haystack.magic_number(1, c) for c in cells} | {haystack.magic_number(2, c) for c in cells}) == 16
    )
    assert all(len(haystack.magic_number(1, c)) == 7 for c in cells)


@pytest.mark.parametrize(
    ("lengths", "depths", "says"),
    [
        ((), (0,), "--lengths : give different"),
        ((5, 5), (0,), "--lengths 5 5"),
        ((0,), (0,), "not 0"),
        ((9,), (101,), "--depths 101"),
        ((9,), (-1,), "not -1"),
    ],
)
def test_cells_that_mean_nothing(lengths, depths, says):
    with pytest.raises(UserError, match=re.escape(says)):
        make_cells(lengths, depths, 1)


@pytest.mark.parametrize(("depth", "before"), [(0, 0), (25, 5), (50, 10), (100, 20)])
def test_the_needle_lies_where_it_should(depth, before):
    text = haystack.build_text(Cell(0, depth, 0), "Needle.", ["One.", "Two two."], [1, 2], 30)
    parts = text.split(" Needle.") if depth else ["", text.removeprefix("Needle.")]
    assert parts[0].count(".") == before
    assert text.count(".") == 21
    assert text.replace("Needle.", "").split() == ["One.", "Two", "two."] * 10


def test_files_are_cut_into_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two!  Three?\nFour\n\n五。 六")
    assert haystack.read_sentences([str(tmp_path / "a.txt")]) == [
        "One.",
        "Two!",
        "Three?",
        "Four",
        "五。",
        "六",
    ]
    assert haystack.read_sentences([]) == list(haystack.FILLER)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfOne.")
    assert haystack.read_sentences([str(tmp_path / "bom.txt")]) == ["One."]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    for name in ("b.txt", "none.txt"):
        with pytest.raises(UserError, match=name):
            haystack.read_sentences([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("answer", "expected", "scored"),
    [
        (" It is 1234567.", "1234567", True),
        ("1 234 567", "1234567", True),
        ("234567", "1234567", False),
        ("Eat a\nSandwich", "eat a sandwich", True),
    ],
)
def test_answers(answer, expected, scored):
    assert haystack.contains_answer(answer, expected) is scored


def test_a_model_that_reads_finds_all_and_goes_on_where_it_was(cpu, tiny, tmp_path, monkeypatch, capsys):
    """A stand-in for the model finds the number in the ids that it is given; a blind one finds none."""
    from ascendspeed.evaluation import needle
    from ascendspeed.inference import engine

    seen_prompts = []

    def reads(model, prompts, params):
        from ascendspeed.tokenization import tokenizer

        words = tokenizer.load(tiny)
        text = words.decode(prompts[0])
        seen_prompts.append((len(prompts[0]), text))
        number = re.search(r"day is (\d{7})", text)[1]
        return [[engine.Completion(words.encode(f" {number}.").tolist(), "length", 0.0)]]

    monkeypatch.setattr(engine, "sample", reads)
    flags = ["--load", str(tiny), "--output-dir", str(tmp_path / "out"), "--depths", "0", "50", "100"]
    needle.run(needle.resolve([*flags, "--lengths", "200"], 1)[0], cpu, [])
    assert [length <= 200 and length > 170 for length, _ in seen_prompts] == [True] * 3
    places = [text.index("The magic number") / text.index("Question") for _, text in seen_prompts]
    assert places[0] < 0.02 < 0.3 < places[1] < 0.45 < 0.6 < places[2]
    seen_prompts.clear()
    needle.run(needle.resolve([*flags, "--lengths", "200", "400"], 1)[0], cpu, [])
    assert len(seen_prompts) == 3  # the others were asked before
    assert json.loads((tmp_path / "out/results.json").read_text())["found"] == [[1.0, 1.0]] * 3
    assert "depth 50 % | 100 | 100" in capsys.readouterr().out
    assert (tmp_path / "out/chart.png").read_bytes().startswith(b"\x89PNG")
    blind = [[engine.Completion([5], "length", 0.0)]]
    monkeypatch.setattr(engine, "sample", lambda *_: blind)
    flags[3] = str(tmp_path / "blind")
    needle.run(needle.resolve([*flags, "--lengths", "200"], 1)[0], cpu, [])
    assert json.loads((tmp_path / "blind/results.json").read_text())["found"] == [[0.0]] * 3


def test_a_needle_in_a_conversation(cpu, tiny, tmp_path):
    """By a template that is named, where the tokenizer lacks the tokens of the model's own."""
    from ascendspeed.evaluation import needle

    flags = [
        "--load",
        str(tiny),
        "--output-dir",
        str(tmp_path / "out"),
        "--lengths",
        "300",
        "--depths",
        "50",
        "--max-new-tokens",
        "4",
    ]
    with pytest.raises(UserError, match="--chat-template"):
        needle.run(needle.resolve([*flags, "--chat"], 1)[0], cpu, [])
    needle.run(needle.resolve([*flags, "--chat", "--chat-template", "v1"], 1)[0], cpu, [])
    settings, answer = map(json.loads, (tmp_path / "out/questions.jsonl").read_text().splitlines())
    assert settings["settings"]["chat_template"] == "v1"
    assert 250 < answer["tokens"] <= 300


def test_what_is_too_short_or_not_to_be_found(cpu, tiny, tmp_path):
    from ascendspeed.evaluation import needle

    flags = ["--load", str(tiny), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="has no effect without --chat"):
        needle.resolve([*flags, "--chat-template", "v1"], 1)
    with pytest.raises(UserError, match=r"--lengths 60: at least \d+ tokens are needed"):
        needle.run(needle.resolve([*flags, "--lengths", "60"], 1)[0], cpu, [])
    with pytest.raises(UserError, match="give the expected text with --answer"):
        needle.resolve([*flags, "--needle", "The best thing is a sandwich."], 1)


@pytest.mark.slow
def test_a_refused_folder_is_one_line_on_both_ranks(tiny, tmp_path):
    from ascendspeed.evaluation.answer_cache import AnswerCache

    AnswerCache(tmp_path, {"haystack": ["another"]}).close()
    flags = [
        "--load",
        str(tiny),
        "--output-dir",
        str(tmp_path),
        "--lengths",
        "200",
        "--device",
        "cpu",
        "--tp",
        "2",
    ]
    here = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch.free_port()),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "tasks/evaluation/needle.py", *flags],
            env=launch.environment(**here, RANK=rank, LOCAL_RANK=rank),
            cwd=launch.ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    last_lines = [process.communicate(timeout=120)[1].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert last_lines[0].startswith("error: ")
    assert "holds answers of haystack ['another'], this run has []" in last_lines[0]
    assert last_lines[1] == f"[rank 1] {last_lines[0]}"
