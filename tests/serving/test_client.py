"""examples/serving/client.py, over real sockets, against the signatures of the export."""

import contextlib
import functools
import itertools
import json
import socket
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

TEXTS = ["To be, or not to be", "O", "Wherefore art thou 🌞"]
PORTS = ["rest", "grpc"]
CODES = {
    "rest": {"UNAVAILABLE": 503, "RESOURCE_EXHAUSTED": 429, "DEADLINE_EXCEEDED": 504, "INVALID_ARGUMENT": 400},
    "grpc": {code.name: code for code in grpc.StatusCode},
}


@pytest.fixture(params=PORTS)
def kind(request):
    return request.param


@pytest.fixture
def port(kind, request):
    return request.getfixturevalue("rest" if kind == "rest" else "grpc_")


@pytest.fixture
def transport(kind, kit_client):
    return kit_client.Rest if kind == "rest" else kit_client.Grpc


@pytest.fixture
def client(kit_client, transport, port):
    return kit_client.Client(transport(port.address))


@pytest.fixture(scope="module")
def in_python(generator):
    """The generator's texts, without the wait for XLA."""
    return functools.cache(functools.partial(generator.generate, jit_compile=False))


@pytest.fixture
def naps(kit_client, monkeypatch):
    """How long the client wanted to sleep, each time."""
    naps = []
    monkeypatch.setattr(kit_client.time, "sleep", naps.append)
    return naps


def test_texts_are_continued_as_in_python(client, generator, in_python):
    completions = client.generate(TEXTS, max_new_tokens=12)
    assert [completion.text for completion in completions] == [in_python(text, max_new_tokens=12) for text in TEXTS]
    for completion in completions:
        assert completion.finish_reason == "length"
        assert len(completion.ids) == len(completion.logprobs) == 12
        assert generator.encoder.decode(completion.ids) == completion.text
        assert all(logprob <= 0 for logprob in completion.logprobs)


def test_many_texts_go_in_requests_that_a_server_with_batching_takes(client, kit_client, port, in_python):
    texts = ["To be"[: n % 6] for n in range(2 * kit_client.MOST_ROWS + 1)]
    completions = client.generate(texts, max_new_tokens=3)
    assert [completion.text for completion in completions] == [in_python(text, max_new_tokens=3) for text in texts]
    assert [len(tensors["text"]) for _, tensors in port.calls] == [kit_client.MOST_ROWS] * 2 + [1]
    assert client.generate([]) == []


def test_options_reach_the_sampling(client, in_python):
    options = {"max_new_tokens": 10, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 2**40 + 7}
    (completion,) = client.generate(["To be"], **options)
    assert completion.text == in_python("To be", **options)


def test_every_input_has_a_value_per_row(client, port):
    """With batching a server refuses anything else."""
    client.generate(["a", "b", "c"], temperature=0.5, seed=3)
    ((signature, tensors),) = port.calls
    assert signature == "generate"
    assert {len(array) for array in tensors.values()} == {3}
    assert tensors["temperature"].dtype == np.float32
    assert tensors["seed"].dtype == np.int64
    assert tensors["max_new_tokens"].dtype == np.int32


def test_all_options_of_the_signature_are_there_with_its_defaults(kit_client, served):
    assert served.dtypes["generate"].keys() == {"text", *kit_client.OPTIONS}
    for signature in ("generate", "next"):
        for name, dtype in served.dtypes[signature].items():
            assert np.dtype(dtype) == np.dtype(object if name == "text" else kit_client.DTYPES[name])
    for name, value in served.defaults("generate").items():
        if name != "max_new_tokens":  # the export's own
            assert value == np.float32(kit_client.OPTIONS[name][1])


def test_a_row_that_cannot_be_served_says_so(client):
    (completion,) = client.generate(["To be"], temperature=-1)
    assert completion.finish_reason.startswith("error: ")
    assert completion.text == ""
    assert completion.ids == completion.logprobs == []


@pytest.mark.parametrize("signature", ["generate", "generate_xla"])
def test_a_long_row_in_error_leaves_its_neighbour_alone(client, kit_client, in_python, signature):
    options = kit_client.rows_of({"max_new_tokens": 12}, 2) | {"temperature": [-1.0, 0.0]}
    outputs = client.predict(signature, {"text": ["word " * 60, "O"], **options})
    assert outputs["finish_reason"][0].startswith("error: temperature")
    assert outputs["text"] == ["", in_python("O", max_new_tokens=12)]


