// All layers of a dense decoder for one token, in one launch: weights are on their way before what they meet is there.
//
// A block lives on each multiprocessor and does its share of each phase. One of its warps does nothing but copy the
// block's weights of all phases and layers, in their order, into a ring of shared memory, so that memory is busy while
// blocks wait for each other, which single launches cannot be. A layer has seven phases: queries and latent; queries
// into the latent space; attention to a part of the cache; the parts joined, and out of the latent space; o_proj; gate
// and up; down_proj.
//
// No barrier stands between phases. A number passes from block to block as a word that says of which phase it is: 20
// bits of fp32 and 12 of the phase, which is never 0. Who needs it reads it until the phase is right, so that a phase
// costs a way to L2 and back, and no fence. A place is written again a layer later, by blocks that by then have,
// through others, everything for which it was read. All blocks must run at once: if other work keeps some of them from
// multiprocessors for long, the kernel fails rather than wait for ever.
//
// A product has tiles of 16 rows, which blocks take in turn. Warps take 64 bytes each of what a slot of the ring has of
// a tile's rows, and multiply them with tensor cores: the other operand has one column of bf16, or three of codes,
// which together are one number to 22 bits below the largest. Any order of the columns is right that both operands
// share, so each lane takes 16 bytes in a row of both.
//
// Sizes are macros, and the kernel itself, which knows how many addresses there are, is written by decode_layers.py.

constexpr int THREADS = 32 * WARPS, HALF_ROPE = ROPE / 2, ENTRY = RANK + ROPE;
constexpr int QUERIES = HEADS * (NOPE + ROPE), MIXED = HEADS * VALUE;
constexpr int FEW = 16;            // heads that attend together, the rows of a tile
constexpr int SLICE = 64;          // numbers of a latent that a block makes of a head's query at a time
constexpr int BESIDE = 64;         // bytes between rows in shared memory, so that lanes meet in no bank
constexpr int CHUNK = 64 * WARPS;  // bytes of a row in a slot of the ring
constexpr int SLOT = 16 * (CHUNK + BESIDE);
constexpr float FINEST = 4194304;  // 2^22, the largest number as codes

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int bytes_of(bool codes, int numbers) { return codes ? 3 * (numbers + BESIDE) : 2 * numbers; }
constexpr int QUERY_ROW = 2 * ENTRY + (128 + BESIDE - 2 * ENTRY % 128) % 128;
constexpr int tiles_of(int rows) { return (rows / 16 + BLOCKS - 1) / BLOCKS; }  // of a block, at most
constexpr int MOST_TILES =
    larger(larger(tiles_of(QUERIES + ENTRY), tiles_of(MIXED)), larger(tiles_of(DIM), 2 * tiles_of(WIDE)));
constexpr int PARTED = BLOCKS / ((PARTS - 1) * (HEADS / FEW));  // blocks that there are for a part of the cache
constexpr int WAYS =
    PARTED >= 8 && RANK >= 512 ? 8 : PARTED >= 4 && RANK >= 256 ? 4 : PARTED >= 2 && RANK >= 128 ? 2 : 1;
constexpr int X_BYTES = larger(
    larger(larger(bytes_of(Q_KV_CODES, DIM), bytes_of(GATE_UP_CODES, DIM)),
           larger(bytes_of(O_CODES, MIXED), bytes_of(DOWN_CODES, WIDE))),
    larger(larger(FEW * QUERY_ROW, 16 * THREADS), 4 * WARPS * SLICE));

struct Scratch {  // words that pass from phase to phase; all are 0 at first
  unsigned both[QUERIES + ENTRY];
  unsigned absorbed[HEADS * RANK];
  unsigned mixed[MIXED];
  unsigned between[WIDE];  // gate and up
  unsigned x[2][DIM];      // after attention, and after the layer
  unsigned highest[HEADS][PARTS], total[HEADS][PARTS];  // the last of them is the new token
  unsigned part[PARTS][HEADS][RANK];
};

struct Weights {  // of a layer; a scale is null where the weight is no codes
  const float* input_norm;
  const void *q_kv, *q_kv_scale;
  const Half *keys, *values;
  const float* latent_norm;
  const void *o, *o_scale;
  const float* post_norm;
  const void *gate_up, *gate_up_scale, *down, *down_scale;
  Half* pool;
};

struct Given {
  const Half* x;
  const int* limit;  // the token's place; -1: there is none
  const int* table;
  const float *cos, *sin;
  Scratch* scratch;
  Weights layer[LAYERS];
  Half* out;
};

