"""Writes down how vLLM runs each linear layer: its quantization method and its kernel.

With HYBRIDQUANT_LAYER_REPORT=FILE in its environment, the worker that has loaded the model writes a
JSON list of objects with `name`, `method`, `kernel` and `quantizes_inputs` (null where vLLM does
not say). `python -m export.verify DIR --load` compares it with the directory.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "HYBRIDQUANT_LAYER_REPORT"


def register() -> None:
    """Report on every model that vLLM loads, if it is asked for; a second call changes nothing."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model: Any = BaseModelLoader.load_model
    if hasattr(load_model, "reports_layers"):
        return

    @functools.wraps(load_model)
    def reporting(self: Any, *arguments: Any, **named: Any) -> Any:
        model = load_model(self, *arguments, **named)
        write_report(model, Path(path))
        return model

    reporting.reports_layers = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = reporting  # type: ignore[method-assign]


def write_report(model: Any, path: Path) -> None:
    """Write the report of a loaded model; the file appears whole."""
    layers = []
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or getattr(module, "weight", None) is None:
            continue
        kernel = _kernel(method)
        entry = {
            "name": name,
            "method": type(method).__name__,
            "kernel": type(kernel).__name__ if kernel is not None else None,
            "quantizes_inputs": _quantizes_inputs(method),
        }
        layers.append(entry)
    # With several ranks every worker writes the same.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(layers), encoding="utf-8")
    os.replace(partial, path)


def _kernel(method: Any) -> Any:
    """The kernel object of a quantization method, whatever its attribute is called."""
    for name, value in vars(method).items():
        is_kernel = name == "kernel" or name.endswith(("_kernel", "_linear"))
        if is_kernel and value is not None and not isinstance(value, (str, bool, int)):
            return value
    return None


def _quantizes_inputs(method: Any) -> bool | None:
    spec = getattr(method, "spec", None)
    if spec is None:
        return None
    return getattr(spec, "activation", None) is not None
