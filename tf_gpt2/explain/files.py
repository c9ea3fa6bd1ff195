"""Writes an explanation to a file as a page or a picture, whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tf_gpt2.explain.explanation import Explanation
from tf_gpt2.explain.page import render_page
from tf_gpt2.explain.picture import render_picture

ENDINGS = (".html", ".htm", ".png")


def write_explanation(explanation: Explanation, out: str | Path) -> None:
    """Writes a page or a picture; replaces a file of that name.

    Args:
        explanation: the explanation to show.
        out: ends in ``.html`` or ``.htm`` for a page, in ``.png`` for a picture.

    Raises:
        ImportError: when a picture is wanted and matplotlib is not installed.
        ValueError: when ``out`` ends otherwise, or its folder does not exist.
    """
    path = check_out(out)
    is_picture = path.suffix.lower() == ".png"
    content = render_picture(explanation) if is_picture else render_page(explanation).encode()
    # beside the file, because a move is atomic only within one file system
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as staging:
        part = Path(staging) / path.name
        part.write_bytes(content)
        part.replace(path)


def check_out(out: str | Path) -> Path:
    """Checks the name of the file to write, before the work starts; returns it as a path."""
    path = Path(out)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"out must end in {', '.join(ENDINGS)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, and {path.parent} is not one; make it first")
    if path.is_dir():
        raise ValueError(f"out must be a file, and {path} is a folder")
    return path
