"""A run's folder: its checkpoints, its lives, what it writes down.

folder: names of its files, and what stands in them · checkpoint: written whole, found, verified · lives: who may
write · logs: metrics, audit, progress · trackers: their copies at wandb and for TensorBoard.
"""
