"""The SavedModel in an old TensorFlow, in an environment of its own, against the TensorFlow that wrote it."""

import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tf_gpt2 import TextGenerator, export_saved_model
from tf_gpt2.checkpoint.download import embedded_dir

PEERS_DIR = os.environ.get("TF_GPT2_PEERS_DIR", "")
PYTHON = Path(PEERS_DIR, "tensorflow-2.12", "bin", "python")
pytestmark = pytest.mark.skipif(
    not PEERS_DIR or not PYTHON.exists(),
    reason="TF_GPT2_PEERS_DIR names no folder with tensorflow-2.12/bin/python; "
    "'python -m benchmarks.environments tensorflow-2.12' makes one",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    generator = TextGenerator.from_checkpoint(embedded_dir())
    return export_saved_model(generator, tmp_path_factory.mktemp("export"), max_new_tokens=12, xla=True)


@pytest.fixture(scope="module")
def answers(exported, tmp_path_factory):
    """Gives ``(theirs, ours)``: outputs of each case, of its signature and of the twin, by name."""
    from tests.serving import answer
    from tests.serving.cases import CASES
    from tests.serving.loader import pack_inputs, read_signatures, unpack

    signatures = read_signatures(exported)
    cases = {
        case + suffix: (name + suffix, inputs) for case, (name, inputs) in CASES.items() for suffix in ("", "_xla")
    }
    cases = {case: (name, inputs) for case, (name, inputs) in cases.items() if name in signatures}
    requests = [(name, pack_inputs(signatures[name], inputs)) for name, inputs in cases.values()]
    folder = tmp_path_factory.mktemp("answers")
    (folder / "requests").write_bytes(pickle.dumps(requests))
    command = [PYTHON.absolute(), answer.__file__, exported, folder / "requests", folder / "answers", "tf_gpt2"]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    theirs = pickle.loads((folder / "answers").read_bytes())
    served = tf.saved_model.load(str(exported))
    ours = [answer.answer(served, *request) for request in requests]
    return [{name: unpack(one) for name, (one,) in zip(cases, outputs, strict=True)} for outputs in (theirs, ours)]


def test_an_old_tensorflow_gives_the_same(answers):
    theirs, ours = answers
    for case, expected in ours.items():
        assert theirs[case].keys() == expected.keys()
        for name, values in expected.items():
            if values.dtype == np.float32:
                np.testing.assert_allclose(theirs[case][name], values, rtol=1e-4, atol=1e-4, err_msg=f"{case}: {name}")
            else:
                assert theirs[case][name].tolist() == values.tolist(), f"{case}: {name}"