struct Shared {
  union {
    Given given;
    void* address[sizeof(Given) / sizeof(void*)];
  };
  int limit, span, parts, table[PAGES];  // parts of the cache without the new token, and tokens of each
  float cos[HALF_ROPE], sin[HALF_ROPE];
  alignas(16) unsigned char x[X_BYTES];  // what this phase's weights meet
  float sums[MOST_TILES][WARPS][16];
  alignas(16) float reduced[WARPS][2];
  alignas(16) float shares[PARTS];
  alignas(16) Half entry[ENTRY];  // of the new token
  alignas(16) float scores[FEW][SPAN + 4];
  Gate filled[SLOTS], emptied[SLOTS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring lies behind it");
SHARED(Shared)

DEVICE const Weights& weights_of(int layer) { return shared().given.layer[layer]; }
DEVICE Scratch& scratch() { return *shared().given.scratch; }

enum Phase { QUERIED = 1, ABSORBED, ATTENDED, EXPANDED, PROJECTED, GATED, PASSED };
DEVICE unsigned mark(int layer, Phase phase) { return layer * 7 + phase; }
static_assert(LAYERS * 7 + 7 < 4096, "a mark has 12 bits");

DEVICE float widened(Half half) { return as_float((unsigned)half << 16); }
DEVICE float lower(unsigned pair) { return as_float(pair << 16); }
DEVICE float upper(unsigned pair) { return as_float(pair & 0xffff0000u); }
DEVICE float rounded(float value) { return widened(narrowed(value)); }
DEVICE unsigned paired(float a, float b) { return narrowed(a) | (unsigned)narrowed(b) << 16; }

DEVICE unsigned marked(float value, unsigned mark) {
  const unsigned bits = as_bits(value);
  return (value != value ? 0x7fc00000u : bits + 0x7ff + (bits >> 12 & 1)) & 0xfffff000u | mark;
}
DEVICE float unmarked(unsigned word) { return as_float(word & 0xfffff000u); }

// Whether a word that is late is read again.
struct Patience {
  int left = PATIENCE;
  DEVICE bool again() {
    if (--left < 0) fail();
    return true;
  }
};

DEVICE void give(unsigned* place, float value, unsigned mark) { put_word(place, marked(value, mark)); }

// Numbers of some places, all of which are asked for before one is waited for; null gives 0.
template <int EACH>
DEVICE void take_each(float (&numbers)[EACH], const unsigned* (&place)[EACH], unsigned mark) {
  unsigned word[EACH];
  bool late;
  Patience patience;
  do {
    late = false;
#pragma unroll
    for (int i = 0; i < EACH; i++) word[i] = place[i] ? get_word(place[i]) : mark;
#pragma unroll
    for (int i = 0; i < EACH; i++) late |= (word[i] ^ mark) & 0xfff;
  } while (late && patience.again());
#pragma unroll
  for (int i = 0; i < EACH; i++) numbers[i] = unmarked(word[i]);
}

// A number that is asked for early and needed late.
struct Early {
  const unsigned* place;
  unsigned word, mark;
  DEVICE Early(const unsigned* place, unsigned mark) : place(place), word(place ? get_word(place) : mark), mark(mark) {}
  DEVICE float value() {
    for (Patience patience; (word ^ mark) & 0xfff && patience.again();) word = get_word(place);
    return unmarked(word);
  }
};

// Four numbers from each of some places, all of which are asked for before one is waited for.
template <int EACH>
DEVICE void take_fours(float (&numbers)[EACH][4], const unsigned* (&place)[EACH], unsigned mark) {
  Words four[EACH];
  bool late;
  Patience patience;
  do {
    late = false;
#pragma unroll
    for (int i = 0; i < EACH; i++) four[i] = place[i] ? get_words(place[i]) : Words{mark, mark, mark, mark};
#pragma unroll
    for (int i = 0; i < EACH; i++)
      late |= ((four[i].a ^ mark) | (four[i].b ^ mark) | (four[i].c ^ mark) | (four[i].d ^ mark)) & 0xfff;
  } while (late && patience.again());
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    numbers[i][0] = unmarked(four[i].a), numbers[i][1] = unmarked(four[i].b);
    numbers[i][2] = unmarked(four[i].c), numbers[i][3] = unmarked(four[i].d);
  }
}

DEVICE float scale_of(const void* scale, int row) {
  return SCALES_OF_HALF ? widened(((const Half*)scale)[row]) : ((const float*)scale)[row];
}

// Sum of the first and highest of the second over all threads, the same in each.
DEVICE void reduce_block(float& sum, float& most) {
  for (int mask = 16; mask; mask /= 2) sum += across_lanes(sum, mask);
  most = highest_of_lanes(most);
  const int thread = thread_index(), warp = thread / 32;
  sync_block();
  if (thread % 32 == 0) shared().reduced[warp][0] = sum, shared().reduced[warp][1] = most;
  sync_block();
  sum = most = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += shared().reduced[i][0], most = fmaxf(most, shared().reduced[i][1]);
}

// The gains of a norm, four numbers of a thread at a time; they are asked for before the row is there.
template <int WIDTH>
struct Gains {
  static constexpr int EACH = (WIDTH / 4 + THREADS - 1) / THREADS;
  float of[EACH][4];

