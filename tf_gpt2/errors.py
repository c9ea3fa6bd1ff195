"""The exceptions a user may catch.

Every message names the argument, the value received and what to do next. This module knows nothing of what raises
them.
"""


class GPT2Error(Exception):
    """Base of all errors that tf_gpt2 raises on purpose."""


class DownloadError(GPT2Error):
    """A file could not be fetched, or what arrived is not the file."""


class CheckpointError(GPT2Error):
    """A checkpoint on disk is missing, damaged, or not a GPT-2 of the stated shape."""


class ParamsError(GPT2Error, ValueError):
    """A parameter tree has a missing, extra or misshapen leaf, or numbers that give no logits."""


class ContextLengthError(GPT2Error, ValueError):
    """A sequence does not fit into the model's context window."""
