"""End of generated answers: control tokens as stop texts, and the stop ids of evaluation, against HFLM."""

import json

import pytest
from helpers.evaluating import exported, put_jsonl
from helpers.generate_command import records
from helpers.scripted_model import IM_END, scripted_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from ascendspeed.evaluation.tasks import TASKS
from ascendspeed.inference import args as generate_args
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import control_token_ids, generation_config_stops
from ascendspeed.utils.errors import UserError

CHATML = (IM_END, "<|im_start|>", "<|action_start|>")
UNTIL = TASKS["gsm8k"].styles["lm-eval"].until
NEW_TOKENS = 24
RUN_ON = "7" + "9" * (NEW_TOKENS - 2)
"""Text of an answer that does not end at the control token after 7."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that answer `7<|im_end|>999...` and whose eos, </s>, never comes; a gsm8k of one question."""
    home = tmp_path_factory.mktemp("stops")
    folders = {
        "until": scripted_model(home / "until", ["7", IM_END], "9"),
        "generation_config": scripted_model(home / "config", ["7", IM_END], "9", eos_ids=[2, 400]),
        "config": scripted_model(home / "model_config", ["7", IM_END], "9"),
        "template": scripted_model(home / "template", ["7", IM_END], "9", special=CHATML),
        "eos": scripted_model(home / "eos", ["7", "</s>"], "9"),
        "pad": scripted_model(home / "pad", ["7", "</s>"], "9", special=("<pad>",), extra_rows=-1),
    }
    set_eos(folders["config"] / "config.json", [2, 400])
    for split in ("test", "train"):
        put_jsonl(home / f"gsm8k/{split}.jsonl", [{"question": "3 + 4?", "answer": "3 + 4 = 7\n#### 7"}])
    return folders | {"gsm8k": home / "gsm8k"}


def set_eos(path, value) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | {"eos_token_id": value}))


def evaluated(cpu, folder, data, output) -> dict:
    """The record of the question, by the command."""
    from ascendspeed.evaluation import args, runner

    words = ["--load", folder, "--task", "gsm8k", "--task-data-path", data, "--num-fewshot", "0"]
    words += ["--max-new-tokens", NEW_TOKENS, "--output-dir", output, "--device", "cpu"]
    runner.run(args.resolve(list(map(str, words)), 1)[0], cpu, [])
    _, record = map(json.loads, (output / "questions.jsonl").read_text().splitlines())
    return record


def harness_answer(folder, until) -> str:
    """The answer of lm-evaluation-harness' own model over an exported folder."""
    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, add_bos_token=True)
    settings = {"until": list(until), "max_gen_toks": NEW_TOKENS, "do_sample": False}
    [text] = model.generate_until(
        [Instance("generate_until", {}, ("Question: 3 + 4?\nAnswer:", settings), 0)], disable_tqdm=True
    )
    return text


@pytest.mark.parametrize("kind", ["until", "generation_config", "eos"])
def test_gsm8k_ends_where_hflm_over_the_export_ends(kind, cpu, folders, tmp_path):
    record = evaluated(cpu, folders[kind], folders["gsm8k"], tmp_path / "out")
    assert record["text"] == "7" == harness_answer(exported(tmp_path / "hf", folders[kind]), UNTIL)
    assert record["metrics"]["flexible-extract"] == 1
    assert (record["question"], record["prompt"]) == ("3 + 4?", "Question: 3 + 4?\nAnswer:")
    assert (record["predicted"], record["right"]) == ("7", "3 + 4 = 7\n#### 7")


def test_gsm8k_ends_at_each_of_the_sources_of_stop_ids(cpu, folders, tmp_path, monkeypatch):
    """Without <|im_end|> in `until`: generation_config.json, config.json alone and the chat template each
    suffice; the control has none of them."""
    from ascendspeed.evaluation import runner

    monkeypatch.setattr(runner, "control_token_ids", lambda tokens, until: ())
    texts = {
        kind: evaluated(cpu, folders[kind], folders["gsm8k"], tmp_path / kind)["text"]
        for kind in ("generation_config", "config", "template", "until")
    }
    assert texts == {"generation_config": "7", "config": "7", "template": "7", "until": RUN_ON}
    export = exported(tmp_path / "hf", folders["generation_config"])
    assert harness_answer(export, ["Question:"]) == "7"
    assert harness_answer(exported(tmp_path / "bare", folders["until"]), ["Question:"]) == RUN_ON
    alone = exported(tmp_path / "alone", folders["config"])
    (alone / "generation_config.json").unlink()
    assert harness_answer(alone, ["Question:"]) == "7"


