"""What pydantic found wrong in a file, told as ``path: cure`` lines, all at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel, ValidationError

Path = tuple[int | str, ...]


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem as one ``path: what it must be`` phrase, in file order of the model's checks."""
    found = error.errors(include_url=False)
    inside = {e["loc"][:i] for e in found for i in range(len(e["loc"]))}
    # A list whose only member is wrong is also "too short" to pydantic; the member says it better.
    return [_problem(dict(e), model) for e in found if e["type"] != "too_short" or e["loc"] not in inside]


def _problem(e: dict[str, object], model: type[BaseModel]) -> str:
    loc = e["loc"]
    assert isinstance(loc, tuple)
    path = dotted(loc)
    kind, given = str(e["type"]), e.get("input")
    context = e.get("ctx")
    ctx = context if isinstance(context, dict) else {}
    if kind == "extra_forbidden":
        return f"{path}: unknown key{nearest_key(str(loc[-1]), _known_keys(model, loc[:-1]))}"
    if kind == "missing":
        return f"{path}: is missing"
    if kind == "value_error":
        message = str(ctx.get("error", e["msg"]))
        return f"{path}: {message}" if path else message
    rule = _RULES.get(kind)
    if rule:
        limit = ctx.get("max_length", next(iter(ctx.values()), ""))
        limit = f"{limit:g}" if isinstance(limit, float) else limit
        return f"{path}: {rule.format(limit)}, found {_short(given)}"
    return f"{path}: {str(e['msg'])[:1].lower()}{str(e['msg'])[1:]}, found {_short(given)}"


_RULES = {
    "greater_than": "must be > {}",
    "greater_than_equal": "must be >= {}",
    "less_than": "must be < {}",
    "less_than_equal": "must be <= {}",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {}",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "too_short": "must hold something",
    "too_long": "must hold {} at most",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
}


def dotted(loc: Iterable[int | str]) -> str:
    """``links[1].bandwidth_gb_s``: keys joined by dots, places in a list in brackets."""
    path = ""
    for part in loc:
        if part == "[key]":  # pydantic's word for what is wrong with a key itself
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def nearest_key(key: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known are {', '.join(names)})" if names else ""


def _known_keys(model: type[BaseModel], loc: Path) -> list[str]:
    """Keys that the (nested) model at ``loc`` knows."""
    current: type[BaseModel] | None = model
    for part in loc:
        if current is None:
            return []
        if not isinstance(part, str) or part not in current.model_fields:
            continue  # a place in a list or a free key of a mapping: same model
        current = _model_in(current.model_fields[part].annotation)
    return list(current.model_fields) if current else []


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The model inside ``X``, ``X | None``, ``tuple[X, ...]`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found:
            return found
    return None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
