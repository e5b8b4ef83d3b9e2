"""Point-to-point communication of a pipeline, written down as ProcessGroupNCCL would issue it.

``torch.distributed.isend``, ``irecv`` and ``batch_isend_irecv`` are replaced while a schedule runs.  On CUDA
(torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, pointToPoint(), PyTorch 2.13):

* a send or receive by itself runs on a communicator of the two ranks, which has one stream for both directions;
* a batch runs as one kernel (ncclGroupStart to ncclGroupEnd) on the communicator and the stream of the whole group;
* each waits for what the current stream has been given so far, and ``wait()`` makes the current stream wait for it.

Within a communicator the n-th send from one rank to another meets the n-th receive there, so each communicator has a
group of two for each direction it is used in: sender first.  Ranks are named by their place in the pipeline.

Left out: that NCCL sends what fits its buffers (4 MiB a channel) before the receiver has come; here both ends leave
together.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sim.ops import CollectiveKind
from sim.workload.builder import Transfer
from sim.workload.record import Recorder, dtype_of, nbytes

STREAM = "nccl:pp"


class Arrival:
    """Stands in for ``torch.distributed.Work``."""

    def __init__(self, recorder: Recorder, indices: Sequence[int]) -> None:
        self._recorder = recorder
        self._indices = indices

    def wait(self, timeout: Any = None) -> bool:
        """The current stream waits, the host does not."""
        for index in self._indices:
            self._recorder.wait(index)
        return True


class PointToPoint:
    """The sends and receives of the rank at ``place`` of a pipeline; ``recorder`` is who writes down now.

    ``stride`` is how far apart the ranks of a pipeline are: how many ranks share a place, and run one program.
    """

    recorder: Recorder

    def __init__(self, place: int, stride: int) -> None:
        self._place = place
        self._stride = stride
        self.pairs: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Replace torch.distributed's calls while the context is open."""
        calls: dict[str, Any] = {"isend": self._isend, "irecv": self._irecv, "batch_isend_irecv": self._batch}
        with unittest.mock.patch.multiple(dist, **calls), unittest.mock.patch.multiple(distributed_c10d, **calls):
            yield

    def groups(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The groups of two that were used, one instance for each rank of a place."""
        return {
            name: tuple((a * self._stride + i, b * self._stride + i) for i in range(self._stride))
            for name, (a, b) in self.pairs.items()
        }

    def _isend(
        self, tensor: torch.Tensor, dst: int | None = None, group: Any = None, tag: int = 0,
        group_dst: int | None = None,
    ) -> Arrival:  # fmt: skip
        return self._alone("send", tensor, self._place_of(dst, group_dst))

    def _irecv(
        self, tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0,
        group_src: int | None = None,
    ) -> Arrival:  # fmt: skip
        return self._alone("recv", tensor, self._place_of(src, group_src))

    def _batch(self, ops: Sequence[Any]) -> list[Arrival]:
        transfers = [
            self._transfer("send" if op.op == self._isend else "recv", op.tensor, op.peer // self._stride, " batched")
            for op in ops
        ]
        return [self._issue(transfers, STREAM)]

    def _alone(self, kind: CollectiveKind, tensor: torch.Tensor, peer: int) -> Arrival:
        low, high = sorted((self._place, peer))
        transfer = self._transfer(kind, tensor, peer, "")
        return self._issue([transfer], f"{STREAM} {low}-{high}")

    def _issue(self, transfers: Sequence[Transfer], stream: str) -> Arrival:
        return Arrival(self.recorder, self.recorder.builder.exchange(transfers, stream))

    def _place_of(self, rank: int | None, group_rank: int | None) -> int:
        """A peer is given by its rank in the group, which is its place, or by its rank among all."""
        if group_rank is not None:
            return group_rank
        assert rank is not None, "a peer has a rank"
        return rank // self._stride

    def _transfer(self, kind: CollectiveKind, tensor: torch.Tensor, peer: int, how: str) -> Transfer:
        pair = (self._place, peer) if kind == "send" else (peer, self._place)
        group = f"pp {pair[0]} to {pair[1]}{how}"
        self.pairs[group] = pair
        known = peer if self._stride == 1 else None
        block = self.recorder.buffer(tensor, kind)
        return Transfer(kind, nbytes([tensor]), group, dtype_of(tensor), block, known)
