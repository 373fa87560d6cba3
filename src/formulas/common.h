// Types shared by all kernels, on host and device. NVRTC has no standard library, so nothing here uses it.
#pragma once

#ifdef __CUDACC__
#define KP_HD __host__ __device__ inline
#else
#define KP_HD inline
#endif
#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stddef.h>
#include <stdint.h>
#endif

namespace kp {

enum class Metric : int { l2, l1, linf };

}  // namespace kp
