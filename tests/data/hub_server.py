"""A Hugging Face hub on 127.0.0.1: as much of its protocol as `datasets` needs, and its faults."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40

#: What an answer with a file's content can be instead of right.
FAULTS = ("refuses", "stalls", "drips", "times out", "breaks off", "garbage", "ends early", "empty")


class HubServer:
    """Serves the files of a folder as the dataset `owner/name`, from its own threads.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        faults: taken one by one by the next requests of file content.
        is_down: every request of file content gets the fault of this name.
        requests: names of the files whose content was asked for.
        waiting: answers that were not given, and never will be.
    """

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.faults: list[str] = []
        self.is_down: str | None = None
        self.requests: list[str] = []
        self.waiting = 0
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next_fault(self) -> str | None:
        if self.is_down:
            return self.is_down
        return self.faults.pop(0) if self.faults else None

    def close(self) -> None:
        """Releases the stalled answers too."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        listing = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.hub.files.items()
        ]
        if re.fullmatch(r"/api/datasets/owner/name(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in self.hub.files]
            self.answer(200, _json({"id": "owner/name", "sha": COMMIT, "siblings": siblings}))
        elif re.fullmatch(r"/api/datasets/owner/name/tree/\w+", path):
            self.answer(200, _json(listing))
        elif match := re.fullmatch(r"/datasets/owner/name/resolve/\w+/(.+)", path):
            self.serve_file(match[1])
        else:  # among them the folders that a dataset may have
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def serve_file(self, name: str) -> None:
        data = self.hub.files.get(name)
        if data is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        code, headers = 200, {"ETag": '"0"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            code, data = 206, data[begin : end + 1]
        fault = None
        if self.command == "GET":
            self.hub.requests.append(name)
            fault = self.hub.next_fault()
        if fault is None:
            self.answer(code, data, headers)
        else:
            self.fail(fault, code, data, headers)

    def fail(self, fault: str, code: int, data: bytes, headers: dict[str, str]) -> None:
        """The answer has the fault."""
        if fault == "refuses":
            self.answer(500, b"")
        elif fault == "garbage":
            self.answer(code, os.urandom(len(data)), headers)
        elif fault == "ends early":  # at a line's end, with a length that agrees
            self.answer(code, data[: data.rfind(b"\n", 0, len(data) // 2) + 1], headers)
        elif fault == "empty":
            self.answer(code, b"", headers)
        elif fault == "breaks off":
            self.answer(code, data, headers, sent=len(data) // 2)
            self.close_connection = True
        elif fault == "stalls":
            self.answer(code, data, headers, sent=len(data) // 2)
            self.hub.closed.wait()
            self.close_connection = True
        elif fault == "times out":
            self.hub.waiting += 1
            self.hub.closed.wait()
            self.close_connection = True
        elif fault == "drips":  # so that no time-out between two bytes sees it
            self.answer(code, data, headers, sent=0)
            while not self.hub.closed.wait(0.1):
                try:
                    self.wfile.write(b"{")
                except OSError:
                    break
            self.close_connection = True

    def answer(
        self, code: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None
    ) -> None:
        """Answers; of the body only the first `sent` bytes."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
            self.wfile.flush()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
