// The interface between kernels compiled for the CPU (device.h) and the scheduler that runs their threads
// (runtime.cpp).
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

// The position of a thread in its block.
struct Identity {
  uint3 index;
  unsigned number, warp, lane;  // number: index in one dimension
};

// Operations for which lanes of a warp wait for each other. All lanes must wait for the same operation.
enum class Meeting : uint8_t { sync, shuffle, ballot, match };

extern const Identity* self;
extern dim3 block_size, grid_size;
extern uint3 block;
extern void* dynamic_shared;

// Waits for all threads of the block; returns for how many of them `predicate` was not zero.
unsigned barrier(int predicate, int line);

// Waits for the lanes of `mask`; values[l] becomes the value of lane l. Returns the mask of the lanes that arrived.
uint32_t meet(Meeting meeting, uint32_t mask, uint64_t value, uint64_t* values, int line);

// Called before an atomic operation on `size` bytes.
void before_atomic(void* at, size_t size, int line);

// Ends the launch with an error message that begins with the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emu
