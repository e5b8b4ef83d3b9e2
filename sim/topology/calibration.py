"""Calibration: how much of its data sheet a device reaches, fitted to microbenchmarks, by what bounds a kernel.

Every block says what it was fitted to.  Which formula reads a number is said in docs/kernels.md; how it was fitted, in
tools/fit_kernels.py.  Shares are of the data sheet; times are microseconds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from sim.topology.fields import Count, Dtype, FileModel, NotBool, Positive, Share, Text, Time, one_of

Tile = tuple[Count, Count]
Tiles = Annotated[tuple[Tile, ...], Field(min_length=1)]
AtLeastOne = Annotated[float, Field(ge=1, le=1e9, allow_inf_nan=False), NotBool]
ROWS = ("softmax", "layer_norm")
SPREADS = ("gemm_float16", "gemm_float32", "elementwise", *ROWS, "attention")
RowName = Annotated[str, one_of("kernel of rows", ROWS)]
SpreadName = Annotated[str, one_of("class of kernels", SPREADS)]


class GemmFit(FileModel):
    """Matrix products that library kernels compute tile by tile.

    ``efficiency``: share of an SM's rate in an endless tile; ``operand_elements``: rows of operands whose loading
    costs as much as one row of products (small tiles pay it more often); ``prologue_k``: steps of k that a tile's
    begin and end cost; ``tail``: tiles' worth of time that an SM idles at the end; ``split_us``: what splitting k
    costs; ``fixed_us``: begin and end of the kernel; ``memory_efficiency``: share of what streams reach when bound by
    operands; ``overlap``: how sharply the slower of compute and memory rules (a p-norm); ``store_exposed``: share of
    the output's way to DRAM that no product hides, because all SMs end their tiles at the same time;
    ``unaligned_efficiency``: where rows do not begin at 16 bytes; ``long_k_efficiency``: from k = 32768 on, where the
    libraries choose other kernels.  ``tiles`` are [columns, rows] of the output.
    """

    source: Text
    data: Text
    efficiency: Share
    operand_elements: Time
    prologue_k: Time
    tail: Time
    split_us: Time
    fixed_us: Time
    memory_efficiency: Share
    overlap: AtLeastOne
    store_exposed: Annotated[float, Field(ge=0, le=1)] = 0.0
    unaligned_efficiency: Share = 1.0
    long_k_efficiency: Share = 1.0
    tiles: Tiles
    splits: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 2, 4, 8)


class PowerFit(FileModel):
    """What the power limit allows: ``gflop_per_joule`` of board power at full load, in tiles of 128 x 128.

    ``lower_bound``: no limit showed, the best rate that was measured is all that is known.
    """

    source: Text
    data: Text
    gflop_per_joule: Positive
    lower_bound: bool = False


class MemoryFit(FileModel):
    """``efficiency``: share of the data sheet's bandwidth that large streams reach; ``cache_speedup``: by how much
    tensors that fit into the last cache together are faster, where that was measured; ``element_ns``: of a CPU's core,
    what elementwise ops that compute take an element beside its bytes, by name; ``op_us``: of a CPU, what the shortest
    call of an elementwise op takes beyond ``kernel_floor_us``."""

    source: Text
    data: Text
    efficiency: Share
    cache_speedup: AtLeastOne | None = None
    element_ns: dict[str, Positive] = Field(default_factory=dict)
    op_us: dict[str, Positive] = Field(default_factory=dict)


class RowFit(FileModel):
    """Kernels in which one block of threads reads a row several times (softmax, layer norm).

    ``setup_us`` and ``pass_us``: what a row costs a block besides bytes, once and for each pass of its threads over a
    stretch of the row; ``miss_from`` and ``miss_span``: rows in flight, as a share of the L2, from where on and over
    which span a second reading comes from DRAM again; ``overlap`` as for matrix products.
    """

    source: Text
    data: Text
    setup_us: Time
    pass_us: Time
    miss_from: Time
    miss_span: Positive
    overlap: AtLeastOne


class AttentionFit(FileModel):
    """Shares of the tensor-core rate that fused attention reaches, forward and backward."""

    source: Text
    data: Text
    flash: Share
    flash_backward: Share
    efficient: Share
    efficient_backward: Share


class Spread(FileModel):
    """Measured over predicted: the 10th and 90th percentile on data that the fit had not seen.

    ``p10``, ``p90``: shapes left out on the device itself; ``borrowed_p10``, ``borrowed_p90``: the device left out
    whole, predicted by what others lend it.
    """

    p10: Positive
    p90: Positive
    borrowed_p10: Positive
    borrowed_p90: Positive

    @model_validator(mode="after")
    def _rising(self) -> Spread:
        if self.p10 > self.p90 or self.borrowed_p10 > self.borrowed_p90:
            raise ValueError("p10 must not exceed p90")
        return self


class CallTime(FileModel):
    """Microseconds that device events around one call show besides the kernel (the host's part), by class of op.

    ``linear`` and ``bmm``: one product with its bias, and a batch of products, in float32; None where not measured.
    """

    source: Text
    data: Text
    elementwise: Time
    softmax: Time
    layer_norm: Time
    linear: Time | None = None
    bmm: Time | None = None


class Calibration(FileModel):
    """What is calibrated on this device; what is not is borrowed (sim/topology/abilities.py)."""

    gemm: dict[Dtype, GemmFit] = Field(default_factory=dict)
    power: dict[Dtype, PowerFit] = Field(default_factory=dict)
    memory: MemoryFit | None = None
    rows: dict[RowName, RowFit] = Field(default_factory=dict)
    attention: AttentionFit | None = None
    call: CallTime | None = None
    spread: dict[SpreadName, Spread] = Field(default_factory=dict)
