"""Scripts that measure, most of them on a GPU; each prints a table and writes a JSON file.

What happens here: the figures of docs/results.md, in files that hold the command that made them.
What the other rooms must not know: this room. Nothing imports it but its tests.
"""
