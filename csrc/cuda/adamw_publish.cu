// AdamW on float32 master weights, rounded into the published ones, in one pass over memory, of
// many tensors; a last launch adds up what the blocks have counted.
#include "cuda/entries.h"
#include "cuda/launch.h"
#include "math/adamw.h"
#include "math/stochastic_rounding.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Elements of a thread at once: 16 bytes of float32, and a word of the fingerprint of 16 bits.
constexpr int kAtOnce = 4;
// 64 registers: with more, three blocks would fill a multiprocessor.
constexpr int kBlocksPerSm = 4;

struct Entry {
    void* published;
    const void* grad;
    float* master;
    void *exp_avg, *exp_avg_sq;
    Rows rows;  // of published
    uint64_t key;
    float step_size, root_scale;
    int first_block, blocks, first_partial;
    int8_t grad_dtype, moment_dtype;
    bool aligned;
};

// What all tensors share; step_size and root_scale are those of an Entry.
struct Common {
    AdamwNumbers numbers;
    float grad_scale;
    const float* grad_scale_factor;
    int64_t* partial_counts;
    float* partial_updates;
    bool stochastic;
};

using Launch = Entries<Entry, (kParameterBytes - sizeof(Common) - 16) / sizeof(Entry)>;
static_assert(sizeof(Launch) + sizeof(Common) <= kParameterBytes);

struct Sums {
    uint64_t fingerprint, changed;
    float master_update, published_update;
};

// The sums of a block, in every thread.
__device__ __forceinline__ Sums add_block(const Sums& own) {
    __shared__ uint64_t integers[kWarps];
    __shared__ float floats[kWarps];
    Sums sums;
    sums.fingerprint = block_sum<kWarps>(own.fingerprint, integers);
    sums.changed = block_sum<kWarps>(own.changed, integers);
    sums.master_update = block_sum<kWarps>(own.master_update, floats);
    sums.published_update = block_sum<kWarps>(own.published_update, floats);
    return sums;
}

// Elements at .. at + count of a dense array; `whole` reads them at once.
__device__ __forceinline__ void load_four(const void* data, int dtype, int64_t at, int count,
                                          bool whole, float (&out)[kAtOnce]) {
    if (!whole) {
        const View view = {const_cast<void*>(data), 0, 1, dtype};
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) out[k] = k < count ? load_float(view, at + k) : 0.0f;
    } else if (dtype == kFloat32) {
        const float4 read = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
        out[0] = read.x, out[1] = read.y, out[2] = read.z, out[3] = read.w;
    } else {
        const uint2 read = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + at);
        if (dtype == kBFloat16) {
            Element<kBFloat16>::unpack(read.x, out);
            Element<kBFloat16>::unpack(read.y, out + 2);
        } else {
            Element<kFloat16>::unpack(read.x, out);
            Element<kFloat16>::unpack(read.y, out + 2);
        }
    }
}

