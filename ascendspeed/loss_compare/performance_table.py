"""Performance table in the published form: rows from logs beside the published rows."""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ascendspeed.config.schema import ModelConfig
from ascendspeed.loss_compare.curve import LoggedStep, LossCurve, flatten_config
from ascendspeed.models import families

COLUMNS = ("Device", "Model", "total Iterations", "samples/s/p", "tokens/s/p", "s/step", "TFLOP/s")
NARROW_COLUMNS = (
    ("Device", "Model", "total", "samples", "tokens", "s/step", "TFLOP/s"),
    ("", "", "iter.", "/s/p", "/s/p", "", ""),
)
"""COLUMNS in two lines, for a terminal of 80 columns."""

WIDTH = 80
"""Columns of a terminal."""
MEANING = (
    "p is one device. Rows from logs are medians without the first steps. TFLOP/s are those of the log: this "
    "project counts 6 per token and matrix weight, and causal attention, but no recomputation."
)


@dataclass(frozen=True)
class PerformanceRow:
    """One row of the table. None: unknown."""

    device: str
    model: str
    iterations: int | None = None
    """Iterations of the whole run."""
    samples: float | None = None
    """Samples per second and device."""
    tokens: float | None = None
    """Tokens per second and device."""
    seconds: float | None = None
    """Seconds per iteration."""
    tflops: float | None = None
    """TFLOP/s per device, as the log counts them."""
    notes: tuple[str, ...] = ()
    """Footnotes."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Texts in the order of COLUMNS."""
        formats = ("{:d}", "{:.3f}", "{:.0f}", "{:.3f}", "{:.2f}" if (self.tflops or 0) >= 1 else "{:.3g}")
        numbers = (self.iterations, self.samples, self.tokens, self.seconds, self.tflops)
        texts = [
            "-" if value is None else text.format(value) for text, value in zip(formats, numbers, strict=True)
        ]
        return (self.device, self.model, *texts)


# The rows of the published page, with samples/s and s/step converted to the units of their columns; the notes
# explain how.
PUBLISHED = (
    PerformanceRow(
        "published, 8 NPUs",
        "Internlm-7B",
        2048,
        13.0 / 8,
        2943,
        19.6846,
        145.69,
        (
            "The page gives 19684.6 s/step, which are milliseconds, and 13.000 samples/s/p, which are "
            "samples/s of all 8 devices: a global batch of 256 every 19.7 s.",
            "Its 2943 tokens/s/p contradict that: 13.0 samples/s x 2048 / 8 are 3328, the figure of an "
            "earlier page. 145.69 TFLOP/s go with 3328 under a formula that counts slightly more than the "
            "43.0 GFLOP per token of this project (143), and not with 2943 (127).",
        ),
    ),
    PerformanceRow(
        "published, 8 A100",
        "Internlm-7B",
        tokens=4078,
        notes=("4078 tokens/s/p were measured on 8 A100; the page does not say so.",),
    ),
    PerformanceRow(
        "published, 32 NPUs",
        "Internlm-65B",
        50000,
        5.33 / 32,
        342,
        24.0,
        137.8,
        (
            "The page gives 5.33 samples/s/p, which are samples/s of all 32 devices: a global batch of 128 "
            "every 24 s.",
        ),
    ),
    PerformanceRow("published reference", "Internlm-65B", tokens=414),
)


def performance_row(curve: LossCurve, devices: int | None = None, warmup: int = 5) -> PerformanceRow:
    """Returns the row of a log: medians over its steps, without the first `warmup` of them if it has more.

    `devices`: number of devices; None: as in the log. Values that need an unknown number stay unknown.
    """
    steps = curve.steps[warmup:] or curve.steps
    config = flatten_config(curve.config or {})
    devices = devices or _devices(curve)
    batch_size, seq_length = _setting(steps, "global_batch_size", config), _seq_length(steps, config)
    ms, total_samples = _median(steps, "ms"), _median(steps, "samples_per_s")
    seconds = ms / 1e3 if ms else batch_size / total_samples if batch_size and total_samples else None
    total_samples = total_samples or (batch_size / seconds if batch_size and seconds else None)
    tokens = _median(steps, "tokens_per_s")
    samples = total_samples / devices if total_samples and devices else None
    if tokens is None and samples and seq_length:
        tokens = samples * seq_length
    if samples is None and tokens and seq_length:
        samples = tokens / seq_length
    missing = []
    if not total_samples and not batch_size:
        missing.append("its global batch size")
    if not total_samples and not seconds:
        missing.append("how long an iteration took")
    if not devices:
        missing.append("how many devices there were: --devices N")
    name = (curve.device or Path(curve.path).name).split(",")[0]
    return PerformanceRow(
        device=name + (f" ({devices})" if devices else ""),
        model=_model(curve),
        iterations=steps[-1].train_iters,
        samples=samples,
        tokens=tokens,
        seconds=seconds,
        tflops=_median(steps, "tflops"),
        notes=() if samples else (f"{curve.path} does not say {' and '.join(missing)}.",),
    )


def _median(steps: Sequence[LoggedStep], field: str) -> float | None:
    values = [getattr(step, field) for step in steps]
    return median(value for value in values if value is not None) if any(values) else None


def _setting(steps: Sequence[LoggedStep], field: str, config: dict[str, str]) -> int | None:
    """Returns a number of the last step, or of the run's settings."""
    logged = getattr(steps[-1], field)
    return logged or (int(config[field]) if config.get(field, "").isdigit() else None)


def _seq_length(steps: Sequence[LoggedStep], config: dict[str, str]) -> int | None:
    last = steps[-1]
    divisible = last.tokens and last.samples and last.tokens % last.samples == 0
    return _setting(steps, "seq_length", config) or (last.tokens // last.samples if divisible else None)


def _devices(curve: LossCurve) -> int | None:
    """Number of devices: 4 for `cpu (AMD EPYC), gloo; 4 processes: TP 2 x DP 2`, or Megatron-LM's argument
    world_size.
    """
    words = (curve.device or "").split()
    if "processes:" in words:
        return int(words[words.index("processes:") - 1])
    world_size = flatten_config(curve.config or {}).get("world_size", "")
    return int(world_size) if world_size.isdigit() else None


def _model(curve: LossCurve) -> str:
    """Name of the model's preset, or its shape if it is not a preset."""
    config = curve.config or {}
    try:
        model = ModelConfig(**config["model"])
    except (KeyError, TypeError):
        settings = flatten_config(config)
        layers, hidden_size = settings.get("num_layers"), settings.get("hidden_size")
        return f"{layers} layers x {hidden_size}" if layers and hidden_size else "-"
    name = next((name for name, preset in families.PRESETS.items() if preset == model), None)
    return name or f"{model.family}, {model.num_layers} layers x {model.hidden_size}"


def format_table(rows: Sequence[PerformanceRow], markdown: bool = False) -> str:
    """Formats the table and its footnotes, as aligned text or as Markdown with an aligned source."""
    notes = [note for row in rows for note in row.notes]
    table = [_cells_with_marks(row, notes) for row in rows]
    headers = (COLUMNS,) if markdown else NARROW_COLUMNS
    widths = [max(len(cells[i]) for cells in (*headers, *table)) for i in range(len(COLUMNS))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |" if markdown else "  ".join(aligned).rstrip()

    rule = [
        "-" * width if i < 2 or not markdown else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]
    footnotes = [
        f"{'' if markdown else ' '}[{i}] {note}" + ("  " if markdown else "")
        for i, note in enumerate(notes, 1)
    ]
    text = [*map(line, headers), line(rule), *map(line, table), ""]
    if markdown:
        return "\n".join([*text, *footnotes, MEANING])
    wrapped = (textwrap.wrap(note, WIDTH, subsequent_indent="     ") for note in footnotes)
    return "\n".join([*text, *itertools.chain(*wrapped), *textwrap.wrap(MEANING, WIDTH)])


def _cells_with_marks(row: PerformanceRow, notes: Sequence[str]) -> tuple[str, ...]:
    marks = ",".join(str(notes.index(note) + 1) for note in row.notes)
    device, *others = row.cells
    return (f"{device} [{marks}]" if marks else device, *others)
