"""Reports on the quickstart: held-out loss of this project and of the export in transformers, and the loss
curve.

python examples/intern/quickstart_report.py --work .quickstart
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ascendspeed.cli import parser
from ascendspeed.training import metric_lines
from ascendspeed.utils import errors


@dataclass(frozen=True)
class Options:
    """Reports on the output of quickstart.sh."""

    work: Path
    """Folder of the quickstart."""
    length: int = 256
    """Tokens per held-out sample."""


def held_out(work: Path, length: int) -> Any:
    """Returns the held-out rows, in the form of the training rows, as samples: [n, length + 1] int64."""
    import pyarrow.parquet
    import torch

    from ascendspeed.data.handlers.base import EncoderConfig
    from ascendspeed.data.handlers.pretrain import AlpacaPretrainHandler
    from ascendspeed.tokenization import tokenizer

    loaded = tokenizer.load(work / "data" / "tokenizer")
    rows = pyarrow.parquet.read_table(work / "data" / "heldout.parquet").to_pydict()
    handler = AlpacaPretrainHandler(EncoderConfig("", "AlpacaPretrainHandler"), loaded)
    ids = [token for text in handler.texts(rows)["text"] for token in [*loaded.encode(text), loaded.eos]]
    count = (len(ids) - 1) // length
    return torch.stack(
        [torch.tensor(ids[i * length : (i + 1) * length + 1], dtype=torch.int64) for i in range(count)]
    )


def our_loss(work: Path, samples: Any) -> float:
    """Returns the mean token loss of the last training checkpoint in this project's model, in one process."""
    from ascendspeed.distributed import device

    here = device.prepare("cpu")  # before anything of Megatron is imported

    import torch

    from ascendspeed.checkpoint.discovery import open_checkpoint
    from ascendspeed.config.schema import ParallelConfig, TrainConfig
    from ascendspeed.distributed import process_groups
    from ascendspeed.models.gpt import gpt_model, layer_spec

    found, alone = open_checkpoint(work / "ckpt"), ParallelConfig()
    process_groups.initialize(here, alone, seed=1)
    model = gpt_model.build_model(
        found.config, alone, layer_spec.transformer_config(found.config, alone, TrainConfig())
    ).eval()
    gpt_model.load_weights(model, found.config, alone, found.tensors())
    with torch.no_grad():
        losses = [model(part[:, :-1], None, None, labels=part[:, 1:]) for part in samples.split(8)]
    process_groups.destroy()
    return float(torch.cat(losses).mean())


def their_loss(work: Path, samples: Any) -> float:
    """Returns the mean token loss of the exported directory in stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        work / "export", dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = torch.cat([model(part[:, :-1]).logits for part in samples.split(8)])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()))


def log_lines(path: Path) -> list[Any]:
    """Returns every iteration and evaluation once; lines of a resumed run replace those of the killed one."""
    lines = (
        {(type(line), line.iteration): line for line in metric_lines.read_lines(path)}
        if path.is_file()
        else {}
    )
    return list(lines.values())


def of_training(work: Path, train: list[Any], valid: list[Any]) -> list[tuple[str, str]]:
    """Returns the rows of the table that come from the training log."""
    if not train:
        return [
            (
                "training",
                f"no iteration stands in {work}/logs/train.log: it was deleted, so there is no loss curve",
            )
        ]
    return [
        ("loss curve, log, TensorBoard", f"{work}/loss.png, {work}/logs/train.log, {work}/tensorboard"),
        (
            "training loss, first -> last",
            f"{train[0].loss:.4f} -> {train[-1].loss:.4f} ({len(train)} iterations)",
        ),
        *(("validation loss: rows that --split set aside", f"{line.loss:.4f}") for line in valid[-1:]),
        ("tokens/s per process (median)", f"{median(line.tokens_per_s for line in train):.0f}"),
        ("peak memory per process", f"{max(line.memory_gib for line in train):.2f} GiB"),
    ]


def of_evaluation(work: Path) -> list[tuple[str, str]]:
    """Returns the row of the score, if there is one."""
    path = work / "evaluation" / "results.json"
    if not path.is_file():
        return []
    scores = json.loads(path.read_text())["tasks"]["mmlu"]
    return [("60 questions of four answers", f"{100 * scores['micro']:.2f} % right (chance: 25 %)")]


def draw(lines: list[Any], path: Path) -> None:
    """Draws the losses of training and validation, the learning rate and the gradient norm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [line for line in lines if isinstance(line, metric_lines.TrainLine)]
    valid = [line for line in lines if isinstance(line, metric_lines.EvalLine)]
    figure, (losses, rates, norms) = pyplot.subplots(
        3, 1, figsize=(7, 6.5), dpi=120, sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    iterations = [line.iteration for line in train]
    losses.plot(iterations, [line.loss for line in train], lw=1.2, label="training")
    losses.plot(
        [line.iteration for line in valid], [line.loss for line in valid], "o", ms=5, label="validation"
    )
    losses.set(
        ylabel="loss per token", title="InternLM-tiny on docstrings: loss, learning rate, gradient norm"
    )
    losses.legend()
    for axes, field, label in ((rates, "lr", "learning rate"), (norms, "grad_norm", "gradient norm")):
        values = [
            (line.iteration, getattr(line, field)) for line in train if getattr(line, field) is not None
        ]
        axes.plot([x for x, _ in values], [y for _, y in values], lw=1.0, color="tab:gray")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    norms.set_xlabel("iteration")
    for axes in (losses, rates, norms):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Prints the summary; a path that is wider than the terminal continues on the next line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="quickstart", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    """Computes both losses, draws the curve and prints the table."""
    options = parser.parse(Options, description=__doc__ or "")
    work = options.work
    samples = held_out(work, options.length)
    ours, theirs = our_loss(work, samples), their_loss(work, samples)
    lines = log_lines(work / "logs" / "train.log")
    train = [line for line in lines if isinstance(line, metric_lines.TrainLine)]
    valid = [line for line in lines if isinstance(line, metric_lines.EvalLine)]
    if train:
        draw(lines, work / "loss.png")

    rows = [
        ("text -> tokens", f"{work}/data/train.parquet -> {work}/alpaca_text_document.bin, .idx"),
        ("random model -> split weights", f"{work}/hf -> {work}/weights"),
        ("training checkpoints", f"{work}/ckpt"),
        ("exported for transformers", f"{work}/export"),
        *of_training(work, train, valid),
        (
            "held-out loss: rows of modules not trained on",
            f"{ours:.6f} here, {theirs:.6f} in transformers (chance: {math.log(2048):.2f})",
        ),
        *of_evaluation(work),
    ]
    print_table(rows)
    if abs(ours - theirs) > 1e-4:
        raise errors.UserError(
            f"the export disagrees with the training checkpoint: held-out loss {theirs:.6f}, not {ours:.6f}"
        )


if __name__ == "__main__":
    errors.run(main)
