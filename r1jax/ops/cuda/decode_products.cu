// The products of decode_layers.cu: a row in shared memory times weights that a ring brings.

DEVICE float scale_of(const void* scale, int row) {
  return SCALES_OF_HALF ? widened(((const Half*)scale)[row]) : ((const float*)scale)[row];
}

// Sum over all threads, the same in each.
DEVICE float sum_of_block(float sum) {
  const int thread = thread_index();
  for (int mask = 16; mask; mask /= 2) sum += across_lanes(sum, mask);
  sync_block();
  if (thread % 32 == 0) shared().reduced[thread / 32] = sum;
  sync_block();
  sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += shared().reduced[i];
  return sum;
}

// Which numbers of a row a thread has, four at a time: those that its own warp multiplies, 64 bytes of each STRIDE.
template <bool CODES, int WIDTH>
struct Columns {
  static constexpr int RUN = CODES ? 64 : 32, LANES = RUN / 4, EACH = (WIDTH + 128 * WARPS - 1) / (128 * WARPS);

  DEVICE static int at(int i) {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    return (i * (32 / LANES) + lane / LANES) * (RUN * WARPS) + warp * RUN + lane % LANES * 4;
  }
};

// The norm of a row. Its gains are asked for before the row is there, and what it divides by is known and used when the
// product is: a warp need not wait for numbers that others multiply.
template <bool CODES, int WIDTH>
struct Norm {
  using Own = Columns<CODES, WIDTH>;
  float gain[Own::EACH][4], square = 0;
  float* squares;  // of all warps

  DEVICE Norm(const float* gains, float* squares) : squares(squares) {
#pragma unroll
    for (int i = 0; i < Own::EACH; i++) {
      const Words four = Own::at(i) < WIDTH ? ask(gains + Own::at(i)) : Words{};
      gain[i][0] = as_float(four.a), gain[i][1] = as_float(four.b);
      gain[i][2] = as_float(four.c), gain[i][3] = as_float(four.d);
    }
  }
  DEVICE void note() {  // before all meet
    for (int mask = 16; mask; mask /= 2) square += across_lanes(square, mask);
    if (thread_index() % 32 == 0) squares[thread_index() / 32] = square;
  }
  DEVICE float shrink() const {  // behind that
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += squares[i];
    return rsqrtf(sum / WIDTH + EPS);
  }
};

// Three codes of each of four numbers: a number is, in units, ((first 256) + second) 256 + last, each code the nearest to
// what the ones before it leave. The last is the last byte of the whole number, and what rounds the others carries into
// theirs.
DEVICE void split(const float (&x)[4], float inverse, unsigned (&codes)[3]) {
  constexpr unsigned HALVES[3] = {0x8080, 0x80, 0}, BYTES[3] = {0x62, 0x51, 0x40};
  unsigned whole[4];
#pragma unroll
  for (int i = 0; i < 4; i++) whole[i] = as_bits(x[i] * inverse + WHOLE) - as_bits(WHOLE);
#pragma unroll
  for (int code = 0; code < 3; code++) {
    const unsigned low = pick(whole[0] + HALVES[code], whole[1] + HALVES[code], BYTES[code]);
    codes[code] = pick(low, pick(whole[2] + HALVES[code], whole[3] + HALVES[code], BYTES[code]), 0x5410);
  }
}

// Puts a warp's columns of a row into shared memory, times the gains of a norm if there is one, as bf16 or as three codes
// a number; returns the unit of their last code, which is no number where one of them is none or infinite, and for bf16
// 1. The first layer's row is `plain`.
template <bool CODES, int WIDTH>
DEVICE float put_row(const unsigned* row, unsigned mark, Norm<CODES, WIDTH>* norm, const Half* plain = nullptr) {
  using Own = Columns<CODES, WIDTH>;
  const unsigned* place[Own::EACH];
  float x[Own::EACH][4];
  unsigned high = 0;
  if (plain) {
#pragma unroll
    for (int i = 0; i < Own::EACH; i++)
      for (int j = 0; j < 4; j++) x[i][j] = Own::at(i) < WIDTH ? widened(plain[Own::at(i) + j]) : 0;
  } else {
#pragma unroll
    for (int i = 0; i < Own::EACH; i++) place[i] = Own::at(i) < WIDTH ? row + Own::at(i) : nullptr;
    take_fours(x, place, mark);
  }
  sync_warp();  // lanes have waited for different words
#pragma unroll
  for (int i = 0; i < Own::EACH; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (norm) norm->square += x[i][j] * x[i][j], x[i][j] *= norm->gain[i][j];
      if (CODES) high = highest(high, as_bits(x[i][j]) & 0x7fffffff);  // of numbers that are none the highest
    }
  const float most = CODES ? as_float(highest_of_lanes(high)) : 1, inverse = most > 0 ? FINEST / most : 0;
#pragma unroll
  for (int i = 0; i < Own::EACH; i++) {
    const int at = Own::at(i);
    if (at >= WIDTH) break;
    if (!CODES) {
      *(Pair*)(shared().x + 2 * at) = {paired(x[i][0], x[i][1]), paired(x[i][2], x[i][3])};
      continue;
    }
    unsigned codes[3];
    split(x[i], inverse, codes);
#pragma unroll
    for (int code = 0; code < 3; code++) *(unsigned*)(shared().x + code * (WIDTH + BESIDE) + at) = codes[code];
  }
  sync_warp();
  return CODES ? most / FINEST + (most - most) : 1;
}

