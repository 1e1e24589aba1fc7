// The library `shira`: its schemas, what the build holds, and the Python module that loads it.
#include <Python.h>

#include "checks.h"
#include "schemas.h"
#include "stable.h"

SHIRA_LIBRARY(m) {
  SHIRA_SCHEMAS(m);
  m.def("_build_info() -> int");
  m.def("_select_random(Tensor like, int numel, int k, int seed, int granule) -> Tensor");  // see csrc/ops/select.h
  // On the CPU alone, for python/shira/_granules.py: foreach_swap_, and by how much it changes each fingerprint; and
  // what words that were read add to one.
  m.def(
      "_foreach_swap_fingerprint_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] values, int granule) -> Tensor");
  m.def("_fingerprint_words(Tensor words, Tensor positions) -> Tensor");
  // In any vector width that the processor has, or in either way on a GPU: the bits depend on it, so the tests ask for
  // each.
  m.def("_sampled_grad(Tensor grad_output, Tensor input, Tensor indices, int granule, str how) -> Tensor");
  m.def(
      "_sparse_linear(Tensor input, Tensor indices, Tensor values, int out_features, bool transposed, int granule, "
      "str how) -> Tensor");
}

// Exported by libtorch_cuda only; weak, so that it is null under a CPU torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

// Bit 0: CUDA kernels are compiled in. Bit 1: the torch that is loaded has CUDA.
static int64_t build_info() {
  int64_t info = 0;
#ifdef SHIRA_WITH_CUDA
  info |= 1;
#endif
  if (&aoti_torch_get_current_cuda_stream != nullptr) info |= 2;
  return info;
}

SHIRA_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("_build_info", TORCH_BOX(&build_info)); }

// `import shira_ops._C` loads the library; nothing is called through Python's own interface. The build says what the
// module is called (TORCH_EXTENSION_NAME: _C).
PyMODINIT_FUNC C10_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static constexpr char kName[] = C10_STRINGIZE(TORCH_EXTENSION_NAME);
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, kName, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
