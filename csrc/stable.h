// The only file that includes torch's headers: the LibTorch stable ABI, target 2.11. A library built
// on these loads under every torch from 2.11 on, with CUDA or without.
#pragma once
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// An error raised by torch keeps its text ("CUDA out of memory ...") if this torch provides it; torch's macro would
// name a line of its own headers.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace shira {
[[noreturn]] inline void torch_failed(const char* call) {
  const char* what =
      &torch_exception_get_what_without_backtrace == nullptr ? nullptr : torch_exception_get_what_without_backtrace();
  if (what != nullptr && *what != '\0') throw std::runtime_error(what);
  throw std::runtime_error(std::string("shira: a call into torch failed, which says why on stderr: ") + call);
}
}  // namespace shira

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != 0) {                 \
    ::shira::torch_failed(#call);    \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// The namespace of the ops: torch.ops.shira. Two builds in one process need one each, so a build may name its own
// (-DSHIRA_NAMESPACE=...), as the emulator of the tests does.
#ifndef SHIRA_NAMESPACE
#define SHIRA_NAMESPACE shira
#endif
// Torch's macros paste the namespace as it is written: the step in between replaces SHIRA_NAMESPACE first.
#define SHIRA_EXPANDED(macro, ...) macro(__VA_ARGS__)
#define SHIRA_LIBRARY(m) SHIRA_EXPANDED(STABLE_TORCH_LIBRARY, SHIRA_NAMESPACE, m)
#define SHIRA_LIBRARY_IMPL(key, m) SHIRA_EXPANDED(STABLE_TORCH_LIBRARY_IMPL, SHIRA_NAMESPACE, key, m)
#define SHIRA_OP(name) C10_STRINGIZE(SHIRA_NAMESPACE) "::" name

namespace shira {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
}  // namespace shira
