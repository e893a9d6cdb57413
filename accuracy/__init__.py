"""BF16 against a variant: how much accuracy quantization costs, with intervals, and the gate.

What happens here: token agreement on held-out prompts, answers to exact tasks in process and
through an endpoint, paired intervals, the gate that a recipe demands; published benchmarks
(suites/).
What it must not know: quantization formats.
"""
