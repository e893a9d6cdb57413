"""Times vLLM's Mamba-2 state update with each launch configuration, for `serve.tune`.

    SERVE_PYTHON serve/tune_kernel.py REQUEST.json

It runs in the serve environment, on a GPU, and imports nothing of the project. The request is a
JSON object:
  heads, groups, head_dim, state_size   of the model's Mamba layers
  states     types that the state is kept in: float32, float16, bfloat16
  batches    requests that decode at once, the most important first
  seconds    after which no further batch size is begun
  result     the file that is written, again after every batch size

Every configuration is timed inside a CUDA graph, as vLLM replays it, on states that are not in the
GPU's cache: in a model the weights of all layers pass between two uses of one state.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE = "cuda"

Launch = tuple[int, int]
"""BLOCK_SIZE_M, the rows of a head's state that one program updates, and its number of warps."""

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
WARPS = (1, 2, 4, 8)

COLD_SLOTS = 64
"""States that the calls of one graph go round at least: 335 MB for the 12B in float32, more than
any GPU's cache."""

MOST_CALLS = 64
"""Calls of the kernel in one graph at most."""

FEWEST_CALLS = 4

CHECKED_BATCH = 8
"""Batch size at which every configuration's answers are compared."""

COMPARED = 64
"""Sequences of a larger batch whose answers are compared."""

FINALISTS = 4
"""Configurations that are timed once more, in turn with vLLM's own."""

FINAL_ROUNDS = 9

LEAST_GAIN = 1.01
"""Times as fast as vLLM's own that another configuration must be to replace it."""

STATE_TOLERANCE = {"float32": 1e-5, "float16": 2**-9, "bfloat16": 2**-6}
"""Relative difference of two states that are equal up to the order of sums: for 16 bits, two steps
of the type."""

OUTPUT_TOLERANCE = 2**-6
"""The same for outputs, which are in bfloat16, relative to the largest."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model's Mamba layers on one GPU."""

    heads: int
    groups: int
    head_dim: int
    state_size: int

    @property
    def state_values(self) -> int:
        """Values of one sequence's state in one layer."""
        return self.heads * self.head_dim * self.state_size


class Problem:
    """The kernel's arguments for one batch size, laid out as vLLM's mixer has them.

    Args:
        shape: Of the layer.
        batch: Sequences.
        states: [slots, heads, head_dim, state_size], the pool that the kernel updates.
    """

    def __init__(self, shape: Shape, batch: int, states: Any) -> None:
        import torch

        device = states.device
        generator = torch.Generator(device).manual_seed(batch)

        def normal(*sizes: int) -> Any:
            values = torch.randn(*sizes, generator=generator, device=device)
            return values.to(torch.bfloat16)

        self.shape = shape
        self.batch = batch
        self.states = states
        inner = shape.heads * shape.head_dim
        grouped = shape.groups * shape.state_size
        # One row holds x, B and C side by side, as the convolution leaves them.
        convolved = normal(batch, inner + 2 * grouped)
        x, b, c = convolved.split([inner, grouped, grouped], dim=-1)
        self.x = x.view(batch, shape.heads, shape.head_dim)
        self.b = b.view(batch, shape.groups, shape.state_size)
        self.c = c.view(batch, shape.groups, shape.state_size)
        steps = normal(batch, shape.heads)
        self.dt = steps[:, :, None].expand(-1, -1, shape.head_dim)
        decay = -torch.linspace(1, 16, shape.heads, device=device)
        self.a = decay[:, None, None].expand(-1, shape.head_dim, shape.state_size)
        bias = torch.linspace(-6, -2, shape.heads, device=device).to(torch.bfloat16)
        self.dt_bias = bias[:, None].expand(-1, shape.head_dim)
        self.d = normal(shape.heads)[:, None].expand(-1, shape.head_dim)
        self.out = torch.empty(batch, inner, dtype=torch.bfloat16, device=device)
        # Which states are updated, in an order that memory does not suggest. Slot 0 is vLLM's
        # padding and is never updated.
        count = (len(states) - 1) // batch
        slots = 1 + torch.randperm(len(states) - 1, generator=generator, device=device)
        slots = slots[: count * batch].to(torch.int32).view(count, batch, 1)
        self.slots = list(slots)

    def update(self, kernel: Callable[..., Any], number: int, is_blackwell: bool) -> None:
        """Update the states of one set of slots."""
        slots = self.slots[number % len(self.slots)]
        kernel(
            self.states,
            self.x,
            self.dt,
            self.a,
            self.b,
            self.c,
            self.d,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            state_batch_indices=slots,
            dst_state_batch_indices=slots,
            out=self.out.view(self.batch, self.shape.heads, self.shape.head_dim),
            is_blackwell=is_blackwell,
        )

    def expected(self) -> tuple[Any, Any]:
        """Return the new states of the first set of slots and the outputs, by plain PyTorch in
        float32.
        """
        import torch

        shape = self.shape
        old = self.states[self.slots[0][:, 0].long()].float()
        dt = torch.nn.functional.softplus(self.dt.float() + self.dt_bias.float())
        per_group = shape.heads // shape.groups
        b = self.b.float().repeat_interleave(per_group, dim=1)[:, :, None, :]
        c = self.c.float().repeat_interleave(per_group, dim=1)[:, :, None, :]
        x = self.x.float()
        new = old * torch.exp(self.a * dt[..., None]) + b * (dt * x)[..., None]
        out = (new * c).sum(-1) + x * self.d.float()
        return new, out.reshape(self.batch, -1)


