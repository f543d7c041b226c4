"""`distrain bench`: how fast this machine reads, trains and evaluates, beside the usual ways and the machine's limits.

A part is a module with `measure`, from a `Context` to a `Table`; `command` runs them, and writes what they found.
"""

CHEAP = ("reading", "training", "scaling", "evaluation", "startup", "memory")
"""What is measured unless parts are named."""

PARTS = (*CHEAP, "accuracy")
