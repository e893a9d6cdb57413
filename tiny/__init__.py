"""The tiny checkpoint and its world: weights, tokenizer, tasks with exact answers, and how it was
trained.

What happens here: a checkpoint of the released layout is written at 7 MB, so that everything runs
on any machine. What it must not know: how anything is quantized, exported or served. Nothing
imports this room but the default recipe, the gate's tiny tasks, tests and benchmarks.
"""