  DEVICE void ask_for(const float* gain) {
    int thread = thread_index();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = 4 * (i * THREADS + thread);
      Words four = at < WIDTH ? ask(gain + at) : Words{};
      of[i][0] = as_float(four.a), of[i][1] = as_float(four.b);
      of[i][2] = as_float(four.c), of[i][3] = as_float(four.d);
    }
  }
};

// Puts a row into shared memory, normed where there are gains, as bf16 or as three codes a number; returns the unit of
// the last code. The first layer's row is `plain`.
template <bool CODES, int WIDTH>
DEVICE float put_row(const unsigned* row, unsigned mark, const Gains<WIDTH>* gains, const Half* plain = nullptr) {
  constexpr int EACH = Gains<WIDTH>::EACH;
  const int thread = thread_index();
  const unsigned* place[EACH];
  float x[EACH][4], sum = 0, most = 0;
  if (plain) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = 4 * (i * THREADS + thread);
      for (int j = 0; j < 4; j++) x[i][j] = at < WIDTH ? widened(plain[at + j]) : 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = 4 * (i * THREADS + thread);
      place[i] = at < WIDTH ? row + at : nullptr;
    }
    take_fours(x, place, mark);
  }
#pragma unroll
  for (int i = 0; i < EACH; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sum += x[i][j] * x[i][j];
      most = fmaxf(most, fabsf(gains ? x[i][j] * gains->of[i][j] : x[i][j]));
    }
  float shrink = 1;
  if (gains || CODES) reduce_block(sum, most);
  if (gains) shrink = rsqrtf(sum / WIDTH + EPS);
  most *= shrink;
  float unit = most / FINEST, inverse = most > 0 ? FINEST / most : 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int at = 4 * (i * THREADS + thread);
    if (at >= WIDTH) break;
    if (gains)
#pragma unroll
      for (int j = 0; j < 4; j++) x[i][j] *= shrink * gains->of[i][j];
    const Pair pair = {paired(x[i][0], x[i][1]), paired(x[i][2], x[i][3])};
    if (!CODES) {
      *(Pair*)(shared().x + 2 * at) = pair;
      continue;
    }
    float y[4] = {lower(pair.a), upper(pair.a), lower(pair.b), upper(pair.b)};
    unsigned codes[3] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int left = (int)rintf(y[j] * inverse), second = (left + 128) >> 8, first = (second + 128) >> 8;
      codes[0] |= (first & 255) << 8 * j;
      codes[1] |= (second & 255) << 8 * j;  // less 256 times the first, which these bits do not hold
      codes[2] |= (left & 255) << 8 * j;
    }
#pragma unroll
    for (int digit = 0; digit < 3; digit++)
      *(unsigned*)(shared().x + digit * (WIDTH + BESIDE) + at) = codes[digit];
  }
  sync_block();
  return unit;
}

// Where a thread is in the ring.
struct Turn {
  int slot = 0, round = 0;
  DEVICE void next() {
    if (++slot == SLOTS) slot = 0, round++;
  }
  DEVICE unsigned char* place() const { return ring() + slot * SLOT; }
};

template <bool CODES> struct Sum { using type = float; };
template <> struct Sum<true> { using type = int; };

// A matrix of ROWS x WIDTH times a row in shared memory; PAIRED: with another as many rows below, of a SwiGLU.
template <bool CODES, int ROWS, int WIDTH, bool PAIRED>
struct Product {
  static constexpr int ROW = WIDTH * (CODES ? 1 : 2), STREAMS = PAIRED ? 2 : 1, TILES = ROWS / 16;
  static constexpr int CHUNKS = (ROW + CHUNK - 1) / CHUNK, PIECES = STREAMS * CHUNKS;
  static constexpr int TOGETHER = PIECES % 4 == 0 ? 4 : PIECES % 2 == 0 ? 2 : 1;
  static_assert(TOGETHER <= SLOTS, "what is taken together fits into the ring");
  static_assert(ROW % 64 == 0 && ROWS % 16 == 0, "whole steps and tiles");
  static_assert(tiles_of(ROWS) * 16 <= THREADS, "a thread ends a row");

  float scale[STREAMS];  // of the row that this thread ends
  int row;

