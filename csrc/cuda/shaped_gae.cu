#include "cuda/gae_forward.h"

namespace warpo::cuda {

void shaped_gae(const ShapedGae& a, Stream stream) {
    launch_forward("shaped_gae", a, a.gae, stream);
}

}  // namespace warpo::cuda
