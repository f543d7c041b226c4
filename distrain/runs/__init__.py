"""A run's folder: its checkpoints, its attempts, what it writes down.

folder: names of its files, and what stands in them · checkpoint: written whole, found, verified · attempts: who may
write · logs: metrics, audit, progress · trackers: their copies at wandb and for TensorBoard.
"""
