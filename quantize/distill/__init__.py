"""Quantization-aware distillation: the quantized language model is trained to match BF16.

plan.py checks and counts, training.py trains. A distillation keeps its checkpoints in a directory
that it is given; how that directory is named, and whether a run may be resumed, is decided by
whoever runs it. What a format's tensors look like on disk is not known here.
"""
