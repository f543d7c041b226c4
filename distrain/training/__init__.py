"""The training itself.

setup → job (what a run works with) → trainer: the loop, and when it logs, evaluates and saves → step: one step;
evaluation: exact scores; checkpointing: the folder taken, gone on from, saved to; summary and pictures: for people.
"""
