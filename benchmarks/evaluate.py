"""Compares the speed of evaluation with lm-evaluation-harness' HFLM on the same questions and weights, in
turns.

    python benchmarks/evaluate.py --threads 1 --out benchmarks/results/evaluate-cpu.md
    python benchmarks/evaluate.py --threads 1 --task gsm8k --subjects 1 --out evaluate-generation-cpu.md
    python benchmarks/evaluate.py --device cuda --dtype bf16 --model internlm2-7b --layers 8 --out ...

Both sides run the whole harness: requests, tokens, the model, grades. The questions have MMLU's format
(subjects, examples before each question, four letters to choose from) or GSM8K's (examples with worked
answers, a generated answer). The result is the ratio theirs / ours; the log-likelihoods or the texts must
agree.
"""

import contextlib
import io
import json
import os
import platform
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from clock import Timing, timed

from ascendspeed.cli import parser
from ascendspeed.config.schema import ModelConfig
from ascendspeed.evaluation.questions import Benchmark, Question, Subject
from ascendspeed.evaluation.subjects import SUBJECTS
from ascendspeed.evaluation.tasks import find_style
from ascendspeed.models import families
from ascendspeed.utils import errors
from ascendspeed.utils.errors import UserError

SMALL = replace(
    families.preset("internlm-7b"),
    num_layers=8,
    hidden_size=384,
    ffn_hidden_size=1024,
    num_attention_heads=6,
    vocab_size=2048,
)
"""16M parameters."""
WORDS = (
    "the",
    "a",
    "of",
    "in",
    "which",
    "one",
    "is",
    "not",
    "how",
    "many",
    "force",
    "cell",
    "law",
    "price",
    "city",
    "river",
    "atom",
)


@dataclass(frozen=True)
class Options:
    """Flags of this benchmark."""

    task: Literal["mmlu", "gsm8k"] = "mmlu"
    """Format of the questions: choices that are compared, or answers that are generated."""
    new_tokens: int = 128
    """Tokens of a generated answer (random weights end none)."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Device to run on."""
    model: str | None = None
    """A preset such as internlm2-7b; None: 16M parameters."""
    layers: int | None = None
    """Number of layers, if the whole model does not fit into memory twice."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format."""
    subjects: int = 3
    """Number of subjects; MMLU has 57."""
    questions: int = 20
    """Questions per subject; MMLU has 246 on average."""
    words: int = 40
    """Words per question."""
    shots: int = 5
    """Examples before each question."""
    batch_size: int = 8
    """Batch size of both sides."""
    rounds: int = 3
    """Measured runs of each side, after a warm-up run."""
    threads: int | None = None
    """CPU threads; None: torch's default. Use 1 on a shared machine."""
    out: Annotated[Path | None, parser.output_flag("out")] = None
    """Markdown file to write; None: print only."""


