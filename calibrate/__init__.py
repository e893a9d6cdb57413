"""Samples in, activation ranges out: sources, prompts as vLLM builds them, EVS pruning, the forward
loop.
"""
