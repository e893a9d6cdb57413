"""How the tiny checkpoint was trained: data, model, optimizer, evaluation; `record/` holds the logs
of the run.
"""
