"""A real S3 server on the loopback (moto's), behind a proxy that injects faults."""

from __future__ import annotations

import contextlib
import http.client
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENVIRON = {
    "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1", "no_proxy": "127.0.0.1",
}  # fmt: skip
"""Environment of the server's clients; botocore tries once, so that the project's own retries are tested."""

_HOLD_SECONDS = 120
_ANSWERS = {
    "301": ("PermanentRedirect", "The bucket is in another region."),
    "400": ("AuthorizationHeaderMalformed", "The region is wrong."),
    "403": ("ExpiredToken", "The provided token has expired."),
    "507": ("InsufficientStorage", "the bucket is full"),
}
"""Code and message of the answers; others are empty."""
Fault = Callable[[str, str, int], str | None]
"""Called with method, path and number of a request; returns what goes wrong, or None.

`301`, `503` and other numbers are answers; `cut` is half of one; `ignore-condition` drops If-None-Match. `hold` waits
for `released` before the request is forwarded, `hold-body` before its body is read.
"""


class FaultyStore(ThreadingHTTPServer):
    """Forwards requests to moto's server, but those for which `fault` names what goes wrong."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moto = (host, port)
        self.fault: Fault = lambda method, path, number: None
        self.requests: list[str] = []
        self.is_waiting, self.released = threading.Event(), threading.Event()

    @property
    def environ(self) -> dict[str, str]:
        """The environment of its clients."""
        return {**ENVIRON, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}"}


class _Handler(BaseHTTPRequestHandler):
    server: FaultyStore
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        fault = self.server.fault(self.command, self.path, len(self.server.requests))
        if fault == "hold-body":
            self.server.is_waiting.set()
            self.server.released.wait(_HOLD_SECONDS)
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:  # the client has ended
            self.close_connection = True
            return None
        if fault is not None and fault.isdecimal():
            code, message = _ANSWERS.get(fault, ("", ""))
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""
            return self._answer(int(fault), {}, text.encode())
        if fault == "hold":
            self.server.is_waiting.set()
            self.server.released.wait(_HOLD_SECONDS)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        if fault == "ignore-condition":
            headers.pop("If-None-Match", None)
        connection = http.client.HTTPConnection(*self.server.moto, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), cut=fault == "cut")
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def handle(self) -> None:
        """Handle one request after the other; a client may end at any time."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@contextlib.contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """Start moto's server and the proxy; both have an empty bucket named `bucket`."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("WARNING")
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        # Objects of earlier servers of this process would still be there.
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"", timeout=30).close()
        client = boto3.client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
            aws_access_key_id="nobody", aws_secret_access_key="nothing",
        )  # fmt: skip
        client.create_bucket(Bucket="bucket")
        with FaultyStore(host, port) as proxy:
            threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
            s3fs.S3FileSystem.clear_instance_cache()  # of another test's server
            yield proxy
            proxy.released.set()
            proxy.shutdown()
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        moto.stop()
