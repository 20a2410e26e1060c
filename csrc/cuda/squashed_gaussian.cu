// Tanh-squashed Gaussian actions and their logprobs, and the gradient: a few neighbouring lanes of
// a warp a row, as many as it has columns, rounded up to a power of two.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/squashed_gaussian.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 128;

int lanes_for(int64_t columns) {
    int lanes = 1;
    while (lanes < 32 && lanes < columns) lanes *= 2;
    return lanes;
}

struct Place {
    int64_t row, column;  // the first column of this lane
};

__device__ __forceinline__ Place own_place(int lanes) {
    const int rows = kThreads / lanes, thread = static_cast<int>(threadIdx.x);
    return {static_cast<int64_t>(blockIdx.x) * rows + thread / lanes, thread % lanes};
}

__device__ __forceinline__ SquashedSample load_sample(const SquashedGaussian& a, int64_t row,
                                                      int64_t column, float noise) {
    const float log_std = load_float(a.log_std, row, column);
    const float spread = squashed_spread(log_std, noise, a.log_std_min, a.log_std_max);
    return squashed_sample(load_float(a.mean, row, column), log_std, spread, a.log_std_min,
                           a.log_std_max);
}

__global__ __launch_bounds__(kThreads) void forward_kernel(const SquashedGaussian a, int lanes) {
    const Place own = own_place(lanes);
    const bool exists = own.row < a.rows;
    float sum = 0.0f;
    if (exists) {
        for (int64_t column = own.column; column < a.columns; column += lanes) {
            const float noise = load_float(a.noise, own.row, column);
            const SquashedSample x = load_sample(a, own.row, column, noise);
            a.actions[own.row * a.columns + column] = x.action;
            sum += squashed_logprob(x, noise);
        }
    }
    // every lane of the warp takes part, those past the last row too
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (exists && own.column == 0) a.logprobs[own.row] = sum;
}

__global__ __launch_bounds__(kThreads) void backward_kernel(const SquashedGaussianBackward b,
                                                            int lanes) {
    const SquashedGaussian& a = b.forward;
    const Place own = own_place(lanes);
    if (own.row >= a.rows) return;
    const float grad_logprob =
        b.grad_logprobs.data ? load_float(b.grad_logprobs, 0, own.row) : 0.0f;
    for (int64_t column = own.column; column < a.columns; column += lanes) {
        const float noise = load_float(a.noise, own.row, column);
        const SquashedSample x = load_sample(a, own.row, column, noise);
        const float grad_action =
            b.grad_actions.data ? load_float(b.grad_actions, own.row, column) : 0.0f;
        const SquashedGradient grad = squashed_gradient(x, grad_action, grad_logprob);
        b.grad_mean[own.row * a.columns + column] = grad.mean;
        b.grad_log_std[own.row * a.columns + column] = grad.log_std;
    }
}

int64_t blocks_for(const SquashedGaussian& a, int lanes) {
    const int rows = kThreads / lanes;
    return (a.rows + rows - 1) / rows;
}

}  // namespace

void squashed_gaussian_forward(const SquashedGaussian& a, Stream stream) {
    DeviceGuard guard(stream.device, "squashed_gaussian");
    if (a.rows == 0) return;
    const int lanes = lanes_for(a.columns);
    launch("squashed_gaussian", stream, blocks_for(a, lanes), kThreads, forward_kernel, a, lanes);
}

void squashed_gaussian_backward(const SquashedGaussianBackward& b, Stream stream) {
    DeviceGuard guard(stream.device, "squashed_gaussian_backward");
    if (b.forward.rows == 0) return;
    const int lanes = lanes_for(b.forward.columns);
    launch("squashed_gaussian_backward", stream, blocks_for(b.forward, lanes), kThreads,
           backward_kernel, b, lanes);
}

}  // namespace warpo::cuda
