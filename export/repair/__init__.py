"""Repairs an exported directory without calibration.

What happens here: the exclude list, the quantization section, names of tensors, missing files and
old manifests are put right in a copy of hard links; the verifier judges the copy, and it takes the
directory's place. What it must not know: how scales were found.
"""
