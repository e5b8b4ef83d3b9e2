"""PYTORCH_CUDA_ALLOC_CONF: the settings of the caching allocator, parsed as PyTorch parses them.

Sources: PyTorch c10/core/AllocatorConfig.h and .cpp and c10/cuda/CUDAAllocatorConfig.h and .cpp, tag v2.13.0.
The accepted strings, the values they give and the refused ones were compared with libc10.so and
libc10_cuda.so of the 2.13.0 wheel.  What PyTorch takes without a word and a user can only have mistyped
(a negative number, which it wraps to 2^64 minus it) is an error here.

Changed over the versions: ``max_non_split_rounding_mb`` came with 2.7 (before, the constant 20 MiB),
``per_process_memory_fraction``, ``graph_capture_record_stream_reuse`` and ``large_segment_size_mb`` between
2.9 and 2.11, ``throw_on_cudamalloc_oom`` and ``pinned_free_catch_all`` between 2.12 and 2.13.  In a list of
roundups, ``>:N`` filled from the last named interval itself until 2.8 and fills from the one after it since.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from sim.errors import UnknownNameError, UserError
from sim.replay.allocator.rounding import LARGE_BUFFER, MIN_LARGE_ALLOC, NO_ROUNDUP, ROUNDUP_INTERVALS
from sim.units import MIB


@dataclasses.dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """Settings that decide addresses.  Sizes are bytes; ``None`` is "no limit".

    ``without_effect`` names the keys that were given, are valid, and change nothing that is simulated here
    (they are about pinned host memory, locks, or which error is raised when).
    """

    max_split_size: int | None = None
    max_non_split_rounding: int = LARGE_BUFFER
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    roundup_power2_divisions: tuple[int, ...] = NO_ROUNDUP
    large_segment_size: int = LARGE_BUFFER
    per_process_memory_fraction: float = 1.0
    without_effect: tuple[str, ...] = ()


def parse_alloc_conf(text: str) -> AllocatorConfig:
    """The settings in ``key:value,key:value``; white space is ignored, a later key overrides an earlier one.

    Raises :class:`~sim.errors.UserError` naming the key, the value and what is allowed.
    """
    return _Parser(_tokens(text)).config()


def _tokens(text: str) -> list[str]:
    return re.findall(r"[,:\[\]]|[^,:\[\]]+", re.sub(r"\s", "", text))


def _is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class _Parser:
    """Goes through the tokens once; every ``_read_*`` starts on a value and leaves the place after it."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._place = 0
        self._config = AllocatorConfig()
        self._ignored: list[str] = []
        self._at_least_large: dict[str, int] = {}  # sizes in MiB that large_segment_size_mb must not exceed
        self._readers: dict[str, Callable[[str], None]] = {
            "max_split_size_mb": self._read_max_split_size,
            "max_non_split_rounding_mb": self._read_max_non_split_rounding,
            "garbage_collection_threshold": self._read_garbage_collection_threshold,
            "roundup_power2_divisions": self._read_roundups,
            "expandable_segments": self._read_expandable_segments,
            "large_segment_size_mb": self._read_large_segment_size,
            "per_process_memory_fraction": self._read_memory_fraction,
            "backend": self._read_backend,
            "throw_on_cudamalloc_oom": self._skip_bool,
            "release_lock_on_cudamalloc": self._skip_bool,
            "release_lock_on_hipmalloc": self._skip_bool,
            "pinned_use_cuda_host_register": self._skip_bool,
            "pinned_use_hip_host_register": self._skip_bool,
            "pinned_use_background_threads": self._skip_bool,
            "pinned_free_catch_all": self._skip_bool,
            "graph_capture_record_stream_reuse": self._skip_bool,
            "pinned_num_register_threads": self._skip_register_threads,
            "pinned_reserve_segment_size_mb": self._skip_reserve_segment,
            "pinned_max_round_threshold_mb": self._skip_integer,
            "pinned_max_cached_size_mb": self._skip_integer,
        }

    def config(self) -> AllocatorConfig:
        while self._place < len(self._tokens):
            key = self._next("a key")
            if key not in self._readers:
                raise UnknownNameError("key of PYTORCH_CUDA_ALLOC_CONF", key, self._readers)
            self._expect(":", key)
            self._readers[key](key)
            if self._place < len(self._tokens):
                self._expect(",", key)
        self._check_against_large_segment()
        return dataclasses.replace(self._config, without_effect=tuple(self._ignored))

    def _check_against_large_segment(self) -> None:
        # PyTorch reads large_segment_size_mb first, wherever it stands, and holds the other sizes against it.
        least = self._config.large_segment_size // MIB
        for key, value in self._at_least_large.items():
            if value < least:
                raise UserError(f"{key}:{value} is too small: it must be at least {least}, a large segment in MiB")

    # places and tokens

    def _next(self, wanted: str, key: str = "") -> str:
        if self._place >= len(self._tokens):
            at = f" after {key!r}" if key else ""
            raise UserError(f"PYTORCH_CUDA_ALLOC_CONF ends where {wanted} is expected{at}; write key:value,key:value")
        token = self._tokens[self._place]
        self._place += 1
        return token

    def _expect(self, mark: str, key: str) -> None:
        token = self._next(f"{mark!r}", key)
        if token != mark:
            raise UserError(f"{mark!r} expected after {key!r} in PYTORCH_CUDA_ALLOC_CONF, found {token!r}")

    def _integer(self, key: str) -> int:
        """The leading digits of the value, as std::stoull reads them: ``100MB`` is 100."""
        token = self._next("a number", key)
        match = re.match(r"\+?\d+", token)
        if match is None:
            raise UserError(f"{key}:{token} is not a whole number of 0 or more")
        return int(match.group())

    def _decimal(self, key: str) -> float:
        token = self._next("a number", key)
        match = re.match(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", token)
        if match is None:
            raise UserError(f"{key}:{token} is not a number")
        return float(match.group())

    def _bool(self, key: str) -> bool:
        token = self._next("True or False", key)
        if token not in ("True", "False"):
            raise UserError(f"{key}:{token} must be True or False, written so")
        return token == "True"

    # keys that decide addresses

    def _read_max_split_size(self, key: str) -> None:
        value = self._at_least_large[key] = self._integer(key)
        self._config = dataclasses.replace(self._config, max_split_size=value * MIB)

    def _read_max_non_split_rounding(self, key: str) -> None:
        value = self._at_least_large[key] = self._integer(key)
        self._config = dataclasses.replace(self._config, max_non_split_rounding=value * MIB)

    def _read_large_segment_size(self, key: str) -> None:
        value = self._integer(key)
        if value * MIB <= MIN_LARGE_ALLOC:
            raise UserError(f"{key}:{value} must be larger than {MIN_LARGE_ALLOC // MIB}")
        self._config = dataclasses.replace(self._config, large_segment_size=value * MIB)

    def _read_garbage_collection_threshold(self, key: str) -> None:
        value = self._decimal(key)
        if not 0.0 < value < 1.0:
            raise UserError(f"{key}:{value} must lie between 0 and 1, both excluded")
        self._config = dataclasses.replace(self._config, garbage_collection_threshold=value)

    def _read_memory_fraction(self, key: str) -> None:
        value = self._decimal(key)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}:{value} must lie in 0 to 1")
        self._config = dataclasses.replace(self._config, per_process_memory_fraction=value)

    def _read_expandable_segments(self, key: str) -> None:
        self._config = dataclasses.replace(self._config, expandable_segments=self._bool(key))

    def _read_backend(self, key: str) -> None:
        token = self._next("a backend", key)
        if token == "cudaMallocAsync":
            raise UserError("backend:cudaMallocAsync is CUDA's own allocator and is not simulated; use backend:native")
        if token != "native":
            raise UserError(f"{key}:{token} is unknown; PyTorch knows native and cudaMallocAsync")

    def _read_roundups(self, key: str) -> None:
        if self._place < len(self._tokens) and self._tokens[self._place] == "[":
            self._place += 1
            divisions = self._roundup_list(key)
        else:
            value = self._integer(key)
            if not _is_power_of_2(value):
                raise UserError(f"{key}:{value} must be a power of 2")
            divisions = (value,) * ROUNDUP_INTERVALS
        self._config = dataclasses.replace(self._config, roundup_power2_divisions=divisions)

    def _roundup_list(self, key: str) -> tuple[int, ...]:
        """``[256:1,512:2,>:8]``: intervals in MiB; the first fills all below it, ``>`` all above the last."""
        divisions = list(NO_ROUNDUP)
        last = 0
        first = True
        while (interval := self._next("']'", key)) != "]":
            self._expect(":", f"{key}:[{interval}")
            value = self._integer(f"{key}:[{interval}")
            if value != 0 and not _is_power_of_2(value):
                raise UserError(f"{key}:[{interval}:{value}] must be a power of 2, or 0 for no rounding")
            if interval == ">":
                divisions[last + 1 :] = [value] * (ROUNDUP_INTERVALS - last - 1)
            else:
                last = self._interval_index(key, interval)
                if first:
                    divisions[:last] = [value] * last
                    first = False
                divisions[last] = value
            if self._place < len(self._tokens) and self._tokens[self._place] != "]":
                self._expect(",", f"{key}:[{interval}:{value}")
        return tuple(divisions)

    @staticmethod
    def _interval_index(key: str, interval: str) -> int:
        match = re.match(r"\+?\d+", interval)
        if match is None or not _is_power_of_2(int(match.group())):
            raise UserError(f"{key}:[{interval}:...] starts with an interval that is no power of 2 (MiB)")
        return min(int(match.group()).bit_length() - 1, ROUNDUP_INTERVALS - 1)

    # keys that decide none

    def _skip_bool(self, key: str) -> None:
        self._bool(key)
        self._ignored.append(key)

    def _skip_integer(self, key: str) -> None:
        self._integer(key)
        self._ignored.append(key)

    def _skip_register_threads(self, key: str) -> None:
        value = self._integer(key)
        if not _is_power_of_2(value) or value > 128:
            raise UserError(f"{key}:{value} must be a power of 2 of at most 128")
        self._ignored.append(key)

    def _skip_reserve_segment(self, key: str) -> None:
        if self._integer(key) == 0:
            raise UserError(f"{key}:0 must be larger than 0")
        self._ignored.append(key)
