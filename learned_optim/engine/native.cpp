// The passes of a step over many tensors. native_library.py fills the gaps with what the rule says.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

struct bf16 { uint16_t raw; };
struct half { uint16_t raw; };  // not _Float16: some compilers have none, and GCC 12 makes no SIMD code of it
%(types)s
constexpr int64_t CHUNK = 1 << 14, LANES = 16, FEW = 1 << 17;

// Of the OpenMP library that torch has loaded, whichever it is: a second one would fight with it for the cores.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

template <class To, class From> static inline To bits(From x) { To y; std::memcpy(&y, &x, sizeof y); return y; }
template <class T> static inline R load(const T& x) { return R(x); }
static inline R load(const bf16& x) { return R(bits<float>(uint32_t(x.raw) << 16)); }
static inline R load(const half& x) {
  const uint32_t sign = uint32_t(x.raw & 0x8000) << 16, rest = uint32_t(x.raw & 0x7fff) << 13;
  const uint32_t scaled = bits<uint32_t>(bits<float>(rest) * 0x1p112f);  // exponents are biased by 15, not by 127
  return R(bits<float>(sign | scaled | (rest >= 0x0f800000 ? 0x7f800000 : 0)));
}
template <class T> static inline void store(T& to, R x) { to = T(x); }
static inline void store(bf16& to, R value) {
  const float x = float(value);
  const uint32_t b = bits<uint32_t>(x);
  to.raw = uint16_t(x != x ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline void store(half& to, R value) {
  const uint32_t b = bits<uint32_t>(float(value)), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  const uint32_t normal = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;  // the largest round to infinity
  const uint32_t small = bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000;  // a sum that has steps of 2^-24
  const uint32_t large = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  to.raw = uint16_t(sign | (rest < 0x38800000 ? small : rest < 0x47800000 ? normal : large));
}

static void measure_chunk(int64_t n, const P* param, const G* grad, %(few_arguments)s, const R* s, double* out) {
  R lanes[%(sums)d][LANES] = {};
  int64_t begin = 0;
  for (; begin + LANES <= n; begin += LANES)
    for (int64_t j = 0; j < LANES; j++) {
      const int64_t i = begin + j;
      %(few)s
      %(measure)s
      %(adds)s
    }
  for (int64_t i = begin, j = 0; i < n; i++, j++) {
    %(few)s
    %(measure)s
    %(adds)s
  }
  for (int k = 0; k < %(sums)d; k++) {
    out[k] = 0;
    for (int64_t j = 0; j < LANES; j++) out[k] += lanes[k][j];
  }
}

template <bool DIRECTION, class T>
static void apply_chunk(int64_t n, T* target, const P* param, const G* grad, %(arguments)s, const R* s, const R* c,
                        const R* w) {
  INDEPENDENT
  for (int64_t i = 0; i < n; i++) {
    const R p = load(param[i]), g = load(grad[i]);
    %(loads)s
    %(apply)s
    if (DIRECTION) store(target[i], %(direction)s); else store(target[i], %(moved)s);
    %(stores)s
  }
}

template <class Work> static void in_chunks(int64_t count, const int64_t* sizes, int threads, Work work) {
  std::vector<int64_t> first(count + 1);
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) {
    first[k + 1] = first[k] + (sizes[k] + CHUNK - 1) / CHUNK;
    total += sizes[k];
  }
  std::atomic<int64_t> next{0};
  auto run = [&] {
    for (int64_t number; (number = next++) < first[count];) {
      const int64_t k = std::upper_bound(first.begin(), first.end(), number) - first.begin() - 1;
      const int64_t begin = (number - first[k]) * CHUNK;
      work(k, number, begin, std::min(CHUNK, sizes[k] - begin));
    }
  };
  if (threads > 1 && total > FEW && GOMP_parallel)
    GOMP_parallel([](void* data) { (*(decltype(run)*)data)(); }, &run, threads, 0);
  else
    run();
}

extern "C" void measure(int64_t count, const int64_t* sizes, const int64_t* addresses, const double* scalars,
                        const int64_t* which, double* sums, int threads) {
  int64_t chunks = 0;
  for (int64_t k = 0; k < count; k++) chunks += (sizes[k] + CHUNK - 1) / CHUNK;
  std::vector<double> parts(chunks * %(sums)d);
  in_chunks(count, sizes, threads, [&](int64_t k, int64_t number, int64_t begin, int64_t n) {
    const int64_t* q = addresses + k * %(stride)d;
    R s[%(scalars)d];
    for (int i = 0; i < %(scalars)d; i++) s[i] = R(scalars[which[k] * %(scalars)d + i]);
    measure_chunk(n, (const P*)q[0] + begin, (const G*)q[1] + begin, %(few_pointers)s, s, &parts[number * %(sums)d]);
  });
  const double* part = parts.data();
  for (int64_t k = 0; k < count; k++) {
    for (int i = 0; i < %(sums)d; i++) sums[i * count + k] = 0;
    for (int64_t begin = 0; begin < sizes[k]; begin += CHUNK, part += %(sums)d)
      for (int i = 0; i < %(sums)d; i++) sums[i * count + k] += part[i];
  }
}

extern "C" void apply(int64_t count, const int64_t* sizes, const int64_t* addresses, const int64_t* targets,
                      const double* scalars, const int64_t* which, const double* coefficients, int64_t columns,
                      const double* weights, int threads) {
  R w[%(weights)d];
  for (int i = 0; i < %(weights)d; i++) w[i] = R(weights[i]);
  in_chunks(count, sizes, threads, [&](int64_t k, int64_t, int64_t begin, int64_t n) {
    const int64_t* q = addresses + k * %(stride)d;
    R s[%(scalars)d], c[%(rows)d];
    for (int i = 0; i < %(scalars)d; i++) s[i] = R(scalars[which[k] * %(scalars)d + i]);
    for (int i = 0; i < %(rows)d; i++) c[i] = R(coefficients[i * columns + k]);
    const P* p = (const P*)q[0] + begin;
    const G* g = (const G*)q[1] + begin;
    if (targets) apply_chunk<true>(n, (R*)targets[k] + begin, p, g, %(pointers)s, s, c, w);
    else apply_chunk<false>(n, (P*)q[0] + begin, p, g, %(pointers)s, s, c, w);
  });
}

// Parameters that wait for their directions, of the arithmetic's type, to be orthogonalised.
extern "C" void move_along(int64_t count, const int64_t* sizes, const int64_t* params, const int64_t* directions,
                           const double* scalars, const int64_t* which, const double* decays, int threads) {
  in_chunks(count, sizes, threads, [&](int64_t k, int64_t, int64_t begin, int64_t n) {
    R s[%(scalars)d];
    for (int i = 0; i < %(scalars)d; i++) s[i] = R(scalars[which[k] * %(scalars)d + i]);
    const R decay = R(decays[k]);
    P* target = (P*)params[k] + begin;
    const R* direction = (const R*)directions[k] + begin;
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
      const R p = load(target[i]), d = direction[i];
      %(move)s
      store(target[i], %(there)s);
    }
  });
}
%(orthogonalize)s
%(heads)s
