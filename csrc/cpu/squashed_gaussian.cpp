// Tanh-squashed Gaussian actions and their logprobs, and the gradient: rows side by side in a tile,
// since a row of actions is shorter than a vector.
#include "math/squashed_gaussian.h"

#include <string.h>

#include "cpu/cpu.h"
#include "cpu/load.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

constexpr int kTile = 1024;

// Columns [column, column + columns) of `rows` rows; several rows only where they are whole.
struct Span {
    int64_t row, column;
    int rows, columns;
    int count() const { return rows * columns; }
};

struct Buffer {
    alignas(64) float data[kTile];
};

void load_span(const View& view, const Span& span, Buffer& out) {
    const bool dense = view.stride1 == 1 && view.stride0 == span.columns;
    const int runs = dense ? 1 : span.rows, length = span.count() / runs;
    for (int run = 0; run < runs; ++run)
        load_steps(view, span.row + run, span.column, length, out.data + run * length);
}

// Of the loaded log_std and noise, into `out`.
void spread_span(const SquashedGaussian& a, int count, const Buffer& log_std, const Buffer& noise,
                 Buffer& out) {
    const float low = a.log_std_min, high = a.log_std_max;
#pragma omp simd
    for (int i = 0; i < count; ++i)
        out.data[i] = squashed_spread(log_std.data[i], noise.data[i], low, high);
}

void forward_span(const SquashedGaussian& a, const Span& span, double* sums) {
    Buffer mean, log_std, noise, spread, action, logprob;
    load_span(a.mean, span, mean);
    load_span(a.log_std, span, log_std);
    load_span(a.noise, span, noise);
    const float low = a.log_std_min, high = a.log_std_max;
    const int count = span.count();
    spread_span(a, count, log_std, noise, spread);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const SquashedSample x =
            squashed_sample(mean.data[i], log_std.data[i], spread.data[i], low, high);
        action.data[i] = x.action;
        logprob.data[i] = squashed_logprob(x, noise.data[i]);
    }
    memcpy(a.actions + span.row * a.columns + span.column, action.data, count * sizeof(float));
    for (int row = 0; row < span.rows; ++row)
        for (int i = 0; i < span.columns; ++i) sums[row] += logprob.data[row * span.columns + i];
}

void backward_span(const SquashedGaussianBackward& b, const Span& span) {
    const SquashedGaussian& a = b.forward;
    Buffer mean, log_std, noise, spread, grad_action = {}, grad_logprob = {};
    load_span(a.mean, span, mean);
    load_span(a.log_std, span, log_std);
    load_span(a.noise, span, noise);
    if (b.grad_actions.data) load_span(b.grad_actions, span, grad_action);
    // the same for all columns of a row
    const View& of_rows = b.grad_logprobs;
    if (of_rows.data)
        load_span({of_rows.data, of_rows.stride1, 0, of_rows.dtype}, span, grad_logprob);
    const float low = a.log_std_min, high = a.log_std_max;
    const int count = span.count();
    spread_span(a, count, log_std, noise, spread);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const SquashedSample x =
            squashed_sample(mean.data[i], log_std.data[i], spread.data[i], low, high);
        const SquashedGradient grad =
            squashed_gradient(x, grad_action.data[i], grad_logprob.data[i]);
        mean.data[i] = grad.mean;
        log_std.data[i] = grad.log_std;
    }
    const int64_t offset = span.row * a.columns + span.column;
    memcpy(b.grad_mean + offset, mean.data, count * sizeof(float));
    memcpy(b.grad_log_std + offset, log_std.data, count * sizeof(float));
}

// Calls f(span) for the columns of up to `rows` rows from `row` on.
template <class F>
void for_spans(const SquashedGaussian& a, int64_t row, int rows, F f) {
    for (int64_t column = 0; column < a.columns; column += kTile) {
        const int64_t left = a.columns - column;
        f(Span{row, column, rows, (int)(left < kTile ? left : kTile)});
    }
}

int64_t rows_per_tile(const SquashedGaussian& a) {
    return a.columns >= kTile ? 1 : a.columns > 0 ? kTile / a.columns : kTile;
}

int rows_from(const SquashedGaussian& a, int64_t row) {
    const int64_t left = a.rows - row, most = rows_per_tile(a);
    return (int)(left < most ? left : most);
}

}  // namespace

void squashed_gaussian_forward(const SquashedGaussian& a) {
    const int64_t step = rows_per_tile(a);
#pragma omp parallel for if (a.rows * a.columns >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += step) {
        const int rows = rows_from(a, row);
        double sums[kTile] = {};
        for_spans(a, row, rows, [&](const Span& span) { forward_span(a, span, sums); });
        for (int i = 0; i < rows; ++i) a.logprobs[row + i] = (float)sums[i];
    }
}

void squashed_gaussian_backward(const SquashedGaussianBackward& b) {
    const SquashedGaussian& a = b.forward;
    const int64_t step = rows_per_tile(a);
#pragma omp parallel for if (a.rows * a.columns >= kParallelWork)
    for (int64_t row = 0; row < a.rows; row += step)
        for_spans(a, row, rows_from(a, row), [&](const Span& span) { backward_span(b, span); });
}

}  // namespace warpo::cpu::WARPO_ISA
