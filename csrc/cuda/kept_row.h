// A row of logits that stays in shared memory between its two passes, and its gradient.
//
// The vocabulary and the dtype alone cut a row into shares. A team of threads reads a share, and
// the states of its warps, then those of the shares, are merged in their order: over how many
// blocks of a cluster a row is spread, how many teams they have and how much they keep changes no
// bit.
#pragma once

#include <algorithm>

#include "cuda/cluster.h"
#include "cuda/logits_reader.h"

namespace warpo::cuda {

constexpr int kShares = 8, kTeamThreads = 256, kTeamWarps = kTeamThreads / 32, kMaxTeams = 4;

struct RowPlan {
    int blocks;   // of the cluster of a row: 1, 2, 4 or 8
    int threads;  // of a block: teams of them
    int share;    // 16-byte vectors of a share
    int kept;     // so many of the first vectors of a block stay in shared memory
    int shared_bytes;
};

// In the dynamic shared memory of a block, after a header of the kernel's own.
struct RowMemory {
    SoftmaxState* shares;               // [kShares]: those of this block
    SoftmaxState (*warps)[kTeamWarps];  // of each of its shares
    uint4* kept;
};

__host__ __device__ __forceinline__ int state_bytes(int blocks) {
    const int states = kShares + kShares / blocks * kTeamWarps;
    return (states * static_cast<int>(sizeof(SoftmaxState)) + 15) / 16 * 16;
}

__device__ __forceinline__ RowMemory row_memory(const RowPlan& plan, int header_bytes) {
    char* start = static_cast<char*>(dynamic_shared()) + header_bytes;
    RowMemory memory;
    memory.shares = reinterpret_cast<SoftmaxState*>(start);
    memory.warps = reinterpret_cast<SoftmaxState(*)[kTeamWarps]>(memory.shares + kShares);
    memory.kept = reinterpret_cast<uint4*>(start + state_bytes(plan.blocks));
    return memory;
}

// The smallest cluster that leaves room for two rows and more at once, so that one is read while
// another is written; of the largest, all that fits is kept.
inline RowPlan plan_row(int64_t vectors, int header_bytes, const Chip& chip) {
    constexpr int kReservedBytes = 1024;  // by CUDA, of each block
    constexpr int kLineVectors = 8;       // blocks begin and end with lines of 128 bytes
    const int64_t least = (vectors + kShares - 1) / kShares;
    RowPlan plan;
    plan.share = static_cast<int>(least < kTeamThreads ? kTeamThreads
                                                       : (least + kLineVectors - 1) /
                                                             kLineVectors * kLineVectors);
    for (plan.blocks = 1;; plan.blocks *= 2) {
        const int64_t own = std::min(int64_t{plan.share} * (kShares / plan.blocks), vectors);
        const int before = header_bytes + state_bytes(plan.blocks);
        const int64_t resident =
            (chip.shared_bytes + kReservedBytes) / (before + own * 16 + kReservedBytes);
        if (resident < 2 && plan.blocks < kShares && chip.has_clusters) continue;
        const int64_t fits = (chip.shared_bytes - before) / 16;
        plan.kept = static_cast<int>(own < fits ? own : fits);
        plan.shared_bytes = before + plan.kept * 16;
        const int teams = resident < 2 ? kMaxTeams : resident == 2 ? kMaxTeams / 2 : 1;
        plan.threads = kTeamThreads * std::min(teams, kShares / plan.blocks);
        return plan;
    }
}

// The vector at column `column` of a row of `vocab`, whose address is `at`; what is past the end is
// -inf.
template <int kDType>
__device__ __forceinline__ uint4 load_vector(const typename Element<kDType>::Bits* at, int column,
                                             int vocab, int misalignment) {
    constexpr int kPerVector = Element<kDType>::kPerVector;
    if (misalignment == 0) {
        if (vocab - column >= kPerVector) return load_once(at);
    } else if (column >= kPerVector && vocab - column >= 2 * kPerVector) {
        return load_across(at, misalignment);
    }
    return load_edge<kDType>(at, 0, vocab - column, Element<kDType>::kMinusInfinity);
}

// The first `count` vectors of a tile into a state.
template <int kDType>
__device__ __forceinline__ void add_vectors(SoftmaxState& state, const uint4 (&tile)[kLoads],
                                            int count, float scale) {
    using E = Element<kDType>;
    uint32_t largest = E::kMinusInfinity;
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        const uint4 v = tile[k];
        if (k < count) largest = E::max(largest, E::max(E::max(v.x, v.y), E::max(v.z, v.w)));
    }
    float candidates[E::kPerWord];
    E::unpack(largest, candidates);
    const float max = fmaxf(candidates[0], candidates[E::kPerWord - 1]);
    if (max > state.max) state = softmax_raise<true>(state, max, scale);
    const float origin = softmax_origin(state.max);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
        if (k >= count) break;
        const uint32_t words[4] = {tile[k].x, tile[k].y, tile[k].z, tile[k].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float x[E::kPerWord];
            E::unpack(words[w], x);
#pragma unroll
            for (int i = 0; i < E::kPerWord; ++i) softmax_add<true>(state, x[i], scale, origin);
        }
    }
}

// A share as one block has it.
struct Share {
    int column;  // the first
    int left;    // vectors of this thread's and after them
    int copied;  // so many of those are copied to `kept`
    int room;    // so many fit
    uint4* kept;
};

