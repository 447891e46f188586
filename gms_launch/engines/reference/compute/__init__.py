"""What the reference engine's worker needs of a device: fill memory from a file, sum words, keep a word.

`host` works on host memory with numpy, `cuda` on a GPU with its own kernel; both give the same numbers, so the same
model gives the same text on either.
"""

from __future__ import annotations

from gms_launch.engines.reference.compute.base import Compute


def make(kind: str, index: int) -> Compute:
    """The device `index` of a kind: host or cuda. Raises `CudaError` without a driver."""
    if kind == "cuda":
        from gms_launch.engines.reference.compute.cuda import CudaCompute

        return CudaCompute(index)
    from gms_launch.engines.reference.compute.host import HostCompute

    return HostCompute()
