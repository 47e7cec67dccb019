"""What the pages' blocks print: source as it stands, shapes as they are, pictures and tables of what was computed.

A page says `from made import heatmap` in a block that the build runs; what a function here prints goes into the page,
as Markdown or as SVG, whose colours are those of assets/triglot.css in both of the site's schemes.
"""

import ast
import importlib
import inspect
import math
import operator
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from triglot.insight.inspect import Part, Shape, recording
from triglot.insight.runs_page import ticks

ROOT = Path(__file__).parents[1]


def say(text: str) -> None:
    """Print as the page's block prints: the build gives each block a `print` of its own."""
    frame = inspect.currentframe()
    while frame and "print" not in frame.f_globals:
        frame = frame.f_back
    (frame.f_globals["print"] if frame else print)(text)


# Source


def source(module: str, name: str, *, doc: bool = True) -> None:
    """Print the code of `name` ("Class", "Class.method", "function", "CONSTANT") in `module`, with file and lines.

    Without `doc`, its docstring is left out.
    """
    path, text, node = found(module, name)
    first, last = extent(node)
    lines = list(enumerate(text.splitlines()[first - 1 : last], first))
    if not doc:
        lines = [(number, line) for number, line in lines if number not in docstring(node)]
    where = (
        f"{path.relative_to(ROOT)}, lines {first}–{last}" if last > first else f"{path.relative_to(ROOT)}, line {first}"
    )
    indent = min(len(line) - len(line.lstrip()) for _, line in lines if line.strip())
    body = "\n".join(line[indent:] for _, line in lines)
    numbers = f' linenums="{first}"' if doc else ""
    say(f'\n````python title="{where}"{numbers}\n{body}\n````\n')


def code_lines(module: str, name: str) -> int:
    """How many lines of code `name` has: blank ones, comments and docstrings are not counted."""
    _, text, node = found(module, name)
    first, last = extent(node)
    hidden = docstring(node)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in hidden
        for number, line in enumerate(text.splitlines()[first - 1 : last], first)
    )


def found(module: str, name: str) -> tuple[Path, str, Any]:
    """The file, its text and the node of the syntax tree that `name` is."""
    base = ROOT / "src" if module.split(".")[0] == "triglot" else ROOT
    path = base.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        path = path.with_suffix("") / "__init__.py"
    text = path.read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = next((inner for inner in node.body if part in names(inner)), None)
        if node is None:
            raise LookupError(f"{module} has no {name}")
    return path, text, node


def names(node: Any) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    target = getattr(node, "target", None)  # an annotated assignment
    return [target.id] if isinstance(target, ast.Name) else [getattr(node, "name", "")]


def extent(node: Any) -> tuple[int, int]:
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]), node.end_lineno


def docstring(node: Any) -> set[int]:
    """The lines of the docstrings of a class or function and of what it holds."""
    return {
        number
        for inner in ast.walk(node)
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner)
        for number in range(inner.body[0].lineno, inner.body[0].end_lineno + 1)
    }


class Broken:
    """A context in which a function, whoever has imported it, runs by other code than its own."""

    def __init__(self, function: Any, code: CodeType) -> None:
        self.function, self.code = function, code

    def __enter__(self) -> None:
        self.function.__code__, self.code = self.code, self.function.__code__

    def __exit__(self, *_: object) -> None:
        self.__enter__()


def broken(module: str, name: str, line: str, wrong: str) -> Broken:
    """Print as a diff how `line` of a function is spoiled; in the context that is returned, it runs with `wrong`."""
    path, text, node = found(module, name)
    first, last = extent(node)
    inside = list(enumerate(text.splitlines()[first - 1 : last], first))
    at = [number for number, one in inside if one.strip().partition("  # ")[0] == line]
    if len(at) != 1:
        raise LookupError(f"{name} has {len(at)} lines {line!r}")
    say(f'\n````diff title="{path.relative_to(ROOT)}, line {at[0]}"\n- {line}\n+ {wrong}\n````\n')
    function = inspect.unwrap(operator.attrgetter(name)(importlib.import_module(module)))
    code = textwrap.dedent("\n".join(text.splitlines()[first - 1 : last])).replace(line, wrong)
    names: dict[str, Any] = {}
    exec(compile(code, str(path), "exec"), function.__globals__, names)
    return Broken(function, names[node.name].__code__)


