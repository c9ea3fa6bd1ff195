"""Whether rows ask for more than their likeliest tokens, for which a plain loop has a loop of its own."""

import pytest
import tensorflow as tf

from tf_gpt2.config import GPT2Config
from tf_gpt2.generation.processors import History
from tf_gpt2.generation.sampling import asks_for_more, choose, first_largest
from tf_gpt2.generation.settings import make_sampling
from tf_gpt2.model.loops import plain_loop

ASKING = [
    {"temperature": [0.0, 20.0]},
    {"temperature": 2.0, "top_k": 3},
    {"repetition_penalty": [9.0, 1.0]},
    {"presence_penalty": [1.0, 9.0]},
    {"frequency_penalty": [9.0, 0.0]},
    {"no_repeat_ngram_size": [0, 1]},
    {"min_new_tokens": [3, 0]},
    {"bad_words_ids": [[4]]},
    {"logit_bias": {2: 5.0}},
    {"suppress": [4]},
]
NOT_ASKING = [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "seed": 3}]


@pytest.mark.parametrize("options", [*ASKING, *NOT_ASKING], ids=str)
def test_a_plain_loop_chooses_as_is_chosen_elsewhere(options):
    """Whether any row asks for more is said beforehand; if one does, the option must change something."""
    config = GPT2Config(n_vocab=6, n_ctx=8, n_embd=1, n_head=1, n_layer=1)
    sampling = make_sampling(2, config, **{"temperature": 0.0, **options})
    ids, lengths = tf.constant([[4, 1, 4, 4, 0], [1, 4, 1, 4, 4]]), tf.constant([4, 5])
    arguments = sampling, History(ids, lengths, tf.constant([3, 3])), tf.constant([4, -1])
    asks = bool(asks_for_more(sampling))
    assert asks == (options in ASKING)

    @tf.function(autograph=False)
    def choose_in_loop(logits):
        with plain_loop([]):
            return choose(logits, *arguments)

    differs = False
    for seed in range(10):
        logits = tf.random.stateless_normal((2, 6), (seed, 0)) + 2 * tf.one_hot([4, 4], 6)
        wanted = choose(logits, *arguments).numpy().tolist()
        assert choose_in_loop(logits).numpy().tolist() == wanted
        differs |= wanted != first_largest(logits).numpy().tolist()
    assert differs == asks
