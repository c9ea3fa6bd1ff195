"""GPT-2 from token ids to logits: formulas, Keras layers and the model. Knows nothing of text."""

from __future__ import annotations

import os

OTHER_BACKENDS = ("jax", "torch", "openvino")


def require_tensorflow_backend() -> None:
    """Imports Keras, and checks its backend.

    Raises:
        ImportError: when the backend is not TensorFlow.
    """
    try:
        import keras

        backend = keras.config.backend()
    except (ImportError, ValueError) as error:  # not installed, or unknown to Keras
        backend = os.environ.get("KERAS_BACKEND") or getattr(error, "name", None)
        if backend == "tensorflow" or not (os.environ.get("KERAS_BACKEND") or backend in OTHER_BACKENDS):
            raise
    if backend != "tensorflow":
        raise ImportError(
            f"tf_gpt2 needs Keras with the backend 'tensorflow', got {backend!r}; set KERAS_BACKEND=tensorflow before "
            f"Keras is imported"
        )


require_tensorflow_backend()
