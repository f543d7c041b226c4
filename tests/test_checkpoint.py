"""Checkpoints: written atomically, verified when read, deleted only after a newer one is committed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distrain.errors import DataError
from distrain.runs import checkpoint, tensor_file


def save(folder: Path, step: int, value: float = 1.0, best: int | None = None, why: str = "interval") -> Path:
    model = {"weight": torch.full((3, 2), value), "tied": torch.ones(2)}
    state = {
        "identity": {"a": 1},
        "best": {"step": best, "accuracy": 0.5} if best else None,
        "why": why,
        "lines": 0,
        "evaluated_step": 0,
        "seconds": 1.5,
        "losses": {},
        "scaler": None,
        "ids": "0" * 16,
        "bits": {},
    }
    model["tied again"] = model["tied"]
    return checkpoint.save(folder, step, model, {"0.momentum_buffer": torch.ones(3)}, state)


def test_a_saved_checkpoint_is_loaded(tmp_path: Path) -> None:
    saved = checkpoint.load(save(tmp_path, 12, 0.5))
    assert saved.step == 12
    assert saved.state["identity"] == {"a": 1}
    assert torch.equal(saved.model["weight"], torch.full((3, 2), 0.5))
    assert torch.equal(saved.model["tied again"], torch.ones(2))
    assert torch.equal(saved.optimizer["0.momentum_buffer"], torch.ones(3))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / file
    content = victim.read_bytes()
    middle = len(content) // 2
    if damage == "delete":
        victim.unlink()
    else:
        damaged = {"flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}
        victim.write_bytes({**damaged, "truncate": content[:-1], "empty": b""}[damage])
    saved, skipped = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]


def test_a_partial_checkpoint_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".partial-step-00000002").mkdir()
    (tmp_path / "step-x").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.steps(tmp_path / "nowhere") == []
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 0, 0, None)
    assert checkpoint.steps(tmp_path) == [5, 4, 3, 2, 1]
    checkpoint.prune(tmp_path, 2, 0, 2)
    assert checkpoint.steps(tmp_path) == [5, 4, 2]


def test_prune_keeps_the_best_of_each_newest_one(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        save(tmp_path, step, best=best)
    checkpoint.prune(tmp_path, 2, 0, 4)
    assert checkpoint.steps(tmp_path) == [4, 3, 1]


def test_prune_keeps_every_nth_and_the_last_of_a_stop(tmp_path: Path) -> None:
    for step in range(1, 13):
        save(tmp_path, step, why="stop" if step in (3, 7) else "interval")
    checkpoint.prune(tmp_path, 2, 5, None)
    assert checkpoint.steps(tmp_path) == [12, 11, 10, 7, 5]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002").write_text("in the way")
    with pytest.raises(OSError, match="step-00000002"):
        save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert checkpoint.newest_verified(tmp_path) == 1


def test_the_newest_verified_is_searched_without_torch(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003/model.safetensors").write_bytes(b"cut")
    code = "import sys; from pathlib import Path\n"
    code += "from distrain.launcher import launch; from distrain.runs import checkpoint\n"
    code += "print(checkpoint.newest_verified(Path(sys.argv[1])), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 False\n"


def test_other_files_beside_checkpoints_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-000000010").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoint.steps(tmp_path) == [3]


def test_no_pickle_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    trap = tmp_path / "trap"
    import json
    import pickle

    import xxhash

    class Trap:
        def __reduce__(self) -> object:
            return (os.mkdir, (str(trap),))

    (path / "model.safetensors").write_bytes(pickle.dumps({"weight": Trap()}))
    digests = json.loads((path / "digests.json").read_text())
    digests["files"]["model.safetensors"] = xxhash.xxh3_128_hexdigest((path / "model.safetensors").read_bytes())
    (path / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(DataError):
        checkpoint.load(path)
    assert not trap.exists()


def test_differences_name_the_fields(tmp_path: Path) -> None:
    messages = checkpoint.differences({"train.lr": 0.1, "run.seed": 1}, {"train.lr": 0.2, "run.seed": 1, "new": None})
    assert messages == ["train.lr: 0.1 in the checkpoint, 0.2 now"]
    data = [{"data.manifest": "ab", "data.mean": [0.5]}, {"data.manifest": "cd", "data.mean": [0.4]}]
    assert checkpoint.differences(*data) == ["data.dir: another data set now (its manifest.json has another digest)"]
    assert checkpoint.differences({"data.mean": [0.5]}, {"data.mean": [0.4]}) != []


def test_files_of_tensors_are_read_by_safetensors(tmp_path: Path) -> None:
    images = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {str(dtype): torch.tensor([[1, 0, 1]]).to(dtype) for dtype in safetensors.torch._TYPES.values()}
    tensors |= {"channels last": images.to(memory_format=torch.channels_last), "tied": images, 'é"': torch.tensor(2.0)}
    tensors |= {"empty": torch.zeros(0, 3), "transposed": images[0, 0].t()}
    content = b"".join(tensor_file.pieces(tensors, {"classes": '["ant"]'}))
    (tmp_path / "file").write_bytes(content)
    loaded = safetensors.torch.load(content)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert loaded[name].tolist() == tensor.tolist()
    with safetensors.safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"classes": '["ant"]'}
    with pytest.raises(TypeError, match="wide: a tensor of complex128 cannot be saved"):
        list(tensor_file.pieces({"wide": torch.zeros(1, dtype=torch.complex128)}))
