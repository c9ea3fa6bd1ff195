"""The process a model runs in: compiled code on disk, memory."""
