// Generalised advantage estimation and the reverse scans like it: the way to walk them.
#include "cpu/gae_scans.h"

namespace warpo::cpu::WARPO_ISA {
namespace {

// Rows up to this length waste lanes along time.
constexpr int64_t kShortRow = 24;

// By layout and length alone, so that a row has the same bits in any batch.
bool is_along_time(const Gae& a, const View& main) {
    if (a.cu_seqlens) return true;
    return a.steps > kShortRow && (main.stride1 == 1 || main.stride1 <= main.stride0);
}

}  // namespace

void gae_forward(const Gae& a) {
    if (is_along_time(a, a.rewards)) return forward_along_time(a, nullptr, nullptr);
    forward_across_rows(a, nullptr);
}

void gae_backward(const GaeBackward& g) {
    if (is_along_time(g.forward, g.grad_rewards.data ? g.grad_rewards : g.grad_values))
        return backward_along_time(g);
    backward_across_rows(g);
}

void shaped_gae(const ShapedGae& s) { forward_along_time(s.gae, &s, nullptr); }

void vtrace(const Vtrace& v) {
    if (is_along_time(v.gae, v.logprobs)) return forward_along_time(v.gae, nullptr, &v);
    forward_across_rows(v.gae, &v);
}

}  // namespace warpo::cpu::WARPO_ISA
