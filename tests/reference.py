"""What tests compare with: the package's NumPy GPT-2, losses, the sampling filters by sorting, lively random weights.

Sources: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), Meister et al. 2022 (typical-p).
"""

import numpy as np

from tf_gpt2.reference import as_float64, gelu, layer_norm, logits, softmax  # noqa: F401


def forward(params, ids, *, n_head):
    """Logits at each position of one row: ids (T,) -> float64 (T, V)."""
    return logits(ids, params, n_head)


def log_softmax(x):
    return np.log(softmax(as_float64(x)))


def loss(params, ids, targets, *, n_head):
    """Mean cross-entropy of one row in nats."""
    return -log_softmax(forward(params, ids, n_head=n_head))[np.arange(len(ids)), targets].mean()


# ---- sampling


def ranking(logits):
    """Ids from the likeliest down, of equals the lower first."""
    return np.lexsort((np.arange(len(logits)), -as_float64(logits)))


def kept_by_top_k(logits, k):
    """Ids that top-k leaves, sorted."""
    return sorted(ranking(logits)[: k or None].tolist())


def kept_by_top_p(logits, p):
    """Ids of the smallest set of likeliest tokens whose mass reaches p, sorted."""
    order = ranking(logits)
    mass = np.cumsum(softmax(as_float64(logits))[order])
    return sorted(order[: 1 + int(np.sum(mass < p))].tolist()) if p < 1 else sorted(order.tolist())


def kept_by_min_p(logits, p):
    """Ids at least p times as likely as the likeliest."""
    probabilities = softmax(as_float64(logits))
    return np.flatnonzero(probabilities >= p * probabilities.max()).tolist()


def kept_by_typical_p(logits, p):
    """Ids whose information is nearest the entropy, until their mass reaches p, with all that are equally near."""
    probabilities = softmax(as_float64(logits))
    information = -np.log(probabilities, where=probabilities > 0, out=np.full(len(logits), -np.inf))
    distance = np.abs(information - np.sum(probabilities * np.where(probabilities > 0, information, 0)))
    order = np.argsort(distance, kind="stable")
    n_before = min(int(np.sum(np.cumsum(probabilities[order]) < p)), len(order) - 1)
    return np.flatnonzero((distance <= distance[order[n_before]] + 1e-5) & (probabilities > 0)).tolist()


# ---- weights


def lively_params(config, *, seed=0):
    """Random float32 weights so large that each part of the model changes the logits, and greedy text varies."""
    rng = np.random.default_rng(seed)
    c, f = config.n_embd, config.mlp_width

    def normal(*shape, scale=None, mean=0.0):
        scale = shape[0] ** -0.5 if scale is None else scale
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def pair(n_in, n_out):
        return {"w": normal(n_in, n_out), "b": normal(n_out, scale=0.3)}

    def norm(scale=0.3, mean=1.0):
        return {"g": normal(c, scale=scale, mean=mean), "b": normal(c, scale=0.3)}

    def block():
        attn = {"c_attn": pair(c, 3 * c), "c_proj": pair(c, c)}
        return {"attn": attn, "ln_1": norm(), "ln_2": norm(), "mlp": {"c_fc": pair(c, f), "c_proj": pair(f, c)}}

    params = {
        "wte": normal(config.n_vocab, c, scale=1.0),
        "wpe": normal(config.n_ctx, c, scale=1.0),
        "blocks": [block() for _ in range(config.n_layer)],
        # of both signs, or the tied embedding makes each token predict itself
        "ln_f": norm(scale=1.0, mean=0.0),
    }
    return params if config.tie_word_embeddings else {**params, "lm_head": normal(config.n_vocab, c, scale=1.0)}