  // Copies this block's tiles into the ring, by the lanes of one warp.
  DEVICE static void bring(Turn& turn, const void* weight) {
    const int lane = thread_index() % 32;
    for (int tile = block_index(); tile < TILES; tile += BLOCKS)
      for (int s = 0; s < STREAMS; s++)
        for (int start = 0; start < ROW; start += CHUNK, turn.next()) {
          const int bytes = ROW - start < CHUNK ? ROW - start : CHUNK;
          if (turn.round) wait_for(&shared().emptied[turn.slot], turn.round - 1);
          if (lane == 0) expect(&shared().filled[turn.slot], 16 * bytes);
          sync_warp();
          const auto* from = (const unsigned char*)weight + (long long)(s * ROWS + tile * 16 + lane) * ROW + start;
          if (lane < 16) copy(turn.place() + lane * (CHUNK + BESIDE), from, bytes, &shared().filled[turn.slot]);
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
  DEVICE void multiply_tile(Turn& turn, int index) {
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32, group = lane / 4;
    const int column = CODES ? (group < 2 ? group : 2) * (WIDTH + BESIDE) : 0;  // its three codes, or all alike
    const unsigned char* x = shared().x + column + warp * 64 + lane % 4 * 16;
    typename Sum<CODES>::type sum[STREAMS][4] = {};
#pragma unroll
    for (int base = 0; base < PIECES; base += TOGETHER) {
      Words up[TOGETHER], low[TOGETHER], own[TOGETHER];
      Turn now = turn;
#pragma unroll
      for (int i = 0; i < TOGETHER; i++, now.next()) {
        const int start = (base + i) % CHUNKS * CHUNK;
        wait_for(&shared().filled[now.slot], now.round);
        const bool there = start + warp * 64 < ROW;
        const unsigned char* at = now.place() + group * (CHUNK + BESIDE) + warp * 64 + lane % 4 * 16;
        up[i] = there ? *(const Words*)at : Words{};
        low[i] = there ? *(const Words*)(at + 8 * (CHUNK + BESIDE)) : Words{};
        own[i] = there ? *(const Words*)(x + start) : Words{};
      }
      sync_warp();
#pragma unroll
      for (int i = 0; i < TOGETHER; i++, turn.next()) {
        if (lane == 0) arrive(&shared().emptied[turn.slot]);
        multiply(sum[(base + i) / CHUNKS], up[i].a, low[i].a, up[i].b, low[i].b, own[i].a, own[i].b);
        multiply(sum[(base + i) / CHUNKS], up[i].c, low[i].c, up[i].d, low[i].d, own[i].c, own[i].d);
      }
    }
#pragma unroll
    for (int s = 0; s < STREAMS; s++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        float value = sum[s][2 * below];
        if (CODES) {  // columns 0 and 1 are of a lane, column 2 is of the next
          float last = across_lanes(value, 1);
          value = (value * 256 + sum[s][2 * below + 1]) * 256 + last;
        }
        if (lane % 4 == 0) shared().sums[index * STREAMS + s][warp][group + 8 * below] = value;
      }
  }

  // Gives the results of a row to `end(row, results)` of its thread.
  template <typename End>
  DEVICE void end_rows(float unit, End end) {
    sync_block();
    if (row < 0) return;
    const int thread = thread_index();
    float result[STREAMS] = {};
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++)
        result[s] += shared().sums[thread / 16 * STREAMS + s][warp][thread % 16];
      if (CODES) result[s] *= unit * scale[s];
    }
    end(row, result);
  }

  template <typename End>
  DEVICE void finish(Turn& turn, float unit, End end) {
    int index = 0;
    for (int tile = block_index(); tile < TILES; tile += BLOCKS) multiply_tile(turn, index++);
    end_rows(unit, end);
  }
};

using Queries = Product<Q_KV_CODES, QUERIES + ENTRY, DIM, false>;
using Values = Product<false, MIXED, RANK, false>;
using Output = Product<O_CODES, DIM, MIXED, false>;
using GateUp = Product<GATE_UP_CODES, WIDE, DIM, true>;
using Down = Product<DOWN_CODES, DIM, WIDE, false>;

// The place of a token in the pool.
DEVICE Half* entry(int layer, int token) {
  const int page = shared().table[token / PAGE];
  return weights_of(layer).pool + ((long long)page * PAGE + token % PAGE) * ENTRY;
}

constexpr int ABSORBING = HEADS * RANK / SLICE;  // units of the second phase
static_assert(NOPE * SLICE * 2 <= SLOT, "a slot holds the keys' weight of a unit");

// Copies what `absorb` takes of the keys' weight into the ring.
DEVICE void bring_keys(Turn& turn, const Half* keys) {
  const int lane = thread_index() % 32;
  for (int unit = block_index(); unit < ABSORBING; unit += BLOCKS, turn.next()) {
    const Half* from = keys + (long long)(unit / (RANK / SLICE)) * NOPE * RANK + unit % (RANK / SLICE) * SLICE;
    if (turn.round) wait_for(&shared().emptied[turn.slot], turn.round - 1);
    if (lane == 0) expect(&shared().filled[turn.slot], NOPE * SLICE * 2);
    sync_warp();
    for (int row = lane; row < NOPE; row += 32)
      copy(turn.place() + row * SLICE * 2, from + row * RANK, SLICE * 2, &shared().filled[turn.slot]);
  }
}

