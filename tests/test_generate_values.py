"""Generation command: values of sampling flags, further keys of prompts, two runs with one output file."""

import json

import pytest
from helpers.generate_command import folder, records, run

from ascendspeed.inference import prompts
from ascendspeed.inference.output import AnswerWriter
from ascendspeed.utils.errors import UserError


def test_two_runs_with_one_output_file(tmp_path):
    """The second is refused while the first writes and after it has ended; another program's file stays."""
    path = tmp_path / "out.jsonl"
    first = AnswerWriter(str(path), True)
    with pytest.raises(UserError, match=r"another process is writing .*out\.jsonl\.partial: wait for it"):
        AnswerWriter(str(path), True)
    first.add((0, 0), {"text": "of the first"}, None)
    with pytest.raises(UserError, match="another process is writing"):
        AnswerWriter(str(path), True)
    first.finish()
    with pytest.raises(UserError, match=r"out\.jsonl exists; move it away"):
        AnswerWriter(str(path), True)
    assert records(path) == [{"text": "of the first"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl"]
    late = AnswerWriter(str(tmp_path / "late.jsonl"), True)
    late.add((0, 0), {"text": "of the second"}, None)
    (tmp_path / "late.jsonl").write_text("of another program")
    with pytest.raises(UserError, match=r"another program has written it meanwhile; the answers are in "):
        late.finish()
    assert (tmp_path / "late.jsonl").read_text() == "of another program"
    assert records(tmp_path / "late.jsonl.partial") == [{"text": "of the second"}]


def test_further_keys_of_a_row_are_kept(run, tmp_path):
    rows = [
        {"prompt": "Document", "id": 3, "label": [1, {"a": None}]},
        {"id": "x", "messages": [{"role": "user", "content": "hi"}], "source": "中"},
        {"prompt": "plain"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("greedy", "logprobs"):
        out = tmp_path / f"{task}.jsonl"
        files = ("--input-file", tmp_path / "in.jsonl", "--output-file", out)
        run("--task", task, *files)
        written = records(out)
        assert [(r.get("id"), r.get("label"), r.get("source")) for r in written] == [
            (3, [1, {"a": None}], None),
            ("x", None, "中"),
            (None, None, None),
        ]
        assert [r["prompt"] for r in written] == ["Document", rows[1]["messages"], "plain"]
        assert (
            "keys that are no prompt are copied to the output file: id (2 rows), label (1 rows)" in run.stderr
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "answers": 1}', "the key 'answers' is one of the output file's"),
        ('{"messages": [], "task": "qa"}', "the key 'task' is one of the output file's"),
        ('{"prompt": "a", "tools": []}', "'messages' or 'tools' beside 'prompt'"),
        ('{"prompt": "a", "messages": []}', "'messages' or 'tools' beside 'prompt'"),
        ('{"id": 3}', "is not one of: a text"),
    ],
)
def test_rows_whose_keys_clash(row, message):
    with pytest.raises(UserError, match=f"in, line 1.*{message}"):
        prompts.prompts_from_json_lines(row.encode(), "in")


def test_output_keys_are_those_of_the_records(run, tmp_path):
    run("--task", 1, 5, "--prompt", "Document 7", "--output-file", tmp_path / "out.jsonl")
    assert set().union(*records(tmp_path / "out.jsonl")) == prompts.OUTPUT_KEYS


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature 0",
        "--task sample --temperature 0 --top-k 5",
        "--task sample --top-p 0",
        "--task sample --temperature 0 --top-k -1 --top-p 1",
    ],
)
def test_zero_means_greedy(run, flags):
    common = ("--prompt", "Document 7 says", "--max-new-tokens", 12)
    greedy = run(*common, "--task", "greedy").split("-> ")[1]
    assert run(*common, *flags.split()).split("-> ")[1] == greedy
    assert run(*common, "--task", "sample", "--temperature", 5).split("-> ")[1] != greedy  # control


def test_top_k_of_minus_1_means_all(run):
    common = ("--prompt", "Document 7 says", "--max-new-tokens", 12, "--task", "sample", "--temperature", 3)
    assert run(*common, "--top-k", -1) == run(*common, "--top-k", 0) != run(*common, "--top-k", 1)


def test_beams_and_conversations_at_temperature_0(run, tmp_path):
    common = ("--prompt", "Document 7 says", "--max-new-tokens", 8)
    beams = run(*common, "--task", "beam").split("-> ")[1]
    assert run(*common, "--task", "beam-sample", "--temperature", 0).split("-> ")[1] == beams
    plain = run("--task", "chat", "--max-new-tokens", 8, stdin="hi\n")
    assert run("--task", "chat", "--temperature", 0, "--max-new-tokens", 8, stdin="hi\n") == plain
    (tmp_path / "in.jsonl").write_text('[{"role": "user", "content": "hi"}]\n')
    answers = [
        run("--task", "chat", "--input-file", tmp_path / "in.jsonl", "--max-new-tokens", 8, *flags)
        for flags in ((), ("--top-p", 0), ("--temperature", 0))
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "--temperature -1.0: must be 0"),
        ("--temperature 0.00001", "must be 0 .* or at least 0.0001"),
        ("--top-k -2", "--top-k -2: must be above 0, or 0 or -1 for all tokens"),
        ("--top-p -0.1", "--top-p -0.1: must be between 0"),
        ("--temperature 0 --top-p 7", "--top-p 7.0: must be between 0"),
        ("--temperature 0 --num-return-sequences 2", "--num-return-sequences 2: only 1 available"),
    ],
)
def test_sampling_values_that_mean_nothing(run, flags, message):
    with pytest.raises(UserError, match=message):
        run("--prompt", "x", "--task", "sample", *flags.split())


def test_words_of_a_conversation_answer(run):
    """`help` lists the words and `clear` says what it did; neither is a message of the user."""
    from ascendspeed.inference import chat

    plain = run("--task", "chat", "--max-new-tokens", 4, stdin="hi\n")
    assert run("--task", "chat", "--max-new-tokens", 4, stdin="help\nclear\nhi\n") == plain
    assert chat.HELP in run.stderr
    assert "help: show this line" in chat.HELP
    assert "a new conversation: the earlier messages are forgotten" in run.stderr
    quoted = run("--task", "chat", "--max-new-tokens", 4, stdin='"""\nhelp\n"""\n')
    assert quoted
    assert chat.HELP not in run.stderr
