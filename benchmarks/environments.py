"""Builds the peers' environments ``.peers/ENGINE``: one each, because their requirements conflict.

An environment is built again when its requirements change. One that cannot be built does not stop the others.

    python -m benchmarks.environments
    python -m benchmarks.environments huggingface ctranslate2
    python -m benchmarks.environments tensorflow-2.12 apache-beam-2.77

``requirements/ENGINE.txt`` lists the packages; ``requirements/ENGINE.no_deps.txt``, where there is one, those to
install without their dependencies, and ``requirements/ENGINE.source.txt`` those whose source is unpacked in
``.peers/ENGINE/src``. llama.cpp is compiled, which takes minutes and a C++ compiler. Needs no package.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
ENGINES = sorted(path.stem for path in REQUIREMENTS.glob("*.txt") if "." not in path.stem)
OTHERS = sorted(path.stem for path in REQUIREMENTS.glob("*-*.*.txt"))
"""Environments that only tests need: built when they are named."""
PEERS_DIR = Path(os.environ.get("TF_GPT2_PEERS_DIR", Path(__file__).parents[1] / ".peers"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "engines", nargs="*", metavar="engine", help=f"of {', '.join(ENGINES)}, the default; {', '.join(OTHERS)}"
    )
    engines = parser.parse_args().engines or ENGINES
    unknown = set(engines) - {*ENGINES, *OTHERS}
    if unknown:
        parser.error(f"engine must be one of {', '.join(ENGINES + OTHERS)}, got {', '.join(sorted(unknown))}")
    failed = [engine for engine in engines if not build(engine, PEERS_DIR / engine)]
    if failed:
        print(f"could not build {', '.join(failed)}; the messages of pip are above", file=sys.stderr)
    return int(bool(failed))


def build(engine: str, folder: Path) -> bool:
    """Builds an environment as its requirements say; returns whether that succeeded."""
    files = requirement_files(engine)
    stamp, content = folder / "stamp", fingerprint(files)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == content:
        return True
    print(f"building {folder} …", file=sys.stderr, flush=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    stamp.unlink(missing_ok=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for path in files:
        if subprocess.run([*pip, *what_to_do(path, folder), "-r", str(path)]).returncode:
            return False
    for archive in (folder / "src").glob("*.tar.gz"):
        shutil.unpack_archive(archive, folder / "src", filter="data")
    stamp.write_text(content, encoding="utf-8")
    return True


def what_to_do(path: Path, folder: Path) -> list[str]:
    """Returns pip's command for a file of requirements."""
    if path.stem.endswith(".source"):
        return ["download", "--no-deps", "--dest", str(folder / "src")]
    return ["install", "--no-deps"] if path.stem.endswith(".no_deps") else ["install"]


def requirement_files(engine: str) -> list[Path]:
    paths = [REQUIREMENTS / f"{engine}{kind}.txt" for kind in ("", ".no_deps", ".source")]
    return [path for path in paths if path.exists()]


def fingerprint(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