DEVICE void bring_weights() {  // by one warp, in the order in which the others take them
  Turn turn;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    for (int token = block_index() + thread_index() % 32 * BLOCKS; token < shared().limit; token += 32 * BLOCKS)
      bring_near(entry(layer, token), 2 * ENTRY);
    Queries::bring(turn, weights_of(layer).q_kv);
    bring_keys(turn, weights_of(layer).keys);
    Values::bring(turn, weights_of(layer).values);
    Output::bring(turn, weights_of(layer).o);
    GateUp::bring(turn, weights_of(layer).gate_up);
    Down::bring(turn, weights_of(layer).down);
  }
}

// Whether this block has nothing to do in a phase of so many tiles or other units.
DEVICE bool idle(int units) { return block_index() >= units; }

DEVICE void make_queries(int layer, Turn& turn) {
  if (idle(Queries::TILES)) return;
  Queries product;
  Gains<DIM> gains;
  product.begin(weights_of(layer).q_kv_scale);
  gains.ask_for(weights_of(layer).input_norm);
  const Half* plain = layer ? nullptr : shared().given.x;
  float unit = put_row<Q_KV_CODES, DIM>(scratch().x[1], mark(layer - 1, PASSED), &gains, plain);
  product.finish(turn, unit, [&](int row, float* y) {
    give(&scratch().both[row], rounded(y[0]), mark(layer, QUERIED));
  });
}

// The new token's latent, normed, and its turned key, in shared memory.
DEVICE void make_entry(int layer) {
  constexpr int EACH = (RANK + THREADS - 1) / THREADS;
  static_assert(HALF_ROPE <= THREADS, "a thread turns a pair");
  const int thread = thread_index();
  const unsigned* latent = scratch().both + QUERIES;
  const unsigned* place[EACH + 2];
  float value[EACH + 2], gain[EACH], sum = 0, none = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int at = i * THREADS + thread;
    gain[i] = at < RANK ? weights_of(layer).latent_norm[at] : 0;
    place[i] = at < RANK ? latent + at : nullptr;
  }
  place[EACH] = thread < HALF_ROPE ? latent + RANK + thread : nullptr;
  place[EACH + 1] = thread < HALF_ROPE ? latent + RANK + HALF_ROPE + thread : nullptr;
  take_each(value, place, mark(layer, QUERIED));
#pragma unroll
  for (int i = 0; i < EACH; i++) sum += thread + i * THREADS < RANK ? value[i] * value[i] : 0;
  reduce_block(sum, none);
  float shrink = rsqrtf(sum / RANK + LATENT_EPS);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int at = i * THREADS + thread;
    if (at < RANK) shared().entry[at] = narrowed(value[i] * shrink * gain[i]);
  }
  if (thread < HALF_ROPE) {
    float a = value[EACH], b = value[EACH + 1], cos = shared().cos[thread], sin = shared().sin[thread];
    shared().entry[RANK + thread] = narrowed(a * cos - b * sin);
    shared().entry[RANK + HALF_ROPE + thread] = narrowed(b * cos + a * sin);
  }
  sync_block();
}

// A head's query times its keys' weight, SLICE numbers of the latent at a time.
DEVICE void absorb(int layer, Turn& turn) {
  constexpr int EACH = (NOPE + WARPS - 1) / WARPS;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  float* sums = (float*)shared().x;  // [WARPS][SLICE]
  for (int unit = block_index(); unit < ABSORBING; unit += BLOCKS, turn.next()) {
    const int head = unit / (RANK / SLICE), start = unit % (RANK / SLICE) * SLICE, own = warp * EACH + lane;
    const unsigned* place = lane < EACH && own < NOPE ? &scratch().both[head * NOPE + own] : nullptr;
    const float query = Early(place, mark(layer, QUERIED)).value();
    sync_warp();
    wait_for(&shared().filled[turn.slot], turn.round);
    float a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int d = warp * EACH + i;
      const unsigned two = d < NOPE ? *(const unsigned*)(turn.place() + d * SLICE * 2 + 4 * lane) : 0;
      const float q = from_lane(query, i);
      a += q * lower(two), b += q * upper(two);
    }
    sync_warp();
    if (lane == 0) arrive(&shared().emptied[turn.slot]);
    sync_block();
    sums[warp * SLICE + 2 * lane] = a, sums[warp * SLICE + 2 * lane + 1] = b;
    sync_block();
    for (int i = thread; i < SLICE; i += THREADS) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += sums[w * SLICE + i];
      give(&scratch().absorbed[head * RANK + start + i], rounded(sum), mark(layer, ABSORBED));
    }
  }
}

