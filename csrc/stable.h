// The only file that includes torch's headers: the LibTorch stable ABI, target 2.11. A library built
// on these loads under every torch from 2.11 on, with CUDA or without.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace shira {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
}  // namespace shira
