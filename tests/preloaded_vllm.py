"""Runs in the serve environment: imports vLLM once, and then runs scripts in copies of itself.

    python -P tests/preloaded_vllm.py

Reads requests, one line of JSON each: a script, its arguments, its environment, its directory, and
files for its three streams. Prints the exit status of each. See vllm_process.py.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn


def import_vllm() -> dict[str, str]:
    """Import what all scripts need but no model, and no plug-in: scripts test how those are loaded.

    Returns the environment variables that vLLM sets.
    """
    before = dict(os.environ)
    import vllm.engine.arg_utils
    import vllm.entrypoints.llm
    import vllm.renderers
    import vllm.v1.worker.cpu_worker  # noqa: F401

    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def become(request: dict, set_by_vllm: dict[str, str]) -> NoReturn:
    """Run a script in this process, which ends here."""
    status = 1
    try:
        for number, (path, flags) in enumerate(
            zip(request["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)
        ):
            os.dup2(os.open(path, flags), number)
        os.environ.clear()
        os.environ.update(request["environment"] | set_by_vllm)
        os.chdir(request["directory"])
        script = request["script"]
        folders = filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:0] = [str(Path(script).parent), *folders]
        sys.argv = [script, *request["arguments"]]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what imports print is no reply
    set_by_vllm = import_vllm()
    for line in requests:
        child = os.fork()
        if child == 0:
            become(json.loads(line), set_by_vllm)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), file=replies, flush=True)


if __name__ == "__main__":
    main()
