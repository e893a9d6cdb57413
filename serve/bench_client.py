"""Runs `vllm bench serve` for `serve.bench_runs`, in the serve environment.

    SERVE_PYTHON serve/bench_client.py

Each line of its input is a JSON list: the arguments of one `vllm bench serve`. After each run it
answers with a line, `done` or what went wrong. One process makes all the runs, because importing
vLLM takes longer than a short run.

The requests are chat messages from a file, one JSON list a line. vLLM's own datasets cannot send
them: `custom_image` refuses clips, and `custom` needs pandas, which vLLM does not require (0.32,
vllm/benchmarks/datasets/datasets.py).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def samples_of_file(args: Any, tokenizer: Any) -> list[Any]:
    """Return the requests of a run; it takes the place of vLLM's `get_samples`.

    Args:
        args: The parsed arguments; `dataset_path` is the file, `num_prompts` how many of its
            requests are sent, from the first on.
        tokenizer: None; the server counts the tokens.
    """
    from vllm.benchmarks.datasets import SampleRequest

    requests = []
    lines = Path(args.dataset_path).read_text(encoding="utf-8").splitlines()
    for line in lines[: args.num_prompts]:
        request = SampleRequest(
            prompt=json.loads(line), prompt_len=1, expected_output_len=args.custom_output_len
        )
        requests.append(request)
    return requests


def _run() -> int:
    # What vLLM prints goes to the log; the answers have the standard output to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The name in the module of the command: a function that it imports from another one.
    assert callable(serve.get_samples)
    serve.get_samples = samples_of_file
    for line in sys.stdin:
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        try:
            serve.main(parser.parse_args(json.loads(line)))
            answer = "done"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_run())
