#include "cuda/gae_forward.h"

namespace warpo::cuda {

void vtrace(const Vtrace& a, Stream stream) { launch_forward("vtrace", a, a.gae, stream); }

}  // namespace warpo::cuda
