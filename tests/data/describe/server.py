"""A chat server on loopback that answers as told: well, slowly, with errors, or not at all."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

MODEL = "tiny-vlm"


class Answer:
    """What the server does with one request; `drip`: seconds over which it sends the body."""

    def __init__(self, status=200, body=None, headers=None, delay=0.0, drip=0.0, cut=False):
        self.status, self.body, self.headers = status, body, headers or {}
        self.delay, self.drip, self.cut = delay, drip, cut


def said(text: str | None, finish: str = "stop", refusal: str | None = None, **how) -> Answer:
    """A whole chat completion."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL}
    return Answer(body={**body, "choices": [choice]}, **how)


def error(status: int, told: str = "no", **headers) -> Answer:
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return Answer(status, {"error": {"message": told}}, named)


class ChatServer:
    """Answers each request with `behave(number, request)`; keeps requests and their times."""

    def __init__(self, behave: Callable[[int, dict], Answer]) -> None:
        self.behave = behave
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self._send(
                    Answer(body={"object": "list", "data": [{"id": MODEL, "object": "model"}]})
                )

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                request = json.loads(self.rfile.read(length))
                with owner._lock:
                    number = len(owner.requests)
                    owner.requests.append(request)
                    owner.times.append(time.monotonic())
                    owner.busy += 1
                    owner.most_busy = max(owner.busy, owner.most_busy)
                try:
                    self._send(owner.behave(number, request))
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with owner._lock:
                        owner.busy -= 1

            def _send(self, answer: Answer) -> None:
                time.sleep(answer.delay)
                data = json.dumps(answer.body).encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if answer.cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif answer.drip:
                    for place in range(len(data)):
                        self.wfile.write(data[place : place + 1])
                        self.wfile.flush()
                        time.sleep(answer.drip / len(data))
                else:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


def sent_image(request: dict) -> np.ndarray:
    """The pixels that a request carries."""
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    data = np.frombuffer(base64.b64decode(url.split(",", 1)[1]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)
