"""Quantization-aware distillation: the quantized model is trained to match BF16."""
