// torch.ops.shira_emul.*: the ops of csrc/cuda, emulated on the CPU. Ops without a CUDA kernel are declared, too.
#include "../../csrc/ops/select.h"
#include "../../csrc/schemas.h"
#include "cuda_emul.h"

SHIRA_LIBRARY(m) {
  SHIRA_SCHEMAS(m);
  m.def("_select_random(Tensor like, int numel, int k, int seed, int granule) -> Tensor");
  m.def("_sampled_grad(Tensor grad_output, Tensor input, Tensor indices, int granule, str how) -> Tensor");
  m.def("_order(int order) -> ()");        // of threads and blocks: 0 forward, 1 reverse, else shuffled by this seed
  m.def("_capturing(bool on) -> ()");      // whether a graph is captured
  m.def("_launches() -> int");             // so far
  m.def("_most_shared(int bytes) -> ()");  // that a launch may ask for; 0: as on an H100
  m.def("_watch(bool on) -> ()");          // for races, in a build that finds them; it does from the start
  m.def("_planted(Tensor x, str defect) -> Tensor");
}

static shira::Tensor select_random(int64_t numel, int64_t k, int64_t seed, std::optional<torch::stable::Device>,
                                   int64_t granule) {
  shira::check_select_random(numel, k, granule);  // a refusal from within a dispatched call loses its text
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return shira::select_random_on(SHIRA_OP("_select_random"), cpu, numel, k, seed, granule);
}

SHIRA_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("select_random", TORCH_BOX(&select_random));
  m.impl("_order", TORCH_BOX(&shira::emul::set_order));
  m.impl("_capturing", TORCH_BOX(&shira::emul::set_capturing));
  m.impl("_launches", TORCH_BOX(&shira::emul::launches));
  m.impl("_watch", TORCH_BOX(&shira::emul::watch));
  m.impl("_most_shared", TORCH_BOX(&shira::emul::set_most_shared));
}
