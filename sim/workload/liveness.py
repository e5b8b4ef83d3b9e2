"""When intermediates are freed: by Python (as recorded), or at their last use, as an exported graph module does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sim.ops import Alloc, Free, Op, renumbered

KEPT = ("parameter", "input")


def free_at_last_use(ops: Sequence[Op], uses: Mapping[int, Sequence[int]], outputs: Collection[int]) -> list[Op]:
    """Move the Free of every intermediate block to behind the last operation that touches it.

    ``uses`` maps a position in ``ops`` to the blocks touched there; ``outputs`` are blocks that the program
    returns, whose Free stays where it is, as does that of parameters and inputs.
    """
    movable = {op.block for op in ops if isinstance(op, Alloc) and op.category not in KEPT and op.block not in outputs}
    freed = {op.block for op in ops if isinstance(op, Free)}
    last_use: dict[int, int] = {
        op.block: i for i, op in enumerate(ops) if isinstance(op, Alloc) and op.block in movable
    }
    for position, blocks in uses.items():
        for block in blocks:
            if block in movable:
                last_use[block] = max(last_use[block], position)
    dying: dict[int, list[int]] = {}
    for block, position in last_use.items():
        if block in freed:
            dying.setdefault(position, []).append(block)
    return _rebuilt(ops, movable, dying)


def _rebuilt(ops: Sequence[Op], movable: Collection[int], dying: Mapping[int, Sequence[int]]) -> list[Op]:
    moved: list[Op] = []
    index_of: dict[int, int] = {}
    for i, op in enumerate(ops):
        if not (isinstance(op, Free) and op.block in movable):
            index_of[i] = len(moved)
            moved.append(renumbered(op, index_of))
        moved.extend(Free(lane=0, block=block) for block in dying.get(i, ()))
    return moved