// Where a thread is in the ring.
struct Cursor {
  int slot = 0, round = 0;
  DEVICE void next() {
    if (++slot == SLOTS) slot = 0, round++;
  }
  DEVICE unsigned char* place() const { return ring() + slot * SLOT; }
};

// Copies rows of so many bytes, so far apart in memory and in the ring, into the slot that comes next. The lanes of a warp
// start their copies one after another, so each of the warps that bring weights has a share of the rows.
template <int ROWS>
DEVICE void bring_rows(Cursor& cursor, const void* from, int bytes, int apart, int pitch) {
  constexpr int EACH = ROWS / BRINGERS;
  static_assert(ROWS % BRINGERS == 0, "as many rows for each");
  const int lane = thread_index() % 32, first = (thread_index() - THREADS) / 32 * EACH;
  if (cursor.round) wait_for(&shared().emptied[cursor.slot], cursor.round - 1);
  if (lane == 0) expect(&shared().filled[cursor.slot], EACH * bytes);
  sync_warp();
#pragma unroll 1
  for (int row = first + lane; row < first + EACH; row += 32)
    copy(cursor.place() + row * pitch, (const unsigned char*)from + (long long)row * apart, bytes,
         &shared().filled[cursor.slot]);
  cursor.next();
}

template <bool CODES> struct Sum { using type = float; };
template <> struct Sum<true> { using type = int; };

// A matrix of ROWS x WIDTH times a row in shared memory; PAIRED: with another as many rows below, of a SwiGLU. Its sums
// begin at FIRST, where those of the product before it are not: a thread may still read them.
template <bool CODES, int ROWS, int WIDTH, int FIRST, bool PAIRED = false>
struct Product {
  static constexpr int ROW = WIDTH * (CODES ? 1 : 2), STREAMS = PAIRED ? 2 : 1, TILES = ROWS / 16;
  static constexpr int CHUNKS = (ROW + CHUNK - 1) / CHUNK, PIECES = STREAMS * CHUNKS;
  static constexpr int MOST = 4 / STRIDES, TOGETHER = PIECES % MOST == 0 ? MOST : PIECES % 2 == 0 && MOST > 2 ? 2 : 1;
  static_assert(TOGETHER <= SLOTS, "what is taken together fits into the ring");
  static_assert(ROW % 64 == 0 && ROWS % 16 == 0, "whole steps and tiles");
  static_assert(tiles_of(ROWS) * 16 <= THREADS, "a thread ends a row");

  float scale[STREAMS];  // of the row that this thread ends
  int row;

  // Brings this block's tiles.
  DEVICE static void bring(Cursor& cursor, const void* weight) {
#pragma unroll 1
    for (int tile = block_index(); tile < TILES; tile += BLOCKS)
#pragma unroll 1
      for (int s = 0; s < STREAMS; s++)
#pragma unroll 1
        for (int start = 0; start < ROW; start += CHUNK) {
          const auto* from = (const unsigned char*)weight + (long long)(s * ROWS + tile * 16) * ROW + start;
          bring_rows<16>(cursor, from, ROW - start < CHUNK ? ROW - start : CHUNK, ROW, CHUNK + BESIDE);
        }
  }

  // Asks for the scales of the row that this thread ends.
  DEVICE void begin(const void* scales) {
    const int thread = thread_index();
    row = (block_index() + thread / 16 * BLOCKS) * 16 + thread % 16;
    if (row >= ROWS) row = -1;
#pragma unroll
    for (int s = 0; s < STREAMS; s++) scale[s] = CODES && row >= 0 ? scale_of(scales, s * ROWS + row) : 1;
  }

