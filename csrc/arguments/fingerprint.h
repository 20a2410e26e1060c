#pragma once
#include "view.h"

namespace warpo {

struct Fingerprint {
    Matrices tensors;       // float
    int64_t* fingerprints;  // (tensors), 0 before the call
};

}  // namespace warpo
