// Marks what compiles for the host and for a GPU. Everything under core/ is torch-free.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SHIRA_HD __host__ __device__ __forceinline__
#else
#define SHIRA_HD inline
#endif

#if defined(__x86_64__) && !defined(__CUDACC__)
#define SHIRA_X86 1  // vector paths, chosen at run time
#else
#define SHIRA_X86 0
#endif
