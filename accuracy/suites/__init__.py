"""Published benchmarks: prompts and scoring of the harnesses, our server, paired intervals.

What happens here: a worker in the harnesses' own environment builds prompts and scores answers,
requests go to a server and are kept, two checkpoints are compared on the same items.
What it must not know: quantization formats, and how a harness scores.
"""
