"""Several samples in one row, without attention or Mamba's state crossing from one into the next.

Norms, projections and the loss work token by token: they run over the whole row. The convolution,
the scan and attention look back, so they run over the samples, those of similar length at once and
padded at their ends. All three are causal: what follows a sample changes nothing in it.

Where mamba_ssm's kernels run, convolution and scan take the whole row as well, and are told where
samples begin. Bringing samples out of the row and back took a fifth of a GPU's time
(benchmarks/results/training_attention_h200.json).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from checkpoint.libraries import find_mamba_kernels, language_model_classes
from quantize.distill.fused import compiled_convolution

_LARGEST_PADDED = 1.25
"""A group of samples, padded, may have this many times the tokens of its samples."""

_ATTENTION = "sdpa"
"""transformers' name of the attention that is kept apart."""

_CONVOLUTION = "causal_conv1d_fn"
_SCAN = "mamba2_chunk_scan"


class Packed:
    """Where the samples of a row are.

    It is given to the language model's forward as `packed`, which transformers passes on to every
    mixer.

    Attributes:
        lengths: Tokens of the samples, in the row's order.
        numbers: int32 [1, length], the number of each token's sample in the row.
        offsets: int64 [length], the place of each token in its sample.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Prepare the places of the samples.

        Args:
            lengths: Tokens of the samples; their sum is the row's length.
            device: Of the row.
        """
        self.lengths = tuple(lengths)
        counts = torch.tensor(self.lengths)
        numbers = torch.arange(len(counts), dtype=torch.int32)
        self.numbers = numbers.repeat_interleave(counts)[None].to(device)
        self.offsets = torch.cat([torch.arange(length) for length in self.lengths]).to(device)
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        groups = []
        found_at = torch.empty(starts[-1], dtype=torch.int64)
        before = 0
        for group in groups_of_similar(self.lengths):
            longest = max(self.lengths[index] for index in group)
            places = torch.empty(len(group), longest, dtype=torch.int64)
            for number, index in enumerate(group):
                length = self.lengths[index]
                offsets = torch.arange(longest)
                # The last token stands for the padding: any token of the row would do.
                places[number] = starts[index] + offsets.clamp(max=length - 1)
                own = before + number * longest + offsets[:length]
                found_at[starts[index] : starts[index + 1]] = own
            before += places.numel()
            groups.append(places.to(device))
        self._groups = groups
        self._found_at = found_at.to(device)

    def apart(
        self,
        compute: Callable[..., torch.Tensor],
        tensors: Sequence[torch.Tensor],
        dim: int,
        result_dim: int,
    ) -> torch.Tensor:
        """Compute something causal for each sample by itself.

        Args:
            compute: Takes the tensors of some samples, [samples, …], and returns their result.
            tensors: Of the row, [1, …].
            dim: Dimension of the tokens in `tensors`.
            result_dim: Dimension of the tokens in the result.

        Returns:
            The row's result, [1, …].
        """
        results = []
        for places in self._groups:
            parts = []
            for tensor in tensors:
                by_token = tensor[0].movedim(dim - 1, 0)
                parts.append(by_token[places].movedim(1, dim))
            result = compute(*parts).movedim(result_dim, 1)
            results.append(result.flatten(0, 1))
        row = torch.cat(results)[self._found_at]
        return row[None].movedim(1, result_dim)


def groups_of_similar(lengths: Sequence[int]) -> list[list[int]]:
    """Return the indices of samples in groups of similar length, the longest first."""
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tokens += lengths[index]
        if groups:
            padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1)
            if padded <= _LARGEST_PADDED * tokens:
                groups[-1].append(index)
                continue
        groups.append([index])
        tokens = lengths[index]
    return groups


