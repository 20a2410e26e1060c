#include "cuda/gae_backward.h"

namespace warpo::cuda {

void gae_forward(const Gae& a, Stream stream) { launch_forward("gae", a, a, stream); }

void gae_backward(const GaeBackward& b, Stream stream) {
    const Gae& a = b.forward;
    DeviceGuard guard(stream.device, "gae_backward");
    check_steps(a, "gae_backward");
    if (a.rows == 0) return;
    const View* layout = &b.grad_rewards;
    for (const View* view : {&b.grad_values, &b.grad_advantages, &b.grad_returns}) {
        if (!layout->data) layout = view;
    }
    choose_block<false>(a, *layout, [&](auto block) {
        using B = decltype(block);
        launch("gae_backward", stream, (a.rows + B::kRows - 1) / B::kRows, B::kThreads,
               backward_kernel<B>, b);
    });
}

}  // namespace warpo::cuda
