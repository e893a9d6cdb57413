"""How the tiny checkpoint was trained: data, model, optimizers and evaluation; `record/` holds the
logs of the runs.
"""
