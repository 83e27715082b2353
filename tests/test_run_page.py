"""The page of a real run in headless Chromium: curves, tables, console."""

import pytest
from helpers import evaluating, launch
from helpers.browser import browser, required

pytestmark = [required, pytest.mark.slow]
HEADINGS = [
    "Skipped iterations and spikes",
    "Checkpoints",
    "Evaluations",
    "Profile of iterations 5-6",
    "Benchmarks",
]
DRAWN = """
return [...document.querySelectorAll("svg")].map(svg => ({
    title: svg.querySelector(".t").textContent,
    lengths: [...svg.querySelectorAll("polyline")].map(line => line.getTotalLength()),
    height: svg.getBoundingClientRect().height,
}));
"""
CUT_OFF = """
return [...document.querySelectorAll(".wide, svg")].filter(
    part => part.scrollWidth > part.clientWidth || part.getBoundingClientRect().right > innerWidth
).map(part => part.textContent.slice(0, 80));
"""
BROKEN_HEADERS = """
return [...document.querySelectorAll("th")].filter(header => {
    const text = document.createRange();
    text.selectNodeContents(header);
    return new Set([...text.getClientRects()].map(line => line.top)).size > 1;
}).map(header => header.textContent);
"""


def test_the_page_of_a_run(tmp_path):
    model = evaluating.model_dir(tmp_path / "model")
    evaluating.boolq(tmp_path / "boolq")
    words = f"""--load {model} --tokenizer-name-or-path {model} --mock-data --seq-length 32 --train-iters 10
        --global-batch-size 2 --micro-batch-size 1 --lr 1e-3 --device cpu --log-dir {tmp_path}/logs
        --save {tmp_path}/ckpt --save-interval 5 --eval-interval 5 --eval-iters 1 --eval-tasks boolq
        --eval-tasks-data-path {tmp_path}/boolq --eval-tasks-interval 5
        --profile --profile-step-start 4 --profile-step-end 6"""
    launch.must("pretrain_intern.py", *words.split())
    with browser(tmp_path / "profile") as driver:
        driver.get(f"file://{tmp_path}/logs/run.html")
        charts = {chart["title"]: chart for chart in driver.execute_script(DRAWN)}
        assert {"loss", "learning rate", "gradient norm", "boolq: acc"} <= set(charts)
        for title, chart in charts.items():
            assert chart["height"] > 100, title
            assert max(chart["lengths"]) > 100, title
        assert [heading.text for heading in driver.find_elements("css selector", "h2")] == HEADINGS
        assert driver.execute_script(CUT_OFF) == []
        assert driver.execute_script(BROKEN_HEADERS) == []
        assert driver.get_log("browser") == []
        driver.get("data:text/html,<script>console.error('mistake')</script>")
        assert len(driver.get_log("browser")) == 1  # control