def test_a_text_alone_is_text_or_an_error(client, kit_client, in_python):
    assert client.complete("To be", max_new_tokens=12) == in_python("To be", max_new_tokens=12)
    with pytest.raises(kit_client.ServingError, match=r"INVALID_ARGUMENT: error: .*temperature"):
        client.complete("To be", temperature=-1)


def test_an_unknown_option_is_named_before_anything_is_sent(client, port):
    with pytest.raises(TypeError, match=r"no option temprature; there are .*temperature"):
        client.generate(["a"], temprature=1)
    with pytest.raises(TypeError, match="temprature"):
        list(client.stream("a", temprature=1))
    assert not port.calls


def test_any_signature_can_be_asked(client, generator):
    expected = [score.total for score in generator.score(TEXTS[:2], jit_compile=False)]
    totals = client.predict("score", {"text": TEXTS[:2]})["total"]
    np.testing.assert_allclose(totals, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_a_stream_joined_is_the_text(client, in_python, n_tokens):
    pieces = list(client.stream("To be", max_new_tokens=n_tokens))
    assert "".join(pieces) == in_python("To be", max_new_tokens=n_tokens)
    assert all(pieces)


def test_a_sampled_stream_joined_is_the_text(client, in_python):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}
    assert "".join(client.stream("Enter", **options)) == in_python("Enter", **options)


def test_a_stream_asks_for_one_token_then_for_more(client, port):
    """And sends back what it got; nothing is kept in the server."""
    stream = client.stream("To be", max_new_tokens=60)
    next(stream)
    assert len(port.calls) == 1  # the first piece waits for one call only
    list(stream)
    sent = [{name: array.tolist() for name, array in tensors.items()} for _, tensors in port.calls]
    assert [tensors["n_tokens"] for tensors in sent] == [[1], [2], [4], [8], [16], [16], [16]]
    assert [tensors["lengths"] for tensors in sent] == [[0], [1], [3], [7], [15], [31], [47]]
    for tensors, later in itertools.pairwise(sent[1:]):
        assert len(tensors["ids"][0]) == tensors["lengths"][0]
        assert later["ids"][0][: tensors["lengths"][0]] == tensors["ids"][0]


def test_characters_of_several_tokens_come_whole(client, in_python):
    """Each piece is text by itself: no half of a character, which would be shown as U+FFFD and never mended."""
    options = {"max_new_tokens": 60, "temperature": 3.0, "seed": 11}
    pieces = list(client.stream("🌞🌚", **options))
    assert "".join(pieces) == in_python("🌞🌚", **options)


def test_a_stream_of_what_cannot_be_served_raises(client, kit_client):
    with pytest.raises(kit_client.ServingError, match=r"INVALID_ARGUMENT: error: .*top_p") as caught:
        list(client.stream("To be", top_p=-1.0))
    assert caught.value.code == "INVALID_ARGUMENT"


def test_a_server_that_stands_still_is_no_endless_stream(kit_client):
    class Still:
        def predict(self, signature, inputs):
            return {"ids": [[7]], "lengths": inputs["lengths"], "text": [""], "finish_reason": [""]}

    with pytest.raises(kit_client.ServingError, match="added no token"):
        list(kit_client.Client(Still()).stream("a"))


def test_what_fills_up_a_row_is_no_token(kit_client):
    class Padded:
        def predict(self, signature, inputs):
            rows = {"text": ["a", "bc"], "ids": [[7, 0], [8, 0]], "logprobs": [[-1.0, 0.0], [-1.0, -2.0]]}
            return rows | {"finish_reason": ["stop", "length"], "completion_length": [1, 2]}

    first, second = kit_client.Client(Padded()).generate(["x", "y"])
    assert (first.ids, first.logprobs) == ([7], [-1.0])
    assert (second.ids, second.logprobs) == ([8, 0], [-1.0, -2.0])


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_what_passes_is_tried_again_and_later_each_time(client, port, kind, naps, code):
    port.failures.extend([CODES[kind][code]] * 4)
    (completion,) = client.generate(["To be"], max_new_tokens=2)
    assert completion.finish_reason == "length"
    assert len(naps) == 4
    for nap, longest in zip(naps, [0.5, 1, 2, 4], strict=True):
        assert longest / 2 <= nap <= longest


