// Selects the function table of the best instruction set that this machine runs; KPCORE_ISA or set_isa() overrides it.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "parallel.h"

namespace kp {
namespace {

const Functions* const compiled[] = {
    &functions_base,
#ifdef KP_HAVE_AVX2
    &functions_avx2,
#endif
#ifdef KP_HAVE_AVX512
    &functions_avx512,
#endif
};

bool runs_here(const Functions& table) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!strcmp(table.isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!strcmp(table.isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("bmi2");
#endif
  return true;
}

struct Choice {
  const char* names[4] = {};
  const Functions* table = nullptr;

  Choice() {
    int n = 0;
    for (const Functions* k : compiled)
      if (runs_here(*k)) {
        names[n++] = k->isa;
        table = k;
      }
  }
};

Choice& choice() {
  static Choice c;
  return c;
}

}  // namespace

const Functions& functions() {
  return *choice().table;
}
const char* const* isas() {
  return choice().names;
}

bool set_isa(const char* name) {
  for (const Functions* k : compiled)
    if (!strcmp(k->isa, name) && runs_here(*k)) {
      choice().table = k;
      return true;
    }
  return false;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

// The file of the OpenMP library that the extension is linked to; null without OpenMP.
const char* openmp_library() {
#ifdef _OPENMP
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_thread_num), &info)) return info.dli_fname;
#endif
  return nullptr;
}

// After a fork the child has one thread, but libgomp still lists the parent's worker threads and would wait for them
// forever. Called before a fork, this ends them; parent and child start new ones when they next need them. False if
// OpenMP cannot: then a child must never use a second thread.
bool pause_threads() {
#ifdef _OPENMP
  // Looked up at run time: OpenMP before 5.0 (torch 2.6 ships one) lacks this function, and with a direct reference
  // this library would not load.
  static const auto pause = [] {
    void* const library = dlopen(openmp_library(), RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<int (*)(omp_pause_resource_t)>(library ? dlsym(library, "omp_pause_resource_all")
                                                                   : nullptr);
  }();
  return pause && pause(omp_pause_hard) == 0;
#else
  return true;
#endif
}

}  // namespace kp
