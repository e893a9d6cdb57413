"""One file for each quantization format; importing this package registers those of the project.

To add a format, write a file like fp8.py and name its `Format` here. Everything outside this folder
finds a format in `registry.FORMATS` by the name that recipes write, or with `registry.find_format`
by its `quant_algo`.
"""

from quantize.formats.fp8 import FP8
from quantize.formats.nvfp4 import NVFP4
from quantize.formats.nvfp4_weight_only import NVFP4_WEIGHT_ONLY
from quantize.formats.registry import register_format

for _format in (FP8, NVFP4, NVFP4_WEIGHT_ONLY):
    register_format(_format)
