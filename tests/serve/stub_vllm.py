"""Stands in for vLLM in tests of the process: the same command line, a child like EngineCore, and
ways to fail.

STUB_MODE is `serve` (answers), `die` (prints two errors and ends), `refuse` (ends as vLLM does that
does not take its configuration), `taken` (ends because a port is in use), `taken once` (so the
first time), `stubborn` (answers and ignores SIGTERM) or `silent` (never answers). STUB_PIDS names a
file for the process ids of the server and its child.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

mode = os.environ["STUB_MODE"]
arguments = sys.argv[1:]
port = int(arguments[arguments.index("--port") + 1])
print("Resolved architecture", flush=True)
if mode == "die":
    print(
        "(EngineCore pid=7) ERROR 11-22 12:00:00 [core.py:1] ValueError: the root cause", flush=True
    )
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    sys.exit(3)
if mode == "refuse":
    print("(APIServer pid=7) Traceback (most recent call last):")
    print("(APIServer pid=7) pydantic_core.ValidationError: 1 validation error for ModelConfig")
    print("(APIServer pid=7)   Value error, Unknown quantization method: zzz. [type=value_error]")
    print("(APIServer pid=7)     For further information visit pydantic", flush=True)
    sys.exit(1)
if mode.startswith("taken"):
    starts = Path(os.environ["STUB_PIDS"] + ".starts")
    is_first = not starts.exists()
    with starts.open("a") as file:
        file.write(f"{port}\n")
    if is_first or mode == "taken":
        print(
            "RuntimeError: [enforce fail at socket.cc:95] bind: Address already in use", flush=True
        )
        print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
        sys.exit(1)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(os.environ["STUB_PIDS"], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"" if self.path == "/health" else json.dumps({"data": [{"id": "stub"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if mode == "silent":
    time.sleep(600)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
