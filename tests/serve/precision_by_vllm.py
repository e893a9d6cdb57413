"""Runs in the serve environment: which quantization vLLM reads from a checkpoint's own files.

    python tests/serve/precision_by_vllm.py TINY_DIR QUANT_ALGO…        # prints JSON

For each name, once in config.json and once in hf_quant_config.json alone: vLLM's own name of the
method, or the first line of its error.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from vllm.config import ModelConfig
from vllm.plugins import load_general_plugins


def main():
    source, *algos = sys.argv[1:]
    load_general_plugins()  # ours gives the model's configuration
    found = {}
    for algo in algos:
        for file in ("config.json", "hf_quant_config.json"):
            with tempfile.TemporaryDirectory() as scratch:
                directory = Path(scratch) / "checkpoint"
                shutil.copytree(source, directory)
                name_precision(directory, file, algo)
                found[f"{algo} in {file}"] = quantization(directory)
    print(json.dumps(found))


def name_precision(directory, file, algo):
    if file == "config.json":
        config = json.loads((directory / file).read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": algo}
    else:
        config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algo}}
    (directory / file).write_text(json.dumps(config))


def quantization(directory):
    try:
        config = ModelConfig(model=str(directory), dtype="bfloat16")
    except ValueError as error:
        return f"error: {error}"
    return config.quantization


if __name__ == "__main__":
    main()
