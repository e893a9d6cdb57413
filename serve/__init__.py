"""vLLM on a checkpoint directory: the command, the server process, the client, the plug-in for
CPUs.
"""
