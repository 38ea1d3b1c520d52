"""A real http server of a folder, with byte ranges, that fails as it is told."""

import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """How a GET is answered wrongly."""

    status: int = 200
    """Answered in place of the file, where it is not 200."""

    cut: int | None = None
    """The connection ends after so many bytes of the body."""

    stall: int | None = None
    """Nothing comes any more after so many bytes, for `stall_seconds`."""

    body: bytes | None = None
    """Sent in place of the file's content."""

    stall_seconds: float = 3.0


@dataclass
class Site:
    """A served folder: faults by file name, each for one GET in turn, and what was asked for."""

    folder: Path
    url: str = ""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    ranges_answered: bool = True
    """Whether a Range header is heeded; else all of the file is sent."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def ranges(self, name: str) -> list[str | None]:
        """The ranges that GETs of a file asked for."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path == name]

    def fault(self, name: str) -> Fault:
        """What happens to the next GET of a file."""
        waiting = self.faults.get(name)
        return waiting.pop(0) if waiting else self.always.get(name, Fault())


@contextmanager
def served(folder: Path):
    """Serves `folder` for the time of the context."""
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(self.path.lstrip("/"), Fault())

        def do_GET(self):
            name = self.path.lstrip("/")
            self.answer(name, site.fault(name))

        def answer(self, name, fault):
            wanted = self.headers.get("Range")
            site.requests.append((self.command, name, wanted))
            wanted = wanted if site.ranges_answered else None
            path = folder / name
            if fault.status != 200 or not path.is_file():
                self.send_response(fault.status if fault.status != 200 else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes() if fault.body is None else fault.body
            first, last = byte_range(wanted, len(data))
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(last + 1 - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            if self.command == "GET":
                self.send_body(data[first : last + 1], fault)

        def send_body(self, body, fault):
            stop = min(len(body), *(n for n in (fault.cut, fault.stall, len(body)) if n is not None))
            self.wfile.write(body[:stop])
            if stop < len(body):
                self.wfile.flush()
                if fault.stall is not None:
                    time.sleep(fault.stall_seconds)
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def byte_range(wanted: str | None, size: int) -> tuple[int, int]:
    """First and last byte that a Range header means."""
    if wanted is None:
        return 0, size - 1
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
    return int(first), min(int(last), size - 1) if last else size - 1
