// The attention of decode_layers.cu, from the products before it to those behind it.

// Whether this block has nothing to do in a phase of so many tiles or other units.
DEVICE bool idle(int units) { return block_index() >= units; }

// The new token's latent, normed, and its turned key, in shared memory.
DEVICE void make_entry(int layer) {
  constexpr int EACH = (RANK + THREADS - 1) / THREADS;
  static_assert(HALF_ROPE <= THREADS, "a thread turns a pair");
  const int thread = thread_index();
  const unsigned* latent = scratch().both + QUERIES;
  const unsigned* place[EACH + 2];
  float value[EACH + 2], gain[EACH], sum = 0;
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
  const float shrink = rsqrtf(sum_of_block(sum) / RANK + LATENT_EPS);
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
DEVICE void absorb(int layer, Cursor& cursor) {
  constexpr int EACH = (NOPE + WARPS - 1) / WARPS;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  float* sums = (float*)shared().x;  // [WARPS][SLICE]
  for (int unit = block_index(); unit < ABSORBING; unit += BLOCKS, cursor.next()) {
    const int head = unit / (RANK / SLICE), start = unit % (RANK / SLICE) * SLICE, own = warp * EACH + lane;
    const unsigned* place = lane < EACH && own < NOPE ? &scratch().both[head * NOPE + own] : nullptr;
    const float query = Early(place, mark(layer, QUERIED)).value();
    sync_warp();
    wait_for(&shared().filled[cursor.slot], cursor.round);
    float a = 0, b = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int d = warp * EACH + i;
      const unsigned two = d < NOPE ? *(const unsigned*)(cursor.place() + d * SLICE * 2 + 4 * lane) : 0;
      const float q = from_lane(query, i);
      a += q * lower(two), b += q * upper(two);
    }
    sync_warp();
    if (lane == 0) arrive(&shared().emptied[cursor.slot]);
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

// Adds shares of the tokens that are in shared memory times 8 numbers of their latents, for FEW heads. A share is two
// numbers of bf16, which together are it to 16 bits.
template <int WIDTH>
DEVICE void add_latents(float* sum, int first, int tokens, int column) {
  const int lane = thread_index() % 32, group = lane / 4, own = lane % 4 * 4;  // tokens of a lane, in any order for all
  const Half* latents = (const Half*)shared().x + column + group;
#pragma unroll 1
  for (int start = 0; start < tokens; start += 16) {
    const bool there = start + own < tokens;
    unsigned share[2][2], rest[2][2], two[2];
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const float* scores = &shared().scores[group + 8 * below][first + start + own];
      const Words four = there ? *(const Words*)scores : Words{};
      const float a = as_float(four.a), b = as_float(four.b), c = as_float(four.c), d = as_float(four.d);
      share[below][0] = paired(a, b), share[below][1] = paired(c, d);
      rest[below][0] = paired(a - rounded(a), b - rounded(b)), rest[below][1] = paired(c - rounded(c), d - rounded(d));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const Half* at = latents + (start + own + 2 * i) * (WIDTH + 8);
      two[i] = there ? at[0] | (unsigned)at[WIDTH + 8] << 16 : 0;
    }
    multiply(sum, share[0][0], share[1][0], share[0][1], share[1][1], two[0], two[1]);
    multiply(sum, rest[0][0], rest[1][0], rest[0][1], rest[1][1], two[0], two[1]);
  }
}

// Attention of FEW heads to a span of the cache's tokens, which are asked for before anything is waited for: softmax
// within it, and a part of the sum of latents.
DEVICE void attend(int layer) {
  constexpr int STEPS = (ENTRY / 32 + 1) / 2, WIDTH = RANK / WAYS, PASS = THREADS * 8 / WIDTH;  // tokens that have room
  constexpr int TILES = (WIDTH / 8 + WARPS - 1) / WARPS;  // of 8 numbers of a latent, of a warp
  static_assert(THREADS * 8 % WIDTH == 0 && PASS % 4 == 0 && SPAN % 16 == 0, "whole passes, tokens of a lane, and steps");
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
      for (int second = 0; second < 2; second++) {
        if (half == second)
          for (int i = 0; i < 4; i++) {
            const int token = first + lane % 4 * 2 + i % 2;
            float* score = &shared().scores[group + i / 2 * 8][token < count ? token : 0];
            if (token < count) *score = second ? (*score + sum[i]) * SCALE : sum[i];
          }
        sync_block();
      }
    }
    for (int own = warp; own < FEW; own += WARPS) {
      float most = LOWEST, sum = 0;
      for (int i = lane; i < count; i += 32) most = fmaxf(most, shared().scores[own][i]);
      for (int mask = 16; mask; mask /= 2) most = fmaxf(most, across_lanes(most, mask));
      most = unmarked(marked(most, 0));  // as it is given
      for (int i = lane; i < (count + 15) / 16 * 16; i += 32) {  // what lies beyond has no share
        const float share = i < count ? expf(shared().scores[own][i] - most) : 0;
        shared().scores[own][i] = share, sum += share;
      }
      for (int mask = 16; mask; mask /= 2) sum += across_lanes(sum, mask);
      if (lane == 0 && way == 0) {
        give(&scratch().highest[head + own][part], most, mark(layer, ATTENDED));
        give(&scratch().total[head + own][part], sum, mark(layer, ATTENDED));
      }
    }
    float sum[TILES][4] = {};
    for (int first = 0; first < count; first += PASS) {
      if (first) sync_block();
      *(Words*)(shared().x + 16 * (thread + first_latent)) = latent;  // 16 bytes between tokens, so that lanes meet less
      sync_block();
      ask_for_latent(first + PASS);
      const int tokens = count - first < PASS ? count - first : PASS;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
        if (tile * WARPS + warp < WIDTH / 8) add_latents<WIDTH>(sum[tile], first, tokens, (tile * WARPS + warp) * 8);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int place = (tile * WARPS + warp) * 8 + lane % 4 * 2;
      if (place >= WIDTH) break;
#pragma unroll
      for (int i = 0; i < 4; i++)
        give(&scratch().part[part][head + group + i / 2 * 8][way * WIDTH + place + i % 2], sum[tile][i],
             mark(layer, ATTENDED));
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
  const int thread = thread_index(), lane = thread % 32, parts = shared().parts + 1;  // and the new token
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
DEVICE void expand(int layer, Cursor& cursor) {
  if (idle(Values::TILES)) return;
  Values product;
  product.begin(nullptr);
  int index = 0;
  for (int tile = block_index(); tile < Values::TILES; tile += BLOCKS) {
    sync_block();
    put_joined(layer, tile * 16 / VALUE);
    product.multiply_tile(cursor, index++, 1);
  }
  product.end_rows(nullptr, [&](int row, float* y) {
    give(&scratch().mixed[row], rounded(y[0]), mark(layer, EXPANDED));
  });
}
