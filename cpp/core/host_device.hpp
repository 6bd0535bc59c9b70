// Marks what CUDA's compiler makes for host and device.
#pragma once

#if defined(__CUDACC__)
#define BNEXT_HD __host__ __device__
#else
#define BNEXT_HD
#endif
