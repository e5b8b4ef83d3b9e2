"""transformers while a script runs: models without weights, configurations without the hub, masks as in an eager run.

``from_pretrained`` of a model builds what the configuration says; that of a configuration knows the shipped model
cards.  transformers is not imported for this: its modules are changed when the script imports them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.abc
import importlib.machinery
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sim.workload.cards import find_config, shipped_cards
from sim.workload.script.recorder import ScriptRecorder

_OF_LOADING = {
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
}  # fmt: skip
"""What from_pretrained is told of a hub and of files, and takes away before it makes a configuration."""

Change = Callable[[types.ModuleType, contextlib.ExitStack], None]


@contextlib.contextmanager
def without_weights(recorder: ScriptRecorder) -> Iterator[None]:
    """transformers, where a script imports it, makes models without weights."""
    changes: dict[str, Change] = {
        "transformers.masking_utils": _masks,
        "transformers.modeling_utils": lambda module, stack: _models(module, stack, recorder),
        "transformers.models.auto.configuration_auto": _configurations,
    }
    with contextlib.ExitStack() as stack:
        for name, change in changes.items():
            if name in sys.modules:
                change(sys.modules[name], stack)
        finder = _WhenImported(changes, stack)
        sys.meta_path.insert(0, finder)
        stack.callback(sys.meta_path.remove, finder)
        yield


class _WhenImported(importlib.abc.MetaPathFinder):
    """Changes modules right after they are executed."""

    def __init__(self, changes: dict[str, Change], stack: contextlib.ExitStack) -> None:
        self._changes = changes
        self._stack = stack

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute, change, stack = spec.loader.exec_module, self._changes[name], self._stack

        def execute_and_change(module: types.ModuleType) -> None:
            execute(module)
            change(module, stack)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


def _put(stack: contextlib.ExitStack, place: Any, name: str, value: Any) -> None:
    if hasattr(place, name):
        stack.enter_context(unittest.mock.patch.object(place, name, value))


def _masks(module: types.ModuleType, stack: contextlib.ExitStack) -> None:
    """As :func:`sim.workload.tasks.eager_masks`."""
    _put(stack, module, "is_tracing", lambda tensor=None: False)


def _configurations(module: types.ModuleType, stack: contextlib.ExitStack) -> None:
    load = module.AutoConfig.from_pretrained

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_elsewhere(name):
            return load(name, *args, **kwargs)
        card = find_config(str(name))  # whose fields the script may change, and ask back what are none
        return type(card).from_dict(card.to_dict(), **{k: v for k, v in kwargs.items() if k not in _OF_LOADING})

    _put(stack, module.AutoConfig, "from_pretrained", classmethod(from_pretrained))


def _models(module: types.ModuleType, stack: contextlib.ExitStack, recorder: ScriptRecorder) -> None:
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config") or _configuration(name, cls.config_class)
        return _built(cls._from_config, name, config, kwargs, recorder)

    _put(stack, module.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    # Values are never looked at, and some families' initialization asks for them.
    _put(stack, module.PreTrainedModel, "initialize_weights", lambda self, *args, **kwargs: None)


def _is_elsewhere(name: Any) -> bool:
    """Whether transformers has to find it: no shipped card has the name, or a folder of the user's does."""
    return Path(str(name)).exists() or str(name).rsplit("/", maxsplit=1)[-1] not in shipped_cards()


def _configuration(name: Any, kind: Any) -> Any:
    if not _is_elsewhere(name):
        return find_config(str(name))
    from transformers import AutoConfig

    return (kind or AutoConfig).from_pretrained(name)


def _built(build: Any, name: Any, config: Any, kwargs: dict[str, Any], recorder: ScriptRecorder) -> Any:
    """The model in evaluation mode, as ``from_pretrained`` gives it; the dtype is the configuration's unless told."""
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = {"attn_implementation": kwargs["attn_implementation"]} if kwargs.get("attn_implementation") else {}
    config = copy.deepcopy(config)
    for key in kwargs.keys() & config.to_dict().keys() - {"dtype", "torch_dtype"}:
        setattr(config, key, kwargs[key])  # what is no option of loading goes before the configuration's own
    recorder.told[f"{name} at {recorder.place_of_script()} was built from its configuration, in {dtype}"] += 1
    model = build(config, dtype=dtype, **options).eval()
    return model.to("cuda") if kwargs.get("device_map") not in (None, "cpu") else model
