import gc
import importlib.util
from pathlib import Path

import pytest
from server_double import ServedModel, grpc_port, rest_port

from tf_gpt2 import TextGenerator, export_saved_model
from tf_gpt2.checkpoint.download import embedded_dir

CLIENT = Path(__file__).parents[2] / "examples" / "serving" / "client.py"
MAX_NEW_TOKENS = 12


@pytest.fixture(scope="session")
def generator():
    return TextGenerator.from_checkpoint(embedded_dir())


@pytest.fixture(scope="session")
def exported(generator, tmp_path_factory):
    """The folder of one version of the embedded model, with its XLA twins; made once for all tests."""
    folder = tmp_path_factory.mktemp("export") / "gpt2"

    def collect(_):
        gc.collect()  # what the graphs still need must be held by something

    return export_saved_model(generator, folder, max_new_tokens=MAX_NEW_TOKENS, xla=True, on_step=collect)


@pytest.fixture(scope="session")
def served(exported):
    """The export as a server's ports in tests call it."""
    return ServedModel(exported)


@pytest.fixture
def rest(served):
    with rest_port(served) as port:
        yield port


@pytest.fixture
def grpc_(served):
    with grpc_port(served) as port:
        yield port


@pytest.fixture(scope="session")
def kit_client():
    """The module examples/serving/client.py."""
    spec = importlib.util.spec_from_file_location("kit_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
