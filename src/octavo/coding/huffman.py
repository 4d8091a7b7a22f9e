"""Huffman coding of bytes, borrowed from Zstandard.

Zstandard codes what its matcher leaves over with a fresh Huffman table every 128 KiB, at more than
a gigabyte a second. The parameters keep the matcher from replacing random coincidences, which
costs more than it saves, but leave it able to fold long repetitions.
"""

import numpy as np
import zstandard

from octavo.errors import ArtifactError


def _parameters(**changes: int) -> zstandard.ZstdCompressionParameters:
    """Settings common to both ways of coding; the frame leaves out what the container stores."""
    return zstandard.ZstdCompressionParameters(
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        window_log=21,
        hash_log=6,
        chain_log=6,
        search_log=1,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
        **changes,
    )


# The smallest hash table (64 entries), since matches among random bytes only cost. A target length would turn the
# literal coder off.
_FAST = _parameters(strategy=zstandard.STRATEGY_FAST, min_match=7, target_length=0)
# Where a byte holds little information, long matches abound and the fast matcher takes them all,
# at a loss of up to a fifth. This one weighs them against literals, at a twentieth of the speed.
_CAREFUL = _parameters(strategy=zstandard.STRATEGY_BTOPT, min_match=6, target_length=16)
_CAREFUL_BITS = 3.5
_BLOCK = 1 << 17
_LONGEST = 11


def compress(joined: np.ndarray) -> bytes:
    """Code bytes as one frame."""
    shares = np.bincount(joined[:_BLOCK], minlength=1) / min(len(joined), _BLOCK)
    shares = shares[shares > 0]
    careful = -(shares * np.log2(shares)).sum() < _CAREFUL_BITS
    return zstandard.ZstdCompressor(compression_params=_CAREFUL if careful else _FAST).compress(joined.data)


def decompress(data: memoryview, count: int) -> np.ndarray:
    """Return exactly `count` bytes and never hold more."""
    try:
        # A frame that states its size would make Zstandard allocate it, whatever the limit below.
        stated = zstandard.get_frame_parameters(data, format=zstandard.FORMAT_ZSTD1_MAGICLESS).content_size
        if stated != zstandard.CONTENTSIZE_UNKNOWN:
            raise ArtifactError("coded tensor: a Huffman frame states its own size")
        decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
        plain = decompressor.decompress(data, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"coded tensor: bad Huffman chunk ({error})") from error
    if len(plain) != count:
        raise ArtifactError(f"coded tensor: Huffman chunk holds {len(plain)} bytes instead of {count}")
    return np.frombuffer(plain, np.uint8)


def cost(weights: np.ndarray, digits: int) -> float:
    """Estimate the bits taken by symbols of these counts, `digits` of them in a byte."""
    symbols = float(weights.sum())
    letters = weights / symbols
    bytes_ = letters
    for _ in range(digits - 1):
        bytes_ = np.multiply.outer(bytes_, letters).reshape(-1)
    coded = symbols / digits
    blocks = -(-coded // _BLOCK)
    seen = bytes_[bytes_ * coded > 0.3 * blocks]
    return coded * _code_length(seen) + blocks * (200 + 3.5 * len(seen)) + 100


def _code_length(shares: np.ndarray) -> float:
    """Approximate mean length of a Huffman code of limited length."""
    ordered = np.sort(shares)[::-1]
    length, remaining, first = 0.0, float(ordered.sum()), 0
    # A large share costs a whole bit, however close to one it is.
    while first < len(ordered) - 1 and ordered[first] > 0.4 * remaining:
        length += remaining
        remaining -= float(ordered[first])
        first += 1
    rest = ordered[first:]
    if len(rest) > 1:
        limited = np.maximum(rest / remaining, 2.0 ** (first - _LONGEST))
        # Fitted: the limit costs about half of what clipping the shares to it does.
        length += remaining * (0.03 + 0.5 * float(np.log2(limited.sum())))
        length -= float((rest * np.log2(limited)).sum())
    return length
