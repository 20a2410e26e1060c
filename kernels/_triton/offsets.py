"""Where a sequence lies, from offsets that nobody has looked at: `extent_of` of
csrc/math/offsets.h.
"""

import triton
import triton.language as tl


@triton.jit
def _clamp_index(index, bound):
    return tl.minimum(tl.maximum(index, 0), bound)


@triton.jit
def extent(offsets_ptr, stride, count, index, bound, exists):
    """First element of extent `index` of `count`, its end, and whether it is malformed; 0 and 0
    where it does not exist.
    """
    pointers = offsets_ptr + index * stride
    has_next = exists & (index + 1 < count)
    begin = tl.load(pointers, mask=exists, other=0).to(tl.int64)
    end = tl.load(pointers + stride, mask=exists, other=0).to(tl.int64)
    before = tl.load(pointers - stride, mask=exists & (index > 0), other=0).to(tl.int64)
    after = tl.load(pointers + 2 * stride, mask=has_next, other=0).to(tl.int64)
    descends = (before > begin) | (begin > end) | (has_next & (end > after))
    malformed = exists & (descends | (begin < 0) | (end > bound))
    low = _clamp_index(tl.minimum(begin, end), bound)
    high = _clamp_index(tl.maximum(begin, end), bound)
    first = tl.where(malformed, tl.where(index == 0, 0, low), begin)
    last = tl.where(malformed, tl.where(has_next, high, bound), end)
    return first, last, malformed
