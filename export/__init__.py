"""The quantized checkpoint on disk: written, verified, read back."""
