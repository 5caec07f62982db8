// Orthogonalising matrices block by block: all products of a block run in the caches, and there is one call for all.
// The same as rule/orthogonalize.py. The Gram matrix is symmetric, and so are all products but the last, of polynomials
// of it: they take half of the time, since only what lies on and below the diagonal is multiplied.

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64, TILE = 3;  // of a vector; vectors of a row that the last product adds up in registers
#elif defined(__AVX__)
constexpr int64_t BYTES = 32, TILE = 2;
#else
constexpr int64_t BYTES = 16, TILE = 2;
#endif
extern "C" int vector_bytes() { return BYTES; }
typedef R V __attribute__((vector_size(BYTES), aligned(BYTES)));
constexpr int64_t WIDTH = BYTES / sizeof(R), ROWS = BYTES == 64 ? 8 : 4;  // rows that are added up in registers
constexpr int64_t COLUMNS = 128;  // of X that stay in the first cache
static inline int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

struct Left {  // A [n, depth] in A B, as it lies in memory
  const R* memory;
  int64_t row, column;  // strides
  const R* at(int64_t i, int64_t k) const { return memory + i * row + k * column; }
};

struct Sum {  // alpha A B + beta D; D has the strides of the result
  R alpha = 1, beta = 0;
  const R* d = nullptr;
  Sum from(int64_t offset) const { return {alpha, beta, d ? d + offset : d}; }
};

template <int64_t MANY, int64_t VECTORS>
static inline void tile(int64_t depth, Left a, const R* b, R* c, int64_t stride, Sum sum) {
  V sums[MANY][VECTORS] = {};
  for (int64_t k = 0; k < depth; k++) {
    const V* line = (const V*)(b + k * stride);
    for (int64_t i = 0; i < MANY; i++)
      for (int64_t j = 0; j < VECTORS; j++) sums[i][j] += *a.at(i, k) * line[j];
  }
  for (int64_t i = 0; i < MANY; i++)
    for (int64_t j = 0; j < VECTORS; j++) {
      const int64_t at = i * stride + j * WIDTH;
      const V scaled = sum.alpha * sums[i][j];
      *(V*)(c + at) = sum.d ? scaled + sum.beta * *(const V*)(sum.d + at) : scaled;
    }
}

// C, n rows of so many vectors; B and C have rows of the same stride, a multiple of WIDTH, and are aligned.
template <int64_t VECTORS>
static void strip(int64_t n, int64_t depth, Left a, const R* b, R* c, int64_t stride, Sum sum) {
  int64_t i = 0;
  auto rows = [&](int64_t begin) { return Left{a.at(begin, 0), a.row, a.column}; };
  for (; i + ROWS <= n; i += ROWS) tile<ROWS, VECTORS>(depth, rows(i), b, c + i * stride, stride, sum.from(i * stride));
  if (ROWS > 4 && i + 4 <= n) tile<4, VECTORS>(depth, rows(i), b, c + i * stride, stride, sum.from(i * stride)), i += 4;
  for (; i < n; i++) tile<1, VECTORS>(depth, rows(i), b, c + i * stride, stride, sum.from(i * stride));
}

// C = A B, n rows of so many columns, a multiple of WIDTH.
static void product(int64_t n, int64_t depth, int64_t columns, Left a, const R* b, R* c, int64_t stride) {
  int64_t j = 0;
  for (; j + TILE * WIDTH <= columns; j += TILE * WIDTH) strip<TILE>(n, depth, a, b + j, c + j, stride, {});
  for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH) strip<2>(n, depth, a, b + j, c + j, stride, {});
  if (j < columns) strip<1>(n, depth, a, b + j, c + j, stride, {});
}

// The same for a C [n, n] that is known to be symmetric: its diagonal and what lies below.
static void lower(int64_t n, int64_t depth, Left a, const R* b, R* c, int64_t stride, Sum sum) {
  for (int64_t j = 0; j < n;) {
    const int64_t at = j * stride + j;
    const Left rows{a.at(j, 0), a.row, a.column};
    if (n - j > WIDTH) strip<2>(n - j, depth, rows, b + j, c + at, stride, sum.from(at)), j += 2 * WIDTH;
    else strip<1>(n - j, depth, rows, b + j, c + at, stride, sum.from(at)), j += WIDTH;
  }
}

// Transposes WIDTH vectors: swaps two squares of S by S in each of 2 S by 2 S, then smaller ones.
template <int64_t S> static inline void exchange(V* v) {
  for (int64_t i = 0; i < WIDTH; i++) {
    if (i & S) continue;
    V &a = v[i], &b = v[i + S], c;
#ifdef __clang__
    for (int64_t l = 0; l < WIDTH; l++) c[l] = l & S ? b[l - S] : a[l];
    for (int64_t l = 0; l < WIDTH; l++) b[l] = l & S ? b[l] : a[l + S];
#else
    typedef std::conditional_t<sizeof(R) == 4, int32_t, int64_t> I;
    typedef I Mask __attribute__((vector_size(BYTES)));
    Mask low, high;
    for (int64_t l = 0; l < WIDTH; l++) low[l] = l & S ? WIDTH + l - S : l, high[l] = l & S ? WIDTH + l : l + S;
    c = __builtin_shuffle(a, b, low), b = __builtin_shuffle(a, b, high);
#endif
    a = c;
  }
  if constexpr (S > 1) exchange<S / 2>(v);
}

