"""The package as a whole: its public names, its versions, its wheel."""

import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tf_gpt2

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", tf_gpt2.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(tf_gpt2, name).__doc__


def test_the_version_is_that_of_the_package():
    assert tf_gpt2.__version__ == importlib.metadata.version("tf_gpt2")


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.mark.parametrize("name", ["tensorflow", "keras"])
def test_what_is_installed_is_what_setup_cfg_asks_for(name, setup_cfg):
    requirements = setup_cfg["options"]["install_requires"]
    major, minor, end = re.search(rf"^{name}>=(\d+)\.(\d+),<(\d+\.\d+)$", requirements, re.M).groups()
    assert end == f"{major}.{int(minor) + 1}"  # one minor version
    assert importlib.metadata.version(name).startswith(f"{major}.{minor}.")


def test_all_tools_know_which_python_is_the_oldest(setup_cfg):
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", setup_cfg["options"]["python_requires"]).groups()
    classifiers = re.findall(r"Python :: 3\.(\d+)$", setup_cfg["metadata"]["classifiers"], re.M)
    assert [int(minor) for minor in classifiers] == list(range(int(low), int(high)))
    assert setup_cfg["mypy"]["python_version"] == f"3.{low}"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"] == f"py3{low}"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="GPT3Model"):
        tf_gpt2.GPT3Model  # noqa: B018


def test_modules_of_tests_have_names_of_their_own():
    """The tests' folders are no packages: pytest imports a module by its name alone, and refuses a second one."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_import_is_light():
    program = "import sys, tf_gpt2; tf_gpt2.Encoder; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


IMPORT = """
import os, sys
from pathlib import Path
import keras
before = dict(os.environ), list(sys.meta_path)
import tf_gpt2
assert not [name for name in sys.modules if name.startswith("tf_gpt2.")]
import tf_gpt2.model, tf_gpt2.text.generator, tf_gpt2.generation.generate, tf_gpt2.runtime.compile_cache
assert (dict(os.environ), sys.meta_path) == before
print(list(Path(os.environ["XDG_CACHE_HOME"]).glob("tf_gpt2*")), end=" ")
tf_gpt2.GPT2Model(tf_gpt2.GPT2Config(n_vocab=20, n_ctx=16, n_embd=4, n_head=1, n_layer=1))
print("tf_gpt2" in os.environ["TF_XLA_FLAGS"])
"""


def test_importing_the_package_and_its_modules_does_no_work(run_python, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TF_GPT2_COMPILE_CACHE", "TF_XLA_FLAGS", "TF_ONEDNN_USE_SYSTEM_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    assert run_python(IMPORT) == "[] True\n"


@pytest.mark.parametrize("backend", ["jax", "torch", "no_such_backend"])
@pytest.mark.parametrize("where", ["environment", "file"])
def test_another_backend_of_keras_is_refused_in_a_sentence(backend, where, tmp_path):
    if (backend, where) == ("no_such_backend", "file"):
        pytest.skip("Keras's own sentence names the file's backend")
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    if where == "environment":
        environment["KERAS_BACKEND"] = backend
    else:
        environment["KERAS_HOME"] = str(tmp_path)
        (tmp_path / "keras.json").write_text(json.dumps({"backend": backend}))
    command = [sys.executable, "-m", "tf_gpt2", "generate", "To be", "--model_size", "tiny"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "'tensorflow'" in result.stderr
    assert f"'{backend}'" in result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, ROOT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_package_and_checkpoint_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("tf_gpt2/**/*.py")}
    assert sources <= set(names)
    assert {f"tf_gpt2/explain/page.{ending}" for ending in ("css", "html", "js")} <= set(names)
    assert {f"tf_gpt2/{path.relative_to(ROOT)}" for path in (ROOT / "checkpoints" / "tiny").iterdir()} <= set(names)
    assert "tf_gpt2/py.typed" in names
    if shutil.which("g++"):  # kernels are optional: without a compiler, or when it fails, there are none
        assert [name for name in names if name.startswith("tf_gpt2/runtime/_kernels")]
    assert all(name.startswith(("tf_gpt2/", "tf_gpt2-")) for name in names)


def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import tf_gpt2.cli, tf_gpt2.checkpoint.download as d\n"
        "assert str(d.embedded_dir()).startswith(sys.path[0]), d.embedded_dir()\n"
        "sys.exit(tf_gpt2.cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, tmp_path / "site", "generate", "To be", "--model_size", "tiny"]
    result = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20
