"""The notebooks run from top to bottom on the embedded checkpoint."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


class ThisPython(KernelSpecManager):
    """Finds one kernel: the interpreter that runs the tests, whatever kernels the user has registered."""

    def get_kernel_spec(self, kernel_name):
        spec = super().get_kernel_spec("python3")
        spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return spec


def execute(path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.create_kernel_manager()
    client.km.kernel_spec_manager = ThisPython()
    client.execute()
    return notebook


@pytest.fixture(scope="module")
def notebook():
    return execute(NOTEBOOK)


def outputs(notebook):
    """Gives the text and the kinds of all outputs of the executed notebook."""
    results = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in results]
    return "\n".join(texts), {kind for output in results for kind in output.get("data", {})}


def test_it_shows_what_it_promises(notebook):
    text, kinds = outputs(notebook)
    assert "'Not all heroes wear capes.'" in text
    assert "'n_layer': 5" in text
    assert "model/h0/attn/c_attn/w [1, 160, 480]" in text
    assert "1,751,520 parameters" in text
    assert "GenerationResult(ids=" in text
    assert "image/png" in kinds


def test_the_stored_outputs_are_the_true_ones(notebook):
    stored, _ = outputs(nbformat.read(NOTEBOOK, as_version=4))
    executed, _ = outputs(notebook)
    assert stored.split("GenerationResult")[0] == executed.split("GenerationResult")[0]


def test_the_one_on_fine_tuning_shows_a_curve_and_texts():
    text, kinds = outputs(execute(EXAMPLES / "finetune.ipynb"))
    before, after = (float(number) for number in re.search(r"([\d.]+) -> ([\d.]+) nats", text).groups())
    assert after < 0.9 * before
    assert "of 1,751,520 numbers are trained" in text
    assert "True" in text
    assert "['adapter_config.json', 'adapter_model.safetensors']" in text
    assert "image/png" in kinds
