"""Running from packed codes: which kernel multiplies with which form, and weights that hold no dense matrix."""

from octavo.running.kernels import Kernel, kernel_for, resident_bytes
from octavo.running.weight import PackedWeight, held_bytes, kernels_of

__all__ = ["Kernel", "PackedWeight", "held_bytes", "kernel_for", "kernels_of", "resident_bytes"]
