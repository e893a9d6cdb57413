"""Samples in, embedded prompts out: what activation ranges are calibrated on.

What happens here: sources of samples, prompts token for token as vLLM builds them, tiles, video
frames, EVS pruning, the forward loop over the whole model or layer by layer.
What it must not know: quantization formats, and how files are written.
"""
