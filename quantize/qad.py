"""QAD: quantize a checkpoint, distil it from its own BF16 weights, export, verify and measure it.

    python -m quantize.qad [RECIPE] [key=value …]

    python -m quantize.qad
    python -m quantize.qad recipes/nvfp4_qad.yaml model=BF16_DIR output=OUT
    python -m quantize.qad distill.learning_rate=1e-5 distill.steps=50
    python -m quantize.qad distill.loss=cross_entropy                      # QAT, to compare with

The first takes the tiny checkpoint and runs on a CPU; for the second, the 12B, see the recipe's
head. RECIPE is recipes/tiny/nvfp4_qad.yaml by default; key=value reaches any of its fields. A
killed run is resumed by the same command. Exit status: 0 done and the gate passed, 1 a verification
or the gate failed, 2 bad input or a distillation that went astray.
"""

from pipeline.command import front_door

if __name__ == "__main__":
    front_door("quantize.qad", __doc__, "tiny/nvfp4_qad.yaml", distils=True)
