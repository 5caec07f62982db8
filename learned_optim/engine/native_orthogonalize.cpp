// Orthogonalising matrices block by block: all products of a block run in the caches, and there is one call for all.
// The same as rule/orthogonalize.py, with X^T in place of X: all products then run along rows of memory.

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64, TILE = 4;  // of a vector; vectors of a row that are added up in registers
#elif defined(__AVX__)
constexpr int64_t BYTES = 32, TILE = 2;
#else
constexpr int64_t BYTES = 16, TILE = 2;
#endif
extern "C" int vector_bytes() { return BYTES; }
typedef R V __attribute__((vector_size(BYTES), aligned(BYTES)));
constexpr int64_t WIDTH = BYTES / sizeof(R), ROWS = 4, COLUMNS = 128;  // columns of X that stay in the first cache

// C[i, j] = alpha sum_k A[i, k] B[k, j] + beta D[i, j] for n rows; widths are multiples of WIDTH, memory is aligned.
template <int64_t MANY, int64_t VECTORS>
static inline void tile(int64_t depth, const R* a, int64_t row, int64_t column, const R* b, int64_t width, R* c, R alpha,
                        R beta, const R* d) {
  V sums[MANY][VECTORS] = {};
  for (int64_t k = 0; k < depth; k++) {
    const V* line = (const V*)(b + k * width);
    for (int64_t i = 0; i < MANY; i++)
      for (int64_t j = 0; j < VECTORS; j++) sums[i][j] += a[i * row + k * column] * line[j];
  }
  for (int64_t i = 0; i < MANY; i++)
    for (int64_t j = 0; j < VECTORS; j++) {
      V* target = (V*)(c + i * width) + j;
      *target = d ? alpha * sums[i][j] + beta * *((const V*)(d + i * width) + j) : alpha * sums[i][j];
    }
}

template <int64_t VECTORS>
static void strip(int64_t n, int64_t depth, const R* a, int64_t row, int64_t column, const R* b, int64_t width, R* c,
                  R alpha, R beta, const R* d) {
  int64_t i = 0;
  for (; i + ROWS <= n; i += ROWS)
    tile<ROWS, VECTORS>(depth, a + i * row, row, column, b, width, c + i * width, alpha, beta, d ? d + i * width : d);
  for (; i < n; i++)
    tile<1, VECTORS>(depth, a + i * row, row, column, b, width, c + i * width, alpha, beta, d ? d + i * width : d);
}

static void product(int64_t n, int64_t depth, const R* a, int64_t row, int64_t column, const R* b, int64_t width, R* c,
                    R alpha = 1, R beta = 0, const R* d = nullptr) {
  int64_t left = width / WIDTH, j = 0;
  for (; left >= TILE; left -= TILE, j += TILE * WIDTH)
    strip<TILE>(n, depth, a, row, column, b + j, width, c + j, alpha, beta, d ? d + j : d);
  for (; left > 0; left--, j += WIDTH)
    strip<1>(n, depth, a, row, column, b + j, width, c + j, alpha, beta, d ? d + j : d);
}

struct Matrix {  // X, [rows, columns] with rows <= columns, in blocks of r rows; zeros fill the last one
  R* memory;
  int64_t rows, columns, row, column, r;  // row, column: strides in memory
  int64_t width() const { return (r + WIDTH - 1) / WIDTH * WIDTH; }
  int64_t blocks() const { return (rows + r - 1) / r; }
};

struct Settings {
  double a, b, c, damping, threshold;
  int64_t iterations;
};

struct Sums {  // of a block, or of a matrix
  double square = 0, of_o = 0, inner = 0;  // |X_b|^2, |o_b|^2, <X_b, o_b>
};

struct Room {  // what a thread needs for one block
  std::vector<R> memory;
  R *gram, *next, *factor, *total, *first, *xt, *out;
  void fit(int64_t square, int64_t tall) {
    memory.resize(BYTES + 5 * square + 2 * tall);
    R* at = (R*)((uintptr_t(memory.data()) + 63) / 64 * 64);
    for (R** part : {&gram, &next, &factor, &total, &first}) *part = at, at += square;
    xt = at, out = at + tall;
    std::fill(xt, xt + tall, R(0));  // what is not taken stays zero
  }
};

// work(coordinate of X_b, its place in the transpose) for columns from begin to end.
template <class Work>
static void over(const Matrix& x, int64_t number, int64_t begin, int64_t end, R* transposed, Work work) {
  const int64_t used = std::min(x.r, x.rows - number * x.r), w = x.width();
  R* memory = x.memory + number * x.r * x.row;
  if (x.row == 1)
    for (int64_t k = begin; k < end; k++)
      for (int64_t i = 0; i < used; i++) work(memory[k * x.column + i], transposed[(k - begin) * w + i]);
  else
    for (int64_t from = begin; from < end; from += WIDTH)  // by cache lines of either
      for (int64_t i = 0; i < used; i++)
        for (int64_t k = from; k < std::min(from + WIDTH, end); k++)
          work(memory[i * x.row + k], transposed[(k - begin) * w + i]);
}

// work(begin, end) for a few columns at a time, whose transpose lies in room.xt.
template <class Work> static void by_columns(const Matrix& x, int64_t number, Room& room, Work work) {
  for (int64_t begin = 0; begin < x.columns; begin += COLUMNS) {
    const int64_t end = std::min(begin + COLUMNS, x.columns);
    over(x, number, begin, end, room.xt, [](const R& from, R& to) { to = from; });
    work(begin, end);
  }
}

