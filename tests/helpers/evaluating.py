"""Helpers of the evaluation tests: small benchmarks on disk, a tiny model with its tokenizer, lm-eval's own
tasks.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from safetensors.torch import save_file

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import convert
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.evaluation.subjects import SUBJECTS
from ascendspeed.models import families, param_mapping
from helpers import corpus

HARNESS = Path(lm_eval.__file__).parent / "tasks"
ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "tasks/evaluation/sample_mmlu"
POSITIONS = 1024


def rows(subject: str, split: str, count: int) -> list[list[str]]:
    """Made-up questions with what people's readers stumble over in them."""
    options = ["0.50", "None", "NA", "1e5", "a, b", 'he said "yes"', "two\nlines", "中文", " 007 ", "nan"]
    return [
        [
            f" {subject} {split} question {i}?",
            *(options[(i + j) % len(options)] for j in range(4)),
            "ABCD"[(i * 7 + len(subject)) % 4],
        ]
        for i in range(count)
    ]


def put_csv(path: Path, lines: Sequence[Sequence[str]], header: Sequence[str] = ()) -> None:
    """By hand: every field that needs it in quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    quoted = [
        ",".join(f'"{f.replace(chr(34), chr(34) * 2)}"' if set(f) & set(',"\n') else f for f in line)
        for line in lines
    ]
    path.write_text("".join(f"{line}\n" for line in ([",".join(header)] if header else []) + quoted), "utf-8")


def mmlu(folder: Path, count: int = 3, subjects: Sequence[str] | None = None) -> Path:
    """All 57 subjects, or some."""
    for subject in SUBJECTS["mmlu"] if subjects is None else subjects:
        for split, many in (("dev", 5), ("test", count)):
            put_csv(folder / split / f"{subject}_{split}.csv", rows(subject, split, many))
    return folder


def ceval(folder: Path, count: int = 2) -> Path:
    """C-Eval: headed, with numbers before and explanations after."""
    for subject in SUBJECTS["ceval"]:
        for split, many in (("dev", 5), ("val", count)):
            lines = [
                [str(i), *row, *(["because, 0.5"] if split == "dev" else [])]
                for i, row in enumerate(rows(subject, split, many))
            ]
            header = ["id", "question", *"ABCD", "answer", *(["explanation"] if split == "dev" else [])]
            put_csv(folder / split / f"{subject}_{split}.csv", lines, header)
    return folder


def cmmlu(folder: Path, count: int = 2) -> Path:
    """CMMLU: a nameless first column."""
    for subject in SUBJECTS["cmmlu"]:
        for split, many in (("dev", 5), ("test", count)):
            lines = [[str(i), *row] for i, row in enumerate(rows(subject, split, many))]
            put_csv(folder / split / f"{subject}.csv", lines, ["", "Question", *"ABCD", "Answer"])
    return folder


def put_jsonl(path: Path, tables: Sequence[dict[str, Any]]) -> None:
    """A table in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(table, ensure_ascii=False) + "\n" for table in tables), "utf-8")


def boolq(folder: Path, count: int = 8) -> Path:
    """Writes BoolQ in SuperGLUE's format."""
    for name, many in (("train", 6), ("val", count)):
        rows = [
            {
                "question": f"is {i} odd in {name}",
                "passage": f"Number -- The number {i} is here. 数 {i}.",
                "idx": i,
                "label": i % 3 > 0,
            }
            for i in range(many)
        ]
        put_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def gsm8k(folder: Path, count: int = 6) -> Path:
    """Sums."""
    for name, many in (("train", 6), ("test", count)):
        rows = [
            {
                "question": f"Tom has {i} apples and buys {i * 7}. How many?",
                "answer": f"{i} + {i * 7} = <<{i}+{i * 7}={i * 8}>>\n#### {i * 8:,}",
            }
            for i in range(200, 200 + many)
        ]
        put_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def hellaswag(folder: Path, count: int = 8) -> Path:
    """With the marks of WikiHow in it."""
    for name, many in (("train", 4), ("val", count)):
        rows = [
            {
                "ind": i,
                "activity_label": "Cutting [header] wood",
                "ctx_a": f"[header] How to cut {i} [title] Take  a saw.",
                "ctx_b": "then the man" if i % 2 else "",
                "ctx": "not used",
                "endings": [f"goes {i}.", "[step] saws  on.", "eats [substeps] it.", "falls."],
                "label": i % 4,
            }
            for i in range(many)
        ]
        put_jsonl(folder / f"hellaswag_{name}.jsonl", rows)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "mmlu": mmlu,
    "ceval": ceval,
    "cmmlu": cmmlu,
    "boolq": boolq,
    "gsm8k": gsm8k,
    "hellaswag": hellaswag,
}