// Absorbed and turned queries of FEW heads, row by row in shared memory.
DEVICE void put_queries(int layer, int head) {
  constexpr int EACH = (FEW * RANK / 4 + THREADS - 1) / THREADS;
  const int thread = thread_index();
  for (int i = thread; i < FEW * HALF_ROPE; i += THREADS) {
    int row = i / HALF_ROPE, j = i % HALF_ROPE;
    const unsigned* q = scratch().both + HEADS * NOPE + (head + row) * ROPE;
    const unsigned* from[2] = {q + j, q + HALF_ROPE + j};
    float pair[2], cos = shared().cos[j], sin = shared().sin[j];
    take_each(pair, from, mark(layer, QUERIED));
    Half* turned = (Half*)(shared().x + row * QUERY_ROW) + RANK;
    turned[j] = narrowed(pair[0] * cos - pair[1] * sin);
    turned[HALF_ROPE + j] = narrowed(pair[1] * cos + pair[0] * sin);
  }
  const unsigned* place[EACH];
  float four[EACH][4];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int at = i * THREADS + thread;
    place[i] = at < FEW * RANK / 4 ? scratch().absorbed + head * RANK + at * 4 : nullptr;
  }
  take_fours(four, place, mark(layer, ABSORBED));
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    int at = i * THREADS + thread;
    unsigned char* to = shared().x + at / (RANK / 4) * QUERY_ROW + at % (RANK / 4) * 8;
    if (at < FEW * RANK / 4) *(Pair*)to = {paired(four[i][0], four[i][1]), paired(four[i][2], four[i][3])};
  }
  sync_block();
}

// Attention of FEW heads to a span of the cache's tokens, which are asked for before anything is waited for: softmax
// within it, and a part of the sum of latents.
DEVICE void attend(int layer) {
  constexpr int STEPS = (ENTRY / 32 + 1) / 2, WIDTH = RANK / WAYS, PASS = THREADS * 8 / WIDTH;  // tokens that have room
  constexpr int PAIRS = WIDTH / 2, HELD = larger(1, FEW * PAIRS / THREADS);                     // heads of a thread
  static_assert(THREADS % PAIRS == 0 && PASS % 4 == 0, "each pair has as many threads");
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, group = lane / 4;
  const int parts = shared().parts, span = shared().span, tokens = shared().limit;
  for (int unit = block_index(); unit < parts * WAYS * (HEADS / FEW); unit += BLOCKS) {
    const int way = unit % WAYS, group_of_heads = HEADS == FEW ? 0 : unit / WAYS / parts, head = group_of_heads * FEW;
    const int part = unit / WAYS - group_of_heads * parts, start = part * span;
    const int count = tokens - start < span ? tokens - start : span;
    // Two warps share 8 tokens, and have half of an entry each.
    const int half = warp % 2, mine = warp / 2 * 8, steps = half ? ENTRY / 32 - STEPS : STEPS;
    const int offset = half * STEPS * 32 + lane % 4 * 8, first_latent = thread / (WIDTH / 8);
    Words key[STEPS] = {}, latent = {};
    auto ask_for_keys = [&](int first) {
      const Half* from = entry(layer, start + (first + group < count ? first + group : count - 1)) + offset;
#pragma unroll
      for (int i = 0; i < STEPS; i++)
        if (i < steps) key[i] = get_words(from + i * 32);
    };
    auto ask_for_latent = [&](int first) {
      const int own = first + first_latent;
      if (own < count) latent = get_words(entry(layer, start + own) + way * WIDTH + thread % (WIDTH / 8) * 8);
    };
    if (mine < count) ask_for_keys(mine);
    ask_for_latent(0);
    sync_block();
    put_queries(layer, head);
    for (int base = 0; base < count; base += WARPS / 2 * 8) {
      const int first = base + mine;
      float sum[4] = {};
      if (first < count) {  // 8 tokens are columns
        if (base) ask_for_keys(first);
        const unsigned char* query = shared().x + group * QUERY_ROW + 2 * offset;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
          if (i < steps) {
            const Words up = *(const Words*)(query + i * 64);
            const Words low = *(const Words*)(query + 8 * QUERY_ROW + i * 64);
            multiply(sum, up.a, low.a, up.b, low.b, key[i].a, key[i].b);
            multiply(sum, up.c, low.c, up.d, low.d, key[i].c, key[i].d);
          }
      }
#pragma unroll
      for (int turn = 0; turn < 2; turn++) {
        if (half == turn)
          for (int i = 0; i < 4; i++) {
            const int token = first + lane % 4 * 2 + i % 2;
            float* score = &shared().scores[group + i / 2 * 8][token < count ? token : 0];
            if (token < count) *score = turn ? (*score + sum[i]) * SCALE : sum[i];
          }
        sync_block();
      }
    }
    for (int own = warp; own < FEW; own += WARPS) {
      float most = LOWEST, sum = 0;
      for (int i = lane; i < count; i += 32) most = fmaxf(most, shared().scores[own][i]);
      for (int mask = 16; mask; mask /= 2) most = fmaxf(most, across_lanes(most, mask));
      most = unmarked(marked(most, 0));  // as it is given
      for (int i = lane; i < (count + 3) / 4 * 4; i += 32) {
        const float share = i < count ? expf(shared().scores[own][i] - most) : 0;
        shared().scores[own][i] = share, sum += share;
      }
      for (int mask = 16; mask; mask /= 2) sum += across_lanes(sum, mask);
      if (lane == 0 && way == 0) {
        give(&scratch().highest[head + own][part], most, mark(layer, ATTENDED));
        give(&scratch().total[head + own][part], sum, mark(layer, ATTENDED));
      }
    }
    const int pair = thread % PAIRS, own = thread / PAIRS * HELD;
    float sum[HELD][2] = {};
    for (int first = 0; first < count; first += PASS) {
      if (first) sync_block();
      *(Words*)(shared().x + 16 * thread) = latent;
      sync_block();
      ask_for_latent(first + PASS);
      const int tokens = count - first < PASS ? count - first : PASS;
      if (own < FEW)
#pragma unroll 4
        for (int i = 0; i < tokens; i += 4) {  // what lies beyond has no share
          unsigned two[4];
#pragma unroll
          for (int k = 0; k < 4; k++) two[k] = *(const unsigned*)(shared().x + ((i + k) * WIDTH + 2 * pair) * 2);
#pragma unroll
          for (int j = 0; j < HELD; j++) {
            const Words four = *(const Words*)&shared().scores[own + j][first + i];
            const float share[4] = {as_float(four.a), as_float(four.b), as_float(four.c), as_float(four.d)};
#pragma unroll
            for (int k = 0; k < 4; k++)
              sum[j][0] += share[k] * lower(two[k]), sum[j][1] += share[k] * upper(two[k]);
          }
        }
    }
    if (own < FEW)
#pragma unroll
      for (int j = 0; j < HELD; j++) {
        unsigned* to = &scratch().part[part][head + own + j][way * WIDTH + 2 * pair];
        give(to, sum[j][0], mark(layer, ATTENDED)), give(to + 1, sum[j][1], mark(layer, ATTENDED));
      }
  }
}

