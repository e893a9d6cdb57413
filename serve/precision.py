"""What each precision of a quantized checkpoint needs from vLLM and from the GPU.

vLLM finds the precision by itself, in `quantization_config` of config.json, so no `--quantization`
is given (tests/serve/test_quantized.py holds vLLM to it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from checkpoint.config import CheckpointConfig, read_json
from checkpoint.faults import BadInput, Fault, shortened

Version = tuple[int, int, int]
Capability = tuple[int, int]

OLD_CONFIG = "hf_quant_config.json"
"""Where ModelOpt up to 0.29 wrote what is in config.json today; vLLM reads it when config.json has
no `quantization_config`."""

BF16_CAPABILITY = (8, 0)
"""Least CUDA compute capability for activations in BF16."""


UNNAMED = "unnamed"
"""Stands for the `quant_algo` of a checkpoint that is quantized and names none."""


@dataclass(frozen=True)
class Precision:
    """What one `quant_algo` needs.

    Attributes:
        native: Least CUDA compute capability that multiplies in this precision.
        loaded_since: First vLLM version that loads it.
        weight_only_since: First vLLM version that runs it on lesser GPUs, with activations in BF16.
        in_old_config: Whether vLLM also finds it in hf_quant_config.json alone.
    """

    native: Capability
    loaded_since: Version = (0, 11, 0)
    weight_only_since: Version = (0, 11, 0)
    in_old_config: bool = True

    def least_capability(self, vllm: Version) -> Capability:
        """Return the least CUDA compute capability on which a version of vLLM runs it."""
        if vllm < self.weight_only_since:
            return self.native
        return BF16_CAPABILITY


PRECISIONS = {
    # FP8 matrix units came with Ada.
    "FP8": Precision(native=(8, 9), weight_only_since=(0, 32, 0)),
    "NVFP4": Precision(native=(10, 0)),
    # vLLM's pull request 41769.
    "W4A16_NVFP4": Precision(native=BF16_CAPABILITY, loaded_since=(0, 21, 0), in_old_config=False),
    # vLLM's pull request 35047. Its layers may be of any precision above.
    "MIXED_PRECISION": Precision(native=(10, 0), loaded_since=(0, 18, 0), in_old_config=False),
}
"""By config.json's `quant_algo`. What is not here cannot be served."""


@dataclass(frozen=True)
class Quantization:
    """How config.json, or hf_quant_config.json, says that a checkpoint is quantized.

    Attributes:
        algo: Its `quant_algo` in capitals, or `UNNAMED`.
        file: The file that says so.
    """

    algo: str
    file: str


def precision_name(config: CheckpointConfig) -> str:
    """Return a checkpoint's `quant_algo`, or `BF16`.

    Raises:
        BadInput: hf_quant_config.json cannot be read.
    """
    quantization = read_quantization(config)
    return quantization.algo if quantization else "BF16"


def read_quantization(config: CheckpointConfig) -> Quantization | None:
    """Return how a checkpoint is quantized, found where vLLM looks; None for BF16.

    Raises:
        BadInput: hf_quant_config.json cannot be read, or a section is no JSON object.
    """
    section = _section(config.raw.get("quantization_config"), "quantization_config", config)
    file = "config.json"
    if section is None:
        section = _old_section(config)
        file = OLD_CONFIG
    return None if section is None else Quantization(_algo(section), file)


def disagreement_faults(config: CheckpointConfig) -> Iterator[Fault]:
    """Yield a fault where config.json and hf_quant_config.json name different precisions: vLLM
    reads the first, other programs the second.

    Raises:
        BadInput: One of them cannot be read.
    """
    quantization = read_quantization(config)
    older = _old_section(config)
    if quantization is None or older is None or quantization.algo == _algo(older):
        return
    what = f"quant_algo is {_algo(older)}, and config.json says {quantization.algo}"
    remedy = f"remove the wrong one: hybridquant verify {config.directory} tells which"
    yield Fault(str(config.directory / OLD_CONFIG), shortened(what), remedy)


def _old_section(config: CheckpointConfig) -> dict[str, Any] | None:
    """Return what hf_quant_config.json says; None where there is none.

    Raises:
        BadInput: It cannot be read.
    """
    old = config.directory / OLD_CONFIG
    if not old.exists():
        return None
    return _section(read_json(old).get("quantization"), "quantization", config, OLD_CONFIG)


def _section(
    section: Any, name: str, config: CheckpointConfig, file: str = "config.json"
) -> dict[str, Any] | None:
    """Return a section that says how a checkpoint is quantized; None when it is null or absent.

    Raises:
        BadInput: It is no JSON object.
    """
    if section is None or isinstance(section, dict):
        return section
    where = str(config.directory / file)
    what = f"{name} is {shortened(repr(section), 60)}, not a JSON object"
    raise BadInput(Fault(where, what, "export the checkpoint again"))


def _algo(section: dict[str, Any]) -> str:
    algo = section.get("quant_algo")
    return str(algo).upper() if algo else UNNAMED
