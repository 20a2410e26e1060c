// AdamW on float32 master weights, rounded into the published ones, in one pass over memory, of
// many tensors.
#include "cpu/bits.h"
#include "cpu/cpu.h"
#include "cpu/parts.h"
#include "math/adamw.h"
#include "math/stochastic_rounding.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / sizeof(float);
// Sums of the lanes, in registers: GCC 12 keeps no array there.
typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Counts __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

// Elements of one vector of published, which are stepped together.
template <class T>
constexpr int kGroup = kVectorBytes / sizeof(T);
// The fingerprint takes a group so many elements later, while the next ones wait for divisions: 8
// groups took 0.90 of the time of 2, 16 as long as 8 (EPYC, float32).
template <class T>
constexpr int kLag = 8 * kGroup<T>;
// Sums of more elements in float32 would lose digits, as the steps are much alike. Of 16 bits the
// gradients are converted a block at a time, which is to stay in the caches.
template <class T>
constexpr int kBlock = (sizeof(T) == sizeof(float) ? 256 : 32) * kGroup<T>;

template <class Vector, class T>
WARPO_HD Vector load(const T* source) {
    Vector vector;
    memcpy(&vector, source, sizeof vector);
    return vector;
}

struct Lanes {
    Counts changed = {};
    Floats master_update = {}, published_update = {};
};

struct Sums {
    uint64_t fingerprint = 0;
    int64_t changed[kLanes] = {};
    double master_update[kLanes] = {}, published_update[kLanes] = {};

    WARPO_HD void add(const Lanes& lanes) {
        for (int k = 0; k < kLanes; ++k) {
            changed[k] += lanes.changed[k];
            master_update[k] += lanes.master_update[k];
            published_update[k] += lanes.published_update[k];
        }
    }
};

template <class T>
T total(const T* lanes) {
    T sum = 0;
    for (int k = 0; k < kLanes; ++k) sum += lanes[k];
    return sum;
}

// A step of one tensor.
struct Step {
    const AdamwTensor& tensor;
    AdamwNumbers numbers;
    float grad_scale;
    bool stochastic;
    uint64_t key;  // of the random numbers
};

// The arrays of a block as float32: where they are, or in buffers.
struct Block {
    const float* grad;
    float *master, *exp_avg, *exp_avg_sq;
    const uint64_t* random;
};

template <int kSize>
struct Buffers {
    alignas(64) float grad[kSize], exp_avg[kSize], exp_avg_sq[kSize];
    alignas(64) uint64_t random[kSize];
};

float* as_floats(const View& view, int64_t index, int count, float* buffer) {
    if (view.dtype == kFloat32) return (float*)view.data + index;
    load_steps({view.data, 0, 1, view.dtype}, 0, index, count, buffer);
    return buffer;
}

template <int kSize>
Block load_block(const Step& s, int64_t index, int count, Buffers<kSize>& buffers) {
    if (s.stochastic) {
        const uint64_t key = s.key;
#pragma omp simd
        for (int i = 0; i < count; ++i) buffers.random[i] = random_bits(key, index + i);
    }
    const AdamwTensor& tensor = s.tensor;
    return {as_floats(tensor.grad, index, count, buffers.grad),
            tensor.master ? tensor.master + index : nullptr,
            as_floats(tensor.exp_avg, index, count, buffers.exp_avg),
            as_floats(tensor.exp_avg_sq, index, count, buffers.exp_avg_sq), buffers.random};
}

// `shift`: of its random bits, see math/stochastic_rounding.h.
void store_moment(bool stochastic, const View& moment, int64_t index, int count,
                  const float* values, const uint64_t* random, int shift) {
    if (moment.dtype == kFloat32) return;
    BFloat16* const out = (BFloat16*)moment.data + index;
    if (!stochastic) return store_dense(values, count, out);
#pragma omp simd
    for (int i = 0; i < count; ++i)
        out[i].bits = bfloat16_bits_at_random(values[i], (uint32_t)(random[i] >> shift) & 0xffffu);
}

