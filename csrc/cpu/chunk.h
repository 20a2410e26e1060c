// A stretch of the steps of one row, without the steps that are masked: what is computed on it is
// dense, whatever mask, dtype and stride the arrays have.
#pragma once

#include <string.h>

#include <type_traits>

#include "cpu/cpu.h"
#include "cpu/load.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace warpo::cpu::WARPO_ISA {

// Runs of a page or more keep the prefetchers going: 512 x 4096 took 2.9 ms in chunks of 512 steps,
// 2.6 in these (EPYC, 2 threads).
constexpr int kChunk = 4096, kGroup = 16;
// Each way more room than a chunk needs, for whole vectors.
constexpr int kMargin = 16;

alignas(64) static const float kZeros[kChunk] = {};

struct Buffer {
    float* begin() { return data + kMargin; }
    alignas(64) float data[kMargin + kChunk + kMargin];
};

// Steps [step, step + steps) of a row.
struct Chunk {
    int64_t row, step;
    int steps;
    int count;         // elements of its buffers
    bool all, packed;  // all: no step is masked; packed: masked steps are left out, else they are 0
    uint16_t kept[kChunk / kGroup];  // unless all: a bit a step

    int group_steps(int group) const {
        const int left = steps - group * kGroup;
        return left < kGroup ? left : kGroup;
    }
    int groups() const { return (steps + kGroup - 1) / kGroup; }
    // The last step that is not masked, or -1.
    int last_kept() const {
        if (all) return steps - 1;
        for (int group = groups() - 1; group >= 0; --group)
            if (kept[group]) return group * kGroup + 31 - __builtin_clz(kept[group]);
        return -1;
    }
};

WARPO_HD uint32_t nonzero_bits(const uint8_t* bytes, int count) {
#ifdef __SSE2__
    if (count == kGroup) {
        const __m128i group = _mm_loadu_si128((const __m128i*)bytes);
        return ~(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(group, _mm_setzero_si128())) & 0xffffu;
    }
#endif
    uint32_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= (uint32_t)(bytes[i] != 0) << i;
    return bits;
}

inline void copy_flags(const View& view, int64_t row, int64_t step, int steps, uint8_t* out) {
    const uint8_t* const source = address<uint8_t>(view, row, step);
    if (view.stride1 == 1)
        memcpy(out, source, steps);
    else
        for (int i = 0; i < steps; ++i) out[i] = source[i * view.stride1];
}

inline Chunk chunk_of(const Gae& a, int64_t row, int64_t step, int steps) {
    Chunk at = {row, step, steps, steps, true, a.mask_mode != kZero, {}};
    if (!a.mask.data) return at;
    uint8_t copy[kChunk];
    const uint8_t* mask = address<uint8_t>(a.mask, row, step);
    if (a.mask.stride1 != 1) {
        copy_flags(a.mask, row, step, steps, copy);
        mask = copy;
    }
    int kept = 0;
    for (int group = 0; group < at.groups(); ++group) {
        const uint32_t bits = nonzero_bits(mask + group * kGroup, at.group_steps(group));
        at.kept[group] = (uint16_t)bits;
        kept += __builtin_popcount(bits);
    }
    at.all = kept == steps;
    at.count = at.packed ? kept : steps;
    return at;
}

// Of `steps` <= kGroup elements those with their bit set, or with others as 0; returns how many.
WARPO_HD int pack_group(const float* source, int steps, uint32_t bits, bool packed, float* out) {
    const int kept = packed ? __builtin_popcount(bits) : steps;
#ifdef __AVX512F__
    const __mmask16 lanes = (__mmask16)bits;
    const __m512 values = _mm512_maskz_loadu_ps(lanes, source);
    _mm512_storeu_ps(out, packed ? _mm512_maskz_compress_ps(lanes, values) : values);
#else
    int n = 0;
    for (int i = 0; i < steps; ++i) {
        const bool keep = bits >> i & 1;
        out[n] = keep ? source[i] : 0.0f;
        n += keep || !packed;
    }
#endif
    return kept;
}

WARPO_HD void unpack_group(const float* source, int steps, uint32_t bits, bool packed, float* out) {
#ifdef __AVX512F__
    const __mmask16 lanes = (__mmask16)bits;
    const __m512 values = packed ? _mm512_maskz_expand_ps(lanes, _mm512_loadu_ps(source))
                                 : _mm512_maskz_loadu_ps(lanes, source);
    _mm512_mask_storeu_ps(out, (__mmask16)((1u << steps) - 1), values);
#else
    int n = 0;
    for (int i = 0; i < steps; ++i) {
        const bool keep = bits >> i & 1;
        out[i] = keep ? source[n] : 0.0f;
        n += keep || !packed;
    }
#endif
}

