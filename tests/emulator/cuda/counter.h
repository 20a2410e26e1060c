// In place of csrc/cuda/counter.h: one counter, which every launch must leave at 0. Not shown:
// streams and captures.
#pragma once

#include "cuda/launch.h"

namespace warpo::cuda {

inline unsigned* counter_of(const Stream&, const char* operation) {
    static unsigned counter = 0;
    if (counter != 0) {
        throw std::runtime_error(std::string(operation) + ": a launch has left its counter at " +
                                 std::to_string(counter));
    }
    return &counter;
}

}  // namespace warpo::cuda
