"""``Session``: turns over one cache against ``generate`` over the whole text, what is read, and interrupted turns."""

import numpy as np
import pytest
import reference
import tensorflow as tf
from reference import lively_params

from tf_gpt2.config import GPT2Config
from tf_gpt2.errors import ContextLengthError
from tf_gpt2.generation import session as session_module
from tf_gpt2.generation.generate import generate
from tf_gpt2.generation.session import Session
from tf_gpt2.model.gpt2 import GPT2Model
from tf_gpt2.model.network import Network

CONFIG = GPT2Config(n_vocab=101, n_ctx=96, n_embd=12, n_head=3, n_layer=2)
TURNS = [[5, 3, 8], [1], [], list(range(40, 77)), [2, 2]]


@pytest.fixture(scope="module")
def model():
    model = GPT2Model(CONFIG)
    model.set_weights(lively_params(CONFIG))
    return model


@pytest.fixture
def fed(monkeypatch):
    """Counts the positions that are fed to a cache outside the decode loop, padding included."""
    counts = []
    hidden_states = Network.hidden_states

    def count(network, ids, positions=None, cache=None):
        if positions is not None and ids.shape[1] > 1:
            counts.append(ids.shape[1])
        return hidden_states(network, ids, positions, cache)

    monkeypatch.setattr(Network, "hidden_states", count)
    return counts


def take(session, ids, **options):
    return [i for piece in session.add(ids, **options) for i in piece]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "seed": 7, "top_p": 0.9},
        {"presence_penalty": 5.0, "repetition_penalty": 1.2, "min_new_tokens": 3, "stop_ids": [17, 60, 98]},
    ],
    ids=["greedy", "drawn", "processed"],
)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain graph", "xla"])
def test_turns_give_what_generate_gives_for_the_whole(model, options, jit_compile):
    """``generate`` in the plain graph, as it gives there what it gives in XLA."""
    session, whole, n_read = Session(model, jit_compile=jit_compile), [], 0
    for i, turn in enumerate(TURNS):
        whole = whole + turn
        wanted = generate(model, [whole], max_new_tokens=6 + i, jit_compile=False, **options)
        assert take(session, turn, max_new_tokens=6 + i, **options) == wanted.ids[0]
        assert session.finish_reason == wanted.finish_reasons[0]
        whole = whole + wanted.ids[0]
        assert session.ids == whole
        n_read += len(turn) + (i > 0)  # and the last id of the turn before, which was not fed
        assert session.n_read == n_read
    assert session.n_dropped == 0


def test_only_what_is_new_is_fed(model, fed):
    """Eagerly, so that each pass is counted: 38 ids, the one before them but not the last, take two passes of 32."""
    session = Session(model, jit_compile=False)
    tf.config.run_functions_eagerly(True)
    try:
        for turn, n_fed in zip(TURNS, [0, 32, 0, 64, 32], strict=True):  # the first one is read by itself
            fed.clear()
            take(session, turn, max_new_tokens=2)
            assert sum(fed) == n_fed
    finally:
        tf.config.run_functions_eagerly(False)


def test_the_ids_are_the_likeliest_of_a_plain_forward_pass(model):
    session, params = Session(model, jit_compile=False), model.get_params()
    for turn in TURNS:
        before = len(session.ids) + len(turn)
        take(session, turn, max_new_tokens=5)
        logits = reference.forward(params, session.ids, n_head=3)
        assert session.ids[before:] == logits[before - 1 : -1].argmax(axis=1).tolist()


