"""Which layer gets which format, ModelOpt applied to it; fp8.py and its siblings are the front doors."""
