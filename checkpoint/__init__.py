"""The BF16 checkpoint on disk: configuration, tensor layout, native loading, the embedded tiny
checkpoint.
"""
