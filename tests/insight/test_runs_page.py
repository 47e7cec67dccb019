"""The page of runs is whole, safe and self-contained, and its curves are those of the metrics."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from triglot.insight.runs import Comparison, Run
from triglot.insight.runs_page import HEIGHT, LEFT, MOST_POINTS, WIDTH, chart, charts, thinned, ticks, write_page

EVIL = "</style><script>alert('x')</script><b>&\u202e"


def line(kind: str, step: int, loss: float, **more) -> dict:
    return {"kind": kind, "step": step, "loss": loss} | more


def run_of(name: str, losses: list[float], **more) -> Run:
    lines = [line(kind, step, loss) for step, loss in enumerate(losses, 1) for kind in ("train", "eval")]
    best = {"loss": min(losses)} if losses else {}
    cells = {"run": name} | {f"best {metric}": f"{value:.4f}" for metric, value in best.items()}
    return Run(Path(name), name, cells=cells, best=best, lines=lines, **more)


class Reader(HTMLParser):
    """Collects elements with their attributes, styles, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.styles, self.text, self.stack = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.stack, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "style":
            self.styles.append(data)
        else:
            self.text += data


@pytest.fixture
def html(tmp_path) -> str:
    damaged = Run(Path("bad"), f"bad {EVIL}", f"no {EVIL}", {"run": f"bad {EVIL}", "state": "damaged"})
    runs = [
        run_of(f"a {EVIL}", [3.0, 2.0, 1.5], samples=f"## Step 3\n\n    goes on {EVIL}\n"),
        run_of("b", [2.5]),
        damaged,
    ]
    found = Comparison(runs, ["run", "state", "best loss"], {f"key {EVIL}": [EVIL, "–"]}, [Path(f"other {EVIL}")])
    return write_page(found, tmp_path / "deep" / "runs.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_and_nothing_may_run(html):
    reader = Reader(html)
    assert not {tag for tag, _ in reader.elements} & {"link", "img", "iframe", "object", "embed", "base", "form", "b"}
    assert "script" not in {tag for tag, _ in reader.elements}
    for tag, attrs in reader.elements:
        assert not set(attrs) & {"src", "style", "srcset", "action"}, tag
        assert not any(name.startswith("on") for name in attrs), tag
        assert attrs.get("href", "#").startswith("#")
    (style,) = reader.styles
    assert not re.search(r"https?:|@import|url\(", style)
    policy = next(attrs["content"] for _, attrs in reader.elements if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "unsafe" not in policy


def test_all_that_is_told_is_there_as_text(html):
    reader = Reader(html)
    for where in ("a ", "no ", "goes on ", "key ", "other ", "bad "):
        assert f"{where}{EVIL}" in reader.text
    for said in ("damaged", "can not be read", "1.5000", "They hold no run", "step 3: 1.5000"):
        assert said in reader.text
    anchors = {attrs["href"][1:] for tag, attrs in reader.elements if tag == "a"}
    assert anchors == {attrs["id"] for tag, attrs in reader.elements if tag == "section"}


def test_every_run_that_can_be_read_is_shown_and_hidden_by_a_box(html):
    reader = Reader(html)
    boxes = [attrs["id"] for tag, attrs in reader.elements if tag == "input"]
    assert boxes == ["show-1", "show-2"]
    for box in boxes:
        assert f"#{box}:not(:checked)" in reader.styles[0]
    groups = [attrs["class"] for tag, attrs in reader.elements if tag == "g"]
    assert groups == ["r1", "r2", "r3"] * 2  # training and validation
    scrolled = [attrs for _, attrs in reader.elements if attrs.get("class") == "scroll"]
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolled)


def test_a_chart_maps_its_values_into_its_frame_in_order():
    made = chart("Loss", {1: [(1.0, 5.0), (50.0, 3.0), (100.0, 2.0)], 2: [(10.0, 4.0)], 3: []})
    first, second, third = made["lines"].values()
    assert [text for *_, text in first] == ["step 50: 3.0000", "step 100: 2.0000"]  # 5.0 is above the settled values
    assert [text for *_, text in second] == ["step 10: 4.0000"]
    assert third == []
    (x0, y0, _), (x1, y1, _) = first
    assert LEFT < second[0][0] < x0 < x1 <= WIDTH
    assert 0 <= second[0][1] < y0 < y1 <= HEIGHT
    half = [x for x, text in made["x"] if text == "50"]
    assert half in ([], [x0])


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.0, 1e-9], [-5.0, 1e9], [1e20]])
def test_a_chart_of_whatever_values_is_finite(values):
    made = chart("Loss", {1: [(float(step), value) for step, value in enumerate(values)]})
    numbers = [number for x, y, _ in made["lines"][1] for number in (x, y)]
    assert all(map(math.isfinite, [*numbers, *(place for place, _ in (*made["x"], *made["y"]))]))
    assert made["lines"][1]


def test_what_is_not_finite_is_no_point_and_what_nobody_measured_no_chart():
    runs = [run_of("a", [math.nan, 1.0, math.inf]), run_of("b", []), Run(Path("c"), "c", fault="bad")]
    assert [(one["name"], len(one["lines"][1])) for one in charts(runs)] == [
        ("Training loss, smoothed", 1),
        ("Validation loss", 1),
    ]
    assert charts(runs[1:]) == []
    runs[0].lines.append(line("eval", 4, 1.0, bleu=3.5))
    runs[0].best["bleu"] = 3.5
    assert charts(runs)[-1]["name"] == "Validation bleu"


@pytest.mark.parametrize("count", [0, 1, 2, MOST_POINTS, MOST_POINTS + 1, 7 * MOST_POINTS + 3])
def test_a_thinned_line_keeps_its_ends(count):
    points = [(float(step), 1.0) for step in range(count)]
    some = thinned(points)
    assert len(some) <= MOST_POINTS + 1
    assert set(some) <= set(points)
    assert (some[:1], some[-1:]) == (points[:1], points[-1:])


@pytest.mark.parametrize(("low", "high"), [(0.0, 750.0), (0.0158, 6.2), (0.0, 1.0), (1e-7, 3e-7), (-3.0, 4e6)])
def test_ticks_are_round_and_lie_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high * (1 + 1e-12) for tick in found)
    step = found[1] - found[0]
    assert float(f"{step:e}".split("e")[0]) == pytest.approx(round(float(f"{step:e}".split("e")[0])))
    assert json.dumps(found)
