"""Draws documents, tables, charts, clips and lists with known answers from a seed."""
