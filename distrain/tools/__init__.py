"""What works on a run, or beside one: a module for each command.

doctor, evaluate, export, predict, report, status, wandb_run; trained: a run's model, which several of them use.
"""
