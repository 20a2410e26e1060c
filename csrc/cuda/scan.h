// Scans along the time of rows: which threads share a row, how its steps reach them, and what each
// thread learns of the steps before it. "Before" is in the order of the scan, in time or against
// it.
#pragma once

#include "cuda/device.h"
#include "math/affine_scan.h"
#include "math/offsets.h"

namespace warpo::cuda {

// Consecutive steps of a thread: 16 bytes of float32, 4 of a mask.
constexpr int kItems = 4;

// kLanes neighbouring lanes and kWarps warps lie along the time of a row. With kLanes 1 each lane
// has a row of its own. How a row is combined depends on these and on its length alone.
template <int kLanes_, int kWarps_, bool kFromEnd_>
struct Block {
    static constexpr int kLanes = kLanes_, kWarps = kWarps_;
    static constexpr bool kFromEnd = kFromEnd_;
    static constexpr int kThreads = kWarps == 1 ? 128 : 32 * kWarps;
    static constexpr int kTile = kItems * kLanes * kWarps;
    static constexpr int kRows = kItems * kThreads / kTile;
    // rows that exchange through the same shared memory: neighbours in it
    static constexpr int kColumns = kLanes == 1 ? 32 : 1;
};

// Where a thread stands: lane and warp count along its row, in the order of the scan.
struct Place {
    int lane, warp, row;
    int first, striped;  // of its steps in the tile: of consecutive ones, of every kLanes-th
};

template <class B>
__device__ __forceinline__ Place find_place() {
    const int thread = static_cast<int>(threadIdx.x);
    Place p = {thread % B::kLanes, thread / B::kLanes % B::kWarps, thread / (B::kLanes * B::kWarps),
               0, 0};
    if (B::kLanes == 1) p = {0, thread / 32, thread % 32, 0, 0};
    const int chunk = B::kFromEnd ? B::kLanes - 1 - p.lane : p.lane;
    const int segment = kItems * B::kLanes * (B::kFromEnd ? B::kWarps - 1 - p.warp : p.warp);
    p.first = segment + kItems * chunk;
    p.striped = segment + p.lane;
    return p;
}

// A row: with cu_seqlens its steps lie at start, start + 1, ... of the arrays.
struct Row {
    int64_t index, start;
    int length;  // 0 past the last row
    bool exists, malformed;
};

template <class B, class Sizes>
__device__ __forceinline__ Row find_row(const Sizes& a, const Place& p) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * B::kRows + p.row;
    Row row = {index, 0, 0, index < a.rows, false};
    if (!row.exists) return row;
    row.length = static_cast<int>(a.steps);
    if (a.cu_seqlens) {
        const Extent e = extent_of(a.cu_seqlens, a.rows, index, a.steps);
        row.start = e.first;
        row.length = static_cast<int>(e.end - e.first);
        row.malformed = e.malformed;
    }
    return row;
}

// Steps [first, end) of a packed array, one block.
template <class B>
__device__ __forceinline__ void fill_steps(const View& out, int64_t first, int64_t end,
                                           float value) {
    if (!out.data) return;
    for (int64_t t = first + threadIdx.x; t < end; t += B::kThreads) store_float(out, 0, t, value);
}

// What a packed row leaves in its results beyond its own: steps before the first row and after the
// last get 0. True, and NaN for its steps, if the row is malformed: it is not computed.
template <class B, class Sizes, class... Views>
__device__ __forceinline__ bool fill_rest(const Sizes& a, const Row& row, const Views&... results) {
    if (!a.cu_seqlens) return false;
    const int64_t end = row.start + row.length;
    if (row.malformed) {
        (fill_steps<B>(results, row.start, end, NAN), ...);
        return true;
    }
    if (row.index == 0) (fill_steps<B>(results, 0, row.start, 0.0f), ...);
    if (row.index + 1 == a.rows) (fill_steps<B>(results, end, a.steps, 0.0f), ...);
    return false;
}

// Steps first, first + stride, ... of a row; `vector`: consecutive, and 16 bytes of float32 or 4 of
// flags lie on a boundary.
struct Steps {
    int first, stride;
    bool vector;
};

__device__ __forceinline__ int size_of(const View& view) {
    return view.dtype == kFloat32 ? 4 : view.dtype == kUInt8 ? 1 : 2;
}

