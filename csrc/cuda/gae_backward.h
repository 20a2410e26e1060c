// The adjoint of GAE, a scan forward in time: what an advantage and a value owe to the steps before
// them.
#pragma once

#include "cuda/gae_forward.h"

namespace warpo::cuda {

// What the last step that lets nothing through hands on.
struct Adjoint {
    float value, advantage;  // of the value after the step, and of its advantage
};

// Index of the last valid step of the row, -1 if there is none.
template <class B>
__device__ __forceinline__ int last_valid(const Gae& a, const Row& row, int* shared,
                                          const Place& p) {
    constexpr int kThreads = B::kLanes * B::kWarps;
    int step = row.length - 1 - (p.warp * B::kLanes + p.lane);
    while (step >= 0 && !load_flag(a.mask, row.index, row.start + step)) {
        step -= kThreads;
    }
#pragma unroll
    for (int lanes = B::kLanes / 2; lanes > 0; lanes >>= 1) {
        step = max(step, __shfl_xor_sync(kAllLanes, step, lanes));
    }
    if (B::kWarps > 1) {
        shared[p.warp * B::kColumns + (B::kLanes == 1 ? p.row : 0)] = step;
        __syncthreads();
        for (int w = 0; w < B::kWarps; ++w) {
            step = max(step, shared[w * B::kColumns + (B::kLanes == 1 ? p.row : 0)]);
        }
    }
    return max(step, -1);
}

template <class B>
__device__ __forceinline__ bool is_vector_row(const GaeBackward& b, const Row& row) {
    if (B::kLanes == 1) return false;
    const bool vector = flags_are_vector(b.forward, row) && is_vector(b.grad_advantages, row) &&
                        is_vector(b.grad_returns, row) && is_vector(b.grad_rewards, row) &&
                        is_vector(b.grad_values, row) && is_vector(b.grad_final_values, row);
    return !__any_sync(kAllLanes, !vector);
}

__device__ __forceinline__ Tile<2> load_gradients(const GaeBackward& b, const Row& row,
                                                  const Steps& at) {
    Tile<2> tile;
    load_items(tile.inputs[0], b.grad_advantages, row, at);
    load_items(tile.inputs[1], b.grad_returns, row, at);
    tile.flags = load_all_flags(b.forward, row, at);
    return tile;
}

template <class B>
__global__ __launch_bounds__(B::kThreads,
                             1024 / B::kThreads) void backward_kernel(const GaeBackward b) {
    __shared__ float4 memory[B::kLanes == 1 ? 1 : B::kThreads];
    __shared__ Latest<Adjoint> adjoints_of_warps[B::kWarps * B::kColumns];
    __shared__ AffineMap maps_of_warps[B::kWarps * B::kColumns];
    __shared__ int last_of_warps[B::kWarps * B::kColumns];
    const Gae& a = b.forward;
    const bool carry = a.mask_mode != kZero;
    const float decay = a.gamma * a.gae_lambda;
    const Place p = find_place<B>();
    Row row = find_row<B>(a, p);
    if (fill_rest<B>(a, row, b.grad_rewards, b.grad_values, b.grad_final_values)) {
        if (b.grad_last_values.data && threadIdx.x == 0)
            store_float(b.grad_last_values, row.index, 0, NAN);
        return;
    }
    const Exchange<B> exchange(memory, p);
    const bool vector = is_vector_row<B>(b, row);
    const int own = vector ? p.first : p.striped, stride = vector ? 1 : B::kLanes;
    // The rewards behind it are added to its own.
    const int last = a.mask_mode == kCompact && a.mask.data
                         ? last_valid<B>(a, row, last_of_warps, p)
                         : INT32_MAX;

    AffineMap owed = {0.0f, 0.0f};  // slope 0: a state
    Latest<Adjoint> before = {{0.0f, 0.0f}, 1};
    const int length = a.cu_seqlens ? row.length : static_cast<int>(a.steps);
    Tile<2> ahead = load_gradients(b, row, {own, stride, vector});
    for (int tile = 0; tile < length; tile += B::kTile) {
        Tile<2> s = ahead;
        compute_anew(row.index);
        compute_anew(row.start);
        const Steps at = {tile + own, stride, vector};
        if (tile + B::kTile < length) {
            ahead = load_gradients(b, row, {at.first + B::kTile, stride, vector});
        }
        if (B::kLanes > 1 && !vector) {
            for (float (&gradients)[kItems] : s.inputs) exchange.to_consecutive(gradients);
            s.flags = exchange.to_consecutive(s.flags);
        }
        const int first = tile + p.first;
        const uint32_t flags = gae_flags(a, s.flags, first, row.length);
        float (&direct)[kItems] = s.inputs[0], (&grad_returns)[kItems] = s.inputs[1];
        AffineMap all = affine_identity();
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const unsigned f = flags_of(flags, i);
            // gradients of masked steps may be NaN
            grad_returns[i] = f & kGaeKeep ? grad_returns[i] : 0.0f;
            direct[i] = f & kGaeKeep ? direct[i] + grad_returns[i] : 0.0f;
            if (gae_is_transparent(f, carry)) continue;
            const float slope = f & kGaeCut ? 0.0f : decay;
            all = then(all, AffineMap{slope, f & kGaeCut ? 0.0f : decay * direct[i]});
        }
        float trace = scan_block<B>(all, owed, maps_of_warps, p).offset;

        // from here on `direct` is the adjoint of the advantage
        Latest<Adjoint> own_adjoint = {{0.0f, 0.0f}, 0};
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const unsigned f = flags_of(flags, i);
            if (gae_is_transparent(f, carry)) continue;
            direct[i] += trace;
            trace = f & kGaeCut ? 0.0f : decay * direct[i];
            const bool from_final = (f & kGaeTruncated) && b.grad_final_values.data;
            const float owed_value =
                (f & kGaeTerminated) || from_final ? 0.0f : a.gamma * direct[i];
            own_adjoint = {{owed_value, direct[i]}, 1};
        }
        Adjoint previous = scan_block<B>(own_adjoint, before, adjoints_of_warps, p).payload;

        float grad_rewards[kItems], grad_values[kItems], grad_final[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const unsigned f = flags_of(flags, i);
            const bool keep = f & kGaeKeep, has_bootstrap = keep && !(f & kGaeTerminated);
            const bool from_final = (f & kGaeTruncated) && b.grad_final_values.data;
            const float adjoint = direct[i], to_bootstrap = a.gamma * adjoint;
            grad_rewards[i] = keep ? adjoint : first + i > last ? previous.advantage : 0.0f;
            grad_values[i] = keep ? (grad_returns[i] - adjoint) + previous.value : 0.0f;
            grad_final[i] = has_bootstrap && from_final ? to_bootstrap : 0.0f;
            if (gae_is_transparent(f, carry)) continue;
            const bool to_next = !(f & kGaeTerminated) && !from_final;
            previous = {to_next ? to_bootstrap : 0.0f, adjoint};
        }
        const Output<B> output = {exchange, row, at};
        output.store(grad_rewards, b.grad_rewards);
        output.store(grad_values, b.grad_values);
        output.store(grad_final, b.grad_final_values);
    }
    if (b.grad_last_values.data && row.exists && p.lane == 0 && p.warp == 0) {
        store_float(b.grad_last_values, row.index, 0, before.payload.value);
    }
}

}  // namespace warpo::cuda