__device__ __forceinline__ void store_four(float* data, int64_t at, int count, bool whole,
                                           const float (&values)[kAtOnce]) {
    if (whole) {
        store_streaming(data + at, make_uint4(as_word(values[0]), as_word(values[1]),
                                              as_word(values[2]), as_word(values[3])));
        return;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
        if (k < count) data[at + k] = values[k];
}

// Four elements of 16 bits in two words, of 32 bits in four.
template <int kDType>
struct Bits {
    using Stored = typename Element<kDType>::Bits;
    static constexpr int kPerWord = Element<kDType>::kPerWord, kWords = kAtOnce / kPerWord;
    uint32_t words[kWords];

    __device__ __forceinline__ uint32_t element(int k) const {
        if (kPerWord == 1) return words[k];
        return words[k / kPerWord] >> (k % kPerWord * 16) & 0xffffu;
    }
    __device__ __forceinline__ void unpack(float (&values)[kAtOnce]) const {
#pragma unroll
        for (int w = 0; w < kWords; ++w) Element<kDType>::unpack(words[w], values + w * kPerWord);
    }
    __device__ __forceinline__ void round(const float (&values)[kAtOnce]) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[w] = Element<kDType>::pack(values + w * kPerWord);
    }
    // To bfloat16 up or down by 16 of the bits of `random`, from bit `shift` on.
    __device__ __forceinline__ void round_at_random(const float (&values)[kAtOnce],
                                                    const uint64_t (&random)[kAtOnce], int shift) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[w] = 0;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            words[k / kPerWord] |=
                bfloat16_bits_at_random(values[k], static_cast<uint32_t>(random[k] >> shift) &
                                                       0xffffu)
                << (k % kPerWord * 16);
    }
    __device__ __forceinline__ void load(const void* data, const Rows& rows, int64_t at, int count,
                                         bool whole) {
        const Stored* const elements = static_cast<const Stored*>(data);
        if (whole) {
            const Stored* const first = elements + rows.offset_of(at);
            if (kWords == 4) {
                const uint4 read = *reinterpret_cast<const uint4*>(first);
                words[0] = read.x, words[1] = read.y;
                words[kWords - 2] = read.z, words[kWords - 1] = read.w;
            } else {
                const uint2 read = *reinterpret_cast<const uint2*>(first);
                words[0] = read.x, words[1] = read.y;
            }
            return;
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[w] = 0;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (k < count)
                words[k / kPerWord] |= static_cast<uint32_t>(elements[rows.offset_of(at + k)])
                                       << (k % kPerWord * 16);
    }
    __device__ __forceinline__ void store(void* data, const Rows& rows, int64_t at, int count,
                                          bool whole) const {
        Stored* const elements = static_cast<Stored*>(data);
        if (whole) {
            Stored* const first = elements + rows.offset_of(at);
            if (kWords == 4)
                *reinterpret_cast<uint4*>(first) = {words[0], words[1], words[kWords - 2],
                                                    words[kWords - 1]};
            else
                *reinterpret_cast<uint2*>(first) = {words[0], words[1]};
            return;
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (k < count) elements[rows.offset_of(at + k)] = static_cast<Stored>(element(k));
    }
    // The terms of the words that hold an element.
    __device__ __forceinline__ uint64_t fingerprint(int64_t at, int count) const {
        const uint64_t low = static_cast<uint64_t>(words[1]) << 32 | words[0];
        if (kWords == 2) return fingerprint_term(at / 4, low);
        const uint64_t high = static_cast<uint64_t>(words[kWords - 1]) << 32 | words[kWords - 2];
        return fingerprint_term(at / 2, low) +
               (count > 2 ? fingerprint_term(at / 2 + 1, high) : 0);
    }
};

__device__ __forceinline__ void store_moment(void* data, int dtype, int64_t at, int count,
                                             bool whole, const float (&values)[kAtOnce],
                                             const uint64_t (&random)[kAtOnce], int shift,
                                             bool stochastic) {
    if (dtype == kFloat32) return store_four(static_cast<float*>(data), at, count, whole, values);
    Bits<kBFloat16> bits;
    if (stochastic)
        bits.round_at_random(values, random, shift);
    else
        bits.round(values);
    bits.store(data, {1, 1, 1}, at, count, whole);
}

// Elements at .. at + kAtOnce of a tensor.
template <int kDType>
__device__ __forceinline__ void step_four(const Entry& e, const Common& common,
                                          const AdamwNumbers& numbers, float grad_scale, int64_t at,
                                          Sums& sums) {
    const int count = e.rows.size - at < kAtOnce ? static_cast<int>(e.rows.size - at) : kAtOnce;
    const bool whole = e.aligned && count == kAtOnce;
    // All loads before the first store, which might be to the same address.
    Bits<kDType> before, after;
    float old[kAtOnce], exp_avg[kAtOnce], exp_avg_sq[kAtOnce], grad[kAtOnce];
    before.load(e.published, e.rows, at, count, whole);
    load_four(e.grad, e.grad_dtype, at, count, whole, grad);
    load_four(e.exp_avg, e.moment_dtype, at, count, whole, exp_avg);
    load_four(e.exp_avg_sq, e.moment_dtype, at, count, whole, exp_avg_sq);
    if (e.master)
        load_four(e.master, kFloat32, at, count, whole, old);
    else
        before.unpack(old);

    float weight[kAtOnce];
    uint64_t random[kAtOnce] = {};
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
        const AdamwState next =
            adamw_step(numbers, {old[k], exp_avg[k], exp_avg_sq[k]}, grad[k] * grad_scale);
        weight[k] = k < count ? next.weight : 0.0f;
        exp_avg[k] = next.exp_avg;
        exp_avg_sq[k] = next.exp_avg_sq;
        if (common.stochastic) random[k] = random_bits(e.key, at + k);
        sums.master_update += fabsf(weight[k] - old[k]);
    }
    if (kDType == kBFloat16 && common.stochastic && !e.master)
        after.round_at_random(weight, random, 0);
    else
        after.round(weight);
    if (e.master) store_four(e.master, at, count, whole, weight);
    store_moment(e.exp_avg, e.moment_dtype, at, count, whole, exp_avg, random, 16,
                 common.stochastic);
    store_moment(e.exp_avg_sq, e.moment_dtype, at, count, whole, exp_avg_sq, random, 32,
                 common.stochastic);
    after.store(e.published, e.rows, at, count, whole);

    float was[kAtOnce], is[kAtOnce];
    before.unpack(was);
    after.unpack(is);
    uint32_t changed = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
        changed += after.element(k) != before.element(k);
        sums.published_update += fabsf(is[k] - was[k]);
    }
    sums.changed += changed;
    sums.fingerprint += after.fingerprint(at, count);
}

