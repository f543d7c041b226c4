"""Models of the package timm by name, `timm:NAME`, and their weights. It is installed by `distrain[timm]`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distrain import plugins
from distrain.errors import ConfigError
from distrain.models import downloads
from distrain.models.weight_files import WeightFile
from distrain.text import printable, shortened

PREFIX = "timm:"
"""Beginning of the names of these models, and of their weights."""
_DEFAULT = "DEFAULT"
"""Name of the weights that timm itself would take, as torchvision calls them."""
_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a repository of the Hugging Face Hub; timm looks for them in this order."""


def build(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the model `timm:NAME` with new weights, for images [N, C, H, W] of the given shape (C, H, W).

    Raises:
        ConfigError: timm is missing, or there is no such model.
    """
    timm, model = _import(f"model.name={name}"), _model(name)
    options = _options(timm.models.get_pretrained_cfg(model), image_shape)
    with plugins.user_code(f"model.name={name}"):
        built: nn.Module = timm.create_model(model, num_classes=num_classes, **options)
    return built


def fetch(name: str, model: str) -> Path:
    """Return the file of a model's weights in the cache of the Hugging Face Hub; fetch it if it is not there.

    Args:
        name: the tag of the weights, such as `a1_in1k`, or `DEFAULT`.
        model: `timm:NAME` of the model.

    Raises:
        ConfigError: timm is missing, there are no such weights, or they cannot be fetched.
    """
    weights, subject = _weights(name, model), _subject(name)
    if not weights.hf_hub_id:
        return downloads.fetch(subject, weights.url)
    return _fetch_from_hub(subject, weights.hf_hub_id, [weights.hf_hub_filename] if weights.hf_hub_filename else _FILES)


def read(name: str, model: str, image_shape: tuple[int, int, int]) -> WeightFile:
    """Read a model's weights, which are fetched if necessary: see `distrain.models.pretrained`.

    timm itself loads them into a model for such images: it converts names of older files, the first layer to other
    numbers of channels, and position embeddings to other sizes.
    """
    timm, path, weights = _import(_subject(name)), fetch(name, model), _weights(name, model)
    source = {"file": str(path), "custom_load": weights.custom_load and not weights.hf_hub_id}
    with torch.random.fork_rng(devices=[]), plugins.user_code(f"{_subject(name)}: timm cannot load {path}"):
        loaded = timm.create_model(
            f"{weights.architecture}.{weights.tag}",
            pretrained=True,
            pretrained_cfg_overlay=source,
            **_options(weights, image_shape),
        )
    classes = list(weights.label_names) if weights.label_names else None
    return WeightFile(dict(loaded.state_dict()), classes, [], list(weights.mean), list(weights.std))


def _subject(name: str) -> str:
    return f"model.init={PREFIX}{printable(name)}"


def _import(subject: str) -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(f"{subject}: needs the package timm: pip install 'distrain[timm]'") from error
    module: ModuleType = timm
    return module


def _model(name: str) -> str:
    """Return timm's name of the model `timm:NAME`.

    Raises:
        ConfigError: there is no such model.
    """
    timm = _import(f"model.name={name}")
    model, dot, tag = name.removeprefix(PREFIX).partition(".")
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(PREFIX + each for each in close)}?" if close else "see timm.list_models()"
        raise ConfigError(f"model.name={name}: timm has no such model; {hint}")
    if dot:
        raise ConfigError(
            f"model.name={name}: {printable(tag)} names weights; set model.name={PREFIX}{model} and"
            f" model.init={PREFIX}{printable(tag)}"
        )
    return model


def _weights(name: str, model: str) -> Any:
    """Return timm's description of weights, its `PretrainedCfg`.

    Raises:
        ConfigError: timm is missing, there are no such weights, or it is a model of another library.
    """
    timm, subject = _import(_subject(name)), _subject(name)
    if not model.startswith(PREFIX):
        raise ConfigError(f"{subject}: model.name={model} is not a model of timm; set model.name={PREFIX}… too")
    model = _model(model)
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{model}.*")]
    tag = timm.models.get_pretrained_cfg(model).tag if tags and name == _DEFAULT else name
    if tag not in tags:
        known = f"{model} has the weights {', '.join(shortened([*tags, _DEFAULT], 20))}" if tags else "it has none"
        close = difflib.get_close_matches(name, tags, n=1)
        raise ConfigError(f"{subject}: unknown; {f'did you mean {close[0]}? ' if close else ''}{known}")
    return timm.models.get_pretrained_cfg(f"{model}.{tag}")


def _options(weights: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that depend on the images; transformers are built for one size."""
    channels, height, width = image_shape
    for_one_size = weights is not None and weights.fixed_input_size  # None: no weights were published
    return {"in_chans": channels, **({"img_size": (height, width)} if for_one_size else {})}


def _fetch_from_hub(subject: str, repository: str, names: Sequence[str]) -> Path:
    """Return the first of these files that is in the cache, or that the repository has."""
    import huggingface_hub as hub

    for name in names:
        cached = hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            return Path(hub.hf_hub_download(repository, name))
        except Exception as error:  # of several kinds: network, server, disk
            missing = isinstance(error, hub.errors.EntryNotFoundError)
            if missing and not isinstance(error, hub.errors.LocalEntryNotFoundError) and name != names[-1]:
                continue
            raise ConfigError(
                f"{subject}: {name} of {repository} cannot be fetched from the Hugging Face Hub:"
                f" {printable(error).rstrip('.')}; fetch it on a machine with a network (hf download {repository}"
                f" {name}), and copy its folder of the cache to {hub.constants.HF_HUB_CACHE}"
            ) from error
    raise AssertionError("no names")
