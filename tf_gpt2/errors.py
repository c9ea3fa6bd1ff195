"""The exceptions that a user may catch.

Every message names the argument, the value received and the next step. This module knows nothing of the code that
raises them.
"""


class GPT2Error(Exception):
    """Base of all errors that tf_gpt2 raises on purpose."""


class DownloadError(GPT2Error):
    """A file could not be fetched, or the server sent something else."""


class CheckpointError(GPT2Error):
    """A checkpoint on disk is missing, damaged, or not a GPT-2 of the stated shape."""


class ParamsError(GPT2Error, ValueError):
    """A parameter tree has a missing, extra or misshapen leaf, or NaN or infinity in one."""


class ContextLengthError(GPT2Error, ValueError):
    """A sequence does not fit into the model's context window."""
