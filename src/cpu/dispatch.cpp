// Selects the function table of the best instruction set that this machine runs; KPCORE_ISA or set_isa() overrides it.
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if !defined(_WIN32)
#include <dlfcn.h>
#endif

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

#ifdef __x86_64__
// Whether the processor has the instructions of a table and the system saves their registers: CPUID and XGETBV, Intel's
// manual, volume 1, sections 14.3 and 15.2. __builtin_cpu_supports needs a library that clang-cl does not link.
bool runs_here(const Functions& table) {
  const bool avx2 = !strcmp(table.isa, "avx2"), avx512 = !strcmp(table.isa, "avx512");
  if (!avx2 && !avx512) return true;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return false;
  unsigned saved, saved_high;
  __asm__("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  const unsigned vectors = 0x6, masks_and_wide_vectors = 0xe0;  // bits of the register XCR0
  const unsigned registers = avx512 ? vectors | masks_and_wide_vectors : vectors;
  if ((saved & registers) != registers || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  unsigned instructions = bit_AVX2 | bit_BMI2;
  if (avx512) instructions |= bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
  return (b & instructions) == instructions;
}
#else
bool runs_here(const Functions&) {
  return true;
}
#endif

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

// The file of the OpenMP library that the extension is linked to; null without OpenMP, and on Windows.
const char* openmp_library() {
#if defined(_OPENMP) && !defined(_WIN32)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_thread_num), &info)) return info.dli_fname;
#endif
  return nullptr;
}

// The number of processors that OpenMP binds its threads to, as OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY ask
// for; 0 if it binds none. The thread that loads it is bound to one place at once: its affinity is that place alone.
int bound_processors() {
  int processors = 0;
#ifdef _OPENMP
  for (int place = 0; place < omp_get_num_places(); ++place) processors += omp_get_place_num_procs(place);
  if (omp_get_num_procs() < processors) processors = omp_get_num_procs();  // places may overlap
#endif
  return processors;
}

// OMP_THREAD_LIMIT, the most threads that OpenMP has at once; the largest int if it is not set.
int thread_limit() {
#ifdef _OPENMP
  return omp_get_thread_limit();
#else
  return INT_MAX;
#endif
}

// After a fork the child has one thread, but libgomp still lists the parent's worker threads and would wait for them
// forever. Called before a fork, this ends them; parent and child start new ones when they next need them. False if
// OpenMP cannot: then a child must never use a second thread. Windows has no forks.
bool pause_threads() {
#if defined(_OPENMP) && !defined(_WIN32)
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