@pytest.mark.parametrize("n_pieces", [0, 1, 2, 3])
def test_a_turn_that_is_left_keeps_what_was_given(model, n_pieces):
    session = Session(model, jit_compile=False)
    first = take(session, TURNS[0], max_new_tokens=5)
    pieces = session.add([9, 9], max_new_tokens=20)
    given = [i for _, piece in zip(range(n_pieces), pieces, strict=False) for i in piece]
    pieces.close()
    before = TURNS[0] + first + ([9, 9, *given] if n_pieces else [])
    assert session.ids == before
    wanted = generate(model, [[*before, 4]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [4], max_new_tokens=8) == wanted
    assert list(pieces) == []


@pytest.mark.parametrize("n_calls", [0, 1, 2, 3])
def test_an_interrupt_anywhere_leaves_the_state_right(model, n_calls, monkeypatch):
    """Ctrl-C arrives during a pass, before or after its result is kept."""
    session = Session(model, jit_compile=False)
    first = take(session, TURNS[0], max_new_tokens=5)
    run, calls = session._run, []
    monkeypatch.setattr("tf_gpt2.generation.generate.PIECE_S", 0)  # one token at a time
    for name in ("advance", "extend"):
        step = getattr(run, name)

        def interrupted(*arguments, step=step):
            calls.append(1)
            if len(calls) > n_calls and n_calls % 2:
                raise KeyboardInterrupt
            step(*arguments)
            if len(calls) > n_calls:
                raise KeyboardInterrupt

        monkeypatch.setattr(run, name, interrupted)
    given = []
    with pytest.raises(KeyboardInterrupt):
        for piece in session.add([9, 9], max_new_tokens=20):
            given += piece
    monkeypatch.undo()
    assert session.ids == TURNS[0] + first + ([9, 9, *given] if n_calls else [])
    assert session.finish_reason is None
    wanted = generate(model, [[*session.ids, 4]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [4], max_new_tokens=8) == wanted


def test_what_was_taken_back_is_not_seen(model):
    session = Session(model, jit_compile=False)
    take(session, TURNS[0], max_new_tokens=20)
    session.keep(2)
    wanted = generate(model, [[*TURNS[0][:2], 4]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [4], max_new_tokens=8) == wanted
    session.keep(0)
    assert take(session, [4], max_new_tokens=8) == generate(model, [[4]], max_new_tokens=8, jit_compile=False).ids[0]


def test_another_turn_ends_the_one_before(model):
    session = Session(model, jit_compile=False)
    left = session.add([1], max_new_tokens=20)
    next(left)
    ids = [*session.ids]
    wanted = generate(model, [[*ids, 4]], max_new_tokens=8, jit_compile=False).ids[0]
    other = session.add([4], max_new_tokens=8)
    given = next(other)
    assert list(left) == []
    assert given + [i for piece in other for i in piece] == wanted
    assert session.ids == [*ids, 4, *wanted]


@pytest.mark.parametrize("end", ["add", "keep"])
def test_a_turn_that_was_ended_changes_nothing_more(model, end):
    session = Session(model, jit_compile=False)
    left = session.add([1], max_new_tokens=20)
    next(left)
    if end == "add":
        take(session, [4], max_new_tokens=3)
    else:
        session.keep(1)
    before, reason = session.ids, session.finish_reason
    assert list(left) == []
    assert (session.ids, session.finish_reason) == (before, reason)
    wanted = generate(model, [[*before, 4]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [4], max_new_tokens=8) == wanted


@pytest.mark.parametrize("n_shown", [4, 6, 9])
def test_other_ids_may_stand_for_the_last(model, n_shown):
    """The cache knows nothing of them, and nothing of what was there."""
    session = Session(model, jit_compile=False)
    pieces = session.add(TURNS[0], max_new_tokens=20)
    given = [i for _, piece in zip(range(3), pieces, strict=False) for i in piece]
    session.show(n_shown, [50, 51])
    before = [*[*TURNS[0], *given][:n_shown], 50, 51]
    assert session.ids == before
    wanted = generate(model, [[*before, 4]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [4], max_new_tokens=8) == wanted


def test_what_is_shown_does_not_change_what_a_turn_goes_on_with(model):
    session = Session(model, jit_compile=False)
    given = []
    for piece in session.add(TURNS[0], max_new_tokens=20):
        given += piece
        session.show(2, [50])
    assert given == generate(model, [TURNS[0]], max_new_tokens=20, jit_compile=False).ids[0]
    assert session.ids == TURNS[0] + given


def test_the_reason_is_known_with_the_last_ids(model):
    for options, n_pieces in (({"max_new_tokens": 3}, 9), ({"max_new_tokens": 1}, 1), ({"max_new_tokens": 200}, 999)):
        session, whole = Session(model, jit_compile=False), Session(model, jit_compile=False)
        wanted = take(whole, TURNS[0], **options)
        pieces, given = session.add(TURNS[0], **options), []
        for _ in range(n_pieces):
            given += next(pieces)
            if given == wanted:
                break
            assert session.finish_reason is None
        pieces.close()
        assert (session.ids, session.finish_reason) == (whole.ids, whole.finish_reason)


def test_an_interrupt_while_a_window_is_read_anew_drops_nothing(model, monkeypatch):
    session = Session(model, jit_compile=False)
    take(session, list(range(80)), max_new_tokens=40)
    before = session.ids

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "GrowingRun", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take(session, [7, 8], max_new_tokens=8)
    monkeypatch.undo()
    assert (session.ids, session.n_dropped) == (before, 0)
    wanted = generate(model, [[*before[-46:], 7, 8]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [7, 8], max_new_tokens=8) == wanted


def test_a_full_window_drops_the_oldest_half(model):
    session = Session(model, jit_compile=False)
    take(session, list(range(80)), max_new_tokens=40)
    assert session.finish_reason == "context"
    assert len(session.ids) == 96
    before = session.ids
    kept = before[-46:]
    wanted = generate(model, [[*kept, 7, 8]], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [7, 8], max_new_tokens=8) == wanted
    assert (session.n_dropped, session.ids) == (50, [*kept, 7, 8, *wanted])
    take(session, [5] * 95, max_new_tokens=8)  # leaves room for nothing else
    assert session.ids[:-1] == [5] * 95
    assert session.n_dropped == 50 + 56


@pytest.mark.parametrize(("n_new", "n_dropped"), [(45, 0), (46, 48)])
def test_what_just_fits_drops_nothing(model, n_new, n_dropped):
    session = Session(model, jit_compile=False)
    take(session, [1] * 50, max_new_tokens=0)
    whole = [*[1] * (50 - n_dropped), *[2] * n_new]
    wanted = generate(model, [whole], max_new_tokens=8, jit_compile=False).ids[0]
    assert take(session, [2] * n_new, max_new_tokens=8) == wanted
    assert (session.n_dropped, session.ids) == (n_dropped, whole + wanted)


@pytest.mark.parametrize("n_new", [11, 12, 13, 31, 32, 33])
def test_a_turn_that_ends_where_the_cache_does(model, n_new, monkeypatch):
    """Caches of 20 and 40 places, and 8 ids before the turn: what is read last must not be lost."""
    for name, value in {"SMALLEST_BUCKET": 20, "SMALLEST_GROWING": 20, "GROWTH": 2}.items():
        monkeypatch.setattr(f"tf_gpt2.generation.loop.{name}", value)
    session = Session(model, jit_compile=False)
    take(session, [1] * 8, max_new_tokens=0)
    turn = list(range(n_new))
    wanted = generate(model, [[*session.ids, *turn]], max_new_tokens=4, jit_compile=False).ids[0]
    assert take(session, turn, max_new_tokens=4) == wanted


def test_what_is_refused_changes_nothing(model):
    session = Session(model, jit_compile=False)
    with pytest.raises(ValueError, match="nothing to continue"):
        session.add([])
    take(session, [1, 2], max_new_tokens=3)
    before = session.ids
    for ids, options, error in [
        ([1] * 96, {}, ContextLengthError),
        ([101], {}, ValueError),
        ([1.5], {}, TypeError),
        ([1], {"temperature": -1}, ValueError),
        ([1], {"max_new_tokens": -1}, ValueError),
        ([1], {"topk": 3}, TypeError),
    ]:
        with pytest.raises(error):
            session.add(ids, **options)
    assert session.ids == before


def test_few_sizes_are_compiled():
    config = GPT2Config(n_vocab=11, n_ctx=1024, n_embd=2, n_head=1, n_layer=1)
    model, sizes = GPT2Model(config), set()
    session = Session(model, jit_compile=False)
    for n_new in (3, 60, 150, 2, 300, 200, 100):
        take(session, np.arange(n_new) % 11, max_new_tokens=3)
        sizes.add(session._run.state.n_slots)
    assert sizes == {256, 1024}
