"""cuBLAS workspaces by architecture."""

from __future__ import annotations

import pytest

from sim.errors import UserError
from sim.replay.allocator.workspace import cublas_workspace_bytes, cublaslt_workspace_bytes
from sim.units import KIB, MIB


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9)])
def test_before_hopper(capability: tuple[int, int]) -> None:
    # 2 x 4096 KiB + 8 x 16 KiB = 8192 + 128 KiB = 8.125 MiB
    assert cublas_workspace_bytes(capability) == 8320 * KIB


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_hopper_and_after(capability: tuple[int, int]) -> None:
    assert cublas_workspace_bytes(capability) == 32 * MIB


def test_blackwell_before_2_12() -> None:
    assert cublas_workspace_bytes((12, 0), torch_version=(2, 11)) == 8320 * KIB
    assert cublas_workspace_bytes((9, 0), torch_version=(2, 11)) == 32 * MIB


def test_the_environment_decides() -> None:
    # :4096:8 is 8 buffers of 4 MiB; pairs add up; nonsense leaves the default
    assert cublas_workspace_bytes((8, 6), ":4096:8") == 32 * MIB
    assert cublas_workspace_bytes((9, 0), ":16:8:4096:1") == 128 * KIB + 4 * MIB
    assert cublas_workspace_bytes((8, 6), "nonsense") == 8320 * KIB


def test_cublaslt_shares_it_or_has_1_mib() -> None:
    assert cublaslt_workspace_bytes((8, 6)) == 0
    assert cublaslt_workspace_bytes((8, 6), unified=False) == MIB


def test_no_such_gpu() -> None:
    with pytest.raises(UserError, match=r"write it as \(8, 6\)"):
        cublas_workspace_bytes((0, 3))
    with pytest.raises(UserError, match="compute capability"):
        cublaslt_workspace_bytes((0, 3))
