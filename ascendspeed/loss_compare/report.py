"""What a comparison leaves: parity.json, parity.png, and a page that holds everything and needs nothing beside it."""

import base64
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascendspeed.loss_compare import plot
from ascendspeed.loss_compare.align import WORDS
from ascendspeed.loss_compare.compare import Comparison
from ascendspeed.loss_compare.curve import Curve
from ascendspeed.loss_compare.metrics import Figures, definitions, percent
from ascendspeed.utils.atomic import remove_file, write_file

TEMPLATE = Path(__file__).with_name("page.html")
ABSOLUTE = {"steps", "worst_at", "max_absolute", "identical", "grad_norm_identical"}
NAMES = ("parity.png", "parity.html", "parity.json")


def write(found: Comparison, out: str | Path) -> list[Path]:
    """Writes the three files into the folder `out`, the verdict last: it never stands beside an older picture."""
    forget(out)
    paths = [Path(out) / name for name in NAMES]
    image = plot.draw(found.pair, title(found), found.noise)
    for path, content in zip(
        paths, (image, page(found, image), json.dumps(table(found), indent=2) + "\n"), strict=True
    ):
        write_file(path, content)
    return paths


def forget(out: str | Path) -> None:
    """Removes an older comparison's files: a new one that is refused, or ends in the middle, leaves no verdict."""
    for name in reversed(NAMES):
        remove_file(Path(out) / name)


def title(found: Comparison) -> str:
    """One line that says what was compared, and the verdict."""
    return f"{'PASS' if found.verdict.passed else 'FAIL'} ({found.verdict.profile}): {found.verdict.says}"


def table(found: Comparison) -> dict[str, Any]:
    """parity.json: plain, without NaN."""
    ref2 = {"reference 2": _log(found.ref2), "noise": asdict(found.noise_figures)} if found.ref2 else {}
    return {
        "verdict": "pass" if found.verdict.passed else "fail",
        "profile": found.verdict.profile,
        "says": found.verdict.says,
        "aligned by": WORDS[found.pair.axis],
        "first": found.pair.places[0],
        "last": found.pair.places[-1],
        "figures": asdict(found.figures),
        "reference": _log(found.ref),
        "candidate": _log(found.cand),
        **ref2,
        "origin": found.origin,
        "settings that differ": {name: [a, b] for name, a, b in found.differences},
    }


def lines(found: Comparison) -> list[str]:
    """The same for a terminal."""
    head = [f"reference  {_says(found.ref)}", f"candidate  {_says(found.cand)}"]
    head += [f"ref2       {_says(found.ref2)}"] if found.ref2 else []
    pair, begin = found.pair, found.origin
    head.append(f"aligned by {WORDS[pair.axis]}, {pair.places[0]} to {pair.places[-1]}")
    head.append(
        f"origin     {'same seed, weights and data' if begin else 'not known: no origin.json beside the logs'}"
    )
    noise = asdict(found.noise_figures) if found.noise_figures else {}
    body = [
        f"  {name.replace('_', ' '):19} {shown(name, value):>12}"
        for name, value in asdict(found.figures).items()
    ]
    if noise:
        body = [
            f"{line}   noise {shown(name, noise[name]):>12}" for line, name in zip(body, noise, strict=True)
        ]
    differ = [f"  {name}: {a} | {b}" for name, a, b in found.differences]
    return [
        *head,
        *body,
        *(["settings that differ, reference | candidate:", *differ] if differ else []),
        title(found),
    ]


def shown(name: str, value: float | int | None) -> str:
    """A figure as text; relative ones in per cent."""
    if value is None or value == 0:
        return "-" if value is None else "0"
    if name not in ABSOLUTE:
        return percent(value)
    return str(value) if isinstance(value, int) else f"{value:.4e}"


def page(found: Comparison, image: bytes) -> str:
    """The HTML: picture inside, no script, no link to anything outside."""
    from jinja2 import Environment

    noise = asdict(found.noise_figures) if found.noise_figures else {}
    says = definitions()
    rows = [
        (name.replace("_", " "), shown(name, value), shown(name, noise[name]) if noise else None, says[name])
        for name, value in asdict(found.figures).items()
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text("utf-8")
    )
    return template.render(
        passed=found.verdict.passed,
        title=title(found),
        image=base64.b64encode(image).decode(),
        logs=[(name, _says(curve)) for name, curve in _named(found)],
        axis=WORDS[found.pair.axis],
        places=found.pair.places,
        meaning=Figures.__doc__,
        rows=rows,
        noise=bool(noise),
        origin=found.origin,
        settings=sorted(found.settings, key=lambda setting: setting[1] == setting[2]),
        differing=len(found.differences),
    )


def _named(found: Comparison) -> list[tuple[str, Curve]]:
    second = [("second run of the reference", found.ref2)] if found.ref2 else []
    return [("reference", found.ref), ("candidate", found.cand), *second]


def _says(curve: Curve) -> str:
    again = f", {curve.replaced} of them replaced by a resumed run's" if curve.replaced else ""
    return f"{curve.path} ({curve.kind}{f'; {curve.device}' if curve.device else ''}): {len(curve.steps)} steps{again}"


def _log(curve: Curve) -> dict[str, Any]:
    path = Path(curve.path)
    facts = {
        "path": curve.path,
        "kind": curve.kind,
        "device": curve.device,
        "steps": len(curve.steps),
        "replaced": curve.replaced,
    }
    if path.is_file():
        with open(path, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts
