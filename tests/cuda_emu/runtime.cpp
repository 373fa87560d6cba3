// Runs a kernel: one block after another, its threads as fibers that take turns on one core.
//
// A fiber yields where it waits for other threads and, if asked to, at random memory accesses. The order decides which
// fiber continues: forward, reverse or random. A kernel that works in one order only has a bug, since a GPU promises
// none.
//
// With EMU_CHECK every load and store is checked. Kernels are compiled with -fsanitize=thread, which inserts a function
// call before each access; these functions are defined at the end of this file, and no sanitizer library is linked.
// Every element of an array or of shared memory records the last write and read. Two accesses by different threads, of
// which one is a write, are a race unless both are atomic or a barrier is between them: __syncthreads in a block or
// __syncwarp in a warp. Nothing orders accesses of different blocks.

#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

extern "C" {
extern char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
void emu_switch(void** save, void* resume);
}

namespace emu {

enum Order : int { forward, reversed, random_order };

// Passed by emulator.py, which declares the same fields.
struct Argument {
  char* data;  // of the array
  size_t size;
  int place;        // position among the kernel's arguments
  int element;      // bytes per element
  int initialized;  // 0: reading an element before it is written is an error
};
struct Launch {
  unsigned grid[3], block[3];
  size_t shared;
  int order, preempt;  // preempt: accesses out of a thousand after which another thread continues
  uint64_t seed;
  Argument* arrays;
  int num_arrays;
};

const Identity* self;
dim3 block_size, grid_size;
uint3 block;
void* dynamic_shared;

namespace {

enum class State : uint8_t { ready, at_barrier, at_meeting, returned };

struct Fiber {
  void* stack_pointer;
  char *low, *high;  // of its stack
};

struct Thread : Identity {
  Fiber* fiber;  // none before its first turn and after it has returned
  State state;
  int line;            // where the thread waits
  int predicate;       // argument of the barrier
  unsigned predicted;  // result of the barrier: how many threads had a nonzero predicate
  Meeting meeting;
  uint32_t mask, there;
  uint64_t value, *values;
};

// ---- state of a launch; emulator.py allows one at a time

Order order;
int preempt;
uint64_t random_state;
void (*kernel)(void**);
void** arguments;
sigjmp_buf back;  // returns to emu_launch
char error[2048];

// ---- state of a block

std::vector<Thread> threads;
std::vector<uint32_t> returned_lanes;  // of each warp; lanes past the end of the block count as returned
unsigned num_threads, alive, waiting;
uint64_t block_number;
uint32_t barriers;                    // passed by the block
std::vector<uint32_t> warp_barriers;  // passed by each warp

// Numbers of threads that can continue, from position `turn` on.
std::vector<unsigned> queue;
size_t turn;

Thread& own() {
  return *static_cast<Thread*>(const_cast<Identity*>(self));
}
unsigned random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned((random_state >> 32) % n);
}

// ---- fibers

constexpr size_t stack_bytes = 128 << 10, page = 4096;
std::vector<Fiber*> free_fibers;

#if defined(__x86_64__)
asm(R"(.text
.hidden emu_switch
.globl emu_switch
emu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr size_t saved_words = 7, start_word = 6;
#elif defined(__aarch64__)
asm(R"(.text
.hidden emu_switch
.globl emu_switch
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr size_t saved_words = 20, start_word = 11;
#else
#error "the emulator switches stacks on x86-64 and AArch64 only"
#endif

void run_threads();

Fiber* new_fiber() {
  Fiber* fiber;
  if (free_fibers.empty()) {
    fiber = new Fiber;
    fiber->low = static_cast<char*>(
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(fiber->low, page, PROT_NONE);
    fiber->high = fiber->low + stack_bytes;
  } else {
    fiber = free_fibers.back();
    free_fibers.pop_back();
  }
  // The stack as emu_switch leaves it, returning to run_threads; one more word keeps it aligned.
  void** const top = reinterpret_cast<void**>(fiber->high) - 2 - saved_words + 1;
  memset(top, 0, (saved_words + 1) * sizeof(void*));
  top[start_word] = reinterpret_cast<void*>(run_threads);
  fiber->stack_pointer = top;
  return fiber;
}

// The thread that continues. If none can, the block is deadlocked.
Thread* next_thread() {
  if (turn == queue.size()) {
    char text[512] = "";
    size_t used = 0;
    int lines = 0, last = -1;
    for (const Thread& t : threads)
      if ((t.state == State::at_barrier || t.state == State::at_meeting) && t.line != last && lines++ < 4) {
        last = t.line;
        used += size_t(snprintf(text + used, sizeof(text) - used, " thread %u at line %d (%s);", t.number, t.line,
                                t.state == State::at_barrier ? "__syncthreads" : "its warp"));
      }
    fail("deadlock: %u of %u threads wait:%s", alive, num_threads, text);
  }
  if (order == random_order) std::swap(queue[turn], queue[turn + random_below(queue.size() - turn)]);
  return &threads[queue[turn++]];
}

void can_go_on(Thread& t) {
  t.state = State::ready;
  queue.push_back(t.number);
}

// Yields to another thread; returns when it is this thread's turn again.
void give_way() {
  Thread& before = own();
  Thread* const after = next_thread();
  if (after == &before) return;
  if (turn > 4096 && 2 * turn > queue.size()) {
    queue.erase(queue.begin(), queue.begin() + ptrdiff_t(turn));
    turn = 0;
  }
  if (!after->fiber) after->fiber = new_fiber();
  self = after;
  emu_switch(&before.fiber->stack_pointer, after->fiber->stack_pointer);
}

// The last thread to arrive at a barrier has released the others and continues itself; in random order it queues up.
void goes_on_too(Thread& t) {
  t.state = State::ready;
  if (order != random_order) return;
  queue.push_back(t.number);
  give_way();
}

void open_barrier() {
  const Thread* first = nullptr;
  unsigned predicted = 0;
  for (const Thread& t : threads) {
    if (t.state != State::at_barrier) continue;
    if (!first) first = &t;
    if (t.line != first->line)
      fail("__syncthreads at line %d for thread %u and at line %d for thread %u", first->line, first->number, t.line,
           t.number);
    predicted += t.predicate;
  }
  waiting = 0;
  ++barriers;
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& t = threads[order == reversed ? num_threads - 1 - i : i];
    if (t.state != State::at_barrier) continue;
    t.predicted = predicted;
    if (&t != self) can_go_on(t);
  }
}

// Releases the lanes of the mask if all of them have arrived; returns whether they have.
bool meet_in(unsigned warp, uint32_t mask, Meeting meeting) {
  Thread* const lanes = &threads[warp * 32];
  const auto each = [&](auto call) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) call(lanes[__builtin_ctz(rest)]);
  };
  bool all = true;
  each([&](const Thread& t) { all = all && t.state == State::at_meeting && t.mask == mask && t.meeting == meeting; });
  if (!all) return false;
  uint64_t values[32] = {};
  each([&](const Thread& t) { values[t.lane] = t.value; });
  if (meeting == Meeting::sync) ++warp_barriers[warp];
  each([&](Thread& t) {
    memcpy(t.values, values, sizeof(values));
    t.there = mask;
    if (&t != self) can_go_on(t);
  });
  return true;
}

void has_returned(Thread& t) {
  t.state = State::returned;
  --alive;
  returned_lanes[t.warp] |= 1u << t.lane;
  if (waiting) fail("returned while %u threads of the block wait at __syncthreads", waiting);
  for (unsigned i = t.warp * 32; i < std::min(num_threads, t.warp * 32 + 32); ++i)
    if (threads[i].state == State::at_meeting && threads[i].mask >> t.lane & 1)
      fail("returned while lane %u waits for it at line %d (mask %08x)", threads[i].lane, threads[i].line,
           threads[i].mask);
}

// Main function of a fiber: runs a thread and, while there are threads that have not started, the next on the same
// stack.
void run_threads() {
  for (;;) {
    kernel(arguments);
    Thread& done = own();
    has_returned(done);
    Fiber* const fiber = done.fiber;
    done.fiber = nullptr;
    if (!alive) {
      free_fibers.push_back(fiber);
      siglongjmp(back, 1);
    }
    Thread* const after = next_thread();
    self = after;
    if (!after->fiber) {
      after->fiber = fiber;
      continue;
    }
    free_fibers.push_back(fiber);
    void* nobody;
    emu_switch(&nobody, after->fiber->stack_pointer);
  }
}

// ---- memory

// A memory access: the thread (counted over all blocks from 1) and how many barriers it had passed.
struct Access {
  uint32_t thread, barriers, warp_barriers;
  bool atomic;
};
// Which threads have read an element since it was written. Only the last read is recorded, with the smallest group that
// contains all readers: a barrier of that group after the last read is after all reads.
enum class Readers : uint8_t { nobody, one, warp, block, grid };
struct Cell {
  Access write, read;
  Readers readers;
  bool written;
};
struct Memory {
  char *begin, *end;
  int element;
  bool shared;
  char name[40];
  std::vector<Cell> cells;
};
std::vector<Memory> memories;
size_t last_memory;

uint32_t global_number() {
  return uint32_t(block_number * num_threads + self->number) + 1;
}
uint64_t block_of(uint32_t thread) {
  return (thread - 1) / num_threads;
}
unsigned warp_of(uint32_t thread) {
  return (thread - 1) % num_threads / 32;
}

// Whether a barrier is between another access and this thread.
bool is_past(const Access& a) {
  if (a.thread == global_number()) return true;
  if (block_of(a.thread) != block_number) return false;
  if (a.barriers < barriers) return true;
  return warp_of(a.thread) == self->warp && a.warp_barriers < warp_barriers[self->warp];
}

bool is_past(const Cell& cell) {
  const Access& last = cell.read;
  switch (cell.readers) {
    case Readers::nobody:
      return true;
    case Readers::one:
      return is_past(last);
    case Readers::grid:
      return false;
    default:
      if (block_of(last.thread) != block_number) return false;
      return last.barriers < barriers || (cell.readers == Readers::warp && warp_of(last.thread) == self->warp &&
                                          last.warp_barriers < warp_barriers[self->warp]);
  }
}

// Adds a reader.
void note_read(Cell& cell, const Access& access) {
  const Access& last = cell.read;
  const Readers before = cell.readers;
  if (before == Readers::nobody)
    cell.readers = Readers::one;
  else if (before == Readers::grid || block_of(last.thread) != block_number)
    cell.readers = Readers::grid;
  else if (last.barriers < barriers)
    cell.readers = Readers::one;  // the others are past for the whole block
  else if (before == Readers::block || warp_of(last.thread) != self->warp)
    cell.readers = Readers::block;
  else if (last.warp_barriers < access.warp_barriers)
    cell.readers = Readers::one;  // for the whole warp
  else if (last.thread != access.thread)
    cell.readers = Readers::warp;
  cell.read = access;
}

// "{{address}}" is for emulator.py, which finds the line.
[[noreturn]] void fail_at(const void* code, int line, const char* what, const Memory& memory, const char* at,
                          const Access* other) {
  char where[64], with[64] = "";
  if (line)
    snprintf(where, sizeof(where), "line %d", line);
  else
    snprintf(where, sizeof(where), "{{%zx}}", size_t(static_cast<const char*>(code) - 1 - __ehdr_start));
  if (other)
    snprintf(with, sizeof(with), " with thread %u of block %llu", (other->thread - 1) % num_threads,
             (unsigned long long)block_of(other->thread));
  fail("%s: %s, byte %td of %s%s", where, what, at - memory.begin, memory.name, with);
}

Memory* memory_at(const char* at, size_t size) {
  const auto holds = [=](const Memory& m) { return at >= m.begin && at + size <= m.end; };
  if (last_memory < memories.size() && holds(memories[last_memory])) return &memories[last_memory];
  for (size_t i = 0; i < memories.size(); ++i)
    if (holds(memories[i])) {
      last_memory = i;
      return &memories[i];
    }
  return nullptr;
}

// Checks an access outside all arrays: local variables and constants of the file are allowed, all else is an error.
void check_stray(const char* at, size_t size, const void* code, int line) {
  const Fiber& fiber = *own().fiber;
  if (at >= fiber.low && at < fiber.high) return;
  const char* const all = reinterpret_cast<const char*>(threads.data());
  if (at >= all && at < all + threads.size() * sizeof(Thread)) return;  // threadIdx
  const bool in_shared = at >= __start_emu_shared && at < __stop_emu_shared;
  if (at >= __ehdr_start && at < _end && !in_shared) return;
  const Memory* nearest = nullptr;
  size_t least = SIZE_MAX;
  for (const Memory& m : memories) {
    const size_t away = at < m.begin ? size_t(m.begin - at) : at >= m.end ? size_t(at - m.end) : 0;
    if (away < least) least = away, nearest = &m;
  }
  if (!nearest) fail("access to %p, which is no memory of the kernel's", static_cast<const void*>(at));
  char what[64];
  snprintf(what, sizeof(what), "access to %zu bytes outside, of %td there", size, nearest->end - nearest->begin);
  fail_at(code, line, what, *nearest, at, nullptr);
}

void check(const void* address, size_t size, bool writes, bool atomic, const void* code, int line) {
  if (!self) return;
  const char* const at = static_cast<const char*>(address);
  Memory* const memory = memory_at(at, size);
  if (!memory) return check_stray(at, size, code, line);
  if (size <= 16 && !(size & (size - 1)) && reinterpret_cast<size_t>(at) & (size - 1))
    fail_at(code, line, "misaligned access", *memory, at, nullptr);
  const uint32_t me = global_number();
  const Access access{me, barriers, warp_barriers[self->warp], atomic};
  const ptrdiff_t first = (at - memory->begin) / memory->element;
  const ptrdiff_t last = (at + size - 1 - memory->begin) / memory->element;
  for (ptrdiff_t i = first; i <= last; ++i) {
    Cell& cell = memory->cells[size_t(i)];
    if ((!writes || atomic) && !cell.written)
      fail_at(code, line,
              memory->shared ? "read of what nothing in this block has written" : "read of what nothing has written",
              *memory, at, nullptr);
    const auto collides = [&](const Access& a) { return a.thread && !(atomic && a.atomic) && !is_past(a); };
    if (collides(cell.write)) fail_at(code, line, writes ? "race: written" : "race: read", *memory, at, &cell.write);
    if (writes && !(atomic && cell.read.atomic) && !is_past(cell))
      fail_at(code, line, "race: written after it was read", *memory, at, &cell.read);
    if (writes) {
      cell.write = access;
      cell.written = true;
      cell.readers = Readers::nobody;
    }
    if (!writes || atomic) note_read(cell, access);
  }
  if (preempt && int(random_below(1000)) < preempt) {
    can_go_on(own());
    give_way();
  }
}

Memory& add_memory(char* begin, size_t size, int element, bool shared, bool written) {
  Memory& m = memories.emplace_back();
  m.begin = begin;
  m.end = begin + size;
  m.element = element;
  m.shared = shared;
#ifdef EMU_CHECK
  m.cells.assign((size + size_t(element) - 1) / size_t(element), Cell());
  for (Cell& cell : m.cells) cell.written = written;
#else
  (void)written;
#endif
  return m;
}

// Memory that ends at a page that traps and begins after guard bytes that must not change.
struct Guarded {
  char *map, *data;
  size_t mapped, size;

  explicit Guarded(size_t bytes) : size(bytes) {
    const size_t body = (bytes + 15) / 16 * 16;
    mapped = (body + page - 1) / page * page + 2 * page;
    map = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(map + mapped - page, page, PROT_NONE);
    memset(map, canary, mapped - page);
    data = map + mapped - page - body;
  }
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept : map(other.map), data(other.data), mapped(other.mapped), size(other.size) {
    other.map = nullptr;
  }
  ~Guarded() {
    if (map) munmap(map, mapped);
  }
  bool is_intact() const {
    const auto whole = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char c) { return c == canary; });
    };
    return whole(map, data) && whole(data + size, map + mapped - page);
  }

 private:
  static constexpr char canary = char(0xa5);
};

// Handles traps: an access to a protected page, undefined behavior (an illegal instruction), an integer division by
// zero.
void on_signal(int number, siginfo_t* info, void* context) {
#if defined(__x86_64__)
  const size_t code = size_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#else
  const size_t code = size_t(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
  const size_t at = code - reinterpret_cast<size_t>(__ehdr_start) + (number == SIGILL);
  if (number == SIGILL)
    fail(
        "{{%zx}}: undefined behaviour: a shift, an array's bound, an alignment, a number that the integer cannot hold, "
        "or a division by zero",
        at);
  if (number == SIGFPE) fail("{{%zx}}: integer division by zero", at);
  fail("{{%zx}}: access to %p, which is no memory of the kernel's", at, info->si_addr);
}

class Signals {
 public:
  Signals() {
    stack_t own = {};
    own.ss_sp = stack_;
    own.ss_size = sizeof(stack_);
    sigaltstack(&own, &before_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(numbers[i], &action, &actions_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; ++i) sigaction(numbers[i], &actions_[i], nullptr);
    sigaltstack(&before_, nullptr);
  }

 private:
  static constexpr int numbers[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  static char stack_[1 << 16];
  stack_t before_;
  struct sigaction actions_[4];
};
char Signals::stack_[1 << 16];

void start_block(uint64_t number) {
  block_number = number;
  block = {unsigned(number % grid_size.x), unsigned(number / grid_size.x % grid_size.y),
           unsigned(number / grid_size.x / grid_size.y)};
  alive = num_threads;
  waiting = barriers = 0;
  const size_t warps = (num_threads + 31) / 32;
  returned_lanes.assign(warps, 0);
  if (num_threads % 32) returned_lanes[warps - 1] = ~0u << num_threads % 32;
  warp_barriers.assign(warps, 0);
  for (Memory& m : memories)
    if (m.shared) {
      memset(m.begin, 0xff, size_t(m.end - m.begin));  // NaN
      std::fill(m.cells.begin(), m.cells.end(), Cell());
    }
  queue.resize(num_threads);
  turn = 0;
  for (unsigned i = 0; i < num_threads; ++i) {
    threads[i].state = State::ready;
    queue[i] = order == reversed ? num_threads - 1 - i : i;
  }
}

}  // namespace

void fail(const char* format, ...) {
  size_t used = 0;
  if (self) {
    const uint3 t = self->index;
    used = size_t(snprintf(error, sizeof(error), "block (%u, %u, %u), thread (%u, %u, %u): ", block.x, block.y, block.z,
                           t.x, t.y, t.z));
  }
  va_list list;
  va_start(list, format);
  vsnprintf(error + used, sizeof(error) - used, format, list);
  va_end(list);
  siglongjmp(back, 2);
}

unsigned barrier(int predicate, int line) {
  Thread& t = own();
  t.state = State::at_barrier;
  t.line = line;
  t.predicate = predicate != 0;
  if (alive < num_threads)
    fail("line %d: __syncthreads, but %u threads of the block have returned", line, num_threads - alive);
  if (++waiting == alive) {
    open_barrier();
    goes_on_too(t);
  } else {
    give_way();
  }
  return t.predicted;
}

uint32_t meet(Meeting meeting, uint32_t mask, uint64_t value, uint64_t* values, int line) {
  Thread& t = own();
  if (!(mask >> t.lane & 1)) fail("line %d: lane %u is not in the mask it gives, %08x", line, t.lane, mask);
  if (mask & returned_lanes[t.warp])
    fail("line %d: the mask %08x has lanes that have returned, or never were", line, mask);
  t.meeting = meeting;
  t.mask = mask;
  t.value = value;
  t.values = values;
  t.line = line;
  t.state = State::at_meeting;
  if (meet_in(t.warp, mask, meeting))
    goes_on_too(t);
  else
    give_way();
  return t.there;
}

void before_atomic(void* at, size_t size, int line) {
#ifdef EMU_CHECK
  check(at, size, true, true, nullptr, line);
#else
  (void)at, (void)size, (void)line;
  if (preempt && int(random_below(1000)) < preempt) {
    can_go_on(own());
    give_way();
  }
#endif
}

}  // namespace emu

// Runs a launch. Returns null, or an error message.
extern "C" __attribute__((visibility("default"))) const char* emu_launch(void (*call)(void**), void** launch_arguments,
                                                                         const emu::Launch* launch) {
  using namespace emu;
  kernel = call;
  arguments = launch_arguments;
  grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
  block_size = {launch->block[0], launch->block[1], launch->block[2]};
  num_threads = block_size.x * block_size.y * block_size.z;
  order = Order(launch->order);
  preempt = launch->preempt;
  random_state = launch->seed * 0x9E3779B97F4A7C15ull + 1;
  error[0] = 0;
  threads.assign(num_threads, Thread());
  for (unsigned i = 0; i < num_threads; ++i)
    static_cast<Identity&>(threads[i]) = {
        {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y}, i, i / 32, i % 32};

  memories.clear();
  last_memory = 0;
  std::vector<Guarded> copies;
  for (int i = 0; i < launch->num_arrays; ++i) {
    const Argument& a = launch->arrays[i];
    Guarded& copy = copies.emplace_back(a.size);
    memcpy(copy.data, a.data, a.size);
    *static_cast<void**>(launch_arguments[a.place]) = copy.data;
    snprintf(add_memory(copy.data, a.size, a.element, false, a.initialized).name, 40, "argument %d", a.place);
  }
  const Guarded shared(launch->shared);
  dynamic_shared = shared.data;
  if (launch->shared) strcpy(add_memory(shared.data, shared.size, 4, true, false).name, "dynamic shared memory");
  if (const size_t size = size_t(__stop_emu_shared - __start_emu_shared))
    strcpy(add_memory(__start_emu_shared, size, 4, true, false).name, "shared memory");

  const uint64_t num_blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
  std::vector<uint64_t> numbers(num_blocks);
  for (uint64_t i = 0; i < num_blocks; ++i) numbers[i] = order == reversed ? num_blocks - 1 - i : i;
  for (uint64_t i = num_blocks; order == random_order && i > 1; --i)
    std::swap(numbers[i - 1], numbers[random_below(i)]);
#if defined(__x86_64__)
  const unsigned control = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(control | 0x8040);  // CuPy compiles with -ftz=true: denormal numbers are zero
#endif
  {
    const Signals signals;
    volatile uint64_t done = 0;
    while (done < num_blocks && !error[0]) {
      if (sigsetjmp(back, 1) == 0) {
        start_block(numbers[done]);
        Thread* const first = next_thread();
        first->fiber = new_fiber();
        self = first;
        void* nobody;
        emu_switch(&nobody, first->fiber->stack_pointer);
      }
      self = nullptr;
      done = done + 1;
    }
  }
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(control);
#endif
  for (Thread& t : threads)
    if (t.fiber) free_fibers.push_back(t.fiber);
  for (int i = 0; i < launch->num_arrays; ++i) {
    const Argument& a = launch->arrays[i];
    if (!copies[size_t(i)].is_intact() && !error[0])
      snprintf(error, sizeof(error), "wrote before the begin or past the end of argument %d", a.place);
    memcpy(a.data, copies[size_t(i)].data, a.size);
  }
  return error[0] ? error : nullptr;
}

extern "C" __attribute__((visibility("default"))) size_t emu_static_shared() {
  return size_t(__stop_emu_shared - __start_emu_shared);
}

#ifdef EMU_CHECK
// The functions that -fsanitize=thread calls.
#define EMU_SEEN(name, bytes, writes)                                     \
  extern "C" void __tsan_##name##bytes(void* at) {                        \
    emu::check(at, bytes, writes, false, __builtin_return_address(0), 0); \
  }
