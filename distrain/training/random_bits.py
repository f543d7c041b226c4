"""Further random bits of a sample, made from its own: on its device, without waiting for it."""

from __future__ import annotations

from torch import Tensor


def mix(random_bits: Tensor) -> Tensor:
    """Return other random bits, made from these as SplitMix64 makes its outputs: int64, of the same shape."""
    values = random_bits + signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        values = (values ^ (values >> shift & (1 << 64 - shift) - 1)) * signed(factor)  # >> keeps the sign
    return values


def signed(bits: int) -> int:
    """Return the int64 that has the bits of an unsigned integer."""
    return bits - 2**64 if bits >= 2**63 else bits
