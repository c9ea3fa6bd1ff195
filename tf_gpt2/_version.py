"""Looks up the version of the installed package. Imports no other module of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """Returns the installed version, such as "0.1.0"; "(not installed)" in a checkout that pip does not know."""
    try:
        return version("tf_gpt2")
    except PackageNotFoundError:
        return "(not installed)"