#define EMU_SEEN_OF(bytes)               \
  EMU_SEEN(read, bytes, false)           \
  EMU_SEEN(write, bytes, true)           \
  EMU_SEEN(unaligned_read, bytes, false) \
  EMU_SEEN(unaligned_write, bytes, true)
EMU_SEEN_OF(1)
EMU_SEEN_OF(2)
EMU_SEEN_OF(4)
EMU_SEEN_OF(8)
EMU_SEEN_OF(16)

extern "C" void __tsan_read_range(void* at, size_t size) {
  emu::check(at, size, false, false, __builtin_return_address(0), 0);
}
extern "C" void __tsan_write_range(void* at, size_t size) {
  emu::check(at, size, true, false, __builtin_return_address(0), 0);
}
#define EMU_SEEN_COPY(name)                                                 \
  extern "C" void* __tsan_##name(void* to, const void* from, size_t size) { \
    emu::check(from, size, false, false, __builtin_return_address(0), 0);   \
    emu::check(to, size, true, false, __builtin_return_address(0), 0);      \
    return name(to, from, size);                                            \
  }
EMU_SEEN_COPY(memcpy)
EMU_SEEN_COPY(memmove)
extern "C" void* __tsan_memset(void* at, int byte, size_t size) {
  emu::check(at, size, true, false, __builtin_return_address(0), 0);
  return memset(at, byte, size);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif
