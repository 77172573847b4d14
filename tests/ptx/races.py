"""Who touched which byte: finds accesses that nothing orders.

Two accesses of a byte, at least one of them a write, are ordered if the same warp made both, or if a barrier of their
block lies between them. Blocks are not ordered at all. Atomics do not race with each other.
"""

from __future__ import annotations

import numpy as np

from .values import PtxError

READ, WRITE, ATOMIC = 0, 1, 2
_WORDS = ("read", "write", "atomic")
_CONFLICTS = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}
_NOBODY, _SEVERAL = -1, -2
EVERY_WARP = -3  # of a block, as a warp number: an access by a warpgroup


class Shadow:
    """One record a byte and kind of access: the block, the warp and the epoch (barriers passed) of the last one."""

    def __init__(self, size: int):
        self.block = np.full((3, size), _NOBODY, np.int64)
        self.warp = np.full((3, size), _NOBODY, np.int64)
        self.epoch = np.full((3, size), _NOBODY, np.int64)

    def access(self, kind: int, at: np.ndarray, block: np.ndarray, warp: np.ndarray, epoch: np.ndarray) -> None:
        """``at``: bytes, one row a thread; the others have one value a thread. Warps are numbered over all blocks."""
        width = at.shape[1]
        at, block, warp, epoch = at.ravel(), np.repeat(block, width), np.repeat(warp, width), np.repeat(epoch, width)
        for other in _CONFLICTS[kind]:
            theirs, when = self.block[other, at], self.epoch[other, at]
            stranger = (theirs != _NOBODY) & (theirs != block)
            unordered = (theirs == block) & (when == epoch) & ((self.warp[other, at] != warp) | (warp == EVERY_WARP))
            if (stranger | unordered).any():
                i = int(np.flatnonzero(stranger | unordered)[0])
                who = "another block" if stranger[i] else "another warp, with no barrier in between"
                raise PtxError(f"race: {_WORDS[kind]} of a byte after a {_WORDS[other]} by {who} (byte {int(at[i])})")
        if kind == WRITE:  # two warps in one instruction
            self.warp[WRITE, at] = warp
            if (self.warp[WRITE, at] != warp).any():
                raise PtxError("race: two warps write the same byte in one instruction")
        else:
            order = np.lexsort((warp, at))
            a, w, b = at[order], warp[order], block[order]
            twice = np.flatnonzero((a[1:] == a[:-1]) & (w[1:] != w[:-1]))
            theirs, when = self.block[kind, at], self.epoch[kind, at]
            same_time = (theirs == block) & (when == epoch)
            shared = same_time & (self.warp[kind, at] != warp)
            strangers = (theirs != _NOBODY) & (theirs != block)
            self.warp[kind, at] = np.where(shared, _SEVERAL, warp)
            self.warp[kind, a[twice]] = _SEVERAL
            block = np.where(strangers, _SEVERAL, block)
            self.block[kind, at] = block
            self.block[kind, a[twice[b[twice + 1] != b[twice]]]] = _SEVERAL
            self.epoch[kind, at] = epoch
            return
        self.block[kind, at] = block
        self.epoch[kind, at] = epoch