WARPO_HD void from_float_at_random(float x, uint64_t, float& out) { out = x; }
WARPO_HD void from_float_at_random(float x, uint64_t random, BFloat16& out) {
    out.bits = bfloat16_bits_at_random(x, (uint32_t)random & 0xffffu);
}

// Elements [first, first + count) of a block, at most a group.
template <class T, bool kOwn>
WARPO_HD void step(const AdamwNumbers& numbers, float grad_scale, const Block& b, int first,
                   int count, T* published, Lanes& lanes) {
    constexpr bool kRounded = !kOwn || sizeof(T) < sizeof(float);
    alignas(64) float master_update[kGroup<T>] = {}, published_update[kGroup<T>] = {};
    alignas(64) int32_t changed[kGroup<T>] = {};
#pragma omp simd
    for (int k = 0; k < count; ++k) {
        const int i = first + k;
        const uint32_t old_bits = bits_of(published[k]);
        const float old = to_float(published[k]), weight = kOwn ? old : b.master[i];
        const AdamwState next =
            adamw_step(numbers, {weight, b.exp_avg[i], b.exp_avg_sq[i]}, b.grad[i] * grad_scale);
        b.exp_avg[i] = next.exp_avg;
        b.exp_avg_sq[i] = next.exp_avg_sq;
        if constexpr (kOwn) {
            from_float_at_random(next.weight, kRounded ? b.random[i] : 0, published[k]);
        } else {
            b.master[i] = next.weight;
            from_float(next.weight, published[k]);
        }
        changed[k] = bits_of(published[k]) != old_bits;
        master_update[k] = fabsf(next.weight - weight);
        if (kRounded) published_update[k] = fabsf(to_float(published[k]) - old);
    }
    for (int k = 0; k < kGroup<T>; k += kLanes) {
        lanes.changed += load<Counts>(changed + k);
        lanes.master_update += load<Floats>(master_update + k);
        lanes.published_update += load<Floats>((kRounded ? published_update : master_update) + k);
    }
}

// The fingerprint of a tile, vector by vector.
template <class T>
struct Fingerprints {
    Words position, sum = {};
    int taken = 0;  // elements

    explicit Fingerprints(int64_t index) {
        for (int w = 0; w < kVectorBytes / 8; ++w)
            position[w] = (uint64_t)(index / kPerWord<T> + w + 1) * kSplitMixStep;
    }
    WARPO_HD void add(const T* tile) {
        sum += splitmix64(position + load<Words>(tile + taken));
        position += kVectorBytes / 8 * kSplitMixStep;
        taken += kGroup<T>;
    }
};

// Whole groups of a block, which starts at element `start` of its tile. The arguments by value: a
// store to the arrays could change those behind a reference.
template <class T, bool kOwn>
__attribute__((noinline)) void step_groups(const AdamwNumbers numbers, float grad_scale,
                                           const Block b, T* tile, int start, int groups,
                                           Fingerprints<T>& fingerprints, Sums& sums) {
    Fingerprints<T> own = fingerprints;
    Lanes lanes;
    for (int g = 0; g < groups; ++g) {
        const int at = start + g * kGroup<T>;
        if (at - own.taken == kLag<T>) own.add(tile);
        step<T, kOwn>(numbers, grad_scale, b, g * kGroup<T>, kGroup<T>, tile + at, lanes);
    }
    fingerprints = own;
    sums.add(lanes);
}

// `published` holds the elements of the tile, one after the other.
template <class T, bool kOwn>
void update_tile(const Step& s, int64_t index, int count, T* published, Sums& sums) {
    Buffers<kBlock<T>> buffers;
    Fingerprints<T> fingerprints(index);
    for (int start = 0; start < count; start += kBlock<T>) {
        const int block_count = count - start < kBlock<T> ? count - start : kBlock<T>;
        const Block block = load_block(s, index + start, block_count, buffers);
        const int groups = block_count / kGroup<T>, whole = groups * kGroup<T>;
        step_groups<T, kOwn>(s.numbers, s.grad_scale, block, published, start, groups, fingerprints,
                             sums);
        if (whole < block_count) {
            Lanes lanes;
            step<T, kOwn>(s.numbers, s.grad_scale, block, whole, block_count - whole,
                          published + start + whole, lanes);
            sums.add(lanes);
        }
        store_moment(s.stochastic, s.tensor.exp_avg, index + start, block_count, block.exp_avg,
                     block.random, 16);
        store_moment(s.stochastic, s.tensor.exp_avg_sq, index + start, block_count,
                     block.exp_avg_sq, block.random, 32);
    }
    for (int w = 0; w < kVectorBytes / 8; ++w) sums.fingerprint += fingerprints.sum[w];
    const int taken = fingerprints.taken;
    sums.fingerprint += fingerprint_of(published + taken, count - taken, index + taken);
}