class Kernel:
    """vLLM's kernel, with a launch configuration of our choice.

    Raises:
        ImportError: This vLLM has no configuration files for it.
    """

    def __init__(self) -> None:
        from vllm.model_executor.layers.mamba.ops import mamba_ssm
        from vllm.platforms import current_platform

        self._update = mamba_ssm.selective_state_update
        if not hasattr(mamba_ssm, "override_ssm_config"):
            raise ImportError("this vLLM reads no tuned configuration of its state update")
        self._choose: Any = mamba_ssm.try_get_optimal_ssm_config
        self._override: Any = mamba_ssm.override_ssm_config
        self.device_name = mamba_ssm.get_ssm_device_name()
        self.is_blackwell = bool(current_platform.is_device_capability_family(100))

    def default(self, shape: Shape, batch: int, state: str) -> Launch:
        """Return what vLLM chooses by itself."""
        rows, warps = self._choose(
            shape.head_dim, shape.state_size, batch, shape.heads, state, self.is_blackwell
        )
        return rows, warps

    def update(self, problem: Problem, launch: Launch, number: int = 0) -> None:
        """Run the kernel once on a set of slots."""
        with self._override(launch):
            problem.update(self._update, number, self.is_blackwell)


def name_of(launch: Launch) -> str:
    """Return a configuration as the result names it, `16x2`."""
    return f"{launch[0]}x{launch[1]}"


def candidates() -> list[Launch]:
    """Return all configurations that are tried."""
    return [(rows, warps) for rows in BLOCK_SIZES for warps in WARPS]


def chosen(default: Launch, microseconds: dict[Launch, float]) -> Launch:
    """Return the fastest configuration; vLLM's own unless another gains enough.

    Args:
        default: vLLM's own.
        microseconds: By configuration, vLLM's own among them.
    """
    fastest = min(microseconds, key=lambda launch: microseconds[launch])
    if microseconds[default] < LEAST_GAIN * microseconds[fastest]:
        return default
    return fastest


def answers(problem: Problem, kernel: Kernel, launch: Launch) -> Any:
    """Run the kernel on the first set of slots, and put the states back.

    Returns:
        The new states and the outputs of some of the sequences, evenly spread.
    """
    import torch

    slots = problem.slots[0][:, 0].long()
    before = problem.states[slots].clone()
    kernel.update(problem, launch)
    count = min(problem.batch, COMPARED)
    rows = torch.linspace(0, problem.batch - 1, count, device=slots.device).long()
    after = problem.states[slots[rows]].clone()
    outputs = problem.out[rows].clone()
    problem.states[slots] = before
    return after, outputs


def largest_error(found: Any, expected: Any, state: str) -> float:
    """Return the largest difference of states and outputs in units of its tolerance."""
    states, outputs = found
    wanted_states, wanted_outputs = (part.float() for part in expected)
    scale = STATE_TOLERANCE[state] * (wanted_states.abs() + 1e-2)
    of_states = ((states.float() - wanted_states).abs() / scale).max()
    of_outputs = (outputs.float() - wanted_outputs).abs().max() / wanted_outputs.abs().max()
    error = max(float(of_states), float(of_outputs) / OUTPUT_TOLERANCE)
    return error if error == error else float("inf")


class Graph:
    """Calls of the kernel with one configuration, captured for replay."""

    def __init__(self, kernel: Kernel, problem: Problem, launch: Launch) -> None:
        import torch

        self._calls = max(FEWEST_CALLS, min(MOST_CALLS, len(problem.slots)))
        kernel.update(problem, launch)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for number in range(self._calls):
                kernel.update(problem, launch, number)
        self._graph.replay()
        torch.cuda.synchronize()

    def microseconds(self) -> float:
        """Replay once and return the time of one call."""
        import torch

        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / self._calls


def working(
    kernel: Kernel, shape: Shape, states: Any, state: str, end: float, failed: dict[str, str]
) -> list[Launch]:
    """Return the configurations that compile and answer as vLLM's own; the others are noted."""
    problem = Problem(shape, min(CHECKED_BATCH, len(states) - 1), states)
    default = kernel.default(shape, problem.batch, state)
    expected = answers(problem, kernel, default)
    found = []
    for launch in candidates():
        if time.monotonic() > end:
            failed[name_of(launch)] = "no time"
            continue
        try:
            difference = largest_error(answers(problem, kernel, launch), expected, state)
        except Exception as error:  # Triton has many: out of shared memory, of registers …
            failed[name_of(launch)] = f"{type(error).__name__}: {error}"[:200]
            continue
        if difference > 1:
            failed[name_of(launch)] = f"answers differ, {difference:.3g} times the tolerance"
        else:
            found.append(launch)
    return found