// The transpose of WIDTH rows, of which the first so many are there and the rest 0.
static inline void transpose(const R* from, int64_t stride, int64_t rows, R* to, int64_t to_stride) {
  V v[WIDTH] = {};
  for (int64_t i = 0; i < std::min(rows, WIDTH); i++) v[i] = *(const V*)(from + i * stride);
  exchange<WIDTH / 2>(v);
  for (int64_t i = 0; i < WIDTH; i++) *(V*)(to + i * to_stride) = v[i];
}

// What lies above the diagonal from what lies below.
static void mirror(int64_t n, R* c, int64_t stride) {
  for (int64_t j = 0; j < n; j += WIDTH)
    for (int64_t i = j + WIDTH; i < n; i += WIDTH)
      transpose(c + i * stride + j, stride, n - i, c + j * stride + i, stride);
}

// C = alpha A B + beta D of polynomials of one symmetric matrix, which commute.
static void commuting(int64_t n, const R* a, const R* b, R* c, int64_t stride, Sum sum = {}) {
  lower(n, n, {a, stride, 1}, b, c, stride, sum);
  mirror(n, c, stride);
}

struct Matrix {  // X, [rows, columns] with rows <= columns, in blocks of r rows; zeros fill the last one
  R* memory;
  int64_t rows, columns, row, column, r;  // row, column: strides in memory
  int64_t width() const { return padded(r); }
  int64_t chunk() const { return padded(std::min(columns, COLUMNS)); }
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
  R *gram, *next, *factor, *total, *first, *lines, *out;
  void fit(const Matrix& x) {
    const int64_t square = x.r * x.width(), tall = x.width() * x.chunk();
    memory.resize(BYTES + 5 * square + 2 * tall);
    R* at = (R*)((uintptr_t(memory.data()) + 63) / 64 * 64);
    for (R** part : {&gram, &next, &factor, &total, &first}) *part = at, at += square;
    lines = at, out = at + tall;
    std::fill(lines, lines + tall, R(0));  // what is not taken stays zero
  }
};

// work(coordinate of X_b, its place in a copy of columns from begin to end that has the same order in memory).
template <class Work>
static void over(const Matrix& x, int64_t number, int64_t begin, int64_t end, R* copy, Work work) {
  const int64_t used = std::min(x.r, x.rows - number * x.r);
  R* memory = x.memory + number * x.r * x.row + begin * x.column;
  const int64_t lines = x.row == 1 ? end - begin : used, length = x.row == 1 ? used : end - begin;
  const int64_t apart = x.row == 1 ? x.column : x.row, stride = x.row == 1 ? x.width() : x.chunk();
  for (int64_t i = 0; i < lines; i++)
    for (int64_t k = 0; k < length; k++) work(memory[i * apart + k], copy[i * stride + k]);
}

// work(begin, end) for a few columns at a time, which then lie in room.lines.
template <class Work> static void by_columns(const Matrix& x, int64_t number, Room& room, Work work) {
  for (int64_t begin = 0; begin < x.columns; begin += COLUMNS) {
    const int64_t end = std::min(begin + COLUMNS, x.columns);
    over(x, number, begin, end, room.lines, [](const R& from, R& to) { to = from; });
    work(begin, end);
  }
}

// Q_b of X_b.
static Sums polar(const Matrix& x, int64_t number, const Settings& s, R* q, Room& room) {
  const int64_t r = x.r, w = x.width(), square = r * w;
  const double tiny = std::numeric_limits<R>::min();
  R *gram = room.gram, *next = room.next, *factor = room.factor, *total = room.total;
  by_columns(x, number, room, [&](int64_t begin, int64_t end) {
    const R* xt = room.lines;
    if (x.row != 1) {
      for (int64_t k = 0; k < end - begin; k += WIDTH)
        for (int64_t i = 0; i < r; i += WIDTH)
          transpose(room.lines + i * x.chunk() + k, x.chunk(), r - i, room.out + k * w + i, w);
      xt = room.out;
    }
    lower(r, end - begin, {xt, 1, w}, xt, gram, w, {1, 1, begin ? gram : nullptr});
  });
  mirror(r, gram, w);
  Sums sums;
  for (int64_t i = 0; i < r; i++) sums.square += gram[i * w + i];
  if (sums.square < tiny) sums.square = tiny;
  const R inverse = R(1 / sums.square);
  for (int64_t i = 0; i < square; i++) room.first[i] = gram[i] *= inverse;
  for (int64_t step = 0; step < s.iterations; step++) {
    commuting(r, gram, gram, factor, w, {R(s.c), R(s.b), gram});
    for (int64_t i = 0; i < r; i++) factor[i * w + i] += R(s.a);
    if (step == 0) std::copy(factor, factor + square, total);
    else commuting(r, factor, total, next, w), std::swap(total, next);
    if (step + 1 == s.iterations) break;
    commuting(r, factor, gram, next, w);
    commuting(r, next, factor, gram, w);
  }
  std::copy(total, total + square, q);
  // Symmetric to the last bit, so that X and X^T in memory move alike.
  for (int64_t i = 0; i < r; i++)
    for (int64_t j = i + 1; j < std::min(r, (i / WIDTH + 1) * WIDTH); j++) q[i * w + j] = q[j * w + i];
  commuting(r, q, room.first, next, w);
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
    const int64_t columns = end - begin;
    if (x.row == 1) product(columns, x.r, w, {room.lines, w, 1}, q, room.out, w);
    else product(x.r, x.r, padded(columns), {q, w, 1}, room.lines, room.out, x.chunk());
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
        room.fit(x);
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
