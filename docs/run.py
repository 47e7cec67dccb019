"""Run the blocks of pages as the build does, without the build: `python docs/run.py PAGE …`; what fails says where."""

import re
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r'^( *)```python([^\n]*\bexec="true"[^\n]*)\n(.*?)^\1```', re.MULTILINE | re.DOTALL)


def run(page: Path) -> None:
    """Run a page's blocks in order; those of a session share their names."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(path) for path in (here, here.parent) if str(path) not in sys.path]
    text = page.read_text(encoding="utf-8")
    sessions: dict[str, dict[str, Any]] = {}
    for found in BLOCK.finditer(text):
        named = re.search(r'session="(\w+)"', found[2])
        names = sessions.setdefault(named[1], {}) if named else {}
        names.setdefault("__name__", f"blocks of {page.name}")
        line = text[: found.start(3)].count("\n")
        code = "\n" * line + re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        exec(compile(code, str(page), "exec"), names)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