@contextlib.contextmanager
def kept_apart(model: nn.Module) -> Iterator[None]:
    """Keep the samples of packed rows apart in a language model, and in its teacher.

    A forward without `packed` is what it was. A backward with checkpointed layers computes them
    again, so it belongs inside as well.

    Trap of transformers 5.19: its mixers call convolution and scan as functions of their module,
    which take `seq_idx` only where mamba_ssm and causal_conv1d are installed, and ignore it
    otherwise: samples would run into each other without an error. So the two functions themselves
    are replaced. `test_packing` fails when they are called in another way.

    Args:
        model: A `NemotronHForCausalLM`.

    Raises:
        RuntimeError: It computes attention by another function than the one that is replaced.
    """
    config: Any = model.config
    # No public attribute of transformers names the function that a loaded model uses.
    if config._attn_implementation != _ATTENTION:
        raise RuntimeError(f"attention is {config._attn_implementation}, not {_ATTENTION}")
    modeling = language_model_classes()
    convolution = getattr(modeling, _CONVOLUTION)
    scan = getattr(modeling, _SCAN)
    attention = ALL_ATTENTION_FUNCTIONS[_ATTENTION]
    if find_mamba_kernels() is None:
        of_row = partial(_convolution_of_row, convolution, compiled_convolution())
        setattr(modeling, _CONVOLUTION, of_row)
        setattr(modeling, _SCAN, partial(_scan_of_row, scan))
    else:
        setattr(modeling, _CONVOLUTION, partial(_convolution, convolution))
        setattr(modeling, _SCAN, partial(_scan, scan))
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = partial(_attend, attention)
    try:
        yield
    finally:
        setattr(modeling, _CONVOLUTION, convolution)
        setattr(modeling, _SCAN, scan)
        ALL_ATTENTION_FUNCTIONS[_ATTENTION] = attention


def _convolution(
    original: Callable[..., torch.Tensor],
    channels: torch.Tensor,
    *weights: Any,
    packed: Packed | None = None,
    **options: Any,
) -> torch.Tensor:
    """Convolve [1, channels, length]."""
    if packed is None:
        return original(channels, *weights, **options)

    def convolve(channels: torch.Tensor) -> torch.Tensor:
        return original(channels, *weights, **options)

    return packed.apart(convolve, [channels], dim=2, result_dim=2)


def _convolution_of_row(
    original: Callable[..., torch.Tensor],
    of_row: Callable[..., torch.Tensor],
    channels: torch.Tensor,
    *weights: Any,
    packed: Packed | None = None,
    **options: Any,
) -> torch.Tensor:
    """Convolve [1, channels, length] as `convolved_row` does."""
    if packed is None:
        return original(channels, *weights, **options)
    if options.get("activation") != "silu":
        raise RuntimeError(f"the convolution's activation is not SiLU: {options}")
    return of_row(channels, *weights, packed.offsets)


def _scan_of_row(
    original: Callable[..., Any], *tensors: Any, packed: Packed | None = None, **options: Any
) -> Any:
    """Scan [1, length, heads, width] by mamba_ssm, which clears the state between samples."""
    if packed is not None:
        options["seq_idx"] = packed.numbers
    return original(*tensors, **options)


def _scan(
    original: Callable[..., Any],
    states: torch.Tensor,
    steps: torch.Tensor,
    decay: torch.Tensor,
    into: torch.Tensor,
    out_of: torch.Tensor,
    *rest: Any,
    packed: Packed | None = None,
    **options: Any,
) -> Any:
    """Scan [1, length, heads, width]."""
    if packed is None:
        return original(states, steps, decay, into, out_of, *rest, **options)

    def scan(
        states: torch.Tensor, steps: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor
    ) -> torch.Tensor:
        return original(states, steps, decay, into, out_of, *rest, **options)

    return packed.apart(scan, [states, steps, into, out_of], dim=1, result_dim=1)


def _attend(
    original: Callable[..., Any],
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    packed: Packed | None = None,
    **options: Any,
) -> Any:
    """Attend from [1, heads, length, width] to a result [1, length, heads, width]."""
    if packed is None:
        return original(module, query, key, value, mask, **options)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result, _ = original(module, query, key, value, None, **options)
        return result

    return packed.apart(attend, [query, key, value], dim=2, result_dim=1), None
