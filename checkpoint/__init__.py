"""The BF16 checkpoint on disk, and the ground floor that every room stands on.

What happens here: config, tensor layout, native loading, the names of the model family; atomic
files, run state, processes, dtypes, faults, logging.
What it must not know: quantization. Modules that `serve` needs do not import torch.
"""
