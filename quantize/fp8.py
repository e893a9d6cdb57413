"""FP8: quantize, export, verify and measure a checkpoint.

    python -m quantize.fp8 [RECIPE] [key=value …]

    python -m quantize.fp8
    python -m quantize.fp8 recipes/fp8.yaml model=BF16_DIR output=OUT
    python -m quantize.fp8 calibrate.samples=64 quantize.kv_cache=fp8

The first takes the tiny checkpoint and runs on a CPU, the second the 12B on a GPU. RECIPE is
recipes/tiny/fp8.yaml by default; key=value reaches any of its fields. Exit status: 0 done and the
gate passed, 1 a verification or the gate failed, 2 bad input.
"""

from pipeline.command import front_door

if __name__ == "__main__":
    front_door("quantize.fp8", __doc__, "tiny/fp8.yaml", formats=["fp8"])
