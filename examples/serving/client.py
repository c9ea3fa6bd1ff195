"""A client of a TensorFlow Serving that serves an export of tf_gpt2, over REST or gRPC.

    python client.py --rest http://localhost:8501 "To be" --stream
    python client.py --grpc localhost:8500 "To be" --temperature 0.7 --seed 1

One file to copy. REST needs ``requests``; gRPC needs ``tensorflow-serving-api``, which brings TensorFlow. Knows the
signatures' names and inputs; knows nothing of the package that wrote them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import requests

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
    "INVALID_ARGUMENT": "mend the request; /metadata behind the model's address lists signatures and inputs",
    "NOT_FOUND": "check the model's name, version and label, and the status at /v1/models/NAME",
    "RESOURCE_EXHAUSTED": "the server's queue is full: ask less often, or add servers",
    "UNAVAILABLE": "see that the server is up, the address right, and the model's state AVAILABLE at /v1/models/NAME",
}

MOST_ROWS = 8
"""Texts in one request: a server that collects batches refuses more than ``max_batch_size`` of batching.config."""

LONGEST_STEP = 16  # tokens a call of a stream: more would wait longer, fewer would cost more calls
CONNECT_TIMEOUT_S = 5


class ServingError(Exception):
    """A request failed.

    Attributes:
        code: gRPC's name of the failure, such as "INVALID_ARGUMENT".
    """

    def __init__(self, code: str, message: str):
        remedy = REMEDIES.get(code)
        if "XLA" in message:
            remedy = "start the server with --xla_cpu_compilation_enabled=true, or use the signature without _xla"
        super().__init__(f"{code}: {' '.join(message.split())}" + (f" ({remedy})" if remedy else ""))
        self.code = code


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


class Rest:
    """The server's REST port, in column format: each input once, with the values of all rows.

    Args:
        address: such as "http://localhost:8501", or without the "http://".
        model: its name in the server.
        label: a version's label; without one the newest version answers.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, address: str, model: str = "gpt2", *, label: str | None = None, timeout_s: float = 120):
        address = address if "://" in address else f"http://{address}"
        self._url = f"{address.rstrip('/')}/v1/models/{model}{f'/labels/{label}' if label else ''}:predict"
        self._timeout_s = timeout_s
        self._session = requests.Session()

    def predict(self, signature: str, inputs: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Runs a signature; gives its outputs by name.

        Raises:
            ServingError: when the server refuses, cannot be reached, or does not answer in time.
        """
        body = json.dumps({"signature_name": signature, "inputs": inputs})
        try:
            response = self._session.post(self._url, data=body, timeout=(CONNECT_TIMEOUT_S, self._timeout_s))
        except requests.ReadTimeout as error:
            raise ServingError("DEADLINE_EXCEEDED", f"no answer within timeout_s={self._timeout_s}") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise ServingError("UNAVAILABLE", f"no connection to {self._url}") from error
        if not response.ok:
            raise ServingError(CODES.get(response.status_code, f"HTTP {response.status_code}"), error_of(response))
        outputs = response.json()["outputs"]
        return outputs if isinstance(outputs, dict) else {"text": outputs}  # the server does not name a sole output


def error_of(response: requests.Response) -> str:
    """Gives the server's message, or what a proxy in front of it said."""
    try:
        return response.json()["error"]
    except (ValueError, LookupError, TypeError):
        return response.text[:300]


class Grpc:
    """The server's gRPC port; arguments as for ``Rest``, the address such as "localhost:8500"."""

    def __init__(self, address: str, model: str = "gpt2", *, label: str | None = None, timeout_s: float = 120):
        try:
            import grpc
            import tensorflow as tf
            from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            raise ImportError('gRPC needs the serving protos: pip install "tf_gpt2[serving]"') from error
        self._grpc, self._tf, self._predict_pb2 = grpc, tf, predict_pb2
        channel_options = [
            ("grpc.max_receive_message_length", -1),  # logits are larger than the 4 MB that are usual
            ("grpc.max_reconnect_backoff_ms", 1000),  # or retries would fail without trying
            ("grpc.lb_policy_name", "round_robin"),  # over the addresses of a headless Kubernetes service
        ]
        channel = grpc.insecure_channel(address, channel_options)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self._model, self._label, self._timeout_s = model, label, timeout_s

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
            raise ServingError(error.code().name, error.details()) from error
        return {name: as_list(self._tf.make_ndarray(tensor)) for name, tensor in response.outputs.items()}


def as_list(array: Any) -> list[Any]:
    """Gives an array as REST would: nested lists, text decoded."""
    return [value.decode() for value in array] if array.dtype == object else array.tolist()


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
        outputs = self.predict("generate", {"text": list(texts)} | rows_of(options, len(texts)))
        lengths = outputs["completion_length"]
        columns = [outputs[name] for name in ("text", "ids", "logprobs", "finish_reason")]
        return [
            Completion(text, ids[:length], logprobs[:length], reason)
            for text, ids, logprobs, reason, length in zip(*columns, lengths, strict=True)
        ]

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
        while True:
            inputs = {"text": [text], "ids": [ids], "lengths": [length], "n_tokens": [n_tokens]}
            outputs = self.predict("next", inputs | rows_of(options, 1))
            reason, new_length, new_text = (outputs[name][0] for name in ("finish_reason", "lengths", "text"))
            if reason.startswith("error: "):
                raise ServingError("INVALID_ARGUMENT", reason)
            if new_text != shown:
                yield new_text[len(shown) :]
            if reason:
                return
            if new_length <= length:
                raise ServingError("INTERNAL", f"the server added no token to the {length} it was sent")
            ids, length, shown = outputs["ids"][0][:new_length], new_length, new_text
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
