"""The commands that work on runs that exist, or check a machine: one module each.

doctor, evaluate, export, predict, report, status, wandb_run; loaded_model: a run's model, which several of them use.
"""
