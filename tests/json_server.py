"""A server on this machine that answers in JSON, for tests of what asks one."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and sends JSON; a test adds `do_GET` and `do_POST`."""

    def request_body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def start_serving(server: BaseServer) -> threading.Thread:
    """Let a server answer, in a thread that ends after `server.shutdown()`.

    By default it looks only twice a second whether it shall end, and a test would wait for that.
    """
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def serving(handler, **attributes):
    """Serve for the length of a `with` block; the attributes are the server's, beside `.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    for name, value in attributes.items():
        setattr(server, name, value)
    thread = start_serving(server)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
