"""The quantized checkpoint on disk: written, verified, read back."""

import quantize  # noqa: F401  (quiets ModelOpt's version warning before a module here imports it)
