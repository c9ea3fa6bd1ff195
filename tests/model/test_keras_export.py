"""The model as a Keras user exports it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import lively_params

from tf_gpt2 import GPT2Model

IDS = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def model(request, odd_config):
    options = {"quantization": "int8"} if request.param == "int8" else {"dtype": request.param}
    model = GPT2Model(odd_config, **options)
    model.set_weights(lively_params(odd_config))
    return model


def test_export_takes_ids(model, tmp_path):
    model.export(tmp_path / "export", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "export")
    (spec,) = loaded.signatures["serving_default"].structured_input_signature[1].values()
    assert (spec.dtype, spec.shape.as_list()) == (tf.int32, [None, None])
    np.testing.assert_allclose(loaded.serve(tf.constant(IDS, tf.int32)), model(IDS), atol=1e-5)


def test_export_takes_another_signature(model, tmp_path):
    spec = keras.InputSpec(shape=(2, None), dtype="int64")
    model.export(tmp_path / "export", verbose=False, input_signature=[spec])
    loaded = tf.saved_model.load(tmp_path / "export")
    np.testing.assert_allclose(loaded.serve(tf.constant(IDS, tf.int64)), model(IDS), atol=1e-5)


def test_an_archive_reloads_as_a_layer(model, tmp_path):
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("logits", fn=model.call, input_signature=[tf.TensorSpec((None, None), tf.int32)])
    archive.write_out(tmp_path / "archive", verbose=False)
    layer = keras.layers.TFSMLayer(tmp_path / "archive", call_endpoint="logits")
    np.testing.assert_allclose(layer(tf.constant(IDS, tf.int32)), model(IDS), atol=1e-5)


def test_ids_out_of_range_are_refused(model, tmp_path):
    model.export(tmp_path / "export", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "export")
    with pytest.raises(tf.errors.InvalidArgumentError, match="101 is not in"):
        loaded.serve(tf.constant([[1, 101], [1, 2]]))


def test_reading_weights_makes_no_copies(odd_config):
    """Once rows were gathered from a variable itself, TensorFlow copies it at each later read."""
    model = GPT2Model(odd_config)
    traced = tf.function(model).get_concrete_function(tf.TensorSpec((None, None), tf.int32))
    operations = {operation.type for operation in traced.graph.get_operations()}
    assert "ReadVariableOp" in operations
    assert "ResourceGather" not in operations


def fixed_signature():
    return [keras.InputSpec(shape=IDS.shape, dtype="int32", name="ids")]


def float_model(odd_config):
    model = GPT2Model(odd_config)
    model.set_weights(lively_params(odd_config))
    return model


def assert_near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_export_as_litert_has_a_fixed_shape(odd_config, tmp_path):
    model = float_model(odd_config)
    model.export(tmp_path / "model.tflite", format="litert", verbose=False, input_signature=fixed_signature())
    interpreter = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], IDS.astype(np.int32))
    interpreter.invoke()
    assert_near(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), np.asarray(model(IDS)))


def test_export_as_onnx_takes_any_shape(odd_config, tmp_path):
    pytest.importorskip("tf2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = float_model(odd_config)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for ids in (IDS, IDS[:1, :2]):
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.astype(np.int32)})
        assert_near(found, np.asarray(model(ids)))


def test_openvino_reads_the_saved_model(odd_config, tmp_path):
    openvino = pytest.importorskip("openvino")
    model = float_model(odd_config)
    model.export(tmp_path / "export", verbose=False)
    compiled = openvino.compile_model(str(tmp_path / "export"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for ids in (IDS, IDS[:1, :2]):
        assert_near(next(iter(compiled(ids.astype(np.int32)).values())), np.asarray(model(ids)))