# Tables


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> None:
    """Print a table; columns of numbers stand to the right, floats have four digits."""
    rows = list(rows)
    right = [all(row[i] == "" or isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    lines = [list(head), ["--:" if one else "---" for one in right], *([written(cell) for cell in row] for row in rows)]
    say("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", str(value))  # in code a line is no column's end


def shapes(module: nn.Module, *inputs: Any, **arguments: Any) -> None:
    """Call `module` and print, for each module in it, the shape of what came out and its parameters."""
    training = module.training
    module.eval()
    with torch.no_grad(), recording(module) as tree:
        module(*inputs, **arguments)
    module.train(training)
    tree.name = type(module).__name__
    given = ", ".join(f"[{', '.join(map(str, one.shape))}]" for one in inputs if isinstance(one, Tensor))
    table([["*given*", given, ""], *parts(tree, 0)], ["module", "shape", "parameters"])


def parts(part: Part, depth: int) -> list[list[Any]]:
    """A row for what comes out of a part and one for each tensor inside; then those of its parts, alike ones once."""
    outer = [one for one in part.shapes if not one.what]
    into = "&emsp;" * depth
    kind = f" {part.kind}" if part.kind not in ("", part.name) else ""
    rows = [[f"{into}`{part.name}`{kind}", kept(outer[-1]) if outer else "", part.parameters or ""]]
    rows += [[f"{into}&emsp;*{one.what}*", kept(one), ""] for one in part.shapes if one.what]
    told: list[Part] = []
    for below in part.parts:
        same = next((one for one in told if below.name.isdigit() and one.alike(below)), None)
        if same is None:
            told.append(below)
            rows += parts(below, depth + 1)
        else:
            rows.append([f"{into}&emsp;`{below.name}`", f"as `{same.name}`", below.parameters])
    return rows


def kept(shape: Shape) -> str:
    """A shape whose lines break between axes only."""
    return "[" + ", ".join(f"{name}&nbsp;{size}" for name, size in shape.axes) + "]"


# Pictures


def drawing(title: str, width: float, height: float, body: Sequence[str]) -> str:
    """An SVG of its natural size, or as wide as the page where that is narrower."""
    name = escape(title)
    box = f'viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px;min-width:{0.75 * width:.0f}px"'
    return f'<svg {box} role="img" aria-label="{name}"><title>{name}</title>{"".join(body)}</svg>'


def figure(title: str, *drawings: str, caption: str = "") -> None:
    """Print drawings, beside one another where the page is wide enough, and what they show."""
    below = f"<figcaption>{escape(title)}{caption}</figcaption>"
    say(f'\n<figure class="made"><div class="drawn">{"".join(drawings)}</div>{below}</figure>\n')


def heatmap(
    values: Tensor,
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    title: str = "",
    *,
    mask: Tensor | None = None,
    numbers: bool = False,
    names: Sequence[str] | None = None,
) -> None:
    """Print a matrix [rows, columns], or several [heads, rows, columns] beside one another, as cells.

    A bool matrix is a mask: full cells may attend, empty ones may not. Where `mask` is False there is a dot. Numbers
    below 0 have a colour of their own; several matrices share their scale. With `numbers`, cells tell their values;
    else they do when pointed at. `names` stand over the matrices.
    """
    maps = values.detach().cpu()
    maps = maps[None] if maps.dim() == 2 else maps
    _, high, wide = maps.shape
    most = maps.float().abs().max().item() or 1.0
    below, beside = [str(one) for one in columns or range(wide)], [str(one) for one in rows or range(high)]
    size = 34 if numbers else max(6, min(22, 420 // wide))
    longest = max(map(len, below))
    upright = longest * 7 + 4 > size and not all(name.isdigit() for name in below)
    apart = math.ceil((12 if upright else 7 * longest + 4) / size)  # so that names do not lie over one another
    left, top = 8 + 7 * max(map(len, beside)), 8 + 7 * longest if upright else 16
    head = 16 if names or len(maps) > 1 else 0
    told = [[f"{row} → {column}" for column in below] for row in beside]
    drawings = []
    for number, one in enumerate(maps):
        name, y = names[number] if names else f"head {number + 1}", head + top
        body = [word(left, 12, name, "start")] if head else []
        for i in range(0, high, math.ceil(12 / size)):
            body.append(word(left - 4, y + (i + 0.5) * size + 4, beside[i], "end"))
        for i in range(0, wide, apart):
            body.append(over(left + (i + 0.5) * size, y - 4, below[i], upright))
        body += cells(one, most, mask, left, y, size, told, numbers)
        label = f"{title}: {name}" if head else title
        drawings.append(drawing(label, left + wide * size + 8, y + high * size + 4, body))
    figure(title, *drawings)


def cells(
    values: Tensor,
    most: float,
    mask: Tensor | None,
    left: int,
    top: int,
    size: int,
    told: list[list[str]],
    numbers: bool,
) -> list[str]:
    shown = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand_as(values)
    drawn = []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            x, y, name = left + column * size, top + row * size, escape(told[row][column])
            box = f'x="{x + 0.5:g}" y="{y + 0.5:g}" width="{size - 1}" height="{size - 1}"'
            if not shown[row, column]:
                at = f'cx="{x + size / 2:g}" cy="{y + size / 2:g}" r="1.5"'
                drawn.append(f'<circle class="hidden" {at}><title>{name}: hidden</title></circle>')
            elif value.dtype == torch.bool:
                kind, does = ("full", "may") if value else ("empty", "may not")
                drawn.append(f'<rect class="{kind}" {box}><title>{name}: {does} attend</title></rect>')
            else:
                number = float(value)
                part = (abs(number) / most) ** 0.6  # a root, so that small weights are seen
                kind = f'class="{"full" if number >= 0 else "below"}" fill-opacity="{part:.3f}"'
                drawn.append(f'<rect class="zero" {box}/>')
                drawn.append(f"<rect {kind} {box}><title>{name}: {number:.3f}</title></rect>")
                if numbers:
                    text = f"{number:.2f}".replace("0.", ".", 1)
                    drawn.append(word(x + size / 2, y + size / 2 + 4, text, "middle", "value"))
    return drawn


def word(x: float, y: float, text: str, anchor: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def over(x: float, y: float, text: str, upright: bool) -> str:
    if not upright:
        return word(x, y, text, "middle")
    return f'<text transform="translate({x + 4:g} {y:g}) rotate(-90)">{escape(text)}</text>'


def lines(
    series: Mapping[str, Sequence[float]],
    x: Sequence[float] | None = None,
    title: str = "",
    *,
    x_label: str = "",
    y_label: str = "",
    log: bool = False,
) -> None:
    """Print curves over one another, each as long as it is; with `log`, powers of ten are as far apart."""
    scale = math.log10 if log else float
    drawn = {
        name: [(float(one), scale(value)) for one, value in zip(x or range(len(values)), values, strict=False)]
        for name, values in series.items()
    }
    across, up = ([point[axis] for line in drawn.values() for point in line] for axis in (0, 1))
    first, last, low, high = min(across), max(across), min(up), max(up)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    width, height, left, bottom = 400, 240, 48, 36

    def place(one: float, value: float) -> tuple[float, float]:
        right = (one - first) / ((last - first) or 1) * (width - left - 12)
        return round(left + right, 1), round(height - bottom - (value - low) / (high - low) * (height - bottom - 10), 1)

    body = []
    for tick in ticks(low, high):
        y = place(first, tick)[1]
        body.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y}" y2="{y}"/>')
        body.append(word(left - 4, y + 4, f"{10**tick if log else tick:.4g}", "end"))
    for tick in ticks(first, last) if last > first else [first]:
        body.append(word(place(tick, low)[0], height - bottom + 14, f"{tick:,.4g}", "middle"))
    body.append(word((width + left) / 2, height - 4, x_label, "middle"))
    at = f"translate(11 {(height - bottom) / 2:g}) rotate(-90)"
    body.append(f'<text transform="{at}" text-anchor="middle">{escape(y_label)}</text>')
    for number, line in enumerate(drawn.values(), 1):
        points = " ".join("{},{}".format(*place(*point)) for point in line)
        body.append(f'<polyline class="s{number}" points="{points}"/>')
    caption = legend(list(drawn)) if len(drawn) > 1 else ""
    figure(title, drawing(title, width, height, body), caption=caption)


def legend(names: Sequence[str]) -> str:
    key = '<svg viewBox="0 0 24 8" class="key"><polyline class="s{}" points="0,4 24,4"/></svg>'
    drawn = (f"<span>{key.format(number)}{escape(name)}</span>" for number, name in enumerate(names, 1))
    return f'<span class="legend">{"".join(drawn)}</span>'


def bars(values: Mapping[str, float], title: str = "", *, unit: str = "") -> None:
    """Print a bar for each name, with its number behind it; what is below 0 goes to the left."""
    numbers = {name: float(value) for name, value in values.items()}
    left, room, high = 10 + 7 * max(map(len, numbers)), 200, 22
    low, most = min(0.0, *numbers.values()), max(0.0, *numbers.values())
    per = room / ((most - low) or 1)
    zero = left - low * per
    body = []
    for row, (name, value) in enumerate(numbers.items()):
        y, wide = row * high, abs(value) * per
        body.append(word(left - 6, y + 15, name, "end"))
        kind, x = ("full", zero) if value >= 0 else ("below", zero - wide)
        box = f'x="{x:.1f}" y="{y + 3}" width="{max(wide, 0.5):.1f}" height="{high - 6}"'
        body.append(f'<rect class="{kind}" {box}/>')
        body.append(word(max(x + wide, zero) + 5, y + 15, f"{written(value)} {unit}".strip(), "start"))
    figure(title, drawing(title, left + room + 70 + 6 * len(unit), len(numbers) * high + 4, body))
