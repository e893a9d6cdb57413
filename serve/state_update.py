"""Tuned launch configurations of vLLM's Mamba-2 state update: their files, and which one is used.

Decoding, vLLM updates the state of every sequence with one kernel. How it is launched (rows of a
head a program, warps) is read from a file whose name holds the sizes of a head, the GPU and the
type of the state, in the folder that VLLM_TUNED_CONFIG_FOLDER names or in vLLM's own
(vllm/model_executor/layers/mamba/ops/mamba_ssm.py; equal in 0.32 and 0.33). vLLM has no file for
heads of 80 × 128, and takes a rule of thumb.

`python -m serve.tune` writes such files; those that were measured for this project are in
serve/tuned/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from checkpoint.config import CheckpointConfig
from serve.environment import Device
from serve.vllm_flags import flag_value

FOLDER_VARIABLE = "VLLM_TUNED_CONFIG_FOLDER"

SHIPPED = Path(__file__).with_name("tuned")
"""Files that were measured for this project."""

STATE_FLAG = "--mamba-ssm-cache-dtype"
"""Flag of vLLM that sets the type of the state. `--mamba-cache-dtype` does not for this model: vLLM
fills the other one from config.json first."""

DEFAULT_STATE = "float32"
"""Type of the state of this model where neither config.json nor a flag says another
(vllm/model_executor/models/config.py, NemotronHForCausalLMConfig)."""

REPLAY_STATE = "float16"
"""Type of the state that goes with the setting `replayssm`: half the bytes. ReplaySSM rounds a
state once in 16 tokens, when it is written."""

STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a value of the state, by type."""


class Layer(NamedTuple):
    """Sizes of a model's Mamba layers.

    Attributes:
        heads: Of one layer, on all GPUs together.
        groups: Groups of heads that share B and C.
        head_dim: Rows of a head's state.
        state_size: Columns of it.
    """

    heads: int
    groups: int
    head_dim: int
    state_size: int


def mamba_layer(config: CheckpointConfig) -> Layer:
    """Return the sizes of a checkpoint's Mamba layers."""
    text = config.text
    return Layer(
        text["mamba_num_heads"], text["n_groups"], text["mamba_head_dim"], text["ssm_state_size"]
    )


def file_name(layer: Layer, gpu: str, state: str) -> str:
    """Return the name under which vLLM looks for a configuration.

    Args:
        layer: The Mamba layers.
        gpu: The GPU's name, as the driver spells it.
        state: `float32`, `float16` or `bfloat16`; vLLM has one file for both of 16 bits.
    """
    device = re.sub(r"[\s/]+", "_", gpu)
    kind = "float16" if state == "bfloat16" else state
    sizes = f"headdim={layer.head_dim},dstate={layer.state_size}"
    return f"{sizes},device_name={device},cache_dtype={kind}.json"


def own_folder() -> Path:
    """Return where `hybridquant tune` writes when it is given no folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "hybridquant" / "tuned"


def state_type(
    config: CheckpointConfig, extra: Sequence[str] = (), has_replayssm: bool = False
) -> str:
    """Return the type in which vLLM keeps the state, `float32` unless something says another.

    Args:
        config: The checkpoint's.
        extra: Flags of vLLM that will be added; they win.
        has_replayssm: Whether the setting `replayssm` is on.
    """
    given = flag_value(extra, STATE_FLAG)
    if given is None and has_replayssm:
        return REPLAY_STATE
    if given is not None and given != "auto":
        return given
    return str(config.text.get("mamba_ssm_cache_dtype", DEFAULT_STATE))


@dataclass(frozen=True)
class Tuned:
    """Where vLLM will look for the configuration of its state update.

    Attributes:
        folder: The folder; None when there is none.
        name: Of the file that it looks for.
        is_given: Whether the user has named the folder.
    """

    folder: Path | None
    name: str
    is_given: bool = False

    @property
    def is_there(self) -> bool:
        """Whether the file is there."""
        return self.folder is not None and (self.folder / self.name).is_file()


def find_tuned(config: CheckpointConfig, device: Device, extra: Sequence[str] = ()) -> Tuned | None:
    """Return where vLLM will look for a configuration; None without a GPU.

    The user's VLLM_TUNED_CONFIG_FOLDER decides; without it, what `hybridquant tune` has written on
    this machine; otherwise the project's own.

    Args:
        config: The checkpoint's.
        device: What vLLM runs on.
        extra: Flags of vLLM that will be added.
    """
    if device.kind != "cuda":
        return None
    # vLLM asks for the name of its first GPU.
    gpu = device.gpus[0].name if device.gpus else device.name
    name = file_name(mamba_layer(config), gpu, state_type(config, extra))
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Tuned(Path(given), name, is_given=True)
    for folder in (own_folder(), SHIPPED):
        if (folder / name).is_file():
            return Tuned(folder, name)
    return Tuned(None, name)
