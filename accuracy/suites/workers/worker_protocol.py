"""What both workers share: one JSON object a line in, one a line out.

Runs in the harnesses' environment and imports nothing but Python's own library. Requests are
`open`, `prompt` and `score`; a reply is `{"result": …}`, or `{"error": …, "is_data": …}`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

MOST_SECONDS = 600
"""Processor time of one request at most; scoring a benchmark's answers takes seconds."""


class DataError(Exception):
    """The benchmark's data, or something that the user gave, is missing or wrong."""


Handler = Callable[[Mapping[str, Any]], Any]


def serve_requests(handlers: Mapping[str, Handler]) -> None:
    """Answer requests until standard input ends.

    Args:
        handlers: By the request's `do`.
    """
    # Harnesses print to stdout, and ipdb, which OCRBench v2's scoring imports, reads stdin: both
    # are moved away from the protocol. What is printed goes to the log on stderr.
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # VLMEvalKit logs the judge's key at INFO.
    logging.disable(logging.INFO)
    for line in requests:
        _limit_processor_time()
        request = json.loads(line)
        reply = _answer(handlers[request["do"]], request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _limit_processor_time() -> None:
    """End this process if one request takes `MOST_SECONDS` of processor time: under real-time
    scheduling VLMEvalKit's scoring waits for its own processes and never ends.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + MOST_SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _answer(handler: Handler, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"result": handler(request)}
    except DataError as error:
        return {"error": str(error), "is_data": True}
    except Exception as error:  # of a harness: reported by the other side
        traceback.print_exc(file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}", "is_data": False}
