"""An object store that speaks S3 on the loopback interface (moto's server), and that can be told to misbehave."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

USER, SECRET = "AKIAEXAMPLEUSER", "a-secret-of-the-object-store"
ERROR = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>as the test wants it</Message></Error>'
CODES = {403: (b"AccessDenied", "403 Forbidden"), 500: (b"InternalError", "500 Internal Server Error"),
         503: (b"SlowDown", "503 Slow Down")}  # fmt: skip


class ObjectStore:
    """``uri(path)`` names a place in it. ``fault``: called with (method, path, query) of every request; may return a
    status to answer with instead, or sleep, or do whatever else happens between a client and its store."""

    def __init__(self) -> None:
        self.application = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[str, str, str], int | None] = lambda method, path, query: None
        self.requests = 0
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.address = f"127.0.0.1:{self.server.port}"
        self.fs = pafs.S3FileSystem(
            access_key=USER, secret_key=SECRET, endpoint_override=self.address, scheme="http", region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip
        self.fs.create_dir("bucket")

    def uri(self, path: str) -> str:
        return f"s3://{USER}:{SECRET}@bucket/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"

    def put(self, path: str, content: bytes) -> str:
        with self.fs.open_output_stream(f"bucket/{path}") as stream:
            stream.write(content)
        return self.uri(path)

    def put_directory(self, path: str, directory: Path) -> str:
        for file in directory.iterdir():
            self.put(f"{path}/{file.name}", file.read_bytes())
        return self.uri(path)

    def get(self, directory: str, to: Path) -> Path:
        """Copy everything below ``directory`` to a local one."""
        for info in self.fs.get_file_info(pafs.FileSelector(f"bucket/{directory}", recursive=True)):
            if info.type == pafs.FileType.File:
                target = to / info.path.removeprefix(f"bucket/{directory}/")
                target.parent.mkdir(parents=True, exist_ok=True)
                with self.fs.open_input_stream(info.path) as stream:
                    target.write_bytes(stream.read())
        return to

    def close(self) -> None:
        self.server.shutdown()

    def _answer(self, environ, start_response):
        self.requests += 1
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length:  # read in any case, so that the connection stays usable
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        status = self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
        if status is None:
            return self.application(environ, start_response)
        code, line = CODES[status]
        body = ERROR % code
        start_response(line, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def every(nth: int, status: int) -> Callable[[str, str, str], int | None]:
    """A store that answers every nth request with an error."""
    count = iter(range(1, 1 << 60))
    return lambda method, path, query: status if next(count) % nth == 0 else None


def slowly(seconds: float) -> Callable[[str, str, str], int | None]:
    return lambda method, path, query: time.sleep(seconds)
