"""Loads an exported directory with the serve environment's vLLM, and checks what vLLM makes of it.

The plug-in writes down which layers are quantized, and by which kernel
(plugin/hybridquant_vllm/layer_report.py); that list must be the one that config.json means. Then a
text, a picture and a clip must be answered. On a CPU the reference kernels run.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.config import CheckpointConfig, read_config
from checkpoint.faults import BadInput, Fault, shortened
from export.layout import linear_formats
from quantize.formats.registry import FORMATS
from serve.ask import RequestRefused, ask, content_parts
from serve.demo import draw_page, draw_video
from serve.environment import find_environment
from serve.preflight import checked_settings
from serve.process import Server, ServerDied, running_server

VARIABLE = "HYBRIDQUANT_LAYER_REPORT"
"""As in plugin/hybridquant_vllm/layer_report.py, which this environment need not have."""

_KERNELS = {"FP8": "fp8", "NVFP4": "fp4", "W4A16_NVFP4": "fp4"}
"""What the class names of all of vLLM's kernels contain, by `quant_algo`."""

_EXPORT = "verify without --load, then export again"
_MOST_TOKENS = 16


@dataclass(frozen=True)
class Loaded:
    """What vLLM made of a directory.

    Attributes:
        faults: What is wrong.
        layers: The plug-in's report.
    """

    faults: list[Fault]
    layers: list[dict[str, Any]]


def load_and_ask(directory: Path) -> Loaded:
    """Serve a directory, compare the layers that vLLM quantizes with it, and ask three questions.

    Raises:
        BadInput: There is no vLLM, or the directory cannot be served.
    """
    environment = find_environment()
    settings = checked_settings(directory, {"port": 0}, (), environment)
    with tempfile.TemporaryDirectory(prefix="hybridquant-verify-") as folder:
        report = Path(folder) / "layers.json"
        try:
            with running_server(
                directory,
                settings,
                environment=environment,
                more_variables={VARIABLE: str(report)},
            ) as server:
                layers = read_report(report)
                faults = list(layer_faults(read_config(directory), layers))
                faults += question_faults(server, directory, Path(folder))
        except ServerDied as died:
            return Loaded([Fault(str(directory), f"vLLM ends: {shortened(died)}", _EXPORT)], [])
    return Loaded(faults, layers)


def read_report(path: Path) -> list[dict[str, Any]]:
    """Read what the plug-in has written.

    Raises:
        BadInput: It has written nothing: the plug-in is missing or older.
    """
    if not path.exists():
        what = "has not said which layers it quantizes: its plug-in is missing, or older"
        remedy = "install it: hybridquant setup-serve"
        raise BadInput(Fault("vLLM", what, remedy))
    layers: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return layers


def kernels_of(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of vLLM's quantized layers by kernel."""
    return dict(Counter(_kernel_of(layer) for layer in layers if is_quantized(layer)))


def kernel_lines(config: CheckpointConfig, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each kernel: how many of the checkpoint's linears it runs, and in how
    many of vLLM's layers, some of which hold several linears.

    Args:
        config: Of the exported directory.
        layers: The plug-in's report.
    """
    family = config.family
    parts = Counter(family.fused_module(linear) for linear in linear_formats(config))
    linears: Counter[str] = Counter()
    for layer in layers:
        if is_quantized(layer):
            linears[_kernel_of(layer)] += parts[str(layer["name"])]
    fused = [f"{' + '.join(names)} as {name}" for name, names in family.fused.items()]
    lines = []
    for kernel, count in kernels_of(layers).items():
        line = f"vLLM runs {linears[kernel]} linears by {kernel}"
        if linears[kernel] != count:
            line = f"{line}, in {count} layers: it runs {', '.join(fused)}"
        lines.append(line)
    return lines


def _kernel_of(layer: Mapping[str, Any]) -> str:
    return str(layer["kernel"] or layer["method"])


def is_quantized(layer: Mapping[str, Any]) -> bool:
    """Whether vLLM quantizes a layer of the report."""
    return not str(layer["method"]).startswith("Unquantized")


def layer_faults(config: CheckpointConfig, layers: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield one fault for each layer that vLLM runs otherwise than config.json means.

    Args:
        config: Of the exported directory.
        layers: The plug-in's report.
    """
    expected = {}
    for linear, used in linear_formats(config).items():
        expected[config.family.fused_module(linear)] = FORMATS[used]
    where = str(config.directory / "config.json")
    found = {str(layer["name"]): layer for layer in layers}
    for name, format in expected.items():
        layer = found.get(name)
        if layer is None:
            yield Fault(f"{where}: {name}", "is not a layer that vLLM has loaded", _EXPORT)
            continue
        kernel = _kernel_of(layer)
        if not is_quantized(layer):
            yield Fault(f"{where}: {name}", f"runs in BF16, not in {format.algo}", _EXPORT)
        elif _KERNELS.get(format.algo, "") not in kernel.lower():
            yield Fault(f"{where}: {name}", f"runs by {kernel}, not in {format.algo}", _EXPORT)
        elif layer["quantizes_inputs"] not in (None, format.input_quantizer is not None):
            states = "quantizes" if layer["quantizes_inputs"] else "does not quantize"
            what = f"{kernel} {states} its inputs, unlike {format.algo}"
            yield Fault(f"{where}: {name}", what, _EXPORT)
    for name, layer in found.items():
        if is_quantized(layer) and name not in expected:
            what = f"is quantized by {layer['kernel']}, though config.json leaves it in BF16"
            yield Fault(f"{where}: {name}", what, _EXPORT)


def question_faults(server: Server, directory: Path, folder: Path) -> list[Fault]:
    """Return one fault for each kind of question that is not answered.

    Args:
        server: The server.
        directory: What it serves, for the fault.
        folder: Where a picture and a clip may be drawn.
    """
    draw_page(folder / "page.png")
    draw_video(folder / "clip.mp4", seconds=4)
    questions = {
        "text": content_parts(["What is the total of 2 and 3?"]),
        "image": content_parts(["What is the code on the page?"], [folder / "page.png"]),
        "video": content_parts(["Which digit appears?"], videos=[folder / "clip.mp4"]),
    }
    faults = []
    client = server.client()
    for kind, parts in questions.items():
        where = f"{directory}: the {kind} question"
        try:
            answer = ask(client, server.model, parts, _MOST_TOKENS)
        except (RequestRefused, BadInput) as error:
            faults.append(Fault(where, f"is refused: {shortened(error)}", _EXPORT))
            continue
        # NaN makes vLLM repeat the first token of the vocabulary, which is decoded as "!" or not
        # at all.
        if not answer.text.strip(" !"):
            what = f"is answered by {shortened(repr(answer.text), 60)}"
            faults.append(Fault(where, what, _EXPORT))
    return faults
