"""How much of a kernel model's error two pieces of one workload share: the `COMMON` shares of sim/place/doubt.py.

    python tools/doubt_shares.py

One-way analysis of variance of log(measured / predicted) over groups of shapes that one workload would have: products
with one number of rows, row kernels of one width, elementwise ops of one size (to an octave).  Shapes that no fit saw;
for lent calibrations every shape of the devices left out whole, grouped by device as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tools.fit_kernels as fit
from sim.topology.device import load_device, shipped_devices

Column = Any


def common_share(errors: Column, groups: Column) -> float:
    """The share of the variance that lies between the groups (method of moments, unequal sizes)."""
    _, group = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group)
    count, total = len(sizes), len(errors)
    means = np.bincount(group, errors) / sizes
    between = float((sizes * (means - errors.mean()) ** 2).sum()) / (count - 1)
    within = float(((errors - means[group]) ** 2).sum()) / (total - count)
    size = (total - float((sizes**2).sum()) / total) / (count - 1)
    variance = max(0.0, (between - within) / size)
    return variance / (variance + within)


def judged(lent: bool) -> Iterator[tuple[str, str, Column, Column]]:
    """Class of op, device, log(measured / predicted), group."""
    gemms, rows = fit.read_gemms(), fit.read_rows()
    profiles = {name: load_device(name) for name in shipped_devices()}
    able = fit.left_out(profiles) if lent else fit.themselves(profiles)
    for (name, op), products in sorted(gemms.items()):
        part = products if lent else products.part(products.held)
        error = np.log(part.us / part.predicted(able[name], alone=op != "float16"))
        yield ("gemm_float16" if op == "float16" else "gemm_float32"), name, error, part.m
    for (name, op), kernels in sorted(rows.items()):
        some = kernels if lent else kernels.part(kernels.held)
        error = np.log(some.us / some.predicted(able[name]))
        yield op, name, error, _size_octave(some) if op == "elementwise" else some.columns


def _size_octave(part: fit.Rows) -> Column:
    return np.round(np.log2(part.rows * part.columns))


def shares(lent: bool) -> dict[str, float]:
    """By class of op; of calibrated devices the mean over the devices, of lent calibrations with the devices' own
    differences among what is shared, every device as heavy as the others."""
    found: dict[str, list[tuple[Column, Column]]] = {}
    for name, _, error, group in judged(lent):
        found.setdefault(name, []).append((error, group))
    return {name: (_lent if lent else _own)(parts) for name, parts in sorted(found.items())}


def _own(parts: list[tuple[Column, Column]]) -> float:
    return float(np.mean([common_share(error, group) for error, group in parts if len(error) > len(set(group))]))


def _lent(parts: list[tuple[Column, Column]]) -> float:
    """Between devices, and within each what its groups share."""
    between = float(np.var([error.mean() for error, _ in parts], ddof=1))
    within = float(np.mean([error.var() for error, _ in parts]))
    grouped = float(np.mean([error.var() * common_share(error, group) for error, group in parts]))
    return (between + grouped) / (between + within)


def main(show: Callable[[str], None] = print) -> None:
    own, lent = shares(lent=False), shares(lent=True)
    show("class of op       calibrated   lent")
    for name in own:
        show(f"{name:16}  {own[name]:10.2f}  {lent[name]:5.2f}")


if __name__ == "__main__":
    main()
