"""The quantized checkpoint on disk: written, verified, read back.

What happens here: the files that vLLM loads, their verification against config, vLLM's rules and
the source, reading them back as served, and the manifest that says what made them.
What it must not know: how scales were found.
"""
