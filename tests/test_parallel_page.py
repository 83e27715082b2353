"""docs/parallel.md and memory.md: every flag exists, and every figure is the planner's, or computed."""

import json
import re
from pathlib import Path

import pytest
from helpers import launch

from benchmarks import memory_tables

PAGE = (launch.ROOT / "docs" / "parallel.md").read_text()
FLAGS = set((Path(__file__).parent / "flags.txt").read_text().split())
GIB = 2**30


def test_every_flag_exists():
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", PAGE))
    assert len(named) > 20
    assert named <= FLAGS
    assert "--sequence-parallel-size" not in FLAGS  # control


KEPT = json.loads(memory_tables.KEPT.read_text())


def test_tables_are_those_of_the_kept_sizes():
    """`benchmarks/memory_tables.py` would change no page."""
    tables = memory_tables.bodies(KEPT)
    more = {case: {name: size + GIB for name, size in sizes.items()} for case, sizes in KEPT.items()}
    for path, comma in memory_tables.pages().items():
        page = path.read_text()
        assert memory_tables.with_tables(page, tables, comma) == page
        assert memory_tables.with_tables(page, memory_tables.bodies(more), comma) != page  # control
    assert set(KEPT) == set(memory_tables.cases())


@pytest.mark.parametrize("case", KEPT)
def test_planned_states_are_the_computed_ones(case):
    """Between two steps; stage 2 has no gradients then, and other stages have fp32 ones."""
    states = memory_tables.computed_states(case)
    total = states.total - (states.gradients if "--zero-stage 2" in case else 0)
    if "--pipeline" not in case:  # the rank with the highest peak is not that with most parameters
        assert KEPT[case]["states"] == pytest.approx(total, rel=2e-3)


REPLANNED = memory_tables.cases()[:21:5]
"""Cases that are planned again: small models, each engine."""


def plan(case: str) -> dict[str, int]:
    done = launch.script("tools/plan.py", *case.split(), *memory_tables.COMMON.split(), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    return memory_tables.sizes_of(json.loads(done.stdout)["ranks"])


@pytest.mark.slow
@pytest.mark.parametrize("case", REPLANNED)
def test_cases_are_planned_so(case):
    assert plan(case) == KEPT[case]
