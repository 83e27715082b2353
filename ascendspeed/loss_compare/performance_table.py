"""The published performance table, filled from logs, beside the figures that were published."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ascendspeed.config.schema import ModelConfig
from ascendspeed.loss_compare.curve import Curve, Step, flat
from ascendspeed.models import families

COLUMNS = ("Device", "Model", "total Iterations", "samples/s/p", "tokens/s/p", "s/step", "TFLOP/s")

MEANING = (
    "p is one device. Rows from logs: medians, after the first steps. TFLOP/s are the log's: this project counts 6 per token and "
    "weight that multiplies, and causal attention, but no recomputation."
)


@dataclass(frozen=True)
class Row:
    """One line of the table. What is None is not known. p is one device."""

    device: str
    model: str
    iterations: int | None = None
    """Of the whole run."""
    samples: float | None = None
    """Per second and device, as are tokens."""
    tokens: float | None = None
    seconds: float | None = None
    """Per iteration."""
    tflops: float | None = None
    """Per device and second, as the log counts them."""
    notes: tuple[str, ...] = ()
    """Footnotes."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As text, in the order of COLUMNS."""
        forms = ("{:d}", "{:.3f}", "{:.0f}", "{:.3f}", "{:.2f}" if (self.tflops or 0) >= 1 else "{:.3g}")
        numbers = (self.iterations, self.samples, self.tokens, self.seconds, self.tflops)
        shown = (
            "-" if value is None else form.format(value) for form, value in zip(forms, numbers, strict=True)
        )
        return (self.device, self.model, *shown)


# As they stand on the page, samples/s and s/step corrected to what their columns say; the notes tell how.
PUBLISHED = (
    Row(
        "NPUs, published (8)",
        "Internlm-7B",
        2048,
        13.0 / 8,
        2943,
        19.6846,
        145.69,
        (
            "The page gives 19684.6 s/step, which are milliseconds, and 13.000 samples/s/p, which are samples/s of all 8 devices: "
            "a global batch of 256 every 19.7 s.",
            "Its 2943 tokens/s/p do not go with that: 13.0 samples/s x 2048 / 8 are 3328, the figure of an earlier page. "
            "145.69 TFLOP/s go with 3328 under a formula that counts slightly more than the 43.0 GFLOP per token of this project "
            "(143), and not with 2943 (127).",
        ),
    ),
    Row(
        "benchmarks, published",
        "Internlm-7B",
        tokens=4078,
        notes=("4078 tokens/s/p were measured on 8 A100; the page does not say so.",),
    ),
    Row(
        "NPUs, published (32)",
        "Internlm-65B",
        50000,
        5.33 / 32,
        342,
        24.0,
        137.8,
        (
            "The page gives 5.33 samples/s/p, which are samples/s of all 32 devices: a global batch of 128 every 24 s.",
        ),
    ),
    Row("Reference, published", "Internlm-65B", tokens=414),
)


def of_curve(curve: Curve, devices: int | None = None, warmup: int = 5) -> Row:
    """The row of a log: medians over its steps, without the first `warmup` of them where it has more.

    `devices`: how many there were; None: what the log says. Where nobody says, what they are needed for stays unknown.
    """
    steps = curve.steps[warmup:] or curve.steps
    config = flat(curve.config or {})
    devices = devices or _devices(curve)
    batch, length = _one(steps, "global_batch_size", config), _seq_length(steps, config)
    ms, of_all = _median(steps, "ms"), _median(steps, "samples_per_s")
    seconds = ms / 1e3 if ms else batch / of_all if batch and of_all else None
    of_all = of_all or (batch / seconds if batch and seconds else None)
    tokens, samples = _median(steps, "tokens_per_s"), of_all / devices if of_all and devices else None
    if tokens is None and samples and length:
        tokens = samples * length
    if samples is None and tokens and length:
        samples = tokens / length
    missing = (
        ("its global batch size", not of_all and not batch),
        ("how long an iteration took", not of_all and not seconds),
        ("how many devices there were: --devices N", not devices),
    )
    notes = (
        ()
        if samples
        else (f"{curve.path} does not say {' and '.join(what for what, is_so in missing if is_so)}.",)
    )
    iterations = steps[-1].train_iters
    name, model = (curve.device or Path(curve.path).name).split(",")[0], _model(curve)
    return Row(
        name + (f" ({devices})" if devices else ""),
        model,
        iterations,
        samples,
        tokens,
        seconds,
        _median(steps, "tflops"),
        notes,
    )


def _median(steps: Sequence[Step], field: str) -> float | None:
    values = [getattr(step, field) for step in steps]
    return median(value for value in values if value is not None) if any(values) else None


def _one(steps: Sequence[Step], field: str, config: dict[str, str]) -> int | None:
    said = getattr(steps[-1], field)
    return said or (int(config[field]) if config.get(field, "").isdigit() else None)


def _seq_length(steps: Sequence[Step], config: dict[str, str]) -> int | None:
    last = steps[-1]
    exact = last.tokens and last.samples and last.tokens % last.samples == 0
    return _one(steps, "seq_length", config) or (last.tokens // last.samples if exact else None)


def _devices(curve: Curve) -> int | None:
    """`cpu (AMD EPYC), gloo; 4 processes: TP 2 x DP 2` -> 4; Megatron-LM's arguments name the world's size."""
    words = (curve.device or "").split()
    if "processes:" in words:
        return int(words[words.index("processes:") - 1])
    world = flat(curve.config or {}).get("world_size", "")
    return int(world) if world.isdigit() else None


def _model(curve: Curve) -> str:
    """The name of the architecture, when it is one that has a name."""
    config = curve.config or {}
    try:
        model = ModelConfig(**config["model"])
    except (KeyError, TypeError):
        said = flat(config)
        layers, width = said.get("num_layers"), said.get("hidden_size")
        return f"{layers} layers x {width}" if layers and width else "-"
    name = next((name for name, preset in families.PRESETS.items() if preset == model), None)
    return name or f"{model.family}, {model.num_layers} layers x {model.hidden_size}"


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The table and its footnotes, as aligned text or as Markdown (whose source is aligned too)."""
    notes = [note for row in rows for note in row.notes]
    marked = [_marked(row, notes) for row in rows]
    widths = [max(len(line[i]) for line in (COLUMNS, *marked)) for i in range(len(COLUMNS))]

    def line(cells: Sequence[str]) -> str:
        text = [
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(text)} |" if markdown else "  ".join(text).rstrip()

    rule = ["-" * w if i < 2 or not markdown else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    foot = [
        f"{'' if markdown else ' '}[{i}] {note}" + ("  " if markdown else "")
        for i, note in enumerate(notes, 1)
    ]
    return "\n".join([line(COLUMNS), line(rule), *map(line, marked), "", *foot, MEANING])


def _marked(row: Row, notes: Sequence[str]) -> tuple[str, ...]:
    marks = "".join(f" [{notes.index(note) + 1}]" for note in row.notes)
    device, *others = row.cells
    return (device + marks, *others)