def benchmark(options: Options) -> Benchmark:
    """Returns questions of random words in the format of the task."""
    draw = random.Random(5)

    def words(count: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(count))

    def question(name: str, length: int) -> Question:
        text = f"{words(length)} {draw.randrange(10**6)}?"
        if options.task == "gsm8k":
            return Question(name, name, text, (), f"{words(length * 3 // 2)}\n#### {draw.randrange(1000)}")
        return Question(name, name, text, tuple(words(4) for _ in range(4)), draw.randrange(4))

    subjects = []
    for topic in list(SUBJECTS["mmlu"].values())[: options.subjects]:
        shots = tuple(question(f"{topic.name}/dev/{i}", options.words) for i in range(options.shots))
        lengths = (draw.randint(options.words // 2, options.words * 3 // 2) for _ in range(options.questions))
        subjects.append(
            Subject(topic, shots, tuple(question(f"{topic.name}/test/{i}", n) for i, n in enumerate(lengths)))
        )
    return Benchmark(options.task, Path("made up"), tuple(subjects))


def write_model(folder: Path, model: ModelConfig, task: str) -> None:
    """Writes a Llama with random weights as a Hugging Face directory, with a tokenizer of WORDS.

    To generate text, it has as many rows as the tokenizer has ids: the peer may choose any row.
    """
    import sentencepiece
    import torch

    from ascendspeed.conversion import convert
    from ascendspeed.conversion.checkpoint_reader import CheckpointReader, from_factory
    from ascendspeed.models.param_mapping import parameters, random_tensor

    home, pieces = folder / "tokenizer", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [
                " ".join(WORDS),
                "The following are multiple choice questions (with answers) about\nA. B. C. D. Answer:",
            ]
            * 9
        ),
        model_writer=pieces,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    home.mkdir()
    (home / "tokenizer.model").write_bytes(pieces.getvalue())
    if task == "gsm8k":
        size = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue()).vocab_size()
        model = replace(model, vocab_size=size)
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
    }
    (home / "tokenizer_config.json").write_text(
        json.dumps(special | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    )
    known = {parameter.name: parameter for parameter in parameters(model)}
    make = from_factory(lambda name: random_tensor(model, known[name], 1))
    source = CheckpointReader(
        "random weights", folder, model, {}, dict.fromkeys(known, torch.float32), make, None
    )
    with contextlib.redirect_stdout(io.StringIO()):
        convert.convert(
            convert.with_tokenizer(source, str(home)), folder / "llama", convert.HuggingFaceWriter("llama")
        )


def sides(
    folder: Path, options: Options, here: Any
) -> tuple[list[Any], dict[str, Callable[[], list[float]]]]:
    """Returns the prompts, and for each side a function that returns the log-likelihoods of all choices, or
    the generated texts."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from ascendspeed.config.schema import ParallelConfig
    from ascendspeed.conversion.formats.registry import open_reader
    from ascendspeed.distributed import fused_kernels
    from ascendspeed.distributed.cpu_products import Products
    from ascendspeed.evaluation import lm_eval as harness
    from ascendspeed.evaluation.answer_cache import AnswerCache
    from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
    from ascendspeed.evaluation.runner import EngineBackend
    from ascendspeed.inference import engine
    from ascendspeed.tokenization import tokenizer

    tokens = tokenizer.load(folder)
    source, layout = open_reader(folder), ParallelConfig()
    products = Products.of_inference("auto", options.dtype, source.config, layout)
    kernels = fused_kernels.select_kernels(here, products=products)
    model = engine.load(source, dtype=options.dtype, device=here, kernels=kernels)
    max_length, questions = model.config.max_position_embeddings, benchmark(options)
    put = find_style("lm-eval", options.task, options.shots)
    new_tokens = options.new_tokens if options.task == "gsm8k" else 0
    prompts = list(build_prompts(questions, put, PromptEncoder(tokens), max_length, new_tokens))

    class Peer(HFLM):
        """Decodes by our tokenizer: transformers has U+FFFD for whole runs of bytes that are no UTF-8."""

        def tok_decode(self, ids: Any, skip_special_tokens: bool = True) -> Any:
            return (
                tokens.decode(ids) if isinstance(ids, list) else super().tok_decode(ids, skip_special_tokens)
            )

    theirs = Peer(
        str(folder),
        device=str(here.torch),
        dtype={"fp32": "float32", "bf16": "bfloat16"}[options.dtype],
        batch_size=options.batch_size,
        add_bos_token=True,
        max_length=max_length,
    )

    def ask(adapter: Any) -> list[Any]:
        grades = harness.grade_prompts(adapter, prompts, new_tokens)
        records = [adapter.answers.records[grade.key] for grade in grades]
        if new_tokens:
            return [record["text"] for record in records]
        return [value for record in records for value in record["loglikelihoods"]]

    def ask_ours() -> list[Any]:
        encoder = PromptEncoder(tokens)  # with an empty cache
        return ask(
            harness.HarnessModel(
                EngineBackend(model, tokens, options.batch_size), encoder, max_length, AnswerCache(None, {})
            )
        )

    def ask_theirs() -> list[Any]:
        by_subject: dict[str, list[Any]] = {}
        for key, prompt in zip(harness.answer_keys(prompts, {}), prompts, strict=True):
            by_subject.setdefault(prompt.subject, []).append((key, prompt))
        tasks = {name: harness.harness_task(name, some, new_tokens) for name, some in by_subject.items()}
        with contextlib.redirect_stderr(io.StringIO()), torch.inference_mode():
            samples = evaluate(theirs, tasks, bootstrap_iters=0, log_samples=True)["samples"]
        answers = [sample for name in by_subject for sample in _in_order(samples[name])]
        if new_tokens:
            return [sample["resps"][0][0] for sample in answers]
        return [value for sample in answers for value, _ in sample["filtered_resps"]]

    return prompts, {"ours": ask_ours, "theirs": ask_theirs}


def _in_order(samples: list[Any]) -> list[Any]:
    """Returns the samples of a task in the order of its questions, one for each (filters repeat them)."""
    return list({sample["doc_id"]: sample for sample in samples}.values())


def measure(options: Options) -> str:
    """Measures both sides and returns the report."""
    from ascendspeed.distributed import device as devices

    here = devices.prepare(options.device)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    from ascendspeed.evaluation.prompts import PromptEncoder
    from ascendspeed.tokenization import tokenizer

    base = families.preset(options.model) if options.model else SMALL
    model = replace(base, num_layers=options.layers or base.num_layers)
    with tempfile.TemporaryDirectory() as home:
        write_model(Path(home), model, options.task)
        folder = Path(home) / "llama"
        prompts, run = sides(folder, options, here)
        encoder = PromptEncoder(tokenizer.load(folder))
        lengths = [len(encoder.encode(prompt.context)) for prompt in prompts]
        took: dict[str, list[Timing]] = {"ours": [], "theirs": []}
        for number in range(options.rounds + 1):
            values = {}
            for side in took:
                values[side], once = timed(run[side], here.synchronize)
                if number:
                    took[side].append(once)
                    print(f"round {number}: {side} {once.wall:.1f} s, {once.cpu:.1f} s of CPU", flush=True)
    agreement = _check_agreement(options, values["ours"], values["theirs"])
    return _markdown(options, model, here, lengths, took, agreement)


def _check_agreement(options: Options, ours: list[Any], theirs: list[Any]) -> str:
    """Returns how far the sides agree. Raises `UserError` if they cannot be compared."""
    pairs = list(zip(ours, theirs, strict=True))
    if options.task == "gsm8k":
        equal = sum(a == b for a, b in pairs)
        if options.dtype == "fp32" and equal < len(pairs):
            raise UserError(
                f"{len(pairs) - equal} of {len(pairs)} texts differ: the sides cannot be compared"
            )
        return f"Answers of {options.new_tokens} tokens, {equal} of {len(pairs)} texts equal."
    largest_difference = max(abs(a - b) for a, b in pairs)
    if largest_difference > (1e-4 if options.dtype == "fp32" else 0.5):
        raise UserError(f"the sides differ by {largest_difference:.2g}: they cannot be compared")
    return f"4 choices of one token, largest difference of two log-likelihoods: {largest_difference:.1e}."


def _markdown(
    options: Options,
    model: ModelConfig,
    here: Any,
    lengths: list[int],
    took: dict[str, list[Timing]],
    agreement: str,
) -> str:
    import torch

    def ratio(name: str) -> float:
        pairs = zip(took["theirs"], took["ours"], strict=True)
        return statistics.median(getattr(theirs, name) / getattr(ours, name) for theirs, ours in pairs)

    load = os.getloadavg()[0]
    lines = [
        "# Evaluation against lm-evaluation-harness' HFLM",
        "",
        f"{date.today()}, {here.name} ({here.kind}), {torch.get_num_threads()} thread(s), load {load:.0f} "
        f"with that of others; Python {platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers")),
        "",
        f"{model.num_layers} layers of {model.hidden_size}, {options.dtype}; {options.subjects} subjects x "
        f"{options.questions} questions, {options.shots} examples, prompts of {min(lengths)} to "
        f"{max(lengths)} tokens (mean {statistics.mean(lengths):.0f}), batch size {options.batch_size}, "
        f"{options.rounds} rounds. {agreement}",
        "",
        "| | questions/s (median) | CPU s per question |",
        "|---|---|---|",
    ]
    for side, runs in took.items():
        wall, cpu = (statistics.median(getattr(one, name) for one in runs) for name in ("wall", "cpu"))
        lines.append(f"| {side} | {len(lengths) / wall:.2f} | {cpu / len(lengths):.4f} |")
    lines += [
        "",
        f"theirs / ours (median of the rounds): {ratio('wall'):.2f} in time, **{ratio('cpu'):.2f} in CPU "
        "time**",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and writes the report."""
    options = parser.parse(Options, description=__doc__ or "")
    if (
        min(options.subjects, options.questions, options.rounds, options.batch_size, options.words) < 1
        or options.new_tokens < 16
        or options.shots < 0
    ):
        raise UserError(
            "--subjects, --questions, --words, --batch-size and --rounds must be at least 1, "
            "--new-tokens 16 and --shots 0 or more"
        )
    text = measure(options)
    print(text)
    if options.out:
        from ascendspeed.utils.atomic import write_file

        write_file(options.out, text)


if __name__ == "__main__":
    errors.run(main)
