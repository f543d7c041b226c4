"""A run's folder: its checkpoints, its lives, what it writes down."""