def test_a_stream_goes_on_where_a_call_failed(client, port, kind, naps, in_python):
    stream = client.stream("To be", max_new_tokens=9)
    pieces = [next(stream)]
    port.failures.append(CODES[kind]["UNAVAILABLE"])
    pieces += stream
    assert "".join(pieces) == in_python("To be", max_new_tokens=9)
    assert len(naps) == 1


def test_attempts_come_to_an_end(client, port, kind, kit_client, naps):
    port.failures.extend([CODES[kind]["UNAVAILABLE"]] * 20)
    with pytest.raises(kit_client.ServingError, match="UNAVAILABLE: as told") as caught:
        client.generate(["a"])
    assert caught.value.code == "UNAVAILABLE"
    assert len(port.failures) == 20 - 6
    assert len(naps) == 5


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "DEADLINE_EXCEEDED"])
def test_what_does_not_pass_is_not_tried_again(client, port, kind, kit_client, naps, code):
    port.failures.append(CODES[kind][code])
    with pytest.raises(kit_client.ServingError, match=f"{code}: as told") as caught:
        client.generate(["a"])
    assert caught.value.code == code
    assert not naps


def test_nobody_listening_is_said_with_the_address(kit_client, transport, kind, naps):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        client = kit_client.Client(transport(f"http://{address}" if kind == "rest" else address), attempts=3)
        with pytest.raises(kit_client.ServingError, match=f"UNAVAILABLE: .*{address}.*see that the server is up"):
            client.generate(["a"])
    assert len(naps) == 2


def test_a_server_that_does_not_answer_is_given_up(kit_client, transport, kind, naps):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        slow = transport(f"http://{address}" if kind == "rest" else address, timeout_s=1.0)
        start = time.perf_counter()
        with pytest.raises(kit_client.ServingError, match=r"DEADLINE_EXCEEDED: .*ask for fewer max_new_tokens"):
            kit_client.Client(slow).generate(["a"])
        assert time.perf_counter() - start < 4
    assert not naps


def test_an_address_that_is_none_is_not_tried_again(kit_client, naps, capsys):
    assert kit_client.main(["--rest", "nonsense://localhost:8501", "a"]) == 1
    assert "nonsense://localhost:8501" in capsys.readouterr().err
    assert not naps


def test_an_address_may_lack_what_all_have(kit_client, rest):
    assert kit_client.Client(kit_client.Rest(rest.address.removeprefix("http://"))).generate(["To be"])


def test_another_models_name_is_not_found(kit_client, transport, port):
    with pytest.raises(kit_client.ServingError, match=r"NOT_FOUND: Servable not found .*check the model's name"):
        kit_client.Client(transport(port.address, "gpt3")).generate(["a"])


def test_a_signature_that_was_not_exported_is_named(client, kit_client):
    with pytest.raises(kit_client.ServingError, match="generate_fast"):
        client.predict("generate_fast", {"text": ["a"]})


def test_compiled_signatures_are_asked_when_told(kit_client, transport, port, in_python):
    client = kit_client.Client(transport(port.address), xla=True)
    assert client.complete("To be", max_new_tokens=12) == in_python("To be", max_new_tokens=12)
    assert [signature for signature, _ in port.calls] == ["generate_xla"]


def test_xla_that_is_off_in_the_server_has_its_own_remedy(kit_client):
    error = kit_client.ServingError("INVALID_ARGUMENT", "XLA compilation disabled")
    assert "--xla_cpu_compilation_enabled=true" in str(error)
    assert "mend the request" not in str(error)


def test_a_label_is_part_of_the_address(kit_client, rest):
    client = kit_client.Client(kit_client.Rest(rest.address, label="stable"))
    assert client.generate(["To be"], max_new_tokens=1)[0].ids
    with pytest.raises(kit_client.ServingError, match="NOT_FOUND"):
        kit_client.Client(kit_client.Rest(rest.address, label="canary")).generate(["a"])


def test_a_label_is_in_the_request_over_grpc(kit_client, grpc_, monkeypatch):
    transport = kit_client.Grpc(grpc_.address, label="stable")
    seen = []
    predict = transport._stub.Predict
    monkeypatch.setattr(
        transport._stub, "Predict", lambda request, **options: seen.append(request) or predict(request, **options)
    )
    kit_client.Client(transport).generate(["To be"], max_new_tokens=1)
    assert seen[0].model_spec.version_label == "stable"


