"""Write docs/configuration.md, the reference of all keys, from distrain/config.py: `make docs` runs this script."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distrain import config

PAGE = Path(__file__).with_name("configuration.md")

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from distrain/config.py: change it there. -->

Every key of a run. Values come from the defaults, then the YAML file (`--config`), then `section.key=value`:

```bash check
distrain train --config configs/cifar10.yaml data.dir=data/cifar10 train.lr=1e-1 train.clip_norm=null data.std=[1,1,1]
```

In a YAML file, keys are grouped by section; `distrain config` prints such a file with all defaults. `null` means no
value. Unknown keys and invalid values are errors; one message names all of them.

**id**: the key is part of the run's identity. It changes what is trained, so a run resumes only with the same value; to
use another value, choose another `run.dir`. The contents of `data.dir` and `model.init` are part of the identity too,
but not their paths. All other keys may differ between the attempts of a run.
"""

_TYPES = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}
_TYPES |= {"object": "mapping"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_LIMITS |= {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # pydantic keeps its own names in a union with null


def markdown() -> str:
    """Return the page: a table of keys for each section of the configuration."""
    lines = [_INTRODUCTION]
    for section, part in config.Config.model_fields.items():
        schema = type(part.default).model_json_schema()["properties"]
        lines += [f"## {section}", "", escape(type(part.default).__doc__ or ""), ""]
        lines += ["| key | default | values | meaning | id |", "|---|---|---|---|---|"]
        for key_section, name, default, meaning, is_identity in config.every_key():
            if key_section == section:
                cells = [f"`{section}.{name}`", f"`{_yaml(default)}`", _values(schema[name]), meaning]
                lines.append(f"| {' | '.join(map(escape, cells))} | {'id' if is_identity else ''} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Escape characters that would end a table cell or begin an HTML tag."""
    return re.sub(r"<(?=[A-Za-z/!])", r"\<", text.replace("|", r"\|"))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).partition("\n")[0].strip("'")


def _values(schema: Mapping[str, Any]) -> str:
    """Describe the allowed values of a key, given its JSON Schema."""
    if "anyOf" in schema:
        return ", or ".join(_values(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema["type"] == "array":
        minimum, maximum = schema.get("minItems"), schema.get("maxItems")
        count = f"{maximum} " if minimum == maximum and maximum else ""
        return f"list of {count}{_values(schema['items']).replace('number', 'numbers')}"
    if "format" in schema:
        return f"`{schema['format']}`"
    limits = ", ".join(f"{sign} {_limit(schema[name])}" for name, sign in _LIMITS.items() if name in schema)
    return f"{_TYPES[schema['type']]} {limits}".rstrip()


def _limit(number: float) -> str:
    """Return a number as text; large powers of two as `2^n`."""
    whole = int(number)
    return f"2^{whole.bit_length() - 1}" if whole >= 2**20 and whole & (whole - 1) == 0 else f"{number:g}"


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
