"""The training itself: setting up a run, the loop, a step, evaluation."""
