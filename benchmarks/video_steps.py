"""Divides the time to the first token of a clip into the steps that the plug-in writes down.

See `hybridquant_vllm.step_times`: each step is a line with its begin and end by the machine's
monotonic clock, which the asking process reads as well.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paired_servers import Asker

Step = dict[str, Any]


def breakdown(
    asker: Asker, new_clip: Callable[[], Path], times: Path, count: int
) -> dict[str, float]:
    """Ask about new clips one after another, and return the median seconds of each step.

    Args:
        asker: A server with the plug-in, whose HYBRIDQUANT_STEP_TIMES names `times`.
        new_clip: Writes a clip that the server has not seen.
        times: The file of step times; it exists only while this runs.
        count: Clips; the first one is not counted.

    Returns:
        Seconds by step, and `first token`: their sum.
    """
    divided = []
    for _ in range(count):
        clip = new_clip()
        times.write_text("")
        answer = asker.ask("video", [clip], 1)
        lines = times.read_text(encoding="utf-8").splitlines()
        times.unlink()
        divided.append(steps_of(answer, [json.loads(line) for line in lines]))
    counted = divided[1:] or divided
    return {
        name: round(statistics.median(steps[name] for steps in counted), 4) for name in counted[0]
    }


def steps_of(answer: Step, lines: Sequence[Step]) -> dict[str, float]:
    """Divide one answer's time to the first token.

    Args:
        answer: `begin` and `first` of `Asker.ask`.
        lines: The step times written meanwhile.

    Raises:
        KeyError: A step is missing: the server does not run with the plug-in.
    """
    first_of: dict[str, Step] = {}
    for line in sorted(lines, key=lambda line: line["begin"]):
        first_of.setdefault(line["step"], line)
    decode = first_of["decode and resize"]
    vision = first_of["vision"]
    tower = first_of["tower"]
    prefill = first_of["language model"]
    end = answer["begin"] + answer["first"]
    ends = {
        "request, file read": decode["begin"],
        "decode and resize": decode["end"],
        "prompt, to the engine": vision["begin"],
        "to the device, normalize": tower["begin"],
        "vision tower": tower["end"],
        "EVS, frame texts": vision["end"],
        "scheduling": prefill["begin"],
        "prefill": prefill["end"],
        "sampling, to the client": end,
    }
    seconds = {}
    previous = answer["begin"]
    for name, moment in ends.items():
        seconds[name] = moment - previous
        previous = moment
    seconds["first token"] = answer["first"]
    return seconds
