"""A client of a TensorFlow Serving that serves an export of tf_gpt2, over REST or gRPC.

    python client.py --rest http://localhost:8501 "To be" --stream
    python client.py --grpc localhost:8500 "To be" --temperature 0.7 --seed 1

One file to copy. REST needs nothing but Python; gRPC needs ``tensorflow-serving-api``, which brings TensorFlow. Knows
the signatures' names and inputs; knows nothing of the package that wrote them.

A server is not trusted: whatever it answers, and however slowly, becomes a result or a ``ServingError``, in bounded
time and memory. REST goes straight to the address: it follows no redirect, and asks no proxy.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import math
import queue
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

OPTIONS = {
    "max_new_tokens": ("int32", 40),
    "temperature": ("float32", 0.0),
    "top_k": ("int32", 0),
    "top_p": ("float32", 1.0),
    "min_p": ("float32", 0.0),
    "typical_p": ("float32", 1.0),
    "repetition_penalty": ("float32", 1.0),
    "presence_penalty": ("float32", 0.0),
    "frequency_penalty": ("float32", 0.0),
    "no_repeat_ngram_size": ("int32", 0),
    "min_new_tokens": ("int32", 0),
    "seed": ("int64", 0),
}
"""Type and default of each option. All are sent, one value per row, as REST and batching want."""

DTYPES = {"text": "string", "ids": "int32", "lengths": "int32", "n_tokens": "int32"}
DTYPES |= {name: dtype for name, (dtype, _) in OPTIONS.items()}

CODES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
"""gRPC's names of the server's HTTP codes."""

RETRIED = {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
"""Failures that pass. The same request gives the same text, so asking again is safe."""

REMEDIES = {
    "DEADLINE_EXCEEDED": "ask for fewer max_new_tokens, or raise timeout_s here and --rest_api_timeout_in_ms there",
    "FAILED_PRECONDITION": "see which signatures the export has: saved_model_cli show --dir FOLDER --all",
    "INTERNAL": "what answered is no server of an export of tf_gpt2, or is broken: check the address",
    "INVALID_ARGUMENT": "mend the request; /metadata behind the model's address lists signatures and inputs",
    "NOT_FOUND": "check the model's name, version and label, and the status at /v1/models/NAME",
    "RESOURCE_EXHAUSTED": "the server's queue is full: ask less often, or add servers",
    "UNAVAILABLE": "see that the server is up, the address right, and the model's state AVAILABLE at /v1/models/NAME",
}

MOST_ROWS = 8
"""Texts in one request: a server that collects batches refuses more than ``max_batch_size`` of batching.config."""

LONGEST_STEP = 16  # tokens a call of a stream: more would wait longer, fewer would cost more calls
CONNECT_TIMEOUT_S = 5

MOST_ANSWER_BYTES = 2**26
"""Bytes of an answer that are read, unless ``most_bytes`` says otherwise: logits may need more."""

MOST_ERROR_BYTES = 2**16
"""Bytes that are read of what comes with an HTTP code of failure."""

LONGEST_MESSAGE = 500  # characters of what a server said that are shown

FINISHED = {"length", "stop", "context"}
"""Reasons for which a text ends."""


class ServingError(Exception):
    """A request failed.

    Attributes:
        code: gRPC's name of the failure, such as "INVALID_ARGUMENT".
    """

    def __init__(self, code: str, message: str):
        remedy = REMEDIES.get(code)
        if "XLA" in message:
            remedy = "start the server with --xla_cpu_compilation_enabled=true, or use the signature without _xla"
        super().__init__(f"{code}: {printable(message)}" + (f" ({remedy})" if remedy else ""))
        self.code = code


def printable(message: str) -> str:
    """Makes one line for a terminal of what a server said: no control characters, not too long."""
    message = message[: 4 * LONGEST_MESSAGE]
    line = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}…"


def broken(message: str) -> ServingError:
    """Returns the error for an answer that no server of an export gives."""
    return ServingError("INTERNAL", message)


def too_large(most_bytes: int) -> ServingError:
    """Returns the error for an answer that is not read to its end."""
    message = f"the answer has more than most_bytes={most_bytes}: send fewer rows at once, or raise most_bytes"
    return broken(message)


class Completion(NamedTuple):
    """What the model added to one text.

    Attributes:
        text: the new text alone.
        ids: the new tokens; logprobs: of each, natural logarithm.
        finish_reason: "length", "stop", "context", or "error: …" where this text could not be served.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Answer(NamedTuple):
    """What came back from a REST port.

    Attributes:
        status: HTTP's code.
        location: where a redirect points to, or nothing.
        content: the body, of a failure only its beginning.
    """

    status: int
    location: str
    content: bytes


