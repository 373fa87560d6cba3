// The function table of the instruction set that this archive is compiled for.
#include "kernels.h"

#define KP_JOIN_(a, b) a##b
#define KP_JOIN(a, b) KP_JOIN_(a, b)
#define KP_TEXT_(a) #a
#define KP_TEXT(a) KP_TEXT_(a)

namespace kp {
namespace {

// Wraps a kernel so that all kernels have the same signature.
template <class Fields, Status (*kernel)(const Fields&)>
Status call_kernel(const void* fields) {
  return kernel(*static_cast<const Fields*>(fields));
}

#define KP_ENTRY(name, fields) call_kernel<fields, KP_ISA::name>,
Status (*const kernels[])(const void*) = {KP_KERNELS(KP_ENTRY)};

}  // namespace

#undef KP_ENTRY
#define KP_ENTRY(result, name, arguments) KP_ISA::name,
const Functions KP_JOIN(functions_, KP_ISA) = {KP_TEXT(KP_ISA), kernels, KP_FUNCTIONS(KP_ENTRY)};

}  // namespace kp
