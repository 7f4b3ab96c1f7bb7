"""A server of one module over HTTP, with Python's own `http.server`: for trials, not for the internet."""

from __future__ import annotations

import json
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import torch

from fulmen.serve.servable_module import ServableModule


class Response(NamedTuple):
    """What a server answered.

    Attributes:
        status_code: 200 if all went well; 500 if the module raised.
        text: the body; of an error, the traceback.
    """

    status_code: int
    text: str

    @property
    def ok(self) -> bool:
        """Did all go well?"""
        return self.status_code == 200

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.text)


def answer_request(module: ServableModule, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a module to a request, both as JSON can hold them.

    Args:
        module: which computes without gradients.
        request: its "body" has the arguments of `serve_step`.

    Returns:
        The results by name.

    Raises:
        TypeError: `serve_step` returned no dictionary.
        KeyError: an argument is missing, or a result.
    """
    deserializers, serializers = module.configure_serialization()
    arguments = dict(request["body"])
    for name, deserialize in deserializers.items():
        arguments[name] = deserialize(arguments[name])
    with torch.no_grad():
        results: object = module.serve_step(**arguments)
    if not isinstance(results, dict):
        what = f"`{type(module).__name__}.serve_step` must return results by name, not a `{type(results).__name__}`."
        raise TypeError(f"{what} For example: `{{'output': output}}`.")
    for name, serialize in serializers.items():
        results[name] = serialize(results[name])
    return results


@contextmanager
def serve_module(module: ServableModule, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serves a module while the context is open, from a thread of this process.

    ``GET /ping`` tells that it is there, ``POST /serve`` with JSON asks the module.

    Args:
        module: is asked for one request at a time.
        host: the address to listen at.
        port: its port; 0 takes one that is free.

    Yields:
        The address, such as "http://127.0.0.1:8080".

    Raises:
        OSError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        lock = threading.Lock()

        def do_GET(self) -> None:
            self.send_answer(*((200, {"status": "ok"}) if self.path == "/ping" else (404, {"detail": "Not Found"})))

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/serve":
                self.send_answer(404, {"detail": "Not Found"})
                return
            try:
                with self.lock:
                    answer: object = answer_request(module, json.loads(content))
                self.send_answer(200, answer)
            except Exception:  # whatever the module raises is the answer
                self.send_answer(500, traceback.format_exc())

        def send_answer(self, status: int, answer: object) -> None:
            text = answer if isinstance(answer, str) else json.dumps(answer)
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed for each request."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        fix = "Pass another `port`, or 0 for one that is free."
        raise OSError(error.errno, f"No server can listen at port {port} of {host}: {error.strerror}. {fix}") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="fulmen-serve", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def post_json(url: str, content: object, timeout_s: float) -> Response:
    """The answer to a request, whatever its status.

    Args:
        url: whom to ask.
        content: what is sent, as JSON can hold it.
        timeout_s: how long to wait, in seconds.

    Raises:
        OSError: nobody answers, or not in time.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
    # A proxy of the environment could not reach this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return Response(answer.status, answer.read().decode())
    except urllib.error.HTTPError as error:
        return Response(error.code, error.read().decode())
