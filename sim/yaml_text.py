"""YAML text to plain data, with the line of every mistake YAML itself can see."""

from __future__ import annotations

from collections.abc import Hashable

import yaml

from sim.errors import InputError


class _OneKeyLoader(yaml.SafeLoader):
    """A key that stands twice in one mapping is a mistake, not a silent replacement."""


def _mapping_without_repeats(loader: _OneKeyLoader, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
        if key in seen:
            problem = f"the key {key!r} stands twice in this mapping"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_OneKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def parse_yaml(text: str, where: str) -> dict[str, object]:
    """The mapping in ``text``; InputError with the line where it is no YAML mapping."""
    try:
        # A SafeLoader: it builds plain data only, whatever tags a stranger's file carries.
        data = yaml.load(text, Loader=_OneKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(where, f"{line}not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(where, f"not valid YAML: {error or type(error).__name__}") from None
    if not isinstance(data, dict):
        raise InputError(where, f"must be a mapping of keys, found {_shape(data)}")
    return {str(key): value for key, value in data.items()}


def _shape(data: object) -> str:
    words = {"NoneType": "nothing", "str": "text", "int": "a number", "float": "a number", "bool": "true or false"}
    kind = type(data).__name__
    return words.get(kind, f"a {kind}")
