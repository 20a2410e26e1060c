// The operations on a CUDA device. Launches only: no synchronisation, no allocation, fit for stream
// capture. A failure to launch throws std::runtime_error with the operation and the reason.
#pragma once

#include "kernels.h"

namespace warpo::cuda {

struct Stream {
    int device;
    void* stream;  // cudaStream_t; nullptr is the default stream
};

void logprobs_forward(const Logprobs&, Stream);
void logprobs_backward(const Logprobs&, const LogprobsBackward&, Stream);
void gae_forward(const Gae&, Stream);
void gae_backward(const Gae&, const GaeBackward&, Stream);
void policy_loss(const PolicyLoss&, Stream);
void group_advantages_forward(const GroupAdvantages&, Stream);
void group_advantages_backward(const GroupAdvantages&, const GroupAdvantagesBackward&, Stream);

}  // namespace warpo::cuda
