"""Which layer gets which format, ModelOpt applied to it; fp8.py and its siblings are the front
doors.
"""

import warnings

# ModelOpt 0.47 tests transformers below 5.15, where this architecture is broken with a cache, and
# says so at every import. pyproject.toml pins the pair that our tests run.
warnings.filterwarnings(
    "ignore", message="transformers .* is not tested with current version of modelopt"
)
