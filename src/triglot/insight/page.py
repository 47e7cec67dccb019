"""Pages of a single file each, which load nothing."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from triglot.errors import ConfigError, require
from triglot.files import write_text

Page = dict[str, Any]
MADE_HERE = '<meta name="generator" content="Triglot">'


def require_free(out: Path, option: str) -> None:
    """ConfigError where a page must not be written: what is there is no page of ours."""
    rule = "a new file, or a page written here before"
    ours = out.is_file() and MADE_HERE.encode() in out.read_bytes()[:4096]
    require(ours or not out.exists(), option, rule, str(out), ConfigError)


def write(name: str, page: Page, out: Path) -> Path:
    """Write a page, in the place of an older one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(name, page))
    return out


def render(name: str, page: Page) -> str:
    """A page as HTML; the policy in its head lets nothing run but its own script, and nothing load."""
    pages = Environment(
        loader=PackageLoader("triglot.insight", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    pages.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return pages.get_template(f"{name}.html.jinja").render(page=page) + "\n"
