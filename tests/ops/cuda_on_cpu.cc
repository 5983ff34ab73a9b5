// What r1jax/ops/cuda/hopper.cu asks of a GPU, from a CPU: each thread is a context of its own, and one after another
// runs until it has to wait. Where none can go on, the kernel would hang, which is told. What this cannot show is what a
// GPU's memory may reorder: words and copies are there for all at once, and gates count rounds.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

using Half = unsigned short;
struct alignas(16) Words { unsigned a, b, c, d; };
struct alignas(8) Pair { unsigned a, b; };

#define KERNEL extern "C" void
#define DEVICE inline
#define SHARED(type) inline type& shared() { return *static_cast<type*>(running->block->memory); }

inline ucontext_t everything;  // which chooses who runs
inline long moves;             // of anything that somebody may wait for
void rest();

struct Meeting {  // of so many threads
  int size, here = 0;
  long round = 0;
  void operator()() {
    const long mine = round;
    if (++here == size)
      here = 0, round++, moves++;
    else
      while (round == mine) rest();
  }
};
struct Warp {
  Meeting meet{32};
  float value[32];
  unsigned a[32][4], b[32][2];
};
struct Block {
  Block(int warps, int others) : meet{32 * warps}, everybody{32 * (warps + others)}, warp(warps + others) {}
  Meeting meet, everybody;
  std::vector<Warp> warp;
  void* memory = nullptr;
  unsigned char* ring = nullptr;
};
struct Thread {
  ucontext_t context;
  Block* block;
  int block_index, thread;
  bool done = false;
  std::unique_ptr<char[]> stack;
};
inline Thread* running;
void rest() { swapcontext(&running->context, &everything); }

DEVICE int thread_index() { return running->thread; }
DEVICE int block_index() { return running->block_index; }
DEVICE void sync_everything() { running->block->everybody(); }
DEVICE void sync_block() { running->block->meet(); }
DEVICE Warp& own_warp() { return running->block->warp[running->thread / 32]; }
DEVICE void sync_warp() { own_warp().meet(); }
DEVICE float from_lane(float value, int lane) {
  Warp& warp = own_warp();
  warp.value[running->thread % 32] = value;
  warp.meet();
  float found = warp.value[lane];
  warp.meet();
  return found;
}
DEVICE float across_lanes(float value, int mask) { return from_lane(value, running->thread % 32 ^ mask); }
DEVICE float rsqrtf(float x) { return 1 / std::sqrt(x); }
DEVICE unsigned as_bits(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
DEVICE float as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
DEVICE unsigned highest_of_lanes(unsigned value) {
  for (int mask = 16; mask; mask /= 2) value = std::max(value, as_bits(across_lanes(as_float(value), mask)));
  return value;
}
DEVICE unsigned pick(unsigned a, unsigned b, unsigned bytes) {
  unsigned word = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned which = bytes >> 4 * i & 15;
    if (which > 7) std::abort();  // a sign, on the GPU
    word |= ((which < 4 ? a : b) >> which % 4 * 8 & 255) << 8 * i;
  }
  return word;
}
DEVICE Half narrowed(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE unsigned paired(float a, float b) { return narrowed(a) | (unsigned)narrowed(b) << 16; }
DEVICE Words ask(const void* address) { return *static_cast<const Words*>(address); }
DEVICE void fail() { std::abort(); }
DEVICE unsigned clock_now() { return ++moves; }
DEVICE void bring_near(const void* address, unsigned bytes) {
  if ((reinterpret_cast<size_t>(address) | bytes) % 16) std::abort();  // as the GPU would
}
DEVICE void put_word(unsigned* address, unsigned word) { *address = word, moves++; }
DEVICE unsigned get_word(const unsigned* address) { return *address; }
DEVICE Words get_words(const void* address) {
  if (reinterpret_cast<size_t>(address) % 16) std::abort();
  const unsigned* word = static_cast<const unsigned*>(address);
  return {get_word(word), get_word(word + 1), get_word(word + 2), get_word(word + 3)};
}

struct Gate {
  int arrivals, missing, bytes, rounds;
  void settle() {
    if (missing == 0 && bytes == 0) missing = arrivals, rounds++, moves++;
  }
};
DEVICE unsigned char* ring() { return running->block->ring; }
DEVICE void open_gate(Gate* gate, int arrivals) { *gate = {arrivals, arrivals, 0, 0}; }
DEVICE void expect(Gate* gate, int bytes) { gate->bytes += bytes, gate->missing--, gate->settle(); }
DEVICE void arrive(Gate* gate) { expect(gate, 0); }
DEVICE void copy(void* to, const void* from, int bytes, Gate* gate) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | bytes) % 16) std::abort();  // as the GPU would
  std::memcpy(to, from, bytes);
  gate->bytes -= bytes, gate->settle();
}
DEVICE void wait_for(Gate* gate, int round) {
  while (gate->rounds <= round) rest();
}