class Rest:
    """The server's REST port, in column format: each input once, with the values of all rows.

    Args:
        address: such as "http://localhost:8501", or without the "http://".
        model: its name in the server.
        label: a version's label; without one the newest version answers.
        timeout_s: longest wait for one whole answer, from looking up the address to the last byte.
        most_bytes: of an answer; a longer one is an error.

    Raises:
        ValueError: when the address is none, a name is empty, or ``timeout_s`` is no time.
    """

    def __init__(
        self,
        address: str,
        model: str = "gpt2",
        *,
        label: str | None = None,
        timeout_s: float = 120,
        most_bytes: int = MOST_ANSWER_BYTES,
    ):
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"address must be such as http://localhost:8501, got {printable(address)}")
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = quote(parts.path.rstrip("/"), safe="/%") + path_of(model, label)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        port = f":{parts.port}" if parts.port else ""
        self._url = f"{parts.scheme}://{host}{port}{self._path}"  # as messages show it: without a password
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        self._timeout_s, self._most_bytes = check_timeout(timeout_s), most_bytes

    def predict(self, signature: str, inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Runs a signature; gives its outputs by name.

        Raises:
            ServingError: when the server refuses, cannot be reached, does not answer in time, or answers nonsense.
        """
        answer = self._post(json.dumps({"signature_name": signature, "inputs": inputs}).encode())
        if 300 <= answer.status < 400:
            message = (
                f"the server redirects to {answer.location or 'nowhere'}, which is not followed; if it is right, ask it"
            )
            raise ServingError(f"HTTP {answer.status}", message)
        if answer.status != 200:
            raise ServingError(CODES.get(answer.status, f"HTTP {answer.status}"), error_of(answer.content))
        return outputs_of(answer.content)

    def _post(self, body: bytes) -> Answer:
        """Sends a body, and waits for the answer in a thread of its own.

        A server that sends a byte now and then never lets a socket's own time-out come; the wait here is the total.
        """
        sockets: list[socket.socket] = []
        outcome: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def exchange() -> None:
            try:
                outcome.put(self._exchange(body, sockets))
            except Exception as error:
                outcome.put(error)

        threading.Thread(target=exchange, daemon=True).start()  # at exit nobody waits for it
        try:
            found = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            raise ServingError("DEADLINE_EXCEEDED", f"no answer within timeout_s={self._timeout_s}") from None
        finally:
            for one in sockets:  # ends the thread, whatever it waits for
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        if isinstance(found, Answer):
            return found
        raise self._error_for(found) from found

    def _exchange(self, body: bytes, sockets: list[socket.socket]) -> Answer:
        """Sends a body and reads the answer; appends the socket to a list as soon as there is one."""
        make = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=min(CONNECT_TIMEOUT_S, self._timeout_s))
        try:
            start = time.monotonic()
            connection.connect()
            sockets.append(connection.sock)
            if time.monotonic() - start > self._timeout_s:  # nobody waits any more
                raise TimeoutError
            # longer than the wait for the whole, or this end of it might come first, and look like a broken connection
            connection.sock.settimeout(2 * self._timeout_s)
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            with response:
                return self._read(response)
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> Answer:
        """Reads an answer, up to a limit."""
        is_good = response.status == 200
        most_bytes = self._most_bytes if is_good else MOST_ERROR_BYTES
        if is_good and (response.length or 0) > most_bytes:
            raise too_large(most_bytes)
        content = bytearray()
        while len(content) <= most_bytes and (part := response.read(min(2**16, most_bytes + 1 - len(content)))):
            content += part
        if is_good and len(content) > most_bytes:
            raise too_large(most_bytes)
        if is_good and response.length:
            raise ConnectionError(f"the answer ended {response.length} bytes before its end")
        return Answer(response.status, response.headers.get("Location", ""), bytes(content))

    def _error_for(self, error: Exception) -> Exception:
        """Returns what to raise for an exchange that failed."""
        if isinstance(error, ServingError):
            return error
        if isinstance(error, (OSError, http.client.IncompleteRead)):
            return ServingError("UNAVAILABLE", f"no connection to {self._url}, or it broke: {error}")
        return broken(f"{self._url} does not speak HTTP: {type(error).__name__} {error}")


def path_of(model: str, label: str | None) -> str:
    """Returns the path of a model's signatures, with names that hold anything.

    Raises:
        ValueError: when a name is empty, or one that a path takes for a direction.
    """
    for what, name in (("model", model), ("label", label)):
        if name in ("", ".", ".."):
            raise ValueError(f"{what} must be a name, got {name!r}")
    return f"/v1/models/{quote(model, safe='')}{f'/labels/{quote(label, safe=str())}' if label else ''}:predict"


def check_timeout(timeout_s: float) -> float:
    """Returns a time to wait that threads can wait.

    Raises:
        ValueError: when it is no number above 0.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    return min(timeout_s, threading.TIMEOUT_MAX)


def outputs_of(content: bytes) -> dict[str, list[Any]]:
    """Reads the outputs in an answer's body.

    Raises:
        ServingError: when there are none.
    """
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise broken(f"the answer is no JSON: {error}; it begins {content[:80]!r}") from error
    if not isinstance(answer, dict) or "outputs" not in answer:
        raise broken(f'the answer has no "outputs": it begins {content[:80]!r}')
    outputs = answer["outputs"]
    outputs = outputs if isinstance(outputs, dict) else {"text": outputs}  # the server does not name a sole output
    for name, values in outputs.items():
        if not isinstance(values, list):
            raise broken(f"the answer's {name} is no list of rows")
    return outputs


def error_of(content: bytes) -> str:
    """Gives the server's message, or what a proxy in front of it said."""
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        return str(json.loads(content)["error"])
    return content[:LONGEST_MESSAGE].decode(errors="replace")


class Grpc:
    """The server's gRPC port; arguments as for ``Rest``, the address such as "localhost:8500"."""

    def __init__(
        self,
        address: str,
        model: str = "gpt2",
        *,
        label: str | None = None,
        timeout_s: float = 120,
        most_bytes: int = MOST_ANSWER_BYTES,
    ):
        try:
            import grpc
            import tensorflow as tf
            from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            raise ImportError('gRPC needs the serving protos: pip install "tf_gpt2[serving]"') from error
        self._grpc, self._tf, self._predict_pb2 = grpc, tf, predict_pb2
        channel_options = [
            ("grpc.max_receive_message_length", most_bytes),
            ("grpc.max_reconnect_backoff_ms", 1000),  # or retries would fail without trying
            ("grpc.lb_policy_name", "round_robin"),  # over the addresses of a headless Kubernetes service
        ]
        channel = grpc.insecure_channel(address, channel_options)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self._model, self._label = model, label
        self._timeout_s, self._most_bytes = check_timeout(timeout_s), most_bytes

    def predict(self, signature: str, inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """See ``Rest.predict``."""
        request = self._predict_pb2.PredictRequest()
        request.model_spec.name = self._model
        request.model_spec.signature_name = signature
        if self._label:
            request.model_spec.version_label = self._label
        for name, values in inputs.items():
            request.inputs[name].CopyFrom(self._tf.make_tensor_proto(values, DTYPES[name]))
        try:
            response = self._stub.Predict(request, timeout=self._timeout_s)
        except self._grpc.RpcError as error:
            details = error.details() or ""
            if "larger than max" in details:  # said by this side, with a code that would be tried again
                raise too_large(self._most_bytes) from error
            raise ServingError(error.code().name, details) from error
        return {name: self._as_list(name, tensor) for name, tensor in response.outputs.items()}

    def _as_list(self, name: str, tensor: Any) -> list[Any]:
        """Gives a tensor as REST would: nested lists, text decoded.

        Raises:
            ServingError: when it is no tensor with rows.
        """
        sizes = [dimension.size for dimension in tensor.tensor_shape.dim]
        try:
            # a tensor may be sent as one value for all places: its shape alone says how much memory it takes
            n_bytes = math.prod(sizes) * self._tf.as_dtype(tensor.dtype).size
            if not sizes or min(sizes) < 0 or n_bytes > self._most_bytes:
                raise ValueError(f"of the shape {sizes}")
            return decoded(self._tf.make_ndarray(tensor).tolist())
        except (TypeError, ValueError) as error:
            raise broken(f"the answer's {name} is no tensor: {error}") from error


def decoded(values: Any) -> Any:
    """Turns the bytes in nested lists into text."""
    if isinstance(values, list):
        return [decoded(value) for value in values] if values and isinstance(values[0], (bytes, list)) else values
    return values.decode()


class Client:
    """Text to text.

    Args:
        transport: ``Rest(…)`` or ``Grpc(…)``.
        xla: use the compiled signatures; the export must have them, and the server must be told to run them.
        attempts: how often a request is sent, at most, while the failures are such as pass.
    """

    def __init__(self, transport: Rest | Grpc, *, xla: bool = False, attempts: int = 6):
        self._transport, self._suffix, self._attempts = transport, "_xla" if xla else "", attempts

    def generate(self, texts: Sequence[str], **options: float) -> list[Completion]:
        """Continues texts, ``MOST_ROWS`` in a request.

        Args:
            texts: any number.
            **options: of ``OPTIONS``, the same for all texts.
        """
        starts = range(0, len(texts), MOST_ROWS)
        return [one for start in starts for one in self._generate(texts[start : start + MOST_ROWS], options)]

    def _generate(self, texts: Sequence[str], options: Mapping[str, float]) -> list[Completion]:
        """Continues texts in one request."""
        n_rows = len(texts)
        outputs = self.predict("generate", {"text": list(texts)} | rows_of(options, n_rows))
        texts, reasons = column(outputs, "text", n_rows, is_text), column(outputs, "finish_reason", n_rows, is_end)
        ids, logprobs = column(outputs, "ids", n_rows, is_ids), column(outputs, "logprobs", n_rows, is_numbers)
        lengths = column(outputs, "completion_length", n_rows, is_count)
        if any(length > min(len(row), len(other)) for length, row, other in zip(lengths, ids, logprobs, strict=True)):
            raise broken("the answer's completion_length is larger than its rows of ids or logprobs")
        columns = zip(texts, ids, logprobs, reasons, lengths, strict=True)
        return [Completion(text, row[:n], numbers[:n], reason) for text, row, numbers, reason, n in columns]

    def complete(self, text: str, **options: float) -> str:
        """Continues a text.

        Raises:
            ServingError: also when this text cannot be served.
        """
        (completion,) = self.generate([text], **options)
        if completion.finish_reason.startswith("error: "):
            raise ServingError("INVALID_ARGUMENT", completion.finish_reason)
        return completion.text

    def stream(self, text: str, **options: float) -> Iterator[str]:
        """Continues a text, piece by piece; the pieces joined are what ``generate`` gives.

        The server keeps nothing between calls: each carries the tokens so far. The first asks for one token, so that
        something comes at once, the next for two, four, and so on. Raises as ``complete``.
        """
        ids, length, shown, n_tokens = [0], 0, "", 1
        most_tokens = options.get("max_new_tokens", OPTIONS["max_new_tokens"][1])
        while True:
            inputs = {"text": [text], "ids": [ids], "lengths": [length], "n_tokens": [n_tokens]}
            new = next_of(self.predict("next", inputs | rows_of(options, 1)))
            if new.finish_reason.startswith("error: "):
                raise ServingError("INVALID_ARGUMENT", new.finish_reason)
            check_next(new, shown, ids[:length], most_tokens)
            if new.text != shown:
                yield new.text[len(shown) :]
            if new.finish_reason:
                return
            ids, length, shown = new.ids, len(new.ids), new.text
            n_tokens = min(2 * n_tokens, LONGEST_STEP)

    def predict(self, signature: str, inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Runs any signature, again while failures are such as pass; gives its outputs by name."""
        for attempt in range(1, self._attempts):
            try:
                return self._transport.predict(signature + self._suffix, inputs)
            except ServingError as error:
                if error.code not in RETRIED:
                    raise
            # half of the wait is random, or clients that failed together would come back together
            time.sleep(min(0.25 * 2**attempt, 8) * random.uniform(0.5, 1))
        return self._transport.predict(signature + self._suffix, inputs)


class Next(NamedTuple):
    """All the new text and tokens so far, and why they end, or nothing when they go on."""

    text: str
    ids: list[int]
    finish_reason: str


def next_of(outputs: Mapping[str, Any]) -> Next:
    """Reads the one row of an answer of ``next``."""
    (text,) = column(outputs, "text", 1, is_text)
    (ids,) = column(outputs, "ids", 1, is_ids)
    (length,) = column(outputs, "lengths", 1, is_count)
    (reason,) = column(outputs, "finish_reason", 1, lambda value: value == "" or is_end(value))
    if length > len(ids):
        raise broken(f"the answer has lengths {length} for {len(ids)} ids")
    return Next(text, ids[:length], reason)


def check_next(new: Next, shown: str, ids: list[int], most_tokens: float) -> None:
    """Raises ``ServingError`` when an answer of ``next`` does not go on from what was sent, or goes on for ever."""
    n_tokens = len(new.ids)
    if not new.finish_reason and n_tokens <= len(ids):
        raise broken(f"the server added no token to the {len(ids)} it was sent")
    if new.ids[: len(ids)] != ids or not new.text.startswith(shown):
        raise broken("the server changed the text or the ids that it was sent")
    if n_tokens > most_tokens or (n_tokens == most_tokens and not new.finish_reason):
        raise broken(f"the server goes on after {n_tokens} tokens, and max_new_tokens is {most_tokens}")


def column(outputs: Mapping[str, Any], name: str, n_rows: int, holds: Callable[[Any], bool]) -> list[Any]:
    """Returns the values of an output, one per row.

    Raises:
        ServingError: when it is missing, has another number of rows, or values of another kind.
    """
    values = outputs.get(name)
    if not isinstance(values, list) or len(values) != n_rows or not all(map(holds, values)):
        raise broken(f"the answer's {name} is not what {n_rows} rows have: {repr(values)[:80]}")
    return values


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written: JSON may hold halves of characters."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def is_end(value: Any) -> bool:
    """Whether a value is a reason for which a text ends."""
    return is_text(value) and (value in FINISHED or value.startswith("error: "))


def is_count(value: Any) -> bool:
    """Whether a value is a number of tokens, or an id."""
    return type(value) is int and 0 <= value < 2**31


def is_ids(value: Any) -> bool:
    """Whether a value is a row of ids."""
    return isinstance(value, list) and all(map(is_count, value))


def is_numbers(value: Any) -> bool:
    """Whether a value is a row of numbers."""
    return isinstance(value, list) and all(type(one) in (int, float) for one in value)


def rows_of(options: Mapping[str, float], n_rows: int) -> dict[str, list[float]]:
    """Gives every option, one value per row.

    Raises:
        TypeError: on an option that does not exist.
    """
    unknown = options.keys() - OPTIONS.keys()
    if unknown:
        raise TypeError(f"no option {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    return {name: [options.get(name, default)] * n_rows for name, (_, default) in OPTIONS.items()}


def make_parser() -> argparse.ArgumentParser:
    """Makes the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="text to continue")
    parser.add_argument("--rest", metavar="URL", default="http://localhost:8501", help="default: %(default)s")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="instead of REST")
    parser.add_argument("--model", default="gpt2", help="the model's name in the server; default: %(default)s")
    parser.add_argument("--label", help="of a version; without it the newest answers")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--xla", action="store_true", help="use the signatures compiled by XLA")
    parser.add_argument("--timeout_s", type=float, default=120, help="longest wait for an answer; default: %(default)s")
    for name, (dtype, default) in OPTIONS.items():
        kind = float if dtype == "float32" else int
        parser.add_argument(f"--{name}", type=kind, default=default, help="default: %(default)s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the continuation of a text; errors go to standard error, with exit code 1."""
    given = make_parser().parse_args(arguments)
    options = {name: getattr(given, name) for name in OPTIONS}
    try:
        kind, address = (Grpc, given.grpc) if given.grpc else (Rest, given.rest)
        client = Client(kind(address, given.model, label=given.label, timeout_s=given.timeout_s), xla=given.xla)
        for piece in client.stream(given.text, **options) if given.stream else [client.complete(given.text, **options)]:
            print(piece, end="", flush=True)
        print()
    except (ServingError, ImportError, OSError, ValueError) as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
