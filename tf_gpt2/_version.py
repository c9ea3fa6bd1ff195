"""What version this is. Imports nothing of the package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Gives the installed version."""
    try:
        return version("tf_gpt2")
    except PackageNotFoundError:
        return "(not installed)"
