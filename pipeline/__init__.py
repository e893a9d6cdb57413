"""The one flow: check → plan → calibrate → quantize → write → verify → measure.

What happens here: run.py calls one or two functions of each room in turn, whole model or layer by
layer, one process or many, with or without distillation.
What it must not know: the inside of any room.
"""
