// The operations on a CUDA device. Launches only: no synchronisation, no allocation, fit for stream
// capture. A failure to launch throws std::runtime_error with the operation and the reason.
#pragma once

#include <vector>

#include "kernels.h"

namespace warpo::cuda {

// Versions of CUDA are 1000 major + 10 minor.
struct Build {
    std::vector<int> capabilities;  // 10 major + minor of the machine code; the last also as PTX
    int runtime = 0;                // linked in
    int driver = 0;                 // the newest that the driver knows; 0 without a driver
};

Build build();

struct Stream {
    int device;
    void* stream;  // cudaStream_t; nullptr is the default stream
};

#define WARPO_DECLARE(operation, Arguments) void operation(const Arguments&, Stream);
WARPO_OPERATIONS(WARPO_DECLARE)
#undef WARPO_DECLARE

}  // namespace warpo::cuda
