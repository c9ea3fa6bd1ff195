"""Converts between text and token ids: in Python, and inside a TensorFlow graph."""
