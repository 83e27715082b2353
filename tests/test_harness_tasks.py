"""Tasks of lm-evaluation-harness by name over files on disk, against `simple_evaluate` with HFLM."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.chat import KINDS
from helpers.evaluating import boolq, exported, model_dir, put_jsonl
from helpers.tokenizers import stock
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ascendspeed.conversion import chat_assets
from ascendspeed.conversion.tokenizer import export
from ascendspeed.evaluation.answer_cache import AnswerCache
from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.prompts import PromptEncoder
from ascendspeed.evaluation.runner import EngineBackend
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

LIMIT = 1e-5
"""Tolerance of log-likelihoods."""


def aqua_rat(folder: Path) -> Path:
    """A dataset of AGIEval in JSON lines, as the hub has it."""
    rows = [
        {"query": f"Q: {i} + 1?\nChoices: (A){i + 1} (B)7\nA:", "choices": ["(A)", "(B)"], "gold": [i % 2]}
        for i in range(5)
    ]
    put_jsonl(folder / "agieval-aqua-rat/test.jsonl", rows)
    return folder


def bbh(folder: Path) -> Path:
    """Two subsets of BBH as parquet in folders of their names."""
    for subset in ("boolean_expressions", "word_sorting"):
        rows = [{"input": f"not ( {word} ) is", "target": word} for word in ("True", "False", "b a")]
        (folder / subset).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / subset / "test-00000-of-00001.parquet")
    return folder


def wikitext(folder: Path) -> Path:
    """Texts whose whole likelihood is the score; the subset is declared in the dataset's card."""
    card = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    for split in ("train", "validation", "test"):
        rows = [{"page": f"The number {i} is here. " * (9 + 60 * i)} for i in range(2)]
        put_jsonl(folder / f"files/{split}.jsonl", rows)
        card += f"  - split: {split}\n    path: files/{split}.jsonl\n"
    (folder / "README.md").write_text(card + "---\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("harness")
    ours = model_dir(home / "hf")
    return {"ours": ours, "theirs": exported(home / "llama", ours)} | {
        make.__name__: make(home / make.__name__) for make in (aqua_rat, bbh, wikitext)
    }


@pytest.fixture(scope="module")
def backend(folders, cpu) -> EngineBackend:
    from ascendspeed.inference import engine

    return EngineBackend(
        engine.load(folders["ours"], dtype="fp32", device=cpu), tokenizer.load(folders["ours"]), 3
    )


@pytest.fixture(scope="module")
def hf(folders) -> HFLM:
    tokens = tokenizer.load(folders["ours"])

    class Ours(HFLM):
        """Text by our tokenizer: transformers has U+FFFD for whole runs of bytes that are no UTF-8."""

        def tok_decode(self, ids, skip_special_tokens=True):
            return (
                tokens.decode(ids) if isinstance(ids, list) else super().tok_decode(ids, skip_special_tokens)
            )

    return Ours(str(folders["theirs"]), device="cpu", dtype="float32", batch_size=3, add_bos_token=True)


def ours(name: str, folder: Path, backend: EngineBackend, answers: AnswerCache, **options):
    """Our result, and lm-evaluation-harness' tasks with the answers in them."""
    from ascendspeed.evaluation import harness_scores, harness_tasks
    from ascendspeed.evaluation.harness_model import RequestModel

    tasks = harness_tasks.load_tasks(name, folder, options.pop("shots", None))
    new_tokens = options.pop("new_tokens", None)
    encoder, chat = options.pop("encoder", None), options.pop("chat", None)
    model = RequestModel(
        backend,
        encoder or PromptEncoder(backend.tokenizer),
        backend.model.config.max_position_embeddings,
        answers,
        quiet=True,
        new_tokens=new_tokens,
        chat=chat,
    )
    defaults = {"limit": 3, "system": None, "multiturn": False}
    return harness_scores.evaluate_tasks(name, folder, tasks, model, **(defaults | options)), tasks


def theirs(tasks, hf: HFLM, limit: int = 3, **options):
    """`simple_evaluate` over the same tasks, whose prompts it builds anew."""
    for task in tasks.values():
        task._instances = None
    manager = TaskManager(include_defaults=False)
    return simple_evaluate(
        hf,
        task_manager=manager,
        tasks=list(tasks.values()),
        limit=limit,
        bootstrap_iters=0,
        verbosity="ERROR",
        **options,
    )


def check_equal(result, answers: AnswerCache, output) -> None:
    """Scores are equal, log-likelihoods within `LIMIT`, and generated texts equal."""
    for name, subject in result.score.subjects.items():
        for metric, value in subject.metrics.items():
            [score] = [v for k, v in output["results"][name].items() if f"{k},".startswith(f"{metric},")]
            assert score == pytest.approx(value, rel=1e-5), (name, metric)
    expected = {}
    for name, samples in output["samples"].items():
        for sample in samples:
            for i, response in enumerate(sample["resps"]):
                expected[f"{name}/{sample['doc_id']}/{i}"] = response[0]
    seen = {record["id"]: record for record in answers.records.values()}
    assert seen.keys() <= expected.keys()
    for key, record in seen.items():
        if "text" in record:
            assert record["text"] == expected[key], key
        else:
            value = expected[key][0] if isinstance(expected[key], tuple) else expected[key]
            limit = LIMIT * max(1, abs(value) / 64)
            assert record["loglikelihoods"][0] == pytest.approx(value, abs=limit), key


def test_choices_texts_and_whole_texts_equal_hflm(folders, backend, hf):
    """AGIEval (choices), BBH with three examples (generated), wikitext (likelihood of whole texts)."""
    cases = {
        "agieval_aqua_rat": ("aqua_rat", {}),
        "bbh_cot_fewshot_boolean_expressions": ("bbh", {"new_tokens": 6}),
        "wikitext": ("wikitext", {}),
    }
    for name, (data, options) in cases.items():
        answers = AnswerCache(None, {})
        result, tasks = ours(name, folders[data], backend, answers, **options)
        assert answers.records
        assert result.score.is_share == (name != "wikitext")
        more = {"gen_kwargs": {"max_gen_toks": 6}} if options else {}
        output = theirs(tasks, hf, **more)
        check_equal(result, answers, output)
        first = next(iter(answers.records.values()))
        if "loglikelihoods" in first:  # a control
            first["loglikelihoods"][0] *= 1.001
            with pytest.raises(AssertionError):
                check_equal(result, answers, output)


def test_answers_are_kept(folders, backend, monkeypatch):
    """A second evaluation asks the model nothing."""
    answers = AnswerCache(None, {})
    first, _ = ours("agieval_aqua_rat", folders["aqua_rat"], backend, answers)
    monkeypatch.setattr(backend, "score", lambda pairs, on_score: pairs and pytest.fail("asked again"))
    second, _ = ours("agieval_aqua_rat", folders["aqua_rat"], backend, answers)
    assert first == second
    assert {tuple(more) for more in first.records.values()} == {("right", "metrics")}


def test_groups_and_tags_have_their_members():
    """Members are those of lm-evaluation-harness' own index."""
    from ascendspeed.evaluation import harness_tasks

    for name, count in (("bbh", 27), ("ai2_arc", 2), ("mmlu_stem_tasks", 19)):
        manager, configs = harness_tasks._find_configs(name)
        entry = manager.task_index[name]
        assert set(configs) == set(entry.tags or entry.cfg["task"]), name
        assert len(configs) == count
        assert all(config["dataset_path"] for config in configs.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mmlu_por", "has no such task or group; did you mean lm-eval:mmlu_pro"),
        ("humaneval", "executes generated code; use --task humaneval or mbpp"),
        ("agieval", "has no folder agieval-gaokao-biology with the dataset hails/agieval-gaokao-biology"),
        ("gsm8k", "gsm8k with .*|needs the split 'train'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(name, message, folders):
    from ascendspeed.evaluation import harness_tasks

    with pytest.raises(UserError, match=message) as caught:
        harness_tasks.load_tasks(name, folders["aqua_rat"], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task", "lm-eval:nothing_like_it"), "has no such task or group"),
        (("--task", "mmlu", "--apply-chat-template"), "use --task lm-eval:NAME, for example lm-eval:mmlu"),
        (("--task", "agieval", "--system", "x"), "--system belongs to --apply-chat-template"),
        (("--task", "agieval", "--task-data-path", "nowhere"), "nowhere of agieval is not a directory"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, folders):
    data = () if "--task-data-path" in flags else ("--task-data-path", str(folders["aqua_rat"]))
    with pytest.raises(UserError, match=message):
        resolve(["--load", str(folders["ours"]), *flags, *data], 1)


TALK = [
    {"role": "user", "content": "Question: 3 + 4?\nAnswer:"},
    {"role": "assistant", "content": " 7 你好"},
    {"role": "user", "content": "Question: 1 + 1?\nAnswer:"},
]


@pytest.mark.parametrize("kind", ["v1", "v2", "v3"])
def test_chat_prompts_have_the_ids_of_transformers(kind, tmp_path):
    """Contexts and continuations, with and without a system message, and with a begin of the answer."""
    from ascendspeed.evaluation.chat_prompts import ChatEncoder, ChatPrompts

    folder = tmp_path / "model"
    KINDS[kind](folder)
    assert export.write(folder) is None
    chat_assets.write(folder, kind, folder)
    hf_tokenizer, ours = stock(folder), tokenizer.load(folder)
    chat, encoder = ChatPrompts(ours, kind, "internlm2"), ChatEncoder(ours)
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        messages = system + TALK
        text = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoder.encode(chat.render(messages)) == ids
        whole = hf_tokenizer(text + "A", add_special_tokens=False)["input_ids"]
        [(head, tail)] = encoder.encode_pairs(chat.render(messages), ["A"])
        assert head + tail == whole
        begun = [*messages, {"role": "assistant", "content": "The answer is"}]
        expected = hf_tokenizer(text + "The answer is", add_special_tokens=False)["input_ids"]
        assert encoder.encode(chat.render(begun, add_generation_prompt=False)) == expected
    if kind == "v2":  # a control: without parsing, <|im_start|> is text
        assert PromptEncoder(ours).encode(chat.render(TALK)) != encoder.encode(chat.render(TALK))


def test_a_template_without_a_place_for_a_role_is_one_line(tmp_path):
    from ascendspeed.evaluation.chat_prompts import ChatPrompts

    folder = tmp_path / "model"
    KINDS["v2"](folder)
    with pytest.raises(UserError, match="chat template v2: "):
        ChatPrompts(tokenizer.load(folder), "v2", "internlm2").render([{"role": "judge", "content": "x"}])


def test_the_command_writes_all_reports(cpu, folders, tmp_path):
    """Own tasks and lm-evaluation-harness' side by side."""
    from ascendspeed.evaluation import runner

    boolq(tmp_path / "boolq", 2)
    words = ["--load", folders["ours"], "--task", "boolq lm-eval:agieval_aqua_rat", "--limit", 2]
    words += ["--device", "cpu"]
    words += ["--task-data-path", tmp_path / "boolq", folders["aqua_rat"], "--output", tmp_path / "out"]
    runner.run(resolve(list(map(str, words)), 1)[0], cpu, [])
    results = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    assert list(results) == ["boolq", "lm-eval:agieval_aqua_rat"]
    assert results["lm-eval:agieval_aqua_rat"]["questions"] == 2
    assert results["lm-eval:agieval_aqua_rat"]["num_fewshot"] == 0
    _, *lines = map(json.loads, (tmp_path / "out/questions.jsonl").read_text().splitlines())
    assert len(lines) == 2 + 2 * 2
    assert all("metrics" in line for line in lines)
    assert "lm-eval:agieval_aqua_rat" in (tmp_path / "out/results.csv").read_text()
    assert (tmp_path / "out/chart.png").stat().st_size > 1000
