"""Weight-only NVFP4 (W4A16): the weights of NVFP4, with activations that stay in BF16.

On disk: as NVFP4 without `input_scale`. ModelOpt 0.47 calls it `W4A16_NVFP4` (preset
`W4A16_NVFP4_CFG`); vLLM loads it from 0.21 on, as `--quantization modelopt_fp4`.

GPUs without FP4 arithmetic, such as Ampere and Hopper, compute NVFP4 with vLLM's Marlin kernel,
which keeps activations in BF16 in any case. For them this format has the speed and the bytes of
NVFP4, needs no activation ranges, and the accuracy gate measures what is served there.
"""

from __future__ import annotations

import modelopt.torch.quantization as mtq

from quantize.formats.nvfp4 import (
    NVFP4,
    error_bound,
    largest,
    pack_weight,
    unpack_weight,
    weight_tensors,
)
from quantize.formats.registry import WEIGHT_QUANTIZER, Format, preset_settings

NVFP4_WEIGHT_ONLY = Format(
    name="nvfp4_weight_only",
    algo="W4A16_NVFP4",
    weight_quantizer=preset_settings(mtq.W4A16_NVFP4_CFG, WEIGHT_QUANTIZER),
    input_quantizer=None,
    tensors=weight_tensors,
    pack=pack_weight,
    unpack=unpack_weight,
    error_bound=error_bound,
    largest=largest,
    relative_error=NVFP4.relative_error,
    multiple=NVFP4.multiple,
    group_size=NVFP4.group_size,
    shares_ranges=True,
    fused_scales=("weight_scale_2",),
    input_amax=None,
    cpu_backend=NVFP4.cpu_backend,
    searched_weight_quantizer=NVFP4.searched_weight_quantizer,
)
