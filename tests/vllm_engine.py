"""Runs in the serve environment: what vLLM's engine answers that `vllm serve` would have, in one
process and without HTTP.

    python tests/vllm_engine.py REQUEST.json serve DIR FLAGS…

REQUEST.json holds either `messages` or `prompt_token_ids`. Prints the number of tokens that were
generated, and for token ids the log-probability of each but the first. See vllm_process.py.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def engine(command: list[str]) -> LLM:
    """The engine of a command line, read as vLLM's main function does."""
    parser = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(command)
    serve.validate(parsed)
    parsed.model = parsed.model_tag
    return LLM.from_engine_args(EngineArgs.from_cli_args(parsed))


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    llm = engine(sys.argv[2:])
    if "messages" in request:
        (output,) = llm.chat(request["messages"], SamplingParams(temperature=0, max_tokens=8))
        answer = {"tokens": len(output.outputs[0].token_ids)}
    else:
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate({"prompt_token_ids": request["prompt_token_ids"]}, parameters)
        found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        answer = {"tokens": len(output.outputs[0].token_ids), "logprobs": found}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
