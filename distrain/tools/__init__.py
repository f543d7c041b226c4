"""What works on a run, or beside one: a module for each command of that name."""
