"""Servers on loopback that a test starts: files over HTTP with faults, and S3."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class FaultyFiles(SimpleHTTPRequestHandler):
    """Serves a folder; a name says what goes wrong with it.

    `busy…` is 503 at the first two requests, `cut…` ends early, `down…` is 503 always.
    """

    asked: Counter[str]

    def do_GET(self) -> None:
        """One file, or its fault."""
        name = self.path.rpartition("/")[2]
        self.asked[name] += 1
        if name.startswith("down") or (name.startswith("busy") and self.asked[name] <= 2):
            self.send_error(503)
        elif name.startswith("cut"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(Path(self.translate_path(self.path)).read_bytes()[:20])
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Served(NamedTuple):
    """A server's address, and how often each name was asked for."""

    url: str
    asked: Counter[str]


@contextmanager
def http_files(folder: Path) -> Iterator[Served]:
    """`folder` over HTTP, while the context lasts."""
    asked: Counter[str] = Counter()
    handler = type("Files", (FaultyFiles,), {"asked": asked})

    def serve(*args: Any) -> FaultyFiles:
        files: FaultyFiles = handler(*args, directory=str(folder))
        return files

    server = ThreadingHTTPServer(("127.0.0.1", 0), serve)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{server.server_port}", asked)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def png(color: tuple[int, int, int] = (0, 255, 0)) -> bytes:
    """A small image file."""
    import io

    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()
