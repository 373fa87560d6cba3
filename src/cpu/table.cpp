// The table of this archive's instruction set.
#include "kernels.h"

#define KP_JOIN_(a, b) a##b
#define KP_JOIN(a, b) KP_JOIN_(a, b)
#define KP_TEXT_(a) #a
#define KP_TEXT(a) KP_TEXT_(a)

namespace kp {

#define KP_ENTRY(result, name, arguments) KP_ISA::name,
const Kernels KP_JOIN(kernels_, KP_ISA) = {KP_TEXT(KP_ISA), KP_KERNELS(KP_ENTRY)};

}  // namespace kp