// The new token, a part of its own, by one block, which also puts it into the cache.
DEVICE void attend_to_new(int layer) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, part = shared().parts;
  make_entry(layer);
  Half* place = entry(layer, shared().limit);
  for (int i = thread; i < ENTRY; i += THREADS) place[i] = shared().entry[i];
  for (int head = 0; head < HEADS; head += FEW) {
    sync_block();
    put_queries(layer, head);
    for (int own = warp; own < FEW; own += WARPS) {
      float score = 0;
      for (int i = lane; i < ENTRY / 2; i += 32) {
        const unsigned q = *(const unsigned*)(shared().x + own * QUERY_ROW + 4 * i);
        const unsigned k = *(const unsigned*)(shared().entry + 2 * i);
        score += lower(q) * lower(k) + upper(q) * upper(k);
      }
      for (int mask = 16; mask; mask /= 2) score += across_lanes(score, mask);
      score *= SCALE;
      const float most = unmarked(marked(score, 0)), share = expf(score - most);
      if (lane == 0) {
        give(&scratch().highest[head + own][part], most, mark(layer, ATTENDED));
        give(&scratch().total[head + own][part], share, mark(layer, ATTENDED));
        shared().scores[own][0] = share;
      }
    }
    sync_block();
    for (int i = thread; i < FEW * RANK; i += THREADS) {
      const float share = shared().scores[i / RANK][0], number = widened(shared().entry[i % RANK]);
      give(&scratch().part[part][head + i / RANK][i % RANK], share * number, mark(layer, ATTENDED));
    }
  }
}

// A head's parts as one mean latent, in shared memory.
DEVICE void put_joined(int layer, int head) {
  static_assert(PARTS <= 32, "a lane has a part");
  const int thread = thread_index(), lane = thread % 32, parts = shared().parts + (shared().limit >= 0);
  const unsigned from = mark(layer, ATTENDED);
  if (thread < 32) {
    const bool there = lane < parts;
    const unsigned* place[2] = {there ? &scratch().highest[head][lane] : nullptr,
                                there ? &scratch().total[head][lane] : nullptr};
    float own[2];
    take_each(own, place, from);
    sync_warp();
    float most = there ? own[0] : LOWEST, rise = most, total = own[1];
    for (int mask = 16; mask; mask /= 2) rise = fmaxf(rise, across_lanes(rise, mask));
    float share = there ? expf(most - rise) : 0;
    total *= share;
    for (int mask = 16; mask; mask /= 2) total += across_lanes(total, mask);
    if (lane < PARTS) shared().shares[lane] = total > 0 ? share / total : 0;
  }
  for (int base = 0; base < RANK; base += THREADS) {
    const int at = base + thread;
    unsigned word[PARTS];
    float sum = 0;
    bool late;
    Patience patience;
    do {
      late = false;
#pragma unroll
      for (int part = 0; part < PARTS; part++)
        word[part] = part < parts && at < RANK ? get_word(&scratch().part[part][head][at]) : from;
#pragma unroll
      for (int part = 0; part < PARTS; part++) late |= (word[part] ^ from) & 0xfff;
    } while (late && patience.again());
    if (!base) sync_block();
#pragma unroll
    for (int part = 0; part < PARTS; part++) sum += shared().shares[part] * unmarked(word[part]);
    if (at < RANK) *(Half*)(shared().x + 2 * at) = narrowed(sum);
  }
  sync_block();
}

