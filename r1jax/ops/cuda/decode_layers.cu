// All layers of a dense decoder for one token, in one launch: weights are on their way before what they meet is there.
//
// A block lives on each multiprocessor and does its share of each phase. Some of its warps do nothing but copy the block's
// weights of all phases and layers, in their order, into a ring of shared memory, so that memory is busy while blocks
// wait for each other, which single launches cannot be. A layer has seven phases: queries and latent; queries into the
// latent space; attention to a part of the cache; the parts joined, and out of the latent space; o_proj; gate and up;
// down_proj.
//
// No barrier stands between phases. A number passes from block to block as a word that says of which phase it is: 20
// bits of fp32 and 12 of the phase, which is never 0. Who needs it reads it until the phase is right, so that a phase
// costs a way to L2 and back, and no fence. A place is written again a layer later, by blocks that by then have,
// through others, everything for which it was read. All blocks must run at once: if other work keeps some of them from
// multiprocessors for long, the kernel fails rather than wait for ever.
//
// A product has tiles of 16 rows, which blocks take in turn. Of each KiB of a row a warp takes 64 bytes, and multiplies
// them with tensor cores: the other operand has one column of bf16, or three of codes, which together are one number to
// 22 bits below the largest of the warp. Any order of the columns is right that both operands share, so each lane takes
// 16 bytes in a row of both. A warp reads those words itself that it multiplies, so that a block's warps wait for each
// other once in a product: when they add up what they have. A warp that has no columns waits for no words: between the
// reading of a place in shared memory and its being written again by another product, a block's warps have met.
//
// Sizes are macros, and the kernel itself, which knows how many addresses there are, is written by decode_layers.py.

DEVICE void make_queries(int layer, Cursor& cursor) {
  if (idle(Queries::TILES)) return;
  Queries product;
  product.begin(weights_of(layer).q_kv_scale);
  Norm<Q_KV_CODES, DIM> norm(weights_of(layer).input_norm, shared().squares[0]);
  const Half* plain = layer ? nullptr : shared().given.x;
  const float unit = put_row<Q_KV_CODES, DIM>(scratch().x[1], mark(layer - 1, PASSED), &norm, plain);
  product.finish(cursor, unit, &norm, [&](int row, float* y) {
    give(&scratch().both[row], rounded(y[0]), mark(layer, QUERIED));
  });
}

DEVICE void project(int layer, Cursor& cursor) {
  if (idle(Output::TILES)) return;
  if (idle(Values::TILES)) sync_block();  // which `expand` is for others
  Output product;
  product.begin(weights_of(layer).o_scale);
  const int row = product.row;
  Early before(row >= 0 && layer ? &scratch().x[1][row] : nullptr, mark(layer - 1, PASSED));
  const float first = row >= 0 && !layer ? widened(shared().given.x[row]) : 0;
  const float unit = put_row<O_CODES, MIXED>(scratch().mixed, mark(layer, EXPANDED), nullptr);
  product.finish(cursor, unit, nullptr, [&](int row, float* y) {
    give(&scratch().x[0][row], rounded(y[0] + (layer ? before.value() : first)), mark(layer, PROJECTED));
  });
}

DEVICE void gate_up(int layer, Cursor& cursor) {
  if (idle(GateUp::TILES)) return;
  GateUp product;
  product.begin(weights_of(layer).gate_up_scale);
  Norm<GATE_UP_CODES, DIM> norm(weights_of(layer).post_norm, shared().squares[1]);
  const float unit = put_row<GATE_UP_CODES, DIM>(scratch().x[0], mark(layer, PROJECTED), &norm);
  product.finish(cursor, unit, &norm, [&](int row, float* y) {
    give(&scratch().between[row], rounded(y[0] / (1 + expf(-y[0])) * y[1]), mark(layer, GATED));
  });
}

DEVICE void down(int layer, Cursor& cursor) {
  if (idle(Down::TILES)) return;
  Down product;
  product.begin(weights_of(layer).down_scale);
  Early before(product.row >= 0 ? &scratch().x[0][product.row] : nullptr, mark(layer, PROJECTED));
  const float unit = put_row<DOWN_CODES, WIDE>(scratch().between, mark(layer, GATED), nullptr);
  product.finish(cursor, unit, nullptr, [&](int row, float* y) {
    if (layer + 1 < LAYERS)
      give(&scratch().x[1][row], rounded(y[0] + before.value()), mark(layer, PASSED));
    else
      shared().given.out[row] = narrowed(y[0] + before.value());
  });
}

// What every block begins with; then some warps bring weights, and the others run the layers.
DEVICE void prepare() {
  const int thread = thread_index();
  if (thread == 0) {
    const int given = *shared().given.limit, tokens = given < PAGES * PAGE ? given : PAGES * PAGE - 1;
    shared().limit = tokens;
    shared().span = larger(((tokens + PARTS - 2) / (PARTS - 1) + 7) / 8 * 8, LEAST_SPAN);
    shared().parts = (tokens + shared().span - 1) / shared().span;
    for (int i = 0; i < SLOTS; i++) open_gate(&shared().filled[i], BRINGERS), open_gate(&shared().emptied[i], WARPS);
  }
  if (thread < THREADS) {
    for (int i = thread; i < PAGES; i += THREADS) shared().table[i] = shared().given.table[i];
    for (int i = thread; i < HALF_ROPE; i += THREADS)
      shared().cos[i] = shared().given.cos[i], shared().sin[i] = shared().given.sin[i];
  }
  sync_everything();
}

// What is done where there is no token: nothing, and nobody has to wait.
DEVICE void pass() {
  if (block_index() == 0)
    for (int i = thread_index(); i < DIM; i += EVERYBODY) shared().given.out[i] = shared().given.x[i];
}

DEVICE void note_time(int layer, Phase phase) {
  if (TRACED && thread_index() == 0) scratch().clock[mark(layer, phase) * BLOCKS + block_index()] = clock_now();
}

DEVICE void run_layers() {
  Cursor cursor;
  note_time(-1, PASSED);
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    make_queries(layer, cursor);
    note_time(layer, QUERIED);
    absorb(layer, cursor);
    note_time(layer, ABSORBED);
    if (block_index() == BLOCKS - 1) attend_to_new(layer);
    attend(layer);
    note_time(layer, ATTENDED);
    expand(layer, cursor);
    note_time(layer, EXPANDED);
    project(layer, cursor);
    note_time(layer, PROJECTED);
    gate_up(layer, cursor);
    note_time(layer, GATED);
    down(layer, cursor);
    note_time(layer, PASSED);
  }
}
