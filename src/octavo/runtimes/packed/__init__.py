"""Running from packed codes or factors: kernels, and weights without a dense matrix."""

from octavo.runtimes.packed.factors import RunChoice, factored
from octavo.runtimes.packed.kernels import Kernel, kernel_for, resident_bytes
from octavo.runtimes.packed.weight import PackedWeight, held_bytes, kernels_of, packed_weight

__all__ = [
    "Kernel",
    "PackedWeight",
    "RunChoice",
    "factored",
    "held_bytes",
    "kernel_for",
    "kernels_of",
    "packed_weight",
    "resident_bytes",
]
