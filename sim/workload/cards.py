"""Model cards: the architectures that ship with the project, and any folder with a Hugging Face config.json."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sim.errors import InputError, UnknownNameError, UserError
from sim.workload.config_fields import problems_of


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``config``: the fields of a Hugging Face config.json; ``parameters``: how many it should have, if known."""

    config: dict[str, Any]
    source: str
    parameters: int | None = None


def shipped_cards() -> dict[str, ModelCard]:
    """Every model card of the package, by name."""
    cards: dict[str, ModelCard] = {}
    folder = resources.files("sim.workload").joinpath("models")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            cards.update(msgspec.convert(yaml.safe_load(file.read_text()), dict[str, ModelCard]))
    return cards


def find_config(model: str) -> Any:
    """The transformers configuration of a shipped card, a folder with config.json, or a hub name.

    Raises UnknownNameError, with the nearest names, where it is none of them.
    """
    cards = shipped_cards()
    if model in cards:
        return _build(model, cards[model].config)
    path = Path(model)
    if path.is_dir() or path.name == "config.json":
        return _from_file(path / "config.json" if path.is_dir() else path)
    last_part = model.rsplit("/", maxsplit=1)[-1]
    if last_part in cards:
        return _build(model, cards[last_part].config)
    return _from_hub(model, cards)


def _build(name: str, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(name, "no `model_type`; it names the architecture, such as llama")
    problems = list(problems_of(fields))
    if problems:
        raise InputError(name, "; ".join(problems))
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError:
        raise InputError(name, f"model_type {model_type!r} is not known to the installed transformers") from None
    except Exception as error:
        # Configurations validate their own fields, each with errors of its own kind.
        raise InputError(name, f"the configuration is refused by transformers: {error}") from None


def _from_file(path: Path) -> Any:
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(path, "no such file; a model folder holds a Hugging Face config.json") from None
    except (OSError, ValueError) as error:
        raise InputError(path, f"not a JSON configuration ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(path, "not a configuration: a JSON object is expected")
    return _build(str(path), fields)


def _from_hub(model: str, cards: dict[str, ModelCard]) -> Any:
    from transformers import AutoConfig

    unknown = UnknownNameError(
        "model", model, cards, "or give a folder with a config.json, or a hub name where the hub can be reached"
    )
    if model.count("/") != 1:
        raise unknown
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, UserError):
        raise unknown from None
