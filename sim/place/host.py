"""What the host takes for a call of a synthesized workload, by the kind of op and the thread that issues it.

A machine states ``op_us`` for ops that launch and ``metadata_us`` for those that do not; the kinds that it states of
their own go before.
"""

from __future__ import annotations

from sim.ops import HostCall, Lane
from sim.topology.schema import HostCosts

PRODUCTS = frozenset(
    "aten::" + name for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_mm")
)
COPIES = frozenset("aten::" + name for name in ("_to_copy", "copy_", "clone", "cat", "stack"))
NORM_WORDS = ("layer_norm", "batch_norm", "group_norm", "rms_norm", "softmax")
LIST_PREFIXES = ("aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd", "aten::_amp_foreach_")
AUTOGRAD = "autograd"


def host_us(host: HostCosts, call: HostCall, thread: Lane, launches: bool) -> float:
    """Microseconds of a call that is neither measured nor only waits."""
    if not launches:
        return host.metadata_us
    stated = _of_kind(host, call.name)
    if stated is None and thread.name == AUTOGRAD:
        stated = host.backward_us
    return host.op_us if stated is None else stated


def _of_kind(host: HostCosts, name: str) -> float | None:
    if name in PRODUCTS:
        return host.product_us
    if name in COPIES:
        return host.copy_us
    if name.startswith(LIST_PREFIXES):
        return host.list_us
    return host.norm_us if any(word in name for word in NORM_WORDS) else None
