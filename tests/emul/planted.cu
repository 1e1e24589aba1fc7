// A kernel with one planted defect at a time, or none: tests/ops/test_emul.py checks that the emulator finds it.
#include <string>

#include "../../csrc/cuda/memory.h"

namespace shira::cuda {
namespace {

enum class Defect { None, Barrier, Divergence, Warp, Mask, Index, ReadOnly, Alignment, Shared, Race, Blocks };

struct Job {
  const int64_t* in;
  int64_t* out;
  int64_t count;
  Defect defect;
};

// Each block's share of `in` in reverse order; each entry plus that of its warp's first lane.
__global__ void turn(SHIRA_PARAMETER(job, Job)) {
  SHIRA_SHARED(share, kThreads, int64_t);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = int64_t{blockIdx.x} * kThreads + thread;
  share[thread] = i < job.count ? load_stream(job.in + i) : 0;
  if (job.defect == Defect::Shared && thread == 7) share[kThreads] = 0;
  if (job.defect != Defect::Barrier && !(job.defect == Defect::Divergence && thread == 7)) __syncthreads();
  int64_t other = share[kThreads - 1 - thread];
  if (job.defect == Defect::Warp && thread == 33) return;
  const uint32_t mask = job.defect == Defect::Mask && thread % 32 < 16 ? 0xFFFFu : 0xFFFFFFFFu;
  other += __shfl_sync(mask, other, 0);
  if (job.defect == Defect::ReadOnly && i == 3) store_stream(const_cast<int64_t*>(job.in), other);
  if (job.defect == Defect::Alignment && i == 3)
    load_stream(reinterpret_cast<const int64_t*>(reinterpret_cast<const char*>(job.in) + 4));
  if (job.defect == Defect::Race) {  // no order shows it, since the shuffle lets all of a warp write first
    __syncthreads();
    share[thread] = 0;
    other += __shfl_sync(0xFFFFFFFFu, 0, 0);
    other += share[thread ^ 1];
  }
  if (job.defect == Defect::Blocks && i == 3 && load_stream(job.out + 300) == INT64_MIN) other = 0;
  if (i < job.count + (job.defect == Defect::Index)) store_stream(job.out + i, other);
}

Tensor planted(const Tensor& x, std::string name) {
  const std::pair<const char*, Defect> names[] = {
      {"none", Defect::None},          {"barrier", Defect::Barrier},     {"divergence", Defect::Divergence},
      {"warp", Defect::Warp},          {"mask", Defect::Mask},           {"index", Defect::Index},
      {"read only", Defect::ReadOnly}, {"alignment", Defect::Alignment}, {"shared", Defect::Shared},
      {"race", Defect::Race},          {"blocks", Defect::Blocks}};
  const Device device(x);
  const Tensor out = torch::stable::new_empty(x, {x.numel()});
  for (const auto& [known, defect] : names)
    if (name == known) {
      const Job job{address<const int64_t>(x), address<int64_t>(out), x.numel(), defect};
      SHIRA_LAUNCH(turn, static_cast<unsigned>((x.numel() + kThreads - 1) / kThreads), kThreads, device.stream, job);
      return out;
    }
  refuse("_planted: no defect is named ", name);
}

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) { m.impl("_planted", TORCH_BOX(&shira::cuda::planted)); }
