"""Small models with odd shapes, shared by all tests because compiling them takes seconds."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.runtime import compile_cache, prepare_process
from tf_gpt2.runtime.memory import collect_seldom

collect_seldom()  # tracing makes many objects
# tests leave the user's cache alone, and find what the last run compiled
os.environ.setdefault(compile_cache.ENV_VAR, str(Path(__file__).parents[1] / "build" / "xla"))
prepare_process()


def pytest_report_header():
    """What a failure may depend on."""
    flags = [f"{name}={os.environ[name]}" for name in ("XLA_FLAGS", "TF_XLA_FLAGS") if os.environ.get(name)]
    return [
        f"TensorFlow {version('tensorflow')}, Keras {version('keras')}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores",
        *flags,
    ]


@pytest.fixture(scope="session")
def odd_config():
    """No two sizes are equal, and only 12, 36 and 40 have factors in common: a swapped axis shows."""
    return GPT2Config(n_vocab=101, n_ctx=40, n_embd=12, n_head=3, n_layer=2)


@pytest.fixture(scope="session")
def odd_params(odd_config):
    return lively_params(odd_config)


@pytest.fixture(scope="session")
def odd_model(odd_config, odd_params):
    """Tests must not change its weights."""
    from tf_gpt2.model.gpt2 import GPT2Model

    model = GPT2Model(odd_config)
    model.set_weights(odd_params)
    return model


@pytest.fixture(scope="session")
def run_python():
    """Runs a program in an interpreter of its own; a crash or a hang there is a failure here."""

    def run(program, *arguments, timeout=300):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-3000:]}"
        return result.stdout

    return run


@pytest.fixture(scope="session")
def assert_same_bits():
    """Checks that two parameter trees have the same form, dtypes and bits, NaN included."""

    def check(found, expected):
        if isinstance(expected, dict):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                check(found[key], value)
        elif isinstance(expected, list):
            assert isinstance(found, list)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                check(one, other)
        else:
            assert isinstance(found, np.ndarray)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()

    return check