  // Multiplies one tile, `index` of this block, whose rows are in the ring next, with the tile that it is paired with.
  DEVICE void multiply_tile(Cursor& cursor, int index, float unit) {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32, group = lane / 4;
    const int column = CODES ? (group < 2 ? group : 2) * (WIDTH + BESIDE) : 0;  // its three codes, or all alike
    const unsigned char* x = shared().x + column + warp * 64 + lane % 4 * 16;
    typename Sum<CODES>::type sum[STREAMS][4] = {};
#pragma unroll
    for (int base = 0; base < PIECES; base += TOGETHER) {
      constexpr int HELD = TOGETHER * STRIDES;
      Words up[HELD], low[HELD], own[HELD];
      Cursor now = cursor;
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        const int start = (base + i / STRIDES) % CHUNKS * CHUNK + i % STRIDES * STRIDE;
        if (i % STRIDES == 0) wait_for(&shared().filled[now.slot], now.round);
        const bool there = start + warp * 64 < ROW;
        const unsigned char* at = now.place() + group * (CHUNK + BESIDE) + i % STRIDES * STRIDE + warp * 64;
        at += lane % 4 * 16;
        up[i] = there ? *(const Words*)at : Words{};
        low[i] = there ? *(const Words*)(at + 8 * (CHUNK + BESIDE)) : Words{};
        own[i] = there ? *(const Words*)(x + start) : Words{};
        if (i % STRIDES == STRIDES - 1) now.next();
      }
      sync_warp();
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        if (i % STRIDES == 0 && lane == 0) arrive(&shared().emptied[cursor.slot]);
        multiply(sum[(base + i / STRIDES) / CHUNKS], up[i].a, low[i].a, up[i].b, low[i].b, own[i].a, own[i].b);
        multiply(sum[(base + i / STRIDES) / CHUNKS], up[i].c, low[i].c, up[i].d, low[i].d, own[i].c, own[i].d);
        if (i % STRIDES == STRIDES - 1) cursor.next();
      }
    }
#pragma unroll
    for (int s = 0; s < STREAMS; s++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        float value = sum[s][2 * below];
        if (CODES) {  // columns 0 and 1 are of a lane, column 2 is of the next
          float last = across_lanes(value, 1);
          value = ((value * 256 + sum[s][2 * below + 1]) * 256 + last) * unit;
        }
        if (lane % 4 == 0) shared().sums[FIRST + index * STREAMS + s][warp][group + 8 * below] = value;
      }
  }

  // Gives the results of a row to `end(row, results)` of its thread.
  template <typename End>
  DEVICE void end_rows(Norm<CODES, WIDTH>* norm, End end) {
    if (norm) norm->note();
    sync_block();
    if (row < 0) return;
    const float shrink = norm ? norm->shrink() : 1;
    const int thread = thread_index();
    float result[STREAMS] = {};
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++)
        result[s] += shared().sums[FIRST + thread / 16 * STREAMS + s][warp][thread % 16];
      result[s] *= shrink * scale[s];
    }
    end(row, result);
  }

  template <typename End>
  DEVICE void finish(Cursor& cursor, float unit, Norm<CODES, WIDTH>* norm, End end) {
    int index = 0;
    for (int tile = block_index(); tile < TILES; tile += BLOCKS) multiply_tile(cursor, index++, unit);
    end_rows(norm, end);
  }
};

using Queries = Product<Q_KV_CODES, QUERIES + ENTRY, DIM, SUMS_OF_GATES>;
using Values = Product<false, MIXED, RANK, SUMS_OF_GATES + SUMS_OF_QUERIES>;
using Output = Product<O_CODES, DIM, MIXED, SUMS_OF_GATES>;
using GateUp = Product<GATE_UP_CODES, WIDE, DIM, 0, true>;
using Down = Product<DOWN_CODES, DIM, WIDE, SUMS_OF_GATES + SUMS_OF_QUERIES>;

// The place of a token in the pool.
DEVICE Half* entry(int layer, int token) {
  const int page = shared().table[token / PAGE];
  return weights_of(layer).pool + ((long long)page * PAGE + token % PAGE) * ENTRY;
}

constexpr int ABSORBING = HEADS * RANK / SLICE;  // units of the second phase
static_assert(NOPE * SLICE * 2 <= SLOT, "a slot holds the keys' weight of a unit");

// Brings what `absorb` takes of the keys' weight.
DEVICE void bring_keys(Cursor& cursor, const Half* keys) {
#pragma unroll 1
  for (int unit = block_index(); unit < ABSORBING; unit += BLOCKS) {
    const Half* from = keys + (long long)(unit / (RANK / SLICE)) * NOPE * RANK + unit % (RANK / SLICE) * SLICE;
    bring_rows<NOPE>(cursor, from, SLICE * 2, RANK * 2, SLICE * 2);
  }
}

DEVICE void bring_weights() {  // in the order in which they are taken
  Cursor cursor;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    for (int i = thread_index() - THREADS; block_index() + i * BLOCKS < shared().limit; i += 32 * BRINGERS)
      bring_near(entry(layer, block_index() + i * BLOCKS), 2 * ENTRY);
    Queries::bring(cursor, weights_of(layer).q_kv);
    bring_keys(cursor, weights_of(layer).keys);
    Values::bring(cursor, weights_of(layer).values);
    Output::bring(cursor, weights_of(layer).o);
    GateUp::bring(cursor, weights_of(layer).gate_up);
    Down::bring(cursor, weights_of(layer).down);
  }
}
