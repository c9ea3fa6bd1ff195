"""Renders an explanation as one HTML file that needs no network.

The page's script and style are the files beside this one. A content security policy allows only this script, so that no
text on the page can run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from importlib import resources
from typing import Any

import numpy as np

from tf_gpt2.explain.explanation import LEAST_PROBABILITY, PALETTE, ExplainedToken, Explanation


def render_page(explanation: Explanation) -> str:
    """Returns the page as HTML."""
    script = read("page.js")
    parts = {
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        "style": read("page.css"),
        "script": script,
        "data": json_in_html(data_of(explanation)),
    }
    # in one pass, so that a part may contain the placeholder of another
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read("page.html"))


def read(name: str) -> str:
    """Reads a file beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def json_in_html(data: Any) -> str:
    """Writes JSON that is safe inside an HTML element: it cannot end the element, or begin another."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # pure ASCII
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def data_of(explanation: Explanation) -> dict[str, Any]:
    """Collects the data for the page's script."""
    n_layer, n_head, n_tokens, _ = explanation.attention.shape
    return {
        "model": explanation.config.to_hparams(),
        "n_params": explanation.config.n_params,
        "tokens": [token_data(token) for token in explanation.tokens],
        "legend": {"colours": PALETTE, "least": LEAST_PROBABILITY},
        "attention": {
            "n_layer": n_layer,
            "n_head": n_head,
            "n_tokens": n_tokens,
            "bytes": pack_attention(explanation.attention),
        },
    }


def token_data(token: ExplainedToken) -> dict[str, Any]:
    """Collects one token's data for the page's script."""
    return {
        "label": token.label,
        "id": token.id,
        "p": token.probability,
        "rank": token.rank,
        "colour": token.colour,
        "likeliest": [[candidate.label, candidate.id, candidate.probability] for candidate in token.likeliest],
    }


def pack_attention(attention: np.ndarray) -> str:
    """Packs attention weights into deflated base64: a byte each, 255 for 1; only the lower triangles, row by row.

    Args:
        attention: floats (L, H, T, S) in [0, 1].
    """
    rows, columns = np.tril_indices(attention.shape[-1])
    levels = np.rint(attention[:, :, rows, columns] * 255).astype(np.uint8)  # (L, H, T * (T + 1) / 2)
    return base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode("ascii")