// An absent array fits.
__device__ __forceinline__ bool is_vector(const View& view, const Row& row) {
    if (!view.data || !row.exists) return true;
    const uint64_t address = reinterpret_cast<uint64_t>(view.data) +
                             offset_of(view, row.index, row.start) * size_of(view);
    return view.stride1 == 1 && address % (kItems * size_of(view)) == 0;
}

// 0 past the end and where the array is absent.
__device__ __forceinline__ void load_items(float (&out)[kItems], const View& view, const Row& row,
                                           const Steps& at) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) out[i] = 0.0f;
    if (!view.data) return;
    const int64_t offset = offset_of(view, row.index, row.start + at.first);
    if (at.vector && at.first + kItems <= row.length) {
        if (view.dtype == kFloat32) {
            const float4 v =
                *reinterpret_cast<const float4*>(static_cast<const float*>(view.data) + offset);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
            return;
        }
        const uint64_t bits =
            *reinterpret_cast<const uint64_t*>(static_cast<const uint16_t*>(view.data) + offset);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const uint32_t word = static_cast<uint32_t>(bits >> (32 * w));
            if (view.dtype == kBFloat16) {
                Element<kBFloat16>::unpack(word, out + 2 * w);
            } else {
                Element<kFloat16>::unpack(word, out + 2 * w);
            }
        }
        return;
    }
    const int64_t stride = at.stride * view.stride1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (at.first + i * at.stride < row.length) out[i] = load_float(view, offset + i * stride);
    }
}

__device__ __forceinline__ void store_items(const float (&values)[kItems], const View& view,
                                            const Row& row, const Steps& at) {
    const int64_t offset = offset_of(view, row.index, row.start + at.first);
    float* out = static_cast<float*>(view.data) + offset;
    if (at.vector && at.first + kItems <= row.length) {
        *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
        return;
    }
    const int64_t stride = at.stride * view.stride1;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (at.first + i * at.stride < row.length) out[i * stride] = values[i];
    }
}

// A byte an item, 1 where the flag is set.
__device__ __forceinline__ uint32_t load_flags(const View& view, const Row& row, const Steps& at) {
    if (!view.data) return 0;
    const int64_t offset = offset_of(view, row.index, row.start + at.first);
    const uint8_t* flags = static_cast<const uint8_t*>(view.data) + offset;
    if (at.vector && at.first + kItems <= row.length) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(flags);
        return (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7 & 0x01010101u;
    }
    const int64_t stride = at.stride * view.stride1;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (at.first + i * at.stride < row.length && flags[i * stride] != 0) word |= 1u << (8 * i);
    }
    return word;
}

// Between every kLanes-th step and consecutive ones, through shared memory of the warp: rows that
// lie on no boundary still move whole sectors.
template <class B>
struct Exchange {
    char* memory;  // of the lanes of a row
    const Place& p;

    __device__ __forceinline__ Exchange(float4* shared, const Place& place)
        : memory(reinterpret_cast<char*>(shared + threadIdx.x / B::kLanes * B::kLanes)), p(place) {}

    __device__ __forceinline__ int consecutive() const {
        return kItems * (B::kFromEnd ? B::kLanes - 1 - p.lane : p.lane);
    }
    __device__ __forceinline__ void to_consecutive(float (&x)[kItems]) const {
        float* floats = reinterpret_cast<float*>(memory);
#pragma unroll
        for (int i = 0; i < kItems; ++i) floats[i * B::kLanes + p.lane] = x[i];
        __syncwarp();
        const float4 v = *reinterpret_cast<const float4*>(floats + consecutive());
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        __syncwarp();
    }
    __device__ __forceinline__ void to_striped(float (&x)[kItems]) const {
        float* floats = reinterpret_cast<float*>(memory);
        *reinterpret_cast<float4*>(floats + consecutive()) = make_float4(x[0], x[1], x[2], x[3]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kItems; ++i) x[i] = floats[i * B::kLanes + p.lane];
        __syncwarp();
    }
    __device__ __forceinline__ uint32_t to_consecutive(uint32_t bytes) const {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            memory[i * B::kLanes + p.lane] = static_cast<char>(bytes >> (8 * i));
        }
        __syncwarp();
        memcpy(&bytes, memory + consecutive(), sizeof bytes);
        __syncwarp();
        return bytes;
    }
};

