"""Benchmarks of distrain: reading, training and evaluation, compared with common alternatives and the machine's limits.

    python -m benchmarks --help

Each part is a module with a function `measure`, which takes a `Context` and returns a `Table`. `run` calls the parts
one after another and writes their tables. distrain does not import this package, and its wheel does not contain it.
"""

DEFAULT_PARTS = ("reading", "loader", "decoding", "tutorial", "training", "scaling", "evaluation", "startup", "memory")
PARTS = (*DEFAULT_PARTS, "launches", "restarts", "saves", "virtual_ranks", "accuracy")
"""All parts, in the order in which they run.

Parts that train in this process change how it allocates memory, so reading is measured first.
"""