MODEL = ModelConfig(
    "internlm",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    vocab_size=400,
    max_position_embeddings=POSITIONS,
    init_method_std=0.05,
)


def model_dir(folder: Path, model: ModelConfig = MODEL) -> Path:
    """An InternLM with random weights, biases and norms, and a tokenizer, as a Hugging Face directory."""
    corpus.sentencepiece_dir(folder, 400)
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    )
    named = {}
    for parameter in param_mapping.parameters(model):
        tensor = param_mapping.random_tensor(model, parameter, 3)
        noise = torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(len(parameter.name) * 7 + len(named))
        )
        named |= param_mapping.megatron_to_hf(
            model, parameter, tensor + 0.1 * noise if tensor.dim() == 1 else tensor
        )
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
    config = families.FAMILIES[model.family].write_config(model) | {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def exported(folder: Path, source: Path) -> Path:
    """Exports the model as a plain Llama for transformers."""
    reader = open_reader(source)
    convert.convert(reader, folder, convert.HuggingFaceWriter("llama"), convert.DTYPES["fp32"])
    return folder


class Loader(yaml.SafeLoader):
    """lm-eval's files name functions of the file beside them."""


def _function(loader: Loader, node: yaml.Node) -> Any:
    module, name = loader.construct_scalar(node).split(".")
    return getattr(_load(Path(loader.name).parent / f"{module}.py"), name)


Loader.add_constructor("!function", _function)


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _yaml(path: Path) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        own = yaml.load(file, Loader)
    base = _yaml(path.parent / own.pop("include")) if "include" in own else {}
    return base | own


FILES = {
    "mmlu": "mmlu/default/mmlu_{}.yaml",
    "ceval": "ceval/ceval-valid_{}.yaml",
    "cmmlu": "cmmlu/cmmlu_{}.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
WORDS = {
    "mmlu": lambda r: {"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])},
    "ceval": lambda r: dict(zip(("question", *"ABCD", "answer"), r, strict=True)),
    "cmmlu": lambda r: dict(zip(("Question", *"ABCD", "Answer"), r, strict=True)),
}
SCORED = {
    "mmlu": "test",
    "ceval": "val",
    "cmmlu": "test",
    "boolq": "val",
    "gsm8k": "test",
    "hellaswag": "val",
}


def harness_task(
    task: str, folder: Path, subject: str = "", shots: int = 0, count: int = 2
) -> ConfigurableTask:
    """lm-eval's own task over the rows, read without our loaders; examples in their order."""
    config = _yaml(HARNESS / FILES[task].format(subject))
    if subject:
        splits = {
            split: [WORDS[task](row) for row in rows(subject, split, many)]
            for split, many in (("dev", 5), (SCORED[task], count))
        }
        first, second = "dev", SCORED[task]
    else:
        names = {"hellaswag": ("hellaswag_train", "hellaswag_val")}.get(task, ("train", SCORED[task]))
        splits = {
            n: [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()] for n in names
        }
        first, second = names
    for name in (
        "dataset_path",
        "dataset_name",
        "tag",
        "group",
        "training_split",
        "validation_split",
        "test_split",
    ):
        config.pop(name, None)
    data = {name: Dataset.from_list(tables) for name, tables in splits.items()}
    if "process_docs" in config:
        data = {name: config["process_docs"](rows) for name, rows in data.items()}
        config.pop("process_docs")
    config |= {
        "task": f"theirs_{task}_{subject}",
        "custom_dataset": lambda **_: data,
        "test_split": second,
        "fewshot_split": first,
    }
    config |= {"num_fewshot": shots, "fewshot_config": {"sampler": "first_n", "split": first}}
    harness = ConfigurableTask(config=config)
    harness.set_fewshot_seed(1)
    return harness
