// What r1jax/ops/cuda/hopper.cu asks of a GPU, from a CPU: a thread for each thread, which meet at barriers.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using Half = unsigned short;
struct alignas(16) Words { unsigned a, b, c, d; };
struct alignas(8) Pair { unsigned a, b; };

#define KERNEL extern "C" void
#define DEVICE inline
#define SHARED(type) inline type& shared() { return *static_cast<type*>(own.block->memory); }

struct Warp {
  std::barrier<> meet{32};
  float value[32];
  unsigned a[32][4], b[32][2];
};
struct Block {
  explicit Block(int warps) : meet(32 * warps), everything(32 * warps + 32), warp(warps + 1) {}
  std::barrier<> meet, everything;
  std::vector<Warp> warp;
  void* memory = nullptr;
  unsigned char* ring = nullptr;
};
struct Own { Block* block; int block_index, thread; };
thread_local Own own;

DEVICE int thread_index() { return own.thread; }
DEVICE int block_index() { return own.block_index; }
DEVICE void sync_everything() { own.block->everything.arrive_and_wait(); }
DEVICE void sync_block() { own.block->meet.arrive_and_wait(); }
DEVICE Warp& own_warp() { return own.block->warp[own.thread / 32]; }
DEVICE void sync_warp() { own_warp().meet.arrive_and_wait(); }
DEVICE float from_lane(float value, int lane) {
  Warp& warp = own_warp();
  warp.value[own.thread % 32] = value;
  warp.meet.arrive_and_wait();
  float found = warp.value[lane];
  warp.meet.arrive_and_wait();
  return found;
}
DEVICE float across_lanes(float value, int mask) { return from_lane(value, own.thread % 32 ^ mask); }
DEVICE float highest_of_lanes(float value) {
  for (int mask = 16; mask; mask /= 2) value = std::max(value, across_lanes(value, mask));
  return value;
}
DEVICE float rsqrtf(float x) { return 1 / std::sqrt(x); }
DEVICE unsigned as_bits(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
DEVICE float as_float(unsigned bits) { float f; std::memcpy(&f, &bits, 4); return f; }
DEVICE Half narrowed(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE Words ask(const void* address) { return *static_cast<const Words*>(address); }
DEVICE void fail() { std::abort(); }
DEVICE void bring_near(const void* address, unsigned bytes) {
  if ((reinterpret_cast<size_t>(address) | bytes) % 16) std::abort();  // as the GPU would
}
DEVICE void put_word(unsigned* address, unsigned word) { std::atomic_ref(*address).store(word); }
DEVICE unsigned get_word(const unsigned* address) {
  unsigned word = std::atomic_ref(*const_cast<unsigned*>(address)).load();
  std::this_thread::yield();  // where it is read again and again, others must get on
  return word;
}
DEVICE Words get_words(const void* address) {
  if (reinterpret_cast<size_t>(address) % 16) std::abort();
  const unsigned* word = static_cast<const unsigned*>(address);
  return {get_word(word), get_word(word + 1), get_word(word + 2), get_word(word + 3)};
}

struct Gate {
  int arrivals;
  std::atomic<int> missing, bytes, rounds;
  void settle() {
    if (missing == 0 && bytes == 0) missing = arrivals, rounds++;
  }
};
inline std::mutex gates;
DEVICE unsigned char* ring() { return own.block->ring; }
DEVICE void open_gate(Gate* gate, int arrivals) {
  gate->arrivals = arrivals, gate->missing = arrivals, gate->bytes = 0, gate->rounds = 0;
}
DEVICE void expect(Gate* gate, int bytes) {
  std::lock_guard lock(gates);
  gate->bytes += bytes, gate->missing--, gate->settle();
}
DEVICE void arrive(Gate* gate) { expect(gate, 0); }
DEVICE void copy(void* to, const void* from, int bytes, Gate* gate) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | bytes) % 16) std::abort();  // as the GPU would
  std::memcpy(to, from, bytes);
  std::lock_guard lock(gates);
  gate->bytes -= bytes, gate->settle();
}
DEVICE void wait_for(Gate* gate, int round) {
  while (gate->rounds <= round) std::this_thread::yield();
}

// As PTX lays out mma.sync: of the left operand a register holds `per` numbers of a row, of the right one of a column.
template <typename Number, typename Of>
void multiply_all(Number* sum, const unsigned (&a)[4], const unsigned (&b)[2], Of of, int per) {
  Warp& warp = own_warp();
  int lane = own.thread % 32;
  std::memcpy(warp.a[lane], a, sizeof a), std::memcpy(warp.b[lane], b, sizeof b);
  warp.meet.arrive_and_wait();
  for (int i = 0; i < 4; i++) {
    int column = lane % 4 * 2 + i % 2, below = i / 2;
    for (int t = 0; t < 4; t++)
      for (int half = 0; half < 2; half++)
        for (int j = 0; j < per; j++)
          sum[i] += of(warp.a[lane / 4 * 4 + t][below + 2 * half], j) * of(warp.b[column * 4 + t][half], j);
  }
  warp.meet.arrive_and_wait();
}
DEVICE float half_of(unsigned word, int i) { return as_float(i ? word & 0xffff0000u : word << 16); }
DEVICE int code_of(unsigned word, int i) { return static_cast<signed char>(word >> 8 * i); }
DEVICE void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_all(sum, {a0, a1, a2, a3}, {b0, b1}, half_of, 2);
}
DEVICE void multiply(int* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  multiply_all(sum, {a0, a1, a2, a3}, {b0, b1}, code_of, 4);
}

// Runs a kernel, with so much shared memory and so large a ring; what is in them at first are no numbers.
template <typename Kernel>
void run_blocks(int blocks, int warps, size_t bytes, size_t ring, Kernel kernel) {
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::vector<Words>> memory;
  for (int b = 0; b < blocks; b++) {
    for (size_t size : {bytes, ring}) memory.emplace_back(size / 16 + 1, Words{~0u, ~0u, ~0u, ~0u});
    all.push_back(std::make_unique<Block>(warps));
    all[b]->memory = memory[2 * b].data();
    all[b]->ring = reinterpret_cast<unsigned char*>(memory[2 * b + 1].data());
    for (int t = 0; t < 32 * warps + 32; t++)
      threads.emplace_back([=, block = all[b].get()] { own = {block, b, t}; kernel(); });
  }
  for (auto& thread : threads) thread.join();
}
