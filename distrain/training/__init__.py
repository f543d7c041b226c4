"""The training itself.

setup: data set, model, optimizer, as one `Job` → trainer: the loop (`Trainer.fit`) → step: one optimizer step ·
feed: local batches onto the device · stopping: when the processes agree to stop · meters: the training loss ·
checkpointing: the run's folder, resumed from and saved to · evaluation: exact scores · reporting: logs and trackers ·
summary and pictures: for people · augment, optim, profiling: torch alone · optimizer_state: what a checkpoint holds of
an optimizer · user_functions: schedule, loss and augmentation of the user.
"""