// Q_b of X_b.
static Sums polar(const Matrix& x, int64_t number, const Settings& s, R* q, Room& room) {
  const int64_t r = x.r, w = x.width(), square = r * w;
  const double tiny = std::numeric_limits<R>::min();
  R *gram = room.gram, *next = room.next, *factor = room.factor, *total = room.total;
  by_columns(x, number, room, [&](int64_t begin, int64_t end) {
    product(r, end - begin, room.xt, 1, w, room.xt, w, gram, 1, 1, begin ? gram : nullptr);
  });
  Sums sums;
  for (int64_t i = 0; i < r; i++) sums.square += gram[i * w + i];
  if (sums.square < tiny) sums.square = tiny;
  const R inverse = R(1 / sums.square);
  for (int64_t i = 0; i < square; i++) room.first[i] = gram[i] *= inverse;
  for (int64_t step = 0; step < s.iterations; step++) {
    product(r, r, gram, w, 1, gram, w, factor, R(s.c), R(s.b), gram);
    for (int64_t i = 0; i < r; i++) factor[i * w + i] += R(s.a);
    if (step == 0) std::copy(factor, factor + square, total);
    else product(r, r, factor, w, 1, total, w, next), std::swap(total, next);
    if (step + 1 == s.iterations) break;
    product(r, r, factor, w, 1, gram, w, next);
    product(r, r, next, w, 1, factor, w, gram);
  }
  std::copy(total, total + square, q);
  product(r, r, q, w, 1, room.first, w, next);
  double diagonal = 0;
  for (int64_t i = 0; i < r; i++) {
    diagonal += next[i * w + i];
    for (int64_t j = 0; j < r; j++) sums.of_o += double(next[i * w + j]) * q[i * w + j];
  }
  sums.inner = diagonal * std::sqrt(sums.square);
  return sums;
}

struct Lengths {  // of a matrix: S_b = along / |X_b| Q_b + rest I
  double damped, along, rest;
};

static Lengths lengths(const Sums& sums, const Settings& s, double share) {
  const double tiny = std::numeric_limits<R>::min();
  const double length = std::sqrt(sums.square), of_o = std::sqrt(sums.of_o < tiny ? tiny : sums.of_o);
  const double cosine = sums.inner / (length * of_o), low = cosine < 1e-3 ? 1e-3 : cosine, rest = 1 - share;
  const double damped = std::pow((low > s.threshold ? s.threshold : low) / s.threshold, s.damping * share);
  const double of_e = rest * rest + 2 * rest * share * cosine + share * share;
  const double size = damped / std::sqrt(of_e < tiny ? tiny : of_e);
  return {damped, size * share * length / of_o, size * rest};
}

// X_b becomes S_b X_b, but stays 0 where it is: what never had a gradient, such as a pruned weight, does not move.
static void move(const Matrix& x, int64_t number, const Lengths& by, double square, R* q, Room& room) {
  const int64_t w = x.width();
  const R along = R(by.along / std::sqrt(square));
  for (int64_t i = 0; i < x.r * w; i++) q[i] *= along;
  if (by.rest)
    for (int64_t i = 0; i < x.r; i++) q[i * w + i] += R(by.rest);
  by_columns(x, number, room, [&](int64_t begin, int64_t end) {
    product(end - begin, x.r, room.xt, w, 1, q, w, room.out);
    over(x, number, begin, end, room.out, [](R& to, const R& from) { to = to == 0 ? R(0) : from; });
  });
}

// Directions become orthogonal in place. A matrix's bits depend on that matrix alone.
extern "C" void orthogonalize(int64_t count, const int64_t* directions, const int64_t* layouts, const double* settings,
                              int64_t iterations, const double* shares, double* factors, int threads) {
  const Settings s{settings[0], settings[1], settings[2], settings[3], settings[4], iterations};
  std::vector<Matrix> xs;
  std::vector<int64_t> owner, number, place;  // of each block: its matrix, its number there, where its Q_b begins
  int64_t squares = 0, total = 0;
  for (int64_t k = 0; k < count; k++) {
    const int64_t* q = layouts + k * 5;
    xs.push_back({(R*)directions[k], q[0], q[1], q[2], q[3], q[4]});
    total += q[0] * q[1];
    for (int64_t b = 0; b < xs[k].blocks(); b++, squares += xs[k].r * xs[k].width())
      owner.push_back(k), number.push_back(b), place.push_back(squares);
  }
  const int64_t blocks = owner.size();
  std::vector<R> memory(squares + BYTES);
  R* const polars = (R*)((uintptr_t(memory.data()) + 63) / 64 * 64);
  std::vector<Sums> of_blocks(blocks), of_matrices(count);
  auto over_blocks = [&](auto work) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
      Room room;
      for (int64_t i; (i = next++) < blocks;) {
        const Matrix& x = xs[owner[i]];
        room.fit(x.r * x.width(), std::min(x.columns, COLUMNS) * x.width());
        work(i, x, room);
      }
    };
    if (threads > 1 && total > FEW / 8 && GOMP_parallel)
      GOMP_parallel([](void* data) { (*(decltype(run)*)data)(); }, &run, threads, 0);
    else
      run();
  };
  over_blocks([&](int64_t i, const Matrix& x, Room& room) {
    of_blocks[i] = polar(x, number[i], s, polars + place[i], room);
  });
  for (int64_t i = 0; i < blocks; i++) {
    Sums& sums = of_matrices[owner[i]];
    sums.square += of_blocks[i].square, sums.of_o += of_blocks[i].of_o, sums.inner += of_blocks[i].inner;
  }
  std::vector<Lengths> by;
  for (int64_t k = 0; k < count; k++) {
    by.push_back(lengths(of_matrices[k], s, shares[k]));
    factors[k] = by[k].damped;
  }
  over_blocks([&](int64_t i, const Matrix& x, Room& room) {
    move(x, number[i], by[owner[i]], of_blocks[i].square, polars + place[i], room);
  });
}
