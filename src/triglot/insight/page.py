"""Pages of a single file each, which load nothing."""

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

Page = dict[str, Any]


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
