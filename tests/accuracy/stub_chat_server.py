"""Stands in for vLLM where the server has to die: answers chat requests, and ends after some.

STUB_LIVES names a file with one number a line: how many requests each start answers before the
process ends; a start without a line lives on. STUB_ASKED names a file that gets a line for each
request that was answered, and beside it STUB_ASKED.rates the EVS rate of each start.
"""

import http.server
import json
import os
import sys
import threading

arguments = sys.argv[1:]
port = int(arguments[arguments.index("--port") + 1])
lives_file = os.environ["STUB_LIVES"]
with open(lives_file) as file:
    lives = file.read().split()
with open(lives_file, "w") as file:
    file.write("\n".join(lives[1:]))
left = int(lives[0]) if lives else None
with open(os.environ["STUB_ASKED"] + ".rates", "a") as file:
    file.write(arguments[arguments.index("--video-pruning-rate") + 1] + "\n")
turn = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({"data": [{"id": "stub", "object": "model"}], "object": "list"})

    def do_POST(self):
        global left
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = request["messages"][-1]["content"][-1]["text"]
        with turn:
            if left == 0:
                os._exit(1)
            if left is not None:
                left -= 1
            with open(os.environ["STUB_ASKED"], "a") as file:
                file.write(question.splitlines()[0] + "\n")
        message = {"role": "assistant", "content": "100"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub"}
        self.reply(completion | {"choices": [choice], "usage": usage})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