template <int kDType>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void update_kernel(const Common common,
                                                                        const Launch launch) {
    const Entry& e = launch.of_block(static_cast<int>(blockIdx.x));
    const int block = static_cast<int>(blockIdx.x) - e.first_block;
    const float grad_scale =
        common.grad_scale * (common.grad_scale_factor ? *common.grad_scale_factor : 1.0f);
    AdamwNumbers numbers = common.numbers;
    numbers.step_size = e.step_size;
    numbers.root_scale = e.root_scale;
    Sums sums = {0, 0, 0.0f, 0.0f};
    for (int64_t tile = block * kTileSize; tile < e.rows.size; tile += e.blocks * kTileSize) {
#pragma unroll 1
        for (int first = 0; first < kTileSize; first += kThreads * kAtOnce) {
            const int64_t at = tile + first + static_cast<int>(threadIdx.x) * kAtOnce;
            if (at >= e.rows.size) break;
            step_four<kDType>(e, common, numbers, grad_scale, at, sums);
        }
    }
    sums = add_block(sums);
    if (threadIdx.x == 0) {
        const int64_t p = 2 * static_cast<int64_t>(e.first_partial + block);
        common.partial_counts[p] = static_cast<int64_t>(sums.fingerprint);
        common.partial_counts[p + 1] = static_cast<int64_t>(sums.changed);
        common.partial_updates[p] = sums.master_update;
        common.partial_updates[p + 1] = sums.published_update;
    }
}

// The results of some tensors: where their partial results begin, and where the last ones end.
struct Results {
    const int64_t* partial_counts;
    const float* partial_updates;
    int64_t* counts;
    float* updates;
    int64_t first_tensor, tensors;
    static constexpr int kMost = (kParameterBytes - 64) / sizeof(int);
    int first[kMost];
};
static_assert(sizeof(Results) <= kParameterBytes);