// Joins the parts and takes them out of the latent space; a tile is of one head.
DEVICE void expand(int layer, Turn& turn) {
  if (idle(Values::TILES)) return;
  Values product;
  product.begin(nullptr);
  int index = 0;
  for (int tile = block_index(); tile < Values::TILES; tile += BLOCKS) {
    sync_block();
    put_joined(layer, tile * 16 / VALUE);
    product.multiply_tile(turn, index++);
  }
  product.end_rows(1, [&](int row, float* y) {
    give(&scratch().mixed[row], rounded(y[0]), mark(layer, EXPANDED));
  });
}

DEVICE void project(int layer, Turn& turn) {
  if (idle(Output::TILES)) return;
  Output product;
  product.begin(weights_of(layer).o_scale);
  const int row = product.row;
  Early before(row >= 0 && layer ? &scratch().x[1][row] : nullptr, mark(layer - 1, PASSED));
  const float first = row >= 0 && !layer ? widened(shared().given.x[row]) : 0;
  float unit = put_row<O_CODES, MIXED>(scratch().mixed, mark(layer, EXPANDED), nullptr);
  product.finish(turn, unit, [&](int row, float* y) {
    give(&scratch().x[0][row], rounded(y[0] + (layer ? before.value() : first)), mark(layer, PROJECTED));
  });
}

DEVICE void gate_up(int layer, Turn& turn) {
  if (idle(GateUp::TILES)) return;
  GateUp product;
  Gains<DIM> gains;
  product.begin(weights_of(layer).gate_up_scale);
  gains.ask_for(weights_of(layer).post_norm);
  float unit = put_row<GATE_UP_CODES, DIM>(scratch().x[0], mark(layer, PROJECTED), &gains);
  product.finish(turn, unit, [&](int row, float* y) {
    give(&scratch().between[row], rounded(y[0] / (1 + expf(-y[0])) * y[1]), mark(layer, GATED));
  });
}

DEVICE void down(int layer, Turn& turn) {
  if (idle(Down::TILES)) return;
  Down product;
  product.begin(weights_of(layer).down_scale);
  Early before(product.row >= 0 ? &scratch().x[0][product.row] : nullptr, mark(layer, PROJECTED));
  float unit = put_row<DOWN_CODES, WIDE>(scratch().between, mark(layer, GATED), nullptr);
  product.finish(turn, unit, [&](int row, float* y) {
    if (layer + 1 < LAYERS)
      give(&scratch().x[1][row], rounded(y[0] + before.value()), mark(layer, PASSED));
    else
      shared().given.out[row] = narrowed(y[0] + before.value());
  });
}

// What every block begins with; then one warp brings weights, and the others run the layers.
DEVICE void prepare() {
  const int thread = thread_index();
  if (thread == 0) {
    const int limit = *shared().given.limit, tokens = larger(limit, 0);
    shared().limit = limit;
    shared().span = larger(((tokens + PARTS - 2) / (PARTS - 1) + 7) / 8 * 8, LEAST_SPAN);
    shared().parts = (tokens + shared().span - 1) / shared().span;
    for (int i = 0; i < SLOTS; i++) open_gate(&shared().filled[i], 1), open_gate(&shared().emptied[i], WARPS);
  }
  if (thread < THREADS) {
    for (int i = thread; i < PAGES; i += THREADS) shared().table[i] = shared().given.table[i];
    for (int i = thread; i < HALF_ROPE; i += THREADS)
      shared().cos[i] = shared().given.cos[i], shared().sin[i] = shared().given.sin[i];
  }
  sync_everything();
}

DEVICE void run_layers() {
  Turn turn;
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    make_queries(layer, turn);
    absorb(layer, turn);
    if (shared().limit >= 0 && block_index() == BLOCKS - 1) attend_to_new(layer);
    attend(layer);
    expand(layer, turn);
    project(layer, turn);
    gate_up(layer, turn);
    down(layer, turn);
  }
}