def test_what_a_proxy_says_is_passed_on(kit_client, rest, monkeypatch):
    monkeypatch.setattr("server_double.render_error", lambda message: "<html>Bad Gateway</html>")
    rest.failures.append(502)
    with pytest.raises(kit_client.ServingError, match="HTTP 502: <html>Bad Gateway</html>"):
        kit_client.Client(kit_client.Rest(rest.address)).generate(["a"])


def test_a_sole_output_gets_its_name_back(client, in_python):
    assert client.predict("serving_default", {"text": ["To be"]}) == {"text": [in_python("To be", max_new_tokens=12)]}


def test_answers_may_be_large(kit_client, grpc_, generator):
    """The usual limit of gRPC is 4 MB."""
    n_ctx, n_vocab = generator.model.config.n_ctx, generator.model.config.n_vocab
    n_rows = 5_000_000 // (4 * n_ctx * n_vocab) + 1
    inputs = {"ids": [[1] * n_ctx] * n_rows, "lengths": [n_ctx] * n_rows}
    outputs = kit_client.Grpc(grpc_.address).predict("logits", inputs)
    assert np.shape(outputs["logits"]) == (n_rows, n_ctx, n_vocab)


def test_the_command_prints_the_text(kit_client, port, kind, in_python, capsys):
    expected = in_python("To be", max_new_tokens=9) + "\n"
    for more in ([], ["--stream"]):
        assert kit_client.main([f"--{kind}", port.address, "To be", "--max_new_tokens", "9", *more]) == 0
        assert capsys.readouterr().out == expected


