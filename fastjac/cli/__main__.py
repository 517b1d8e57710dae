"""The ``fastjac`` command; ``python -m fastjac.cli`` is the same."""

from __future__ import annotations

import sys

MISSING = 'The fastjac command needs typer and rich: pip install "fastjac[bench]"'


def main() -> None:
    """Run the command. Without typer or rich it names the extra that brings them, and exits with 2.

    The library itself needs neither, so they are imported here and not with the package.
    """
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError:
        print(MISSING, file=sys.stderr)
        sys.exit(2)
    from fastjac.cli.commands import app

    app()


if __name__ == "__main__":
    main()