// What a run of steps does to the state before it: `then` is associative, with `nothing` neutral.
__device__ __forceinline__ AffineMap then(const AffineMap& before, const AffineMap& after) {
    return affine_compose(after, before);
}

// The last payload that was found.
template <class Payload>
struct Latest {
    Payload payload;
    int found;
};

template <class Payload>
__device__ __forceinline__ Latest<Payload> then(const Latest<Payload>& before,
                                                const Latest<Payload>& after) {
    return after.found ? after : before;
}

// A sum that ends at the first run that says so.
struct Pending {
    float sum;
    int ended;
};

__device__ __forceinline__ Pending then(const Pending& before, const Pending& after) {
    return before.ended ? before : Pending{before.sum + after.sum, after.ended};
}

__device__ __forceinline__ void set_nothing(AffineMap& map) { map = affine_identity(); }
__device__ __forceinline__ void set_nothing(Pending& pending) { pending = {0.0f, 0}; }

template <class T>
__device__ __forceinline__ T shuffle(const T& value, int lane) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof value);
    for (uint32_t& word : words) word = __shfl_sync(kAllLanes, word, lane);
    T result;
    memcpy(&result, words, sizeof result);
    return result;
}

template <class T>
__device__ __forceinline__ T shuffle_up(const T& value, int lanes) {
    uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof value);
    for (uint32_t& word : words) word = __shfl_up_sync(kAllLanes, word, lanes);
    T result;
    memcpy(&result, words, sizeof result);
    return result;
}

// Of the lanes before this one in its group of kLanes, and in `all` of the whole group.
template <int kLanes, class T>
__device__ __forceinline__ T scan_lanes(T own, int lane, T& all) {
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes <<= 1) {
        const T before = shuffle_up(own, lanes);
        if (lane >= lanes) own = then(before, own);
    }
    all = shuffle(own, static_cast<int>(threadIdx.x % 32) | (kLanes - 1));
    T before = shuffle_up(own, 1);
    if (lane == 0) set_nothing(before);
    return before;
}

template <int kLanes, class Payload>
__device__ __forceinline__ Latest<Payload> scan_lanes(Latest<Payload> own, int lane,
                                                      Latest<Payload>& all) {
    const int own_lane = static_cast<int>(threadIdx.x % 32), group = own_lane - lane;
    const uint32_t lanes_of_group = kAllLanes >> (32 - kLanes);
    const uint32_t found = __ballot_sync(kAllLanes, own.found != 0) >> group & lanes_of_group;
    const uint32_t before = found & ((1u << lane) - 1u);
    const int last = 31 - __clz(static_cast<int>(found | 1u)),
              last_before = 31 - __clz(static_cast<int>(before | 1u));
    all = {shuffle(own.payload, group + last), found != 0};
    return {shuffle(own.payload, group + last_before), before != 0};
}

// The state before this thread; `state` goes from before the tile to after it. `shared` is written
// again only behind another barrier of the block.
template <class B, class T>
__device__ __forceinline__ T scan_block(const T& own, T& state, T* shared, const Place& p) {
    T before_lane = own, warp = own, before_warp = state;
    if constexpr (B::kLanes > 1) before_lane = scan_lanes<B::kLanes>(own, p.lane, warp);
    if constexpr (B::kWarps == 1) {
        state = then(state, warp);
    } else if constexpr (B::kLanes == 1) {
        shared[p.warp * B::kColumns + p.row] = warp;
        __syncthreads();
        // unrolled in full, its loads would take the registers of all else
#pragma unroll 4
        for (int w = 0; w < B::kWarps; ++w) {
            if (w == p.warp) before_warp = state;
            state = then(state, shared[w * B::kColumns + p.row]);
        }
    } else {
        if (p.lane == 0) shared[p.warp] = warp;
        __syncthreads();
        const int other = p.lane % B::kWarps;
        T all, before = scan_lanes<B::kWarps>(shared[other], other, all);
        before_warp = then(state, shuffle(before, p.warp));
        state = then(state, all);
    }
    return B::kLanes > 1 ? then(before_warp, before_lane) : before_warp;
}

}  // namespace warpo::cuda