def test_the_command_says_what_went_wrong(kit_client, port, kind, capsys):
    for wrong in (["--model", "gpt3"], ["--temperature", "-1"], ["--temperature", "-1", "--stream"]):
        assert kit_client.main([f"--{kind}", port.address, "To be", *wrong]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("client.py: ")
        assert err.count("\n") == 1


def test_rest_needs_no_tensorflow(kit_client, rest, in_python, run_python):
    program = """
import sys
sys.modules.update(tensorflow=None, grpc=None, tensorflow_serving=None)  # not to be imported
sys.path.insert(0, sys.argv[1])
import client
try:
    client.Grpc("localhost:1")
except ImportError as error:
    assert "tf_gpt2[serving]" in str(error), error
else:
    raise SystemExit("no ImportError")
assert client.main(["--grpc", "localhost:1", "a"]) == 1
assert client.main(["--rest", sys.argv[2], "To be", "--max_new_tokens", "5", "--stream"]) == 0
"""
    assert (
        run_python(program, Path(kit_client.__file__).parent, rest.address)
        == in_python("To be", max_new_tokens=5) + "\n"
    )


# ---- servers that lie

GOOD = {
    "text": [" a"],
    "ids": [[7]],
    "logprobs": [[-1.5]],
    "finish_reason": ["length"],
    "prompt_length": [2],
    "completion_length": [1],
}


def http(body, status="200 OK", headers=()):
    """Writes an answer by hand."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def outputs(**changed):
    """An answer of ``generate`` with some outputs changed; None takes one away."""
    return http({"outputs": {name: value for name, value in (GOOD | changed).items() if value is not None}})


LIES = {
    "no JSON": http(b"<html>Welcome to the hotel</html>"),
    "nothing": http(b""),
    "half of JSON": http(b'{"outputs": {"text": ["a"'),
    "no UTF-8": http(b'{"outputs": "\xff\xfe\x00"}'),
    "too deep": http(b"[" * 100_000),
    "too many digits": http(b'{"outputs": {"completion_length": [' + b"9" * 5000 + b"]}}"),
    "a list": http([1, 2]),
    "null": http(None),
    "a number": http(7),
    "text alone": http("outputs"),
    "no outputs": http({"predictions": ["a"]}),
    "an error with 200": http({"error": "no"}),
    "outputs null": http({"outputs": None}),
    "outputs a number": http({"outputs": 7}),
    "outputs text": http({"outputs": "a"}),
    "outputs no names": http({"outputs": []}),
    "output no list": outputs(text="a"),
    "output missing": outputs(logprobs=None),
    "no rows": outputs(**{name: [] for name in GOOD}),
    "more rows": outputs(**{name: 2 * values for name, values in GOOD.items()}),
    "texts of other rows": outputs(text=["a", "b"]),
    "text a number": outputs(text=[7]),
    "text null": outputs(text=[None]),
    "text half a character": http(json.dumps({"outputs": GOOD}).replace('" a"', '"\\ud83d"').encode()),
    "reason null": outputs(finish_reason=[None]),
    "reason a number": outputs(finish_reason=[0]),
    "reason unheard of": outputs(finish_reason=["because"]),
    "no reason": outputs(finish_reason=[""]),
    "ids flat": outputs(ids=[7]),
    "ids text": outputs(ids=[["7"]]),
    "ids fractions": outputs(ids=[[7.5]]),
    "ids below 0": outputs(ids=[[-7]]),
    "ids too large": outputs(ids=[[2**31]]),
    "ids truths": outputs(ids=[[True]]),
    "logprobs text": outputs(logprobs=[["-1"]]),
    "logprobs null": outputs(logprobs=[[None]]),
    "length text": outputs(completion_length=["1"]),
    "length below 0": outputs(completion_length=[-1]),
    "length beyond the ids": outputs(completion_length=[5]),
    "length beyond the logprobs": outputs(ids=[[7, 8]], completion_length=[2]),
    "length infinite": http(json.dumps({"outputs": GOOD | {"completion_length": [1e999]}}).encode()),
    "no content": http(b"", "204 No Content"),
    "part of it": http({"outputs": GOOD}, "206 Partial Content"),
    "an error that is no text": http({"error": {"code": 7}}, "400 Bad Request"),
    "an error that is null": http({"error": None}, "400 Bad Request"),
    "an error in a list": http(["error"], "500 Internal Server Error"),
    "an error too deep": http(b"[" * 60_000, "500 Internal Server Error"),
    "an error of bytes": http(b"\xff\x00\x1b]0;title\x07", "500 Internal Server Error"),
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "no status": b"HTTP/1.1 abc\r\n\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n",
    "a length of letters": b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n{}",
    "a length of 5,000 digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "broken chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "packed": http(b"\x1f\x8b\x08\x00", headers=["Content-Encoding: gzip"]),
    "hung up": b"",
    "hung up in a header": b"HTTP/1.1 200 OK\r\nContent-",
    "hung up in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{",
    "hung up in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n999\r\n{",
}
"""What a port sends in place of an answer, byte for byte."""

BROKEN_OFF = {"hung up", "hung up in the body", "hung up in a chunk", "broken chunks"}
"""Lies that may be a server that ended, so it is asked again."""


@contextlib.contextmanager
def raw_port(answer):
    """Opens a port that answers each request with bytes, or by a function of its connection; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=reply, args=(connection,), daemon=True).start()

    def reply(connection):
        with connection, contextlib.suppress(OSError):
            head, _, body = connection.recv(2**16).partition(b"\r\n\r\n")
            n_bytes = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            while len(body) < n_bytes:
                body += connection.recv(2**16)
            connection.sendall(answer) if isinstance(answer, bytes) else answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def rest_client(kit_client, address, **options):
    return kit_client.Client(kit_client.Rest(address, **options), attempts=1)


def test_an_answer_made_by_hand_is_one(kit_client):
    """What the lies below change."""
    with raw_port(outputs()) as address:
        assert rest_client(kit_client, address).generate(["x"]) == [kit_client.Completion(" a", [7], [-1.5], "length")]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_of_the_clients_own(lie, kit_client, capsys):
    with raw_port(LIES[lie]) as address:
        with pytest.raises(kit_client.ServingError) as caught:
            rest_client(kit_client, address, timeout_s=5).generate(["x"])
        stream = rest_client(kit_client, address, timeout_s=5).stream("x")
        with pytest.raises(kit_client.ServingError):
            list(stream)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert (caught.value.code == "UNAVAILABLE") == (lie in BROKEN_OFF)


