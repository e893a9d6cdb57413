"""One YAML file per product, and what a recipe may say.

What happens here: schema.py composes the sections that the rooms declare, loading.py reads a file
and applies overrides, reference.py documents every field.
What it must not know: how any step works.
"""
