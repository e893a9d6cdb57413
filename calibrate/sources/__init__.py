"""Where samples come from: one file per source, and their mixing.

A source is a `Source` registered with `register_source`; docs/add_a_source.md shows how to add one.
"""
