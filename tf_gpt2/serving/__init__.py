"""Exports GPT-2 as a SavedModel that takes text and returns text, for TensorFlow Serving."""
