"""Decides which linear layer gets which format, and applies ModelOpt to it.

What happens here: formats/ (one file per format), the layer policy, calibration algorithms, ranges,
PTQ of the whole model or layer by layer, the search for a mix of formats, distillation. fp8.py,
nvfp4.py and qad.py are the commands.
What it must not know: how the files of a checkpoint are written.
"""