def test_config_json_counts_without_generation_config_json_only(tmp_path):
    """The order of transformers' own `generation_config` of a loaded model."""
    set_eos(tmp_path / "config.json", [2, 400])
    assert generation_config_stops(tmp_path) == (2, 400)
    (tmp_path / "generation_config.json").write_text("{}")
    assert generation_config_stops(tmp_path) == ()
    set_eos(tmp_path / "generation_config.json", 5)
    assert generation_config_stops(tmp_path) == (5,)


@pytest.mark.parametrize("value", ["2", 2.5, True, [[2], 400], [-1, 2]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_id(name, value, tmp_path):
    set_eos(tmp_path / name, value)
    with pytest.raises(UserError, match=f"{name}: eos_token_id is .*, not an id or a list of ids"):
        generation_config_stops(tmp_path)


def test_a_pad_token_beyond_the_vocabulary(cpu, folders, tmp_path):
    """No text becomes it, so the model can be evaluated."""
    assert evaluated(cpu, folders["pad"], folders["gsm8k"], tmp_path)["text"] == "7"


def test_answers_with_other_stop_ids_are_generated_again(cpu, folders, tmp_path, monkeypatch):
    from ascendspeed.evaluation import runner

    with monkeypatch.context() as patch:
        patch.setattr(runner, "control_token_ids", lambda tokens, until: ())
        assert evaluated(cpu, folders["until"], folders["gsm8k"], tmp_path)["text"] == RUN_ON
    (folders["until"] / "generation_config.json").write_text('{"eos_token_id": [2, 400]}')
    try:
        evaluated(cpu, folders["until"], folders["gsm8k"], tmp_path)
    except ValueError:  # two records: that of the earlier stop ids stays
        pass
    finally:
        (folders["until"] / "generation_config.json").unlink()
    texts = [json.loads(line)["text"] for line in (tmp_path / "questions.jsonl").read_text().splitlines()[1:]]
    assert texts == [RUN_ON, "7"]


@pytest.mark.parametrize("flags", ["", "--task sample --temperature 0.5", "--num-beams 2", "--stream"])
def test_a_stop_text_may_name_a_control_token(flags, cpu, folders, capsys):
    def generate(*stop: str) -> str:
        from ascendspeed.inference import runner

        words = f"--load {folders['until']} --device cpu --max-new-tokens 5 --prompt hi {flags}"
        job, _ = generate_args.resolve([*words.split(), *stop], 1)
        capsys.readouterr()
        runner.run(job, cpu, [])
        return capsys.readouterr().out.rstrip("\n").rpartition("-> ")[2]

    assert generate("--stop", IM_END) == "7"
    assert generate() == generate("--stop", "</s>") == "7999"  # control


def test_a_stop_text_of_a_conversation_may_name_a_control_token(cpu, folders, tmp_path):
    from ascendspeed.inference import runner

    (tmp_path / "in.jsonl").write_text('[{"role": "user", "content": "hi"}]\n')
    for stop, text, reason in (([], "79999", "length"), (["--stop", IM_END], "7", "stop")):
        words = ["--load", folders["until"], "--device", "cpu", "--max-new-tokens", "6", "--task", "chat"]
        words += ["--chat-template", "v1", "--input-file", tmp_path / "in.jsonl", *stop]
        out = tmp_path / f"out{len(stop)}.jsonl"
        job, _ = generate_args.resolve([*map(str, words), "--output-file", str(out)], 1)
        runner.run(job, cpu, [])
        [answer] = records(out)[0]["answers"]
        assert (answer["text"], answer["reason"]) == (text, reason)


def test_names_of_control_tokens(folders, tmp_path):
    from helpers.chat import KINDS

    tokens = tokenizer.load(folders["template"])
    number = tokens.required_id(IM_END)
    assert control_token_ids(tokens, [IM_END, "</s>", "<|im_end|", "7", "Question:"]) == (2, number)
    for mixed in (f"{IM_END}\n", f"7{IM_END}", f"<{IM_END}"):
        with pytest.raises(UserError, match=r"holds the control token <\|im_end\|> and other text"):
            control_token_ids(tokens, [mixed])
    # A vocabulary whose JSON files do not name the tokens: the chat template knows the one in their place.
    old = KINDS["v2-old"](tmp_path / "old")
    loaded = tokenizer.load(old)
    assert control_token_ids(loaded, [IM_END]) == (loaded.required_id("[UNUSED_TOKEN_145]"),)
    # Ordinary pieces are found in text.
    v1 = tokenizer.load(KINDS["v1"](tmp_path / "v1"))
    assert control_token_ids(v1, ["<eoa>", IM_END]) == ()
