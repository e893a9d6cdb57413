"""vLLM on a checkpoint directory: settings, command, preflight, server process, client.

What happens here: the manifest and the command line become one `ServeSettings`, what vLLM would
fail on is checked, vLLM runs under a guard in its own environment, and a client asks it.
What it must not know: ModelOpt, and transformers' model code. It imports torch nowhere, and of the
checkpoint room only modules that do not either.
"""
