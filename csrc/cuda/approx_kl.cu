// Estimators of the KL of each token, and their gradient: a thread a token.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "math/approx_kl.h"

namespace warpo::cuda {
namespace {

constexpr int kThreads = 256;

struct Token {
    int64_t row, column;
    bool inside, keep;
};

template <class Arguments>
__device__ __forceinline__ Token own_token(const Arguments& a, int64_t i) {
    const int64_t row = i / a.columns, column = i - row * a.columns;
    const bool inside = i < a.rows * a.columns;
    return {row, column, inside, inside && (!a.mask.data || load_flag(a.mask, row, column))};
}

template <int kEstimator, class Arguments>
__device__ __forceinline__ ApproxKlTerm term_of(const Arguments& a, const Token& token) {
    return approx_kl<kEstimator>(load_float(a.logprobs, token.row, token.column),
                                 load_float(a.ref_logprobs, token.row, token.column));
}

template <int kEstimator>
__global__ __launch_bounds__(kThreads) void forward_kernel(const ApproxKl a) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const Token token = own_token(a, i);
    if (!token.inside) return;
    float value = 0.0f;
    if (token.keep) value = clamp_symmetric(term_of<kEstimator>(a, token).value, a.limit);
    a.kl[i] = value;
}

template <int kEstimator>
__global__ __launch_bounds__(kThreads) void backward_kernel(const ApproxKlBackward a) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const Token token = own_token(a, i);
    if (!token.inside) return;
    float grad = 0.0f;
    if (token.keep) {
        if (a.straight_through) {
            // k2 before its clamp
            grad = term_of<kK2>(a, token).derivative;
            if (a.weight.data) grad *= load_float(a.weight, token.row, token.column);
        } else {
            grad = clamped_derivative(term_of<kEstimator>(a, token), a.limit);
        }
        grad *= load_float32(a.grad_kl, token.row, token.column);
    }
    if (a.grad_logprobs.data) store_as(a.grad_logprobs, i, grad);
    if (a.grad_ref.data) store_as(a.grad_ref, i, -grad);
}

template <class Arguments>
void launch_tokens(const char* operation, const Arguments& a, Stream stream,
                   void (*kernel)(Arguments)) {
    DeviceGuard guard(stream.device, operation);
    const int64_t blocks = (a.rows * a.columns + kThreads - 1) / kThreads;
    if (blocks > 0) launch(operation, stream, blocks, kThreads, kernel, a);
}

}  // namespace

void approx_kl_forward(const ApproxKl& a, Stream stream) {
    const auto kernel = a.estimator == kK1   ? forward_kernel<kK1>
                        : a.estimator == kK2 ? forward_kernel<kK2>
                         : a.estimator == kK3 ? forward_kernel<kK3>
                                             : forward_kernel<kReverseK3>;
    launch_tokens<ApproxKl>("approx_kl", a, stream, kernel);
}

void approx_kl_backward(const ApproxKlBackward& a, Stream stream) {
    const auto kernel = a.estimator == kK1   ? backward_kernel<kK1>
                        : a.estimator == kK2 ? backward_kernel<kK2>
                         : a.estimator == kK3 ? backward_kernel<kK3>
                                             : backward_kernel<kReverseK3>;
    launch_tokens<ApproxKlBackward>("approx_kl_backward", a, stream, kernel);
}

}  // namespace warpo::cuda
