"""What the build does beside mkdocs: formulas become MathML, and `made` can be imported."""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

HERE = Path(__file__).parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
PAGE = re.compile(r'href="(?!\w+:)([^"#]+)\.md([#"])')


def on_config(config: Any) -> Any:
    """Pages' blocks say `from made import …`, and what lies beside docs/ can be imported, too."""
    sys.path[:0] = [str(path) for path in (HERE, HERE.parent) if str(path) not in sys.path]
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Formulas; and links to pages that blocks have printed, which mkdocs does not see."""
    return PAGE.sub(r'href="\1.html\2', FORMULA.sub(formula, content))


def formula(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    made = convert(html.unescape(found[3]), display=display)
    return f'<div class="formula" tabindex="0">{made}</div>' if display == "block" else made
