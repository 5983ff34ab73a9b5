// What decode_layers.cu asks of a Hopper GPU. A test gives it the same from a CPU (tests/ops/cuda_on_cpu.cc).

using Half = unsigned short;  // bf16
struct alignas(16) Words { unsigned a, b, c, d; };
struct alignas(8) Pair { unsigned a, b; };

#define KERNEL extern "C" __global__ void __launch_bounds__(EVERYBODY, 1)
#define DEVICE __device__ __forceinline__
#define SHARED(type) DEVICE type& shared() { return *(type*)shared_memory; }

extern __shared__ __align__(128) unsigned char shared_memory[];

// Volatile: what follows from it is computed where it is needed, and not kept in registers over all phases.
DEVICE int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
DEVICE void sync_everything() { __syncthreads(); }
DEVICE void sync_block() { __barrier_sync_count(1, 32 * WARPS); }  // without the warp that copies
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float across_lanes(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned as_bits(float value) { return __float_as_uint(value); }
DEVICE unsigned highest_of_lanes(unsigned value) { return __reduce_max_sync(~0u, value); }
DEVICE unsigned pick(unsigned a, unsigned b, unsigned bytes) {  // bytes of a, 0 to 3, and b, 4 to 7: a digit for each
  return __byte_perm(a, b, bytes);
}
DEVICE Half narrowed(float value) {
  Half half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
DEVICE unsigned paired(float a, float b) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

// What is read once, and written by no thread. Volatile: it is asked for where the source says so, which is before a
// wait.
DEVICE Words ask(const void* address) {
  Words w;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.a), "=r"(w.b), "=r"(w.c), "=r"(w.d) : "l"(address));
  return w;
}

DEVICE void fail() { __trap(); }
DEVICE void rest() {}  // before a word is read again: a way to L2 is pause enough
DEVICE unsigned clock_now() { return (unsigned)clock64(); }
DEVICE void bring_near(const void* address, unsigned bytes) {  // to L2; a multiple of 16
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}

// Words between blocks, and of the cache: past L1, which may hold what was there before. Each is written and read as a
// whole, also where four are read together.
DEVICE void put_word(unsigned* address, unsigned word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(word) : "memory");
}
DEVICE unsigned get_word(const unsigned* address) {
  unsigned w;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(address) : "memory");
  return w;
}
DEVICE Words get_words(const void* address) {
  Words w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.a), "=r"(w.b), "=r"(w.c), "=r"(w.d) : "l"(address) : "memory");
  return w;
}

// A ring of shared memory, which copies of rows fill and gates guard: a gate opens for its n-th round when all have
// arrived for it, and the bytes that were expected are there.
DEVICE unsigned char* ring() { return shared_memory + SHARED_BYTES; }
using Gate = unsigned long long;
DEVICE unsigned place_of(const void* address) { return (unsigned)__cvta_generic_to_shared(address); }
DEVICE void open_gate(Gate* gate, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(place_of(gate)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // for the copies, too
}
DEVICE void arrive(Gate* gate) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(place_of(gate)) : "memory");
}
DEVICE void expect(Gate* gate, int bytes) {  // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(place_of(gate)), "r"(bytes) : "memory");
}
DEVICE void copy(void* to, const void* from, int bytes, Gate* gate) {  // a multiple of 16
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(place_of(to)), "l"(from), "r"(bytes), "r"(place_of(gate)) : "memory");
}
DEVICE void wait_for(Gate* gate, int round) {
  unsigned done;
  do asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                  : "=r"(done) : "r"(place_of(gate)), "r"(round & 1) : "memory");
  while (!done);
  __syncwarp();  // what follows is of whole warps
}

// 16 rows times 8 columns: of 16 numbers of bf16, of 32 codes. A lane holds rows lane / 4 and 8 more, and of the
// columns of a sum 2 (lane % 4) and one more.
DEVICE void multiply(float* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void multiply(int* sum, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
