"""QAD: quantize a checkpoint, distil it from its own BF16 weights, export, verify and measure it.

    python -m quantize.qad [RECIPE] [key=value …]

    python -m quantize.qad                                                  # the tiny checkpoint,
    on a CPU
    python -m quantize.qad recipes/nvfp4_qad.yaml model=BF16_DIR output=OUT   # the 12B: see the
    recipe's head
    python -m quantize.qad distill.learning_rate=1e-5 distill.steps=50
    python -m quantize.qad distill.loss=cross_entropy                       # QAT, to compare with

RECIPE is recipes/tiny/nvfp4_qad.yaml by default; key=value reaches any of its fields. A run that
was killed goes on where it was when it is started again with the same command. Exit status: 0 done
and the gate passed, 1 a verification or the gate failed, 2 bad input or a distillation that went
astray.
"""

from pipeline.command import front_door

if __name__ == "__main__":
    front_door("quantize.qad", __doc__, "tiny/nvfp4_qad.yaml", distils=True)
