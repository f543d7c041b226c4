"""A notebook as a script: two learning rates are compared, and the better model classifies images.

python examples/from_python.py
"""

# %% A small data set, made once
import logging

import torch

import distrain

logging.basicConfig(level=logging.WARNING)
shapes = distrain.Synthetic(samples=1200, test_samples=240, image_size=16, classes=4)
data = distrain.prepare(shapes, "data/shapes", val_fraction=0.1, lanes=8)

# %% Two runs
base = distrain.Config.load(
    {
        "data": {"dir": data},
        "model": {"name": "small"},
        "train": {"epochs": 2, "global_batch_size": 32},
        "log": {"report": False},
    }
)
results: dict[float, distrain.TrainingResult] = {}
for lr in (0.0001, 0.05):
    config = distrain.Config.load(base, {"run": {"dir": f"runs/lr-{lr}"}, "train": {"lr": lr}})
    results[lr] = distrain.train(config)
    print(f"lr {lr}: {results[lr].accuracy:.1%} on test, {results[lr].images_per_second:,.0f} images/s")
best = max(results.values(), key=lambda result: result.val_accuracy or 0.0)

# %% Its curves and checkpoints
run = distrain.open_run(best.run)
steps, losses = run.series("train/loss")
print(f"{run.state}: loss {losses[-1]:.3f} after step {steps[-1]}; columns: {', '.join(run.metrics)}")
for saved in run.checkpoints:
    print(saved.name, saved.accuracy)

# %% The confusion on val, and the class that is recognised worst
scores = distrain.evaluate(best.run, "val")
print(scores.confusion_matrix())
print(min(scores.accuracy_by_class.items(), key=lambda entry: entry[1] or 0.0))

# %% The model
model = distrain.load_model(best.run, device="cpu")
images = torch.randint(0, 256, (3, *model.image_shape), dtype=torch.uint8)
print([model.classes[k] for k in model(images).argmax(1).tolist()])

# %% A mistake
try:
    distrain.open_run("runs/no-such-run")
except distrain.DataError as error:
    print(f"as expected: {error}")
