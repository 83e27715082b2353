"""Writes the table and the plot of docs/planner.md on the speed of a device from 8 to 1,024 devices, by the
planner's estimate, beside the figures that InternEvo published.

python benchmarks/device_growth.py

Nothing of it was measured by this project.
"""

import argparse
import io
from dataclasses import dataclass, replace
from pathlib import Path

from ascendspeed.planning import command
from ascendspeed.planning.device_table import DeviceRates, rates_of
from ascendspeed.planning.time_estimate import estimate
from ascendspeed.utils.atomic import write_file

ROOT = Path(__file__).parents[1]
PLOT = ROOT / "docs" / "images" / "device-growth.png"
PAGES = {ROOT / "docs" / "planner.md": "| devices |", ROOT / "docs" / "planner_zh.md": "| 设备数 |"}
"""Page -> beginning of the header of its table."""
DEVICES = tuple(2**i for i in range(3, 11))
PUBLISHED = dict(zip(DEVICES, (4078, 3939, 3919, 3944, 3928, 3920, 3835, 3625), strict=True))
"""Tokens/s per A100 of InternEvo, 7B, 16,384 tokens per device and step, 4 x 100 Gbit/s between nodes of 8
(doc/en/train_performance.md of the InternLM repository)."""
NETWORK_GB_S = 4 * 100 / 8 / 8
"""GB/s of each device to other nodes in that cluster."""
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"


@dataclass(frozen=True)
class Series:
    """A model and layout on growing numbers of devices."""

    label: str
    flags: str
    samples: float
    """Samples of a step for each device; 0: `batch` samples in all."""
    first: int = 8
    batch: int = 0

    def speed(self, devices: int, rates: DeviceRates) -> float:
        """Tokens per second and device."""
        batch = self.batch or int(self.samples * devices)
        instances = str(max(1, devices // 8))
        words = self.flags.replace("{instances}", instances).split()
        words += ["--bf16", "--micro-batch-size", "2", "--global-batch-size", str(batch)]
        run = command.resolve([*words, "--devices", str(devices)])[1]
        return estimate(run, devices, rates).tokens_per_s


SERIES = (
    Series("7B, ZeRO-1 over all", f"--model internlm-7b {OVERLAP}", 8),
    Series(
        "7B, ZeRO-1 in nodes",
        "--model internlm-7b --use-distributed-optimizer --num-distributed-optimizer-instances {instances}",
        8,
    ),
    Series("7B, 4 M tokens a step", f"--model internlm-7b {OVERLAP}", 0, batch=2048),
    Series(
        "65B, TP 8 x PP 4",
        f"--model internlm-65b --tp 8 --pp 4 --sequence-parallel {OVERLAP}",
        4,
        first=32,
    ),
)


def speeds() -> list[dict[int, float]]:
    """Devices -> tokens/s per device, for every series."""
    rates = replace(rates_of("a100"), network_gb_s=NETWORK_GB_S)
    return [
        {devices: series.speed(devices, rates) for devices in DEVICES if devices >= series.first}
        for series in SERIES
    ]


def rows(estimated: list[dict[int, float]]) -> list[str]:
    """Lines of the table: tokens/s per device, and its share of that on the fewest devices."""
    columns = [*estimated, {devices: float(speed) for devices, speed in PUBLISHED.items()}]
    return [
        f"| {devices:,} | " + " | ".join(_cell(column, devices) for column in columns) + " |"
        for devices in DEVICES
    ]


def _cell(column: dict[int, float], devices: int) -> str:
    if devices not in column:
        return "–"
    return f"{column[devices]:,.0f} ({column[devices] / column[min(column)]:.0%})"


def draw(estimated: list[dict[int, float]]) -> bytes:
    """PNG of the shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for series, column in zip(SERIES, estimated, strict=True):
        axes.plot(list(column), _shares(column), marker="o", ms=4, lw=1.5, label=f"{series.label} (estimate)")
    published = {devices: float(speed) for devices, speed in PUBLISHED.items()}
    axes.plot(
        DEVICES,
        _shares(published),
        color="black",
        marker="s",
        ms=4,
        ls="--",
        label="InternEvo, 7B (published)",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEVICES, [f"{devices:,}" for devices in DEVICES])
    axes.set(xlabel="devices", ylabel="tokens/s per device, % of the fewest devices", ylim=(0, 108))
    axes.set_title("Estimate of tools/plan.py for A100s, 4 x 100 Gbit/s per node; not measured", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    return png.getvalue()


def _shares(column: dict[int, float]) -> list[float]:
    return [100 * speed / column[min(column)] for speed in column.values()]


def with_rows(page: str, header: str, lines: list[str]) -> str:
    """The page with the rows of its table."""
    old = page.split("\n")
    start = next(i for i, line in enumerate(old) if line.startswith(header)) + 2
    end = next(i for i in range(start, len(old)) if not old[i].startswith("|"))
    return "\n".join([*old[:start], *lines, *old[end:]])


def main() -> None:
    """Writes the table into both pages, and the plot."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    estimated = speeds()
    for page, header in PAGES.items():
        write_file(page, with_rows(page.read_text(), header, rows(estimated)))
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_bytes(draw(estimated))
    print("\n".join(rows(estimated)))


if __name__ == "__main__":
    main()
