"""The embedded checkpoint's generator, loaded once."""

import pytest

from tf_gpt2.checkpoint.download import embedded_dir
from tf_gpt2.text.generator import TextGenerator


@pytest.fixture(scope="session")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())
