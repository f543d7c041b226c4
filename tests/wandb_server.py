"""A minimal wandb server, on which runs can be started, resumed and logged; it stores the rows that it receives.

It also has sweeps over a grid: `wandb agent` gets one trial after the other.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import yaml


class WandbServer(http.server.ThreadingHTTPServer):
    """A server.

    Attributes:
        rows: the histories of the runs, in the order received.
        down: answer every request with 500.
        sweep: the file of the sweep.
        commands: what the agent of the sweep will be asked to do.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.uploaded: list[str] = []
        self.down = False
        self.sweep = ""
        self.commands: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a GraphQL operation; wandb does without the operations that are missing here."""
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "someone"}}
        run = variables.get("name", "")
        if name == "RunResumeStatus":
            return {"model": {**project, "bucket": self._bucket(run) if run in self.rows else None}}
        if name == "UpsertBucket":
            self.rows.setdefault(run, [])
            bucket = {"id": run, "name": run, "displayName": run, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": each, "uploadUrl": f"{self.address}/upload/{each}"} for each in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "username": "someone", "entity": "someone", "email": "", "teams": None}}
        if name == "UpsertSweep":
            self._start_sweep(variables["config"])
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"config": self.sweep, "runs": {"edges": []}}}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if name == "Heartbeat":
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self._next_command(variables))}}
        return {}

    def _start_sweep(self, text: str) -> None:
        sweep = yaml.safe_load(text)
        names = list(sweep["parameters"])
        grid = itertools.product(*(each["values"] for each in sweep["parameters"].values()))
        for number, values in enumerate(grid):
            arguments = {name: {"value": value} for name, value in zip(names, values, strict=True)}
            command = {"type": "run", "run_id": f"trial{number}", "program": sweep["program"], "args": arguments}
            self.commands.append(command)
        self.sweep = text

    def _next_command(self, variables: dict[str, Any]) -> list[dict[str, Any]]:
        if json.loads(variables["runState"]):
            return []  # a trial is running
        return [self.commands.pop(0) if self.commands else {"type": "exit"}]

    def _bucket(self, run: str) -> dict[str, Any]:
        rows = self.rows[run]
        return {
            "id": run,
            "name": run,
            "displayName": run,
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.down:
            self.send_error(500)
            return
        content = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        request = json.loads(content) if self.headers.get("Content-Type") == "application/json" else {}
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            operation = re.search(r"(?:query|mutation) (\w+)", request["query"])
            name = operation[1] if operation else ""
            answer = {"data": self.server.answer(name, request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            run = self.path.split("/")[-2]
            history = (request.get("files") or {}).get("wandb-history.jsonl", {"content": []})
            self.server.rows[run] += [json.loads(line) for line in history["content"]]
        self._send(json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.uploaded.append(self.path.removeprefix("/upload/"))
        self._send(b"")

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """Run a server on this machine."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
