"""Warm-up records: read back as a server reads them, and run."""

import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tf_gpt2.serving import warmup
from tf_gpt2.serving.options import GENERATE_OPTIONS, option_default

OFF = {name: option_default(name, 0).numpy()[0] for name in GENERATE_OPTIONS}
"""What each option is when it does nothing."""


def read(path):
    """Gives ``(model's name, signature's name, inputs)`` of each record."""
    requests = []
    for record in tf.data.TFRecordDataset(str(path)):
        log = PredictionLog.FromString(record.numpy())
        assert log.WhichOneof("log_type") == "predict_log"
        request = log.predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        requests.append((request.model_spec.name, request.model_spec.signature_name, inputs))
    return requests


def test_records_are_the_requests(tmp_path):
    path = tmp_path / warmup.RECORDS_PATH
    warmup.write_warmup_records(path, "gpt2", warmup.plain_requests())
    found = read(path)
    assert len(found) == len(warmup.plain_requests())
    for (model_name, name, inputs), (wanted_name, wanted) in zip(found, warmup.plain_requests(), strict=True):
        assert (model_name, name) == ("gpt2", wanted_name)
        assert inputs.keys() == wanted.keys()
        for key, array in wanted.items():
            assert inputs[key].dtype == array.dtype
            np.testing.assert_array_equal(inputs[key], array)


def test_every_plain_signature_is_warmed_and_answers(served, tmp_path):
    """With the types of the signature; a record that fails would keep the server from loading the version."""
    warmup.write_warmup_records(tmp_path / "records", "gpt2", warmup.plain_requests())
    seen = set()
    for _, name, inputs in read(tmp_path / "records"):
        for key, array in inputs.items():
            assert array.dtype == np.dtype(served.dtypes[name][key])
        outputs = served.run(name, inputs)
        assert {len(array) for array in outputs.values()} == {1}
        for reason in outputs.get("finish_reason", []):
            assert not reason.startswith(b"error")
        seen.add(name)
    assert seen == {name for name in served.dtypes if not name.endswith("_xla")}


def test_records_run_steps_behind_the_first(served):
    """Warm is what was run: one token would leave the later steps cold."""
    for name, inputs in warmup.plain_requests():
        if name in ("generate", "generate_ids"):
            assert served.run(name, inputs)["completion_length"].tolist() == [warmup.N_TOKENS]


def test_what_people_ask_for_is_warm():
    """A graph sets up what it does for an option when a request first has it: a first draw took 2.2 s."""
    for signature in ("generate", "generate_ids", "next"):
        asked = [inputs for name, inputs in warmup.plain_requests() if name == signature]
        seen = {option for inputs in asked for option in GENERATE_OPTIONS if inputs[option] != OFF[option]}
        assert seen == set(GENERATE_OPTIONS)
        assert any(inputs["temperature"] > 0 and inputs["top_p"] == 1 and inputs["top_k"] == 0 for inputs in asked)
        assert any(inputs["temperature"] > 0 and inputs["top_p"] < 1 and inputs["top_k"] == 0 for inputs in asked)


def test_records_have_one_row_and_a_value_for_each_input(served):
    """So they load in a server of any ``max_batch_size``, which wants all inputs to have as many rows."""
    for name, inputs in warmup.plain_requests():
        assert inputs.keys() == served.dtypes[name].keys()
        assert {len(array) for array in inputs.values()} == {1}


def test_prompts_have_different_lengths(served):
    lengths = [
        served.run(name, inputs)["lengths"].item() for name, inputs in warmup.plain_requests() if name == "encode"
    ]
    assert len(lengths) >= 2
    assert max(lengths) > 4 * min(lengths)


def test_twins_are_warmed_apart(served):
    """A default server refuses them, so they are in no list that it gets."""
    assert not any(name.endswith("_xla") for name, _ in warmup.plain_requests())
    twins = {name for name, _ in warmup.xla_requests()}
    assert twins == {name for name in served.dtypes if name.endswith("_xla")}
    for name, inputs in warmup.xla_requests():
        assert inputs.keys() <= served.dtypes[name].keys()


def test_the_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "1" / warmup.RECORDS_PATH
    requests = warmup.plain_requests()
    warmup.write_warmup_records(path, "gpt2", requests)
    warmup.write_warmup_records(path, "other", requests[:1])
    ((model_name, name, _),) = read(path)
    assert (model_name, name) == ("other", requests[0][0])


@pytest.mark.parametrize("n_requests", [0, 1001])
def test_what_no_server_takes_is_not_written(tmp_path, n_requests):
    with pytest.raises(ValueError, match=f"requests must be 1 to 1000, got {n_requests}"):
        warmup.write_warmup_records(tmp_path / "records", "gpt2", warmup.plain_requests()[:1] * n_requests)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_name_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="model_name must be the model's name"):
        warmup.write_warmup_records(tmp_path / "records", "", warmup.plain_requests())
    assert not list(tmp_path.iterdir())


def test_a_thousand_records_are_written(tmp_path):
    warmup.write_warmup_records(tmp_path / "records", "gpt2", warmup.plain_requests()[:1] * 1000)
    assert len(read(tmp_path / "records")) == 1000


def test_missing_protos_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis.prediction_log_pb2", None)
    with pytest.raises(ImportError, match=r"pip install \"tf_gpt2\[serving\]\""):
        warmup.write_warmup_records(tmp_path / "records", "gpt2", warmup.plain_requests())
    assert not list(tmp_path.iterdir())