// As PTX lays out mma.sync: of the left operand a register holds `per` numbers of a row, of the right one of a column.
template <typename Number, typename Of>
void multiply_all(Number* sum, const unsigned (&a)[4], const unsigned (&b)[2], Of of, int per) {
  Warp& warp = own_warp();
  int lane = running->thread % 32;
  std::memcpy(warp.a[lane], a, sizeof a), std::memcpy(warp.b[lane], b, sizeof b);
  warp.meet();
  for (int i = 0; i < 4; i++) {
    int column = lane % 4 * 2 + i % 2, below = i / 2;
    for (int t = 0; t < 4; t++)
      for (int half = 0; half < 2; half++)
        for (int j = 0; j < per; j++)
          sum[i] += of(warp.a[lane / 4 * 4 + t][below + 2 * half], j) * of(warp.b[column * 4 + t][half], j);
  }
  warp.meet();
}
DEVICE float half_of(unsigned word, int i) { return as_float(i ? word & 0xffff0000u : word << 16); }
DEVICE int code_of(unsigned word, int i) { return static_cast<signed char>(word >> 8 * i); }
DEVICE void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_all(sum, {a0, a1, a2, a3}, {b0, b1}, half_of, 2);
}
DEVICE void multiply(int* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_all(sum, {a0, a1, a2, a3}, {b0, b1}, code_of, 4);
}

inline std::function<void()> kernel_of_all;
void run_thread() {
  kernel_of_all();
  running->done = true, moves++;
  rest();
}

// Runs a kernel, with so much shared memory and so large a ring; what is in them at first are no numbers. Returns
// whether all threads came to their end.
template <typename Kernel>
bool run_blocks(int blocks, int warps, int others, size_t bytes, size_t ring, Kernel kernel) {
  constexpr size_t STACK = 1 << 16;
  constexpr int EPOCH = 200;
  const int size = 32 * (warps + others);
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::vector<Words>> memory;
  std::vector<Thread> threads(blocks * size);
  kernel_of_all = kernel;
  for (int b = 0; b < blocks; b++) {
    for (size_t size : {bytes, ring}) memory.emplace_back(size / 16 + 1, Words{~0u, ~0u, ~0u, ~0u});
    all.push_back(std::make_unique<Block>(warps, others));
    all[b]->memory = memory[2 * b].data();
    all[b]->ring = reinterpret_cast<unsigned char*>(memory[2 * b + 1].data());
    for (int t = 0; t < size; t++) {
      Thread& thread = threads[b * size + t];
      thread.block = all[b].get(), thread.block_index = b, thread.thread = t;
      thread.stack = std::make_unique<char[]>(STACK);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = STACK;
      makecontext(&thread.context, run_thread, 0);
    }
  }
  // For a while at a time half of the warps, drawn anew, only go on when no other can: what the others may not overrun
  // is then still to be read.
  std::vector<bool> slow(threads.size() / 32);
  std::minstd_rand random;
  for (long sweep = 0, before = -1;; sweep++) {
    const bool everyone = before == moves;
    if (sweep % EPOCH == 0)
      for (size_t warp = 0; warp < slow.size(); warp++) slow[warp] = random() >> 16 & 1;
    before = moves;
    for (size_t i = 0; i < threads.size(); i++)
      if (!threads[i].done && (everyone || !slow[i / 32]))
        running = &threads[i], swapcontext(&everything, &threads[i].context);
    if (everyone && before == moves) break;
  }
  return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.done; });
}
