// What a kernel compiled for the CPU (device.h) and the scheduler that runs its threads (runtime.cpp) know of each
// other.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emu {

// What a thread sees of itself.
struct Identity {
  uint3 index;                  // in its block
  unsigned number, warp, lane;  // the same counted in one dimension
};

// Threads of a warp that meet must be there for the same thing.
enum class Meeting : uint8_t { sync, shuffle, ballot, match };

extern const Identity* self;
extern dim3 block_size, grid_size;
extern uint3 block;
extern void* dynamic_shared;

// Waits for all threads of the block; returns for how many of them `predicate` was not zero.
unsigned barrier(int predicate, int line);

// Waits for the lanes of `mask`; `values[l]` becomes what lane l came with. Returns the lanes that are there.
uint32_t meet(Meeting meeting, uint32_t mask, uint64_t value, uint64_t* values, int line);

// To be called before an atomic operation on `size` bytes.
void before_atomic(void* at, size_t size, int line);

// Ends the launch with an error, to which the block and the thread are added.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emu
