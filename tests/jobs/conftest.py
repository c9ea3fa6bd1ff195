import pytest

from tf_gpt2 import TextGenerator
from tf_gpt2.checkpoint.download import embedded_dir


@pytest.fixture(scope="session")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())
