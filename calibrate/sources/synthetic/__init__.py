"""Draws documents, tables, charts, pictures, clips and lists with known answers from a seed."""
