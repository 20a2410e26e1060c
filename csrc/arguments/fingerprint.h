#pragma once
#include "view.h"

namespace warpo {

struct Fingerprint {
    int64_t rows, columns;
    View tensor;           // (row, column) float, stride1 is 1
    int64_t* partials;     // (kMaxPartials) workspace, see math/tiles.h
    int64_t* fingerprint;  // ()
};

}  // namespace warpo