def test_the_command_tells_a_lie_in_one_line(kit_client, capsys):
    with raw_port(http(b"<html>\x1b[2J\nWelcome" + b"x" * 10**6, "500 Internal Server Error")) as address:
        assert kit_client.main(["--rest", address, "x"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("client.py: HTTP 500: <html> [2J Welcome")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) < 1000


def drip(first, each):
    """Sends something, and then a little every now and then, for ever."""

    def send(connection):
        connection.sendall(first)
        while True:
            connection.sendall(each)
            time.sleep(0.05)

    return send


DRIPS = {
    "the status": drip(b"", b"H"),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"X"),
    "a body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "a body without end": drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "an error": drip(b"HTTP/1.1 500 No\r\nContent-Length: 1000\r\n\r\n", b" "),
    "continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("what", DRIPS)
def test_a_server_that_drips_is_held_to_the_time_out_as_a_total(what, kit_client):
    n_threads = threading.active_count()
    with raw_port(DRIPS[what]) as address:
        start = time.perf_counter()
        with pytest.raises(kit_client.ServingError, match=r"DEADLINE_EXCEEDED: no answer within timeout_s=0.5"):
            rest_client(kit_client, address, timeout_s=0.5).generate(["x"])
        assert time.perf_counter() - start < 3
    start = time.perf_counter()
    while threading.active_count() > n_threads and time.perf_counter() - start < 10:
        time.sleep(0.05)
    assert threading.active_count() <= n_threads  # nothing goes on waiting


@pytest.mark.parametrize("headers", ["Content-Length: 600000000", "Transfer-Encoding: chunked", "X: x"])
def test_a_large_answer_is_not_read_whole(headers, kit_client):
    sent = []

    def send(connection):
        connection.sendall(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode())
        part = b" " * 2**16
        while True:
            connection.sendall(b"10000\r\n" + part + b"\r\n" if "chunked" in headers else part)
            sent.append(len(part))

    with raw_port(send) as address:
        with pytest.raises(kit_client.ServingError, match=r"INTERNAL: the answer has more than most_bytes=1000000: "):
            rest_client(kit_client, address, most_bytes=10**6).generate(["x"])
        time.sleep(0.1)
    assert sum(sent) < 2 * 10**7  # some of it fills what lies between
    assert kit_client.MOST_ANSWER_BYTES <= 2**28


def test_an_answer_of_the_largest_size_is_read(kit_client):
    answer = outputs()
    n_bytes = len(answer.partition(b"\r\n\r\n")[2])
    with raw_port(answer) as address:
        assert rest_client(kit_client, address, most_bytes=n_bytes).generate(["x"])
        with pytest.raises(kit_client.ServingError, match=f"more than most_bytes={n_bytes - 1}"):
            rest_client(kit_client, address, most_bytes=n_bytes - 1).generate(["x"])


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_not_followed(status, kit_client):
    visits = []
    with raw_port(lambda connection: visits.append(1)) as elsewhere:
        for location in (f"Location: {elsewhere}/v1", "Location: file:///etc/passwd", "Location: //[", "X: x"):
            refused = pytest.raises(kit_client.ServingError, match=f"HTTP {status[:3]}: the server redirects to")
            with raw_port(http(b"", status, [location])) as address, refused:
                rest_client(kit_client, address).generate(["x"])
    assert not visits


@pytest.mark.parametrize(
    ("model", "label"), [("a/b", None), ("gpt2?x=1#y", "é/ü"), ("../../secret", " "), ("a:b", "%2e")]
)
def test_names_are_quoted_into_the_url(model, label, kit_client):
    lines = []

    def send(connection):
        connection.sendall(outputs())

    with raw_port(send) as address:
        rest = kit_client.Rest(address, model, label=label)
        exchange = kit_client.http.client.HTTPConnection.request

        def request(connection, method, path, *arguments):
            lines.append(path)
            return exchange(connection, method, path, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kit_client.http.client.HTTPConnection, "request", request)
            assert kit_client.Client(rest).generate(["x"])
    ((_, v1, models, *names),) = [line.removesuffix(":predict").split("/") for line in lines]
    assert (v1, models) == ("v1", "models")
    assert [kit_client.unquote(name) for name in names] == [model, *(["labels", label] if label else [])]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_names_that_are_directions_are_refused(name, kit_client):
    with pytest.raises(ValueError, match="model must be a name"):
        kit_client.Rest("localhost:1", name)
    with pytest.raises(ValueError, match="label must be a name"):
        kit_client.Rest("localhost:1", label=name)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_time_out_that_is_none_is_refused(timeout_s, transport, kit_client):
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        transport("localhost:1", timeout_s=timeout_s)


def test_a_password_in_the_address_is_sent_and_not_shown(kit_client):
    heads = []

    def send(connection):
        connection.sendall(http({"error": "no"}, "401 Unauthorized"))

    with raw_port(send) as address:
        rest = kit_client.Rest(address.replace("//", "//me:se%20cret@"))
        heads.append(rest._headers["Authorization"])
        with pytest.raises(kit_client.ServingError, match="HTTP 401: no"):
            rest.predict("generate", {"text": ["x"]})
    with pytest.raises(kit_client.ServingError, match="UNAVAILABLE") as caught:
        rest.predict("generate", {"text": ["x"]})
    assert heads == ["Basic bWU6c2UgY3JldA=="]
    assert "cret" not in str(caught.value)


class Scripted:
    """A transport that gives what a function of the inputs gives."""

    def __init__(self, answer):
        self.answer, self.n_calls = answer, 0

    def predict(self, signature, inputs):
        self.n_calls += 1
        length = inputs["lengths"][0] + inputs["n_tokens"][0]
        good = {"ids": [[7] * length], "lengths": [length], "text": ["a" * length], "finish_reason": [""]}
        return good | self.answer(length)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda length: {}, "the server goes on after .* max_new_tokens is 40"),
        (lambda length: {"ids": [[7] * 1000], "lengths": [1000]}, "the server goes on after 1000 tokens"),
        (lambda length: {"text": ["ab"[length > 3] * length]}, "the server changed the text"),
        (lambda length: {"ids": [[length] * length]}, "the server changed the text or the ids"),
        (lambda length: {"lengths": [length + 1]}, "lengths .* for .* ids"),
        (lambda length: {"ids": [[7] * length] * 2}, "the answer's ids is not what 1 rows have"),
        (lambda length: {"finish_reason": ["maybe"]}, "the answer's finish_reason"),
    ],
)
def test_a_stream_has_an_end(answer, message, kit_client):
    transport = Scripted(answer)
    with pytest.raises(kit_client.ServingError, match=message):
        list(kit_client.Client(transport).stream("x"))
    assert transport.n_calls <= 7


