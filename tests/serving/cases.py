"""Requests at the edges of what a server is asked, and wrong ones."""

import numpy as np

TEXTS = [
    "To be, or not to be",
    "",
    "e\u0301 naïve \U0001f600\n\n  spaces   ",
    b"\xff\xfe broken \xc3",
    "<|endoftext|>",
    "x1 " * 400,  # more tokens than the window has
    b"\xf0\x9f\x98",
    "z" * 20000,
]
RAGGED = ["O Romeo, Romeo! wherefore art thou Romeo?"[: n % 41] for n in range(64)]
IDS = [[5, 900, 17, 1023], [0, 0, 0, 0], [31, 7, 7, 7], [511, -3, 2000, 12]]
LENGTHS = [4, 1, 2, 4]
NAN, INFINITY = float("nan"), float("inf")
SAMPLED = {
    "temperature": [0.8, 1.3, 0.5, 1.0],
    "top_k": [0, 40, 0, 7],
    "top_p": [0.9, 1.0, 1.0, 0.7],
    "min_p": [0.0, 0.0, 0.05, 0.0],
    "typical_p": [1.0, 0.9, 1.0, 1.0],
    "seed": [0, 1, 2**40 + 3, 2**63 - 1],
}
DRAWN = {name: values for name, values in SAMPLED.items() if name != "typical_p"}
PENALTIES = {
    "repetition_penalty": [1.3],
    "presence_penalty": [0.5],
    "frequency_penalty": [0.25],
    "no_repeat_ngram_size": [2],
    "min_new_tokens": [3],
}
WRONG_OPTIONS = {
    "temperature": [NAN, 0.7, -1.0, 0.0, INFINITY],
    "top_p": [1.0, 7.0, 1.0, 1.0, 1.0],
    "max_new_tokens": [5, 5, 5, -1, 5],
    "seed": [0, 0, -1, 0, 0],
}

CASES = {
    "serving_default few rows": ("serving_default", {"text": TEXTS[:3]}),
    "serving_default texts": ("serving_default", {"text": TEXTS}),
    "serving_default no rows": ("serving_default", {"text": []}),
    "serving_default ragged": ("serving_default", {"text": RAGGED}),
    "generate one row": ("generate", {"text": TEXTS[:1]}),
    "generate few rows": ("generate", {"text": TEXTS[:4], "max_new_tokens": [7], **SAMPLED}),
    "generate drawn few rows": ("generate", {"text": TEXTS[:4], "max_new_tokens": [7], **DRAWN}),
    "generate texts": ("generate", {"text": TEXTS, **PENALTIES}),
    "generate no rows": ("generate", {"text": []}),
    "generate wrong options": ("generate", {"text": TEXTS[:5], **WRONG_OPTIONS}),
    "generate ragged": (
        "generate",
        {"text": RAGGED, "temperature": [1.0], "seed": np.arange(64), "max_new_tokens": [9]},
    ),
    "generate nothing": ("generate", {"text": TEXTS[:2], "max_new_tokens": [0]}),
    "generate to the end": ("generate", {"text": TEXTS[:1], "max_new_tokens": [2**31 - 1]}),
    "generate_ids few rows": ("generate_ids", {"ids": IDS, "lengths": LENGTHS}),
    "generate_ids wrong lengths": ("generate_ids", {"ids": IDS, "lengths": [5, -1, 2**31 - 1, 0]}),
    "generate_ids no columns": ("generate_ids", {"ids": np.zeros([2, 0]), "lengths": [0, 0]}),
    "generate_ids no rows": ("generate_ids", {"ids": np.zeros([0, 3]), "lengths": []}),
    "next few rows": ("next", {"text": TEXTS[:3], "ids": [[0]] * 3, "lengths": [0, 0, 0], "n_tokens": [5]}),
    "next go on": ("next", {"text": TEXTS[:3], "ids": [[7, 9], [3, 0], [9999, 0]], "lengths": [2, 1, 1]}),
    "next beyond the window": (
        "next",
        {"text": TEXTS[:3], "ids": np.full([3, 256], 9), "lengths": [256, 250, 3], "max_new_tokens": [300]},
    ),
    "next no rows": ("next", {"text": [], "ids": np.zeros([0, 1]), "lengths": []}),
    "score few rows": ("score", {"text": TEXTS[:3]}),
    "score texts": ("score", {"text": TEXTS}),
    "score no rows": ("score", {"text": []}),
    "score ragged": ("score", {"text": RAGGED}),
    "embed few rows": ("embed", {"text": TEXTS[:3]}),
    "embed texts": ("embed", {"text": TEXTS}),
    "embed no rows": ("embed", {"text": []}),
    "logits few rows": ("logits", {"ids": IDS, "lengths": LENGTHS}),
    "logits no columns": ("logits", {"ids": np.zeros([2, 0]), "lengths": [0, 0]}),
    "logits no rows": ("logits", {"ids": np.zeros([0, 3]), "lengths": []}),
    "encode texts": ("encode", {"text": TEXTS}),
    "encode no rows": ("encode", {"text": []}),
    "decode few rows": ("decode", {"ids": IDS, "lengths": LENGTHS}),
    "decode what there is not": ("decode", {"ids": IDS, "lengths": [9, -1, 2**31 - 1, 4]}),
    "decode no rows": ("decode", {"ids": np.zeros([0, 3]), "lengths": []}),
}
"""A signature and its inputs, by name."""

XLA_CASES = [name for name in CASES if name.endswith(("few rows", "generate one row", "generate no rows"))]
XLA_CASES.remove("decode few rows")
"""Those that the twins run: each shape is compiled."""

WRONG = {
    "two temperatures": ("generate", {"text": TEXTS[:3], "temperature": [1.0, 1.0]}, "temperature must have one value"),
    "no seed": ("generate", {"text": TEXTS[:3], "seed": []}, "seed must have one value"),
    "one length": ("generate_ids", {"ids": IDS, "lengths": [1]}, "lengths must have one value per row"),
    "five lengths": ("decode", {"ids": IDS, "lengths": [1] * 5}, "lengths must have one value per row"),
    "five lengths to go on from": (
        "generate_ids",
        {"ids": IDS, "lengths": [1] * 5},
        "lengths must have one value per row",
    ),
    "five lengths for logits": ("logits", {"ids": IDS, "lengths": [1] * 5}, "lengths must have one value per row"),
    "ids for other rows": ("next", {"text": TEXTS[:2], "ids": [[0]], "lengths": [0]}, "ids must have one row per text"),
    "texts for other rows": (
        "next",
        {"text": TEXTS[:1], "ids": [[0]] * 3, "lengths": [0] * 3},
        "ids must have one row per text",
    ),
    "too many positions": ("score", {"text": ["to be " * 60] * 400}, "at most"),
    "too many logits": ("logits", {"ids": np.zeros([2, 2**18]), "lengths": [1, 1]}, "at most"),
    "an unknown signature": ("complete", {"text": TEXTS[:1]}, "unknown signature"),
}
"""A signature, inputs that it refuses, and what its error says."""
