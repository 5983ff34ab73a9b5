// What the blocks of decode_layers.cu have in shared and in global memory, and how numbers pass between blocks.

constexpr int THREADS = 32 * WARPS, EVERYBODY = THREADS + 32 * BRINGERS, HALF_ROPE = ROPE / 2, ENTRY = RANK + ROPE;
constexpr int QUERIES = HEADS * (NOPE + ROPE), MIXED = HEADS * VALUE;
constexpr int FEW = 16;                  // heads that attend together, the rows of a tile
constexpr int SLICE = 64;                // numbers of a latent that a block makes of a head's query at a time
constexpr int BESIDE = 64;               // bytes between rows in shared memory, so that lanes meet in no bank
constexpr int STRIDE = 64 * WARPS;       // bytes of a row that all warps take together
constexpr int CHUNK = STRIDES * STRIDE;  // bytes of a row in a slot of the ring, which one copy brings
constexpr int SLOT = 16 * (CHUNK + BESIDE);
constexpr float FINEST = 4194304;      // 2^22, the largest number as codes
constexpr float WHOLE = 3 * FINEST;    // to which a number is added to be rounded: the last bits are the whole one

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int bytes_of(bool codes, int numbers) { return codes ? 3 * (numbers + BESIDE) : 2 * numbers; }
constexpr int QUERY_ROW = 2 * ENTRY + (128 + BESIDE - 2 * ENTRY % 128) % 128;
constexpr int tiles_of(int rows) { return (rows / 16 + BLOCKS - 1) / BLOCKS; }  // of a block, at most
constexpr int SUMS_OF_GATES = 2 * tiles_of(WIDE);                                  // and of up_proj
constexpr int SUMS_OF_QUERIES = larger(tiles_of(QUERIES + ENTRY), tiles_of(DIM));  // and of o_proj
constexpr int SUMS_OF_VALUES = larger(tiles_of(MIXED), tiles_of(DIM));             // and of down_proj
constexpr int PARTED = BLOCKS / ((PARTS - 1) * (HEADS / FEW));  // blocks that there are for a part of the cache
constexpr int WAYS =
    PARTED >= 8 && RANK >= 512 ? 8 : PARTED >= 4 && RANK >= 256 ? 4 : PARTED >= 2 && RANK >= 128 ? 2 : 1;
constexpr int X_BYTES = larger(
    larger(larger(bytes_of(Q_KV_CODES, DIM), bytes_of(GATE_UP_CODES, DIM)),
           larger(bytes_of(O_CODES, MIXED), bytes_of(DOWN_CODES, WIDE))),
    larger(larger(FEW * QUERY_ROW, 18 * THREADS), 4 * WARPS * SLICE));

enum Phase { QUERIED = 1, ABSORBED, ATTENDED, EXPANDED, PROJECTED, GATED, PASSED };  // as words say it

struct Scratch {  // words that pass from phase to phase; all are 0 at first
  unsigned both[QUERIES + ENTRY];
  unsigned absorbed[HEADS * RANK];
  unsigned mixed[MIXED];
  unsigned between[WIDE];  // gate and up
  unsigned x[2][DIM];      // after attention, and after the layer
  unsigned highest[HEADS][PARTS], total[HEADS][PARTS];  // the last of them is the new token
  unsigned part[PARTS][HEADS][RANK];
  unsigned clock[TRACED ? (LAYERS * PASSED + 1) * BLOCKS : 1];  // when each block began, and ended each phase
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
  float sums[SUMS_OF_GATES + SUMS_OF_QUERIES + SUMS_OF_VALUES][WARPS][16];
  alignas(16) float reduced[WARPS], squares[2][WARPS];
  alignas(16) float shares[PARTS];
  alignas(16) Half entry[ENTRY];  // of the new token
  alignas(16) float scores[FEW][SPAN + 4];
  Gate filled[SLOTS], emptied[SLOTS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the ring lies behind it");
SHARED(Shared)

DEVICE const Weights& weights_of(int layer) { return shared().given.layer[layer]; }
DEVICE Scratch& scratch() { return *shared().given.scratch; }

DEVICE unsigned mark(int layer, Phase phase) { return layer * PASSED + phase; }
static_assert(LAYERS * PASSED < 4096, "a mark has 12 bits");

DEVICE unsigned highest(unsigned a, unsigned b) { return a > b ? a : b; }
DEVICE float widened(Half half) { return as_float((unsigned)half << 16); }
DEVICE float lower(unsigned pair) { return as_float(pair << 16); }
DEVICE float upper(unsigned pair) { return as_float(pair & 0xffff0000u); }
DEVICE float rounded(float value) { return widened(narrowed(value)); }

DEVICE unsigned marked(float value, unsigned mark) {
  const unsigned bits = as_bits(value);
  return (value != value ? 0x7fc00000u : bits + 0x7ff + (bits >> 12 & 1)) & 0xfffff000u | mark;
}
DEVICE float unmarked(unsigned word) { return as_float(word & 0xfffff000u); }

// Whether a word that is late is read again.
struct Patience {
  int left = PATIENCE;
  DEVICE bool again() {
    rest();
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
