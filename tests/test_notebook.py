"""The notebook runs from top to bottom on the embedded checkpoint."""

import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


class ThisPython(KernelSpecManager):
    """Finds one kernel: the interpreter that runs the tests, whatever kernels the user has registered."""

    def get_kernel_spec(self, kernel_name):
        spec = super().get_kernel_spec("python3")
        spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return spec


@pytest.fixture(scope="module")
def notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.create_kernel_manager()
    client.km.kernel_spec_manager = ThisPython()
    client.execute()
    return notebook


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