def tuned(
    kernel: Kernel, shape: Shape, states: Any, state: str, batch: int, launches: Sequence[Launch]
) -> dict[str, Any]:
    """Return the times of a batch size and the configuration that is chosen for it."""
    problem = Problem(shape, batch, states)
    default = kernel.default(shape, batch, state)
    first: dict[Launch, float] = {}
    for launch in {default, *launches}:
        graph = Graph(kernel, problem, launch)
        first[launch] = statistics.median(graph.microseconds() for _ in range(3))
        del graph
    finalists = sorted(first, key=lambda launch: first[launch])[:FINALISTS]
    graphs = {launch: Graph(kernel, problem, launch) for launch in {default, *finalists}}
    rounds: dict[Launch, list[float]] = {launch: [] for launch in graphs}
    for _ in range(FINAL_ROUNDS):
        for launch, graph in graphs.items():
            rounds[launch].append(graph.microseconds())
    medians = {launch: statistics.median(times) for launch, times in rounds.items()}
    best = chosen(default, medians)
    error = largest_error(answers(problem, kernel, best), answers(problem, kernel, default), state)
    if error > 1:
        best = default
    moved = 2 * batch * shape.state_values * states.element_size()
    return {
        "batch": batch,
        "key": batch * shape.heads,
        "default": {"launch": name_of(default), "us": round(medians[default], 3)},
        "chosen": {"launch": name_of(best), "us": round(medians[best], 3)},
        "times_faster": round(medians[default] / medians[best], 3),
        "state_gb_per_s": round(moved / medians[best] / 1000, 1),
        "difference_in_tolerances": round(error, 4),
        "first_us": {name_of(launch): round(time, 3) for launch, time in sorted(first.items())},
    }


def fitting_slots(shape: Shape, state_bytes: int, batches: Sequence[int], free: float) -> int:
    """Return how many states to allocate: as many as are needed, and as half of the free memory
    holds.
    """
    needed = max(*batches, COLD_SLOTS) + 1
    room = int(free / 2 / (shape.state_values * state_bytes))
    return min(needed, room)


def tune_state(
    kernel: Kernel, request: dict[str, Any], state: str, end: float, keep: Callable[[Any], None]
) -> None:
    """Tune all batch sizes for one type of state.

    Args:
        kernel: vLLM's.
        request: See the module's docstring.
        state: The type.
        end: Time, of `time.monotonic`, after which no batch size is begun.
        keep: Called with everything found so far.
    """
    import torch

    shape = Shape(*(request[name] for name in ("heads", "groups", "head_dim", "state_size")))
    dtype = getattr(torch, state)
    free, _ = torch.cuda.mem_get_info()
    slots = fitting_slots(shape, dtype.itemsize, request["batches"], free)
    found: dict[str, Any] = {"batches": [], "failed": {}, "left_out": {}}
    if slots < 2:
        found["left_out"] = {str(batch): "no memory" for batch in request["batches"]}
        keep(found)
        return
    sizes = (slots, shape.heads, shape.head_dim, shape.state_size)
    states = torch.empty(sizes, dtype=dtype, device=DEVICE).normal_(0, 0.5)
    problem = Problem(shape, min(CHECKED_BATCH, slots - 1), states)
    default = kernel.default(shape, problem.batch, state)
    expected = problem.expected()
    error = largest_error(answers(problem, kernel, default), expected, state)
    # vLLM's exponential is an approximation: the comparison with PyTorch is recorded, and those
    # among configurations decide.
    found["default_against_pytorch_in_tolerances"] = round(error, 4)
    launches = working(kernel, shape, states, state, end, found["failed"])
    found["seconds_to_compile"] = round(time.monotonic() - request["started"], 1)
    for batch in request["batches"]:
        if batch > slots - 1:
            found["left_out"][str(batch)] = "no memory"
        elif time.monotonic() > end:
            found["left_out"][str(batch)] = "no time"
        else:
            found["batches"].append(tuned(kernel, shape, states, state, batch, launches))
        keep(found)


def write(path: Path, value: Any) -> None:
    """Write a JSON file; it appears whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)


def run(request: dict[str, Any]) -> int:
    """Tune as a request says; return 0, or 1 with the reason in the result."""
    request["started"] = time.monotonic()
    end = request["started"] + request["seconds"]
    path = Path(request["result"])
    result: dict[str, Any] = {"states": {}}
    try:
        import torch
        import triton
        import vllm

        result |= {"torch": torch.__version__, "triton": triton.__version__}
        result["vllm"] = vllm.__version__
        if not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        result["gpu"] = torch.cuda.get_device_name()
        kernel = Kernel()
        result["device_name"] = kernel.device_name
        for state in request["states"]:

            def keep(found: Any, state: str = state) -> None:
                result["states"][state] = found
                write(path, result)

            tune_state(kernel, request, state, end, keep)
            torch.cuda.empty_cache()
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        write(path, result)
        raise
    result["seconds"] = round(time.monotonic() - request["started"], 1)
    write(path, result)
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