// Tiles `first`, first + tiles.partials, ... of the elements in row-major order, so that words of
// the fingerprint may cross rows.
template <class T, bool kOwn>
Sums update_tiles(const Step& s, int64_t first) {
    const Matrix& published = s.tensor.published;
    const int64_t size = published.rows * published.columns;
    const Tiles tiles = tiles_of(published);
    Sums sums;
    alignas(64) T gathered[kTileSize];
    for (int64_t t = first; t < tiles.count; t += tiles.partials) {
        const Tile tile = tile_at(tiles, size, t);
        if (published.rows == 1) {
            update_tile<T, kOwn>(s, tile.first, tile.count, (T*)published.view.data + tile.first,
                                 sums);
            continue;
        }
        gather(published.view, published.columns, tile.first, tile.count, gathered);
        update_tile<T, kOwn>(s, tile.first, tile.count, gathered, sums);
        scatter(published.view, published.columns, tile.first, tile.count, gathered);
    }
    return sums;
}

// Without a master, published is its own: float32, or bfloat16 that is rounded stochastically.
Sums update(const Step& s, int64_t first) {
    const bool own = !s.tensor.master;
    switch (s.tensor.published.view.dtype) {
        case kFloat32:
            return own ? update_tiles<float, true>(s, first) : update_tiles<float, false>(s, first);
        case kBFloat16:
            return own ? update_tiles<BFloat16, true>(s, first)
                       : update_tiles<BFloat16, false>(s, first);
        default: return update_tiles<Float16, false>(s, first);
    }
}

// Of partial results [first, end), into the results of tensor i.
void add_partials(const AdamwPublish& a, int64_t i, int64_t first, int64_t end) {
    uint64_t fingerprint = 0;
    int64_t changed = 0;
    double master_update = 0, published_update = 0;
    for (int64_t p = first; p < end; ++p) {
        fingerprint += (uint64_t)a.partial_counts[2 * p];
        changed += a.partial_counts[2 * p + 1];
        master_update += a.partial_updates[2 * p];
        published_update += a.partial_updates[2 * p + 1];
    }
    const auto tensors = (int64_t)a.tensors.size();
    a.counts[i] = (int64_t)fingerprint;
    a.counts[tensors + i] = changed;
    a.updates[i] = (float)master_update;
    a.updates[tensors + i] = (float)published_update;
}

}  // namespace

void adamw_publish(const AdamwPublish& a) {
    Parts parts;
    for (const AdamwTensor& tensor : a.tensors)
        parts.add(tensor.published, tiles_of(tensor.published).partials);
    const float grad_scale = a.grad_scale * (a.grad_scale_factor ? *a.grad_scale_factor : 1.0f);
    for_each_part(parts, [&](int64_t i, int64_t part) {
        const AdamwTensor& tensor = a.tensors[i];
        const Step step = {tensor, adamw_numbers(a, tensor), grad_scale, a.stochastic != 0,
                           random_key(tensor.seed, tensor.step)};
        const Sums sums = update(step, part);
        const int64_t p = 2 * (parts.first[i] + part);
        a.partial_counts[p] = (int64_t)sums.fingerprint;
        a.partial_counts[p + 1] = total(sums.changed);
        a.partial_updates[p] = (float)total(sums.master_update);
        a.partial_updates[p + 1] = (float)total(sums.published_update);
    });
    for (size_t i = 0; i < a.tensors.size(); ++i)
        add_partials(a, i, parts.first[i], parts.first[i + 1]);
}

}  // namespace warpo::cpu::WARPO_ISA