template <class T>
inline const float* pack(const T* source, int64_t stride, const Chunk& at, float* out) {
    constexpr bool is_float = std::is_same_v<T, float>;
    if (at.all) {
        if constexpr (is_float)
            if (stride == 1) return source;
        load_strided(source, stride, at.steps, out);
        return out;
    }
    float* next = out;
    for (int group = 0; group < at.groups(); ++group) {
        const int steps = at.group_steps(group);
        const uint32_t bits = at.kept[group];
        const T* const from = source + group * kGroup * stride;
        if (bits == 0 && at.packed) continue;
        if (is_float && stride == 1) {
            next += pack_group((const float*)from, steps, bits, at.packed, next);
        } else {
            alignas(64) float converted[kGroup];
            load_strided(from, stride, steps, converted);
            next += pack_group(converted, steps, bits, at.packed, next);
        }
    }
    return out;
}

// The elements of the chunk: zeros, the array itself where it is fit, or `buffer`.
inline const float* load_chunk(const View& view, const Chunk& at, Buffer& buffer) {
    float* const out = buffer.begin();
    if (!view.data) return kZeros;
    switch (view.dtype) {
        case kFloat32:
            return pack(address<const float>(view, at.row, at.step), view.stride1, at, out);
        case kBFloat16:
            return pack(address<const BFloat16>(view, at.row, at.step), view.stride1, at, out);
        default: return pack(address<const Float16>(view, at.row, at.step), view.stride1, at, out);
    }
}

// As load_chunk, in the buffer in any case.
inline float* copy_chunk(const View& view, const Chunk& at, Buffer& buffer) {
    const float* const found = load_chunk(view, at, buffer);
    if (found != buffer.begin()) memcpy(buffer.begin(), found, at.count * sizeof(float));
    return buffer.begin();
}

// 1 for the steps at which an episode ends; flag t of a view says so of step t - 1 if starts_at_t.
inline const float* load_ends(const Gae& a, const View& view, const View& last, int64_t row_end,
                              const Chunk& at, Buffer& buffer) {
    if (!view.data) return kZeros;
    uint8_t flags[kChunk];
    if (a.starts_at_t) {
        const bool at_end = at.step + at.steps == row_end;
        copy_flags(view, at.row, at.step + 1, at.steps - at_end, flags);
        if (at_end) flags[at.steps - 1] = element<uint8_t>(last, at.row, 0, 0);
    } else {
        copy_flags(view, at.row, at.step, at.steps, flags);
    }
    alignas(64) float ends[kChunk];
    for (int i = 0; i < at.steps; ++i) ends[i] = flags[i] ? 1.0f : 0.0f;
    if (at.all) {
        memcpy(buffer.begin(), ends, at.steps * sizeof(float));
        return buffer.begin();
    }
    return pack((const float*)ends, 1, at, buffer.begin());
}

// A whole group past the caches: results that do not fit them would first be read into them.
WARPO_HD bool can_stream(const float* out) {
#ifdef __SSE2__
    return (uintptr_t)out % 64 == 0;
#else
    return false;
#endif
}

WARPO_HD void stream_group(const float* source, float* out) {
#if defined(__AVX512F__)
    _mm512_stream_ps(out, _mm512_loadu_ps(source));
#elif defined(__SSE2__)
    for (int i = 0; i < kGroup; i += 4) _mm_stream_ps(out + i, _mm_loadu_ps(source + i));
#endif
}

inline void finish_streams() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// Masked steps get 0. `streams`: the results are more than the caches hold.
inline void store_chunk(const View& view, const Chunk& at, const float* source,
                        bool streams = false) {
    if (!view.data) return;
    float* const out = address<float>(view, at.row, at.step);
    const int64_t stride = view.stride1;
    streams = streams && stride == 1 && can_stream(out);
    if (at.all && stride == 1 && !streams) {
        memcpy(out, source, at.steps * sizeof(float));
        return;
    }
    for (int group = 0; group < at.groups(); ++group) {
        const int steps = at.group_steps(group);
        const uint32_t bits = at.all ? (1u << steps) - 1 : at.kept[group];
        const bool packed = at.packed && !at.all;
        float* const to = out + group * kGroup * stride;
        alignas(64) float values[kGroup];
        if (streams && steps == kGroup) {
            unpack_group(source, kGroup, bits, packed, values);
            stream_group(values, to);
        } else if (stride == 1) {
            unpack_group(source, steps, bits, packed, to);
        } else {
            unpack_group(source, steps, bits, packed, values);
            for (int i = 0; i < steps; ++i) to[i * stride] = values[i];
        }
        source += packed ? __builtin_popcount(bits) : steps;
    }
}

}  // namespace warpo::cpu::WARPO_ISA
