"""A run's folder: its checkpoints, its attempts, its metrics and its result.

folder: names of the files, and reading them · checkpoint, choice: written whole, verified, chosen · attempts: the
lease and its history · exit_record: how the newest attempt ended · results: predicted classes, accuracy of each class ·
logs: metrics, audit and progress · trackers: copies at wandb and for TensorBoard · records: schemas of JSON files.
"""