// Share `share` of block `rank`, from this thread's first vector on. Whole vectors at 16-byte
// boundaries of the row are copied, as far as there is room.
template <int kDType>
__device__ __forceinline__ Share share_of(const RowPlan& plan, uint4* kept, int share, int rank,
                                          int vocab, int misalignment) {
    constexpr int kPerVector = Element<kDType>::kPerVector;
    const int own = share * plan.share, thread = static_cast<int>(threadIdx.x) % kTeamThreads;
    const int vector = rank * (kShares / plan.blocks) * plan.share + own + thread;
    Share result;
    result.column = vector * kPerVector;
    result.left = min(plan.share - thread, (vocab - 1) / kPerVector + 1 - vector);
    result.room = plan.kept - own - thread;
    result.copied =
        misalignment == 0 ? min(result.room, min(result.left, vocab / kPerVector - vector)) : 0;
    result.kept = kept + own + thread;
    return result;
}

template <int kDType>
__device__ __forceinline__ void copy_share(const Share& share,
                                           const typename Element<kDType>::Bits* row) {
    for (int at = 0; at < share.copied; at += kTeamThreads) {
        copy_async(share.kept + at, row + share.column + at * Element<kDType>::kPerVector);
    }
}

// `count` vectors of the thread from vector `at` of the share on; they are kept where there is
// room.
template <int kDType>
__device__ __forceinline__ void load_tile(uint4 (&tile)[kLoads], const Share& share, int at,
                                          int count, const typename Element<kDType>::Bits* row,
                                          int vocab) {
    constexpr int kPerVector = Element<kDType>::kPerVector, kLast = (kLoads - 1) * kTeamThreads;
    const int column = share.column + at * kPerVector, misalignment = misalignment_of(row);
    if (at + kLast < share.copied) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) tile[k] = share.kept[at + k * kTeamThreads];
    } else if (at >= share.room && misalignment == 0 &&
               vocab - column >= (kLast + 1) * kPerVector && count == kLoads) {
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
            tile[k] = load_read_only(row + column + k * kTeamThreads * kPerVector);
    } else {
#pragma unroll
        for (int k = 0; k < kLoads; ++k) {
            const int slot = at + k * kTeamThreads, first = share.column + slot * kPerVector;
            if (k >= count) break;
            if (slot < share.copied) {
                tile[k] = share.kept[slot];
            } else {
                tile[k] = load_vector<kDType>(row + first, first, vocab, misalignment);
                if (slot < share.room) share.kept[slot] = tile[k];
            }
        }
    }
}

// The thread's state of a share.
template <int kDType>
__device__ __forceinline__ SoftmaxState read_share(const Share& share,
                                                   const typename Element<kDType>::Bits* row,
                                                   int vocab, float scale) {
    SoftmaxState state = softmax_empty();
    for (int at = 0; at < share.left; at += kLoads * kTeamThreads) {
        uint4 tile[kLoads];
        const int count = min((share.left - at - 1) / kTeamThreads + 1, kLoads);
        load_tile<kDType>(tile, share, at, count, row, vocab);
        add_vectors<kDType>(state, tile, count, scale);
    }
    return state;
}

// Reads what block `rank` of the cluster has of the row; its shares are in memory after the next
// barrier.
template <int kDType>
__device__ __forceinline__ void read_shares(const RowPlan& plan, const RowMemory& memory,
                                            const typename Element<kDType>::Bits* row, int rank,
                                            int vocab, float scale) {
    const int shares = kShares / plan.blocks, teams = plan.threads / kTeamThreads;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int misalignment = misalignment_of(row);
    const auto own = [&](int share) {
        return share_of<kDType>(plan, memory.kept, share, rank, vocab, misalignment);
    };
    copy_share<kDType>(own(thread / kTeamThreads), row);
    commit_copies();
    for (int share = thread / kTeamThreads; share < shares; share += teams) {
        if (share + teams < shares) copy_share<kDType>(own(share + teams), row);
        commit_copies();
        wait_copies<1>();
        const SoftmaxState state =
            merge_lanes<true>(read_share<kDType>(own(share), row, vocab, scale), scale);
        if (lane == 0) memory.warps[share][warp % kTeamWarps] = state;
    }
    __syncthreads();
    if (warp >= shares) return;
    const SoftmaxState state =
        merge_lanes<true>(lane < kTeamWarps ? memory.warps[warp][lane] : softmax_empty(), scale);
    if (lane == 0) memory.shares[warp] = state;
}

// The state of the row in every lane of the warp that asks, from the shares of all blocks.
__device__ __forceinline__ SoftmaxState merge_shares(const RowPlan& plan, const RowMemory& memory,
                                                     float scale) {
    const int lane = threadIdx.x % 32, shares = kShares / plan.blocks;
    SoftmaxState state = softmax_empty();
    if (lane < kShares) {
        const SoftmaxState& own = memory.shares[lane % shares];
        if (plan.blocks == 1) {
            state = own;
        } else {
            const int block = lane / shares;
            state = {load_from_block(&own.max, block), load_from_block(&own.sum, block),
                     load_from_block(&own.weighted, block)};
        }
    }
    return merge_lanes<true>(state, scale);
}

}  // namespace warpo::cuda
