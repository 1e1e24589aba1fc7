// torch.ops.shira_emul.*: the ops of csrc/cuda, emulated on the CPU. What has no kernel yet is declared all the same.
#include "../../csrc/schemas.h"
#include "../../csrc/stable.h"
#include "cuda_emul.h"

STABLE_TORCH_LIBRARY(shira_emul, m) {
  SHIRA_SCHEMAS(m);
  m.def("_order(int order) -> ()");  // of threads and blocks: 0 forward, 1 reverse, else shuffled by this seed
  m.def("_launches() -> int");       // so far
  m.def("_planted(Tensor x, str defect) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(shira_emul, CompositeExplicitAutograd, m) {
  m.impl("_order", TORCH_BOX(&shira::emul::set_order));
  m.impl("_launches", TORCH_BOX(&shira::emul::launches));
}
