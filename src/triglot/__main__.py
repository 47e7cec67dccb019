"""`triglot` and `python -m triglot`."""

import io
import sys

from triglot.cli import app


def main() -> None:
    """Run the command line; text is UTF-8 whatever the terminal's locale says."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    app(prog_name="triglot")


if __name__ == "__main__":
    main()