__global__ __launch_bounds__(kThreads) void sum_kernel(const Results r) {
    Sums sums = {0, 0, 0.0f, 0.0f};
    for (int64_t p = r.first[blockIdx.x] + static_cast<int>(threadIdx.x);
         p < r.first[blockIdx.x + 1]; p += kThreads) {
        sums.fingerprint += static_cast<uint64_t>(r.partial_counts[2 * p]);
        sums.changed += static_cast<uint64_t>(r.partial_counts[2 * p + 1]);
        sums.master_update += r.partial_updates[2 * p];
        sums.published_update += r.partial_updates[2 * p + 1];
    }
    sums = add_block(sums);
    if (threadIdx.x == 0) {
        const int64_t tensor = r.first_tensor + blockIdx.x;
        r.counts[tensor] = static_cast<int64_t>(sums.fingerprint);
        r.counts[r.tensors + tensor] = static_cast<int64_t>(sums.changed);
        r.updates[tensor] = sums.master_update;
        r.updates[r.tensors + tensor] = sums.published_update;
    }
}

Entry entry_of(const AdamwTensor& tensor, const Parts& parts, size_t i) {
    const Rows rows = rows_of(tensor.published);
    const Rows dense = {rows.size, 0, rows.size};
    const auto aligned = [&](const void* data, int dtype, const Rows& its) {
        return is_aligned(data, its, kAtOnce, bytes_of(dtype));
    };
    const View &published = tensor.published.view, &moment = tensor.exp_avg;
    const auto first = static_cast<int>(parts.first[i]);
    return {published.data,
            tensor.grad.data,
            tensor.master,
            moment.data,
            tensor.exp_avg_sq.data,
            rows,
            random_key(tensor.seed, tensor.step),
            tensor.step_size,
            tensor.root_scale,
            0,
            static_cast<int>(parts.first[i + 1]) - first,
            first,
            static_cast<int8_t>(tensor.grad.dtype),
            static_cast<int8_t>(moment.dtype),
            aligned(published.data, published.dtype, rows) &&
                aligned(tensor.grad.data, tensor.grad.dtype, dense) &&
                aligned(tensor.master, kFloat32, dense) &&
                aligned(moment.data, moment.dtype, dense) &&
                aligned(tensor.exp_avg_sq.data, moment.dtype, dense)};
}

// The tensors whose published weights are of one dtype.
template <int kDType>
void update(const AdamwPublish& a, const Parts& parts, const Common& common, Stream stream) {
    Launch next;
    const auto launch_next = [&] {
        if (next.blocks == 0) return;
        launch("adamw_publish", stream, next.blocks, kThreads, update_kernel<kDType>, common, next);
        next = {};
    };
    for (size_t i = 0; i < a.tensors.size(); ++i) {
        if (a.tensors[i].published.view.dtype != kDType) continue;
        const Entry entry = entry_of(a.tensors[i], parts, i);
        if (next.add(entry)) continue;
        launch_next();
        next.add(entry);
    }
    launch_next();
}

void add_partials(const AdamwPublish& a, const Parts& parts, Stream stream) {
    const auto tensors = static_cast<int64_t>(a.tensors.size());
    Results results = {a.partial_counts, a.partial_updates, a.counts, a.updates, 0, tensors, {}};
    constexpr int64_t kAtMost = Results::kMost - 1;
    for (int64_t first = 0; first < tensors; first += kAtMost) {
        const int64_t count = std::min(tensors - first, kAtMost);
        results.first_tensor = first;
        for (int64_t i = 0; i <= count; ++i)
            results.first[i] = static_cast<int>(parts.first[first + i]);
        launch("adamw_publish", stream, count, kThreads, sum_kernel, results);
    }
}

}  // namespace

void adamw_publish(const AdamwPublish& a, Stream stream) {
    DeviceGuard guard(stream.device, "adamw_publish");
    Parts parts;
    for (const AdamwTensor& tensor : a.tensors)
        parts.add(tensor.published, tiles_of(tensor.published).partials);
    const Common common = {adamw_numbers(a, {}), a.grad_scale,       a.grad_scale_factor,
                           a.partial_counts,     a.partial_updates, a.stochastic != 0};
    update<kFloat32>(a, parts, common, stream);
    update<kBFloat16>(a, parts, common, stream);
    update<kFloat16>(a, parts, common, stream);
    add_partials(a, parts, stream);
}

}  // namespace warpo::cuda