def test_lies_over_grpc_are_errors_of_the_clients_own(kit_client, grpc_, monkeypatch):
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictResponse

    transport = kit_client.Grpc(grpc_.address)
    good = {name: np.array(values) for name, values in GOOD.items() if name not in ("text", "finish_reason")}
    good |= {name: np.array([GOOD[name][0].encode()], object) for name in ("text", "finish_reason")}

    def answer(change):
        response = PredictResponse()
        for name, array in good.items():
            dtype = tf.float32 if name == "logprobs" else None if array.dtype == object else tf.int32
            response.outputs[name].CopyFrom(tf.make_tensor_proto(array, dtype))
        change(response.outputs)
        monkeypatch.setattr(transport._stub, "Predict", lambda request, **options: response)
        return kit_client.Client(transport).generate(["x"])

    def huge(outputs):
        del outputs["ids"].tensor_shape.dim[:]
        outputs["ids"].tensor_shape.dim.add(size=1)
        outputs["ids"].tensor_shape.dim.add(size=2**40)

    assert answer(lambda outputs: None)[0].text == " a"
    for change in (
        lambda outputs: outputs.clear(),
        lambda outputs: outputs.pop("ids"),
        lambda outputs: outputs["text"].string_val.__setitem__(0, b"\xff"),
        lambda outputs: outputs["text"].tensor_shape.Clear(),
        lambda outputs: outputs["logprobs"].tensor_shape.dim[0].__setattr__("size", -1),
        lambda outputs: outputs["logprobs"].__setattr__("dtype", 0),
        lambda outputs: outputs["logprobs"].__setattr__("dtype", 7),
        lambda outputs: outputs["ids"].__setattr__("tensor_content", b"abc"),
        lambda outputs: outputs["completion_length"].tensor_shape.dim.add(size=1),
        huge,
    ):
        with pytest.raises(kit_client.ServingError, match="INTERNAL: the answer's"):
            answer(change)


def test_a_large_answer_over_grpc_is_not_read_and_not_asked_for_again(kit_client, grpc_, naps):
    transport = kit_client.Grpc(grpc_.address, most_bytes=1000)
    with pytest.raises(kit_client.ServingError, match="INTERNAL: the answer has more than most_bytes=1000"):
        kit_client.Client(transport).predict("logits", {"ids": [[1, 2]], "lengths": [2]})
    assert not naps
