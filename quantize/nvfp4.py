"""NVFP4: quantize, export, verify and measure a checkpoint with 4-bit weights and activations.

    python -m quantize.nvfp4 [RECIPE] [key=value …]

    python -m quantize.nvfp4
    python -m quantize.nvfp4 recipes/nvfp4.yaml model=BF16_DIR output=OUT

The first takes the tiny checkpoint and runs on a CPU, the second the 12B on a GPU. RECIPE is
recipes/tiny/nvfp4.yaml by default; key=value reaches any of its fields. Exit status: 0 done and the
gate passed, 1 a verification or the gate failed, 2 bad input.
"""

from pipeline.command import front_door

if __name__ == "__main__":
    front_door("quantize.nvfp4", __doc__, "tiny/nvfp4.yaml", formats=["nvfp4", "nvfp4_weight_only"])
