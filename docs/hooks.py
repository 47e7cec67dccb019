"""What the build does beside mkdocs: formulas become MathML, `made` can be imported, a folder in `nav` is its pages."""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

HERE = Path(__file__).parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> Any:
    """Pages' blocks say `from made import …`; `guide/` stands for the pages in it, by their names."""
    sys.path[:0] = [str(path) for path in (HERE, HERE.parent) if str(path) not in sys.path]
    config.nav = [expanded(entry) for entry in config.nav]
    return config


def expanded(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    [(title, value)] = entry.items()
    if isinstance(value, str) and value.endswith("/"):
        pages = sorted((HERE / value).glob("*.md"), key=lambda path: (path.stem != "index", path.name))
        value = [path.relative_to(HERE).as_posix() for path in pages]
    return {title: value}


def on_page_content(content: str, **_: Any) -> str:
    return FORMULA.sub(formula, content)


def formula(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    made = convert(html.unescape(found[3]), display=display)
    return f'<div class="formula" tabindex="0">{made}</div>' if display == "block" else made
