"""Published benchmarks: the harnesses' prompts and scoring, our server, paired intervals, a verdict.

What happens here: a worker in the harnesses' own environment builds prompts and scores answers,
requests go to a server and are kept, two checkpoints are compared on the same items.
What it must not know: quantization formats, and how a harness scores.
"""
