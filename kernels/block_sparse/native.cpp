// Block-sparse attention on a CPU, the twin of the Triton kernel; compiled and called by native.py.
//
// For every query block, online softmax (Milakov and Gimelshein 2018, FlashAttention) over its key blocks, 64
// keys at a time: scores of a strip of rows, their powers of two, their product with V, all in the
// first-level cache. Keys and values are first packed by panels of 16 keys, so that the blocks of a list need
// not be gathered. With a tail (tail.py) their sums over each panel are taken on the way, and a query block's
// pooled keys are made of these when its list is at its end. Where the processor has AMX, bfloat16 inputs stay
// bfloat16 and its tiles compute the products. In the format "int8" (quantized.py) those of queries and keys are
// of int8, whatever computes the rest.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES
#endif
#if defined(__x86_64__) && defined(__linux__)
#define X86  // instructions for int8 that the processor is asked for when it runs
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, N = 4;  // floats of a vector; vectors of a row that are computed at once
#elif defined(__AVX__)
constexpr int W = 8, N = 2;
#else
constexpr int W = 4, N = 4;
#endif
constexpr int M = 6;                   // rows of a strip: M x N accumulators fill the registers
constexpr int PANEL = 16, PANELS = 4;  // keys of a panel, panels at a time
constexpr int KEYS = PANEL * PANELS, VECTORS = KEYS / W;

typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));

inline vec load(const float* p) { return *(const loose*)p; }
inline void store(float* p, vec x) { *(loose*)p = x; }
inline vec splat(float x) { return x - vec{}; }  // x + 0 would be an addition
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// 2^x for x below 127 to a relative error of 1e-7, NaN for NaN. What would vanish in any sum with 1 is 0: denormal
// numbers are slow.
inline vec exp2(vec x) {
  constexpr float magic = 12582912.0f + 127;  // 1.5 * 2^23: its low bits become round(x) + 127
  const vec shifted = x + magic;
  const vec f = x - (shifted - magic);
  vec p = f * 1.53533590e-04f + 1.33988762e-03f;
  p = p * f + 9.61843692e-03f;
  p = p * f + 5.55033237e-02f;
  p = p * f + 2.40226477e-01f;
  p = p * f + 6.93147182e-01f;
  p = p * f + 1.0f;
  return x < -80.0f ? vec{} : p * (vec)((ivec)shifted << 23);  // the product of a NaN is one
}

template <int HALF, size_t... I>
inline vec swapped(vec x, std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, x, int(I ^ HALF)...);
#else  // GCC has the other since version 12
  return __builtin_shuffle(x, ivec{int32_t(I ^ HALF)...});
#endif
}

template <int HALF = W / 2>
inline float largest(vec x) {
  if constexpr (HALF == 0)
    return x[0];
  else
    return largest<HALF / 2>(larger(x, swapped<HALF>(x, std::make_index_sequence<W>())));
}

inline float greatest(vec x) { return largest<W / 2>(x); }

inline float total(vec x) {
  float sum = 0;
  for (int i = 0; i < W; i++) sum += x[i];
  return sum;
}

}  // namespace

// As in native.py. Strides of batch, head and token count elements.
struct Job {
  const void *q, *k, *v;
  void *k_packed, *v_packed, *out;
  float* lse;  // or null
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  const int32_t *full_start, *full_count, *full_index, *part_start, *part_count, *part_index, *part_tile;
  const int32_t *group_of_plane, *row_order;
  const uint8_t* tiles;
  const int32_t* text_valid;  // or null
  const uint8_t* dropped;     // of each mask group and query block, (groups, group_blocks), or null: no tail
  float *sums, *group_sums;   // of keys and values, (batch, heads, panels or groups, 2, stride)
  int64_t groups, group_blocks, part_blocks;
  int64_t batch, heads, seq_len, kv_len, dim, block_q, block_k, text_start, text_stop, threads;
  float factor;  // of scores: scale * log2(e)
  int64_t group, products;  // in int8: keys that share a scale, and which instructions multiply (`Products`)
  float* channels;          // of each plane, (CHANNELS, stride), what `Channel` names
  float pv_threshold;       // in base 2, below which no value is added (reference.py); infinite: none is left out
};

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t sum_stride(const Job& job) { return rounded(job.dim, 16); }
inline int64_t panels_of(const Job& job) { return ceil_div(job.kv_len, job.block_k) * (job.block_k / PANEL); }
inline int64_t valid_text_end(const Job& job, int64_t plane) {
  return job.text_valid ? job.text_start + job.text_valid[plane / job.heads] : job.text_stop;
}

struct Panel {
  int64_t index;        // of its keys among all panels
  const uint8_t* bits;  // of row 0, or null: all attended
  uint16_t keep;        // keys that any row may attend: not padded text
  const float* bias;    // of its scores in base 2, of pooled keys, or null

  bool full() const { return !bits && keep == 0xffff && !bias; }
};

// One thread's memory for a query block.
struct Scratch {
  float *out, *top, *sum, *scores;  // (rows, width), (rows), (rows, W), (16, KEYS)
  float *q_scale, *shift;           // of rows in int8: of their codes, and what is added to scores in base 2
  float *bias, *added, *means;      // of pooled keys: (KEYS), (2, stride), (2, PANEL, dim)
  uint16_t *q, *p, *v;              // bfloat16: (rows, depth), (16, KEYS), the values of KEYS keys
  int64_t first_slot;               // of the PANELS panels that it packs pooled keys into

  Scratch(int64_t rows, int64_t width, int64_t depth, int64_t stride, int64_t first_slot)
      : first_slot(first_slot) {
    const int64_t floats[] = {rows * width, rounded(rows, 16), rows * W,          16 * KEYS,
                              KEYS,         2 * stride,        2 * PANEL * stride, rounded(rows, 16),
                              rounded(rows, 16)};
    const int64_t halves[] = {rows * depth, 16 * KEYS, KEYS * width};
    int64_t bytes = 0;
    for (int64_t n : floats) bytes += 4 * n;
    for (int64_t n : halves) bytes += rounded(2 * n, 64);
    char* at = (char*)aligned_alloc(64, rounded(bytes, 64));
    float** f[] = {&out, &top, &sum, &scores, &bias, &added, &means, &q_scale, &shift};
    for (int i = 0; i < 9; i++) *f[i] = (float*)at, at += 4 * floats[i];
    uint16_t** h[] = {&q, &p, &v};
    for (int i = 0; i < 3; i++) *h[i] = (uint16_t*)at, at += rounded(2 * halves[i], 64);
  }
  ~Scratch() { free(out); }
  Scratch(const Scratch&) = delete;
};

// Scores as they were multiplied, of floats or of int8.
struct Floats {
  float factor;
  vec operator()(const float* scores, int i) const { return load(scores + i * W) * factor; }
};
struct Integers {
  const float* factors;  // of the row with each panel
  vec operator()(const float* scores, int i) const {
    typedef int32_t loose_ints __attribute__((vector_size(4 * W), aligned(4), may_alias));
    const ivec x = *(const loose_ints*)(scores + i * W);
    return __builtin_convertvector(x, vec) * factors[i * W / PANEL];
  }
};

// Which keys of a panel, from `i` vectors on into all, a row attends to: not 0.
inline ivec shown(const Panel& panel, int64_t row, int64_t bits_stride, int i) {
  ivec bit;
  for (int j = 0; j < W; j++) bit[j] = 1 << j;
  uint16_t bits = 0xffff;
  if (panel.bits) memcpy(&bits, panel.bits + row * bits_stride, 2);
  return (ivec{} + ((bits & panel.keep) >> (i * W % PANEL))) & bit;
}

// Scores of one row with KEYS keys to powers of two in place, below the row's largest so far. Whether one of
// them is above that by `threshold`.
template <class Scores>
__attribute__((always_inline)) inline bool soften(float* scores, const Panel* panels, bool masked,
                                                  int64_t row, int64_t bits_stride, Scores multiplied,
                                                  float threshold, float* top, float* sum, float* out,
                                                  int64_t width) {
  vec x[VECTORS];
  for (int i = 0; i < VECTORS; i++) x[i] = multiplied(scores, i);
  if (masked)
    for (int i = 0; i < VECTORS; i++) {
      const Panel& panel = panels[i * W / PANEL];
      if (panel.full()) continue;
      if (panel.bias) x[i] += load(panel.bias + i * W % PANEL);
      x[i] = shown(panel, row, bits_stride, i) != 0 ? x[i] : splat(-INFINITY);
    }
  vec most = x[0];
  for (int i = 1; i < VECTORS; i++) most = larger(x[i], most);
  const float here = largest(most);
  if (here > *top) {
    const float shrink = exp2f(*top - here);  // 0 at first
    store(sum, load(sum) * shrink);
    for (int64_t i = 0; i < width; i += W) store(out + i, load(out + i) * shrink);
    *top = here;
  }
  const float shift = *top == -INFINITY ? 0.0f : *top;
  vec added = load(sum);
  for (int i = 0; i < VECTORS; i++) {
    const vec p = exp2(x[i] - shift);
    store(scores + i * W, p);
    added += p;
  }
  store(sum, added);
  return !(here + threshold <= *top);  // of no number, and always where the threshold is infinite
}

// A finished row: its result, and its log-sum-exp where wanted.
template <class Format>
inline void finish(const Job& job, const Scratch& scratch, int64_t r, typename Format::type* out,
                   float* lse) {
  const float top = scratch.top[r], sum = total(load(scratch.sum + r * W)), inverse = 1.0f / sum;
  const float* result = scratch.out + r * Format::width(job.dim);
  if (sum == 0.0f)  // nothing attended; the result may be 0 * NaN
    memset(out, 0, sizeof(*out) * job.dim);
  else
    for (int64_t i = 0; i < job.dim; i++) out[i] = Format::converted(result[i] * inverse);
  if (!lse) return;
  const float shift = Format::INT8 ? scratch.shift[r] : 0.0f;
  *lse = sum == 0.0f ? -INFINITY : float((double(top) + log2(double(sum)) + shift) * M_LN2);
}

// -- float32 ------------------------------------------------------------------------------------------------

struct Single {
  typedef float type;
  static constexpr bool INT8 = false;
  static constexpr int64_t PART = 128;  // of a row's channels

  static int64_t width(int64_t dim) { return rounded(dim, W); }
  static int64_t depth(int64_t) { return 0; }
  static int64_t k_size(int64_t dim) { return dim * PANEL; }
  static int64_t v_size(int64_t dim) { return width(dim) * PANEL; }

  // Keys to (dim, PANEL), zero past `count` tokens.
  static void pack_keys(const Job& job, int64_t, int64_t, const float* k, int64_t stride, int64_t count,
                        float* packed) {
    if (count < PANEL) memset(packed, 0, 4 * k_size(job.dim));
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < job.dim; i++) packed[i * PANEL + j] = k[j * stride + i];
  }

  // Values to (PANEL, width), zero past `count` tokens and past dim.
  static void pack_values(const Job& job, const float* v, int64_t stride, int64_t count, float* packed) {
    memset(packed, 0, 4 * v_size(job.dim));
    for (int64_t j = 0; j < count; j++) memcpy(packed + j * width(job.dim), v + j * stride, 4 * job.dim);
  }

  // scores[m] = q[m] . k for R rows and all keys of the panels; long sums in parts, which round less
  template <int R>
  static void score(const float* q, int64_t stride, const float* const* k, int64_t dim, float* scores) {
    constexpr int at_once = N * W / PANEL;
    const float* rows[R];
    for (int m = 0; m < R; m++) rows[m] = q + m * stride;
    for (int panel = 0; panel < PANELS; panel += at_once)
      for (int64_t first = 0; first < dim; first += PART) {
        const int64_t stop = std::min(first + PART, dim);
        vec sum[R][N] = {};
        for (int64_t i = first; i < stop; i++) {
          vec keys[N];
          for (int n = 0; n < N; n++) keys[n] = load(k[panel + n * W / PANEL] + i * PANEL + n * W % PANEL);
          for (int m = 0; m < R; m++) {
            const vec x = splat(rows[m][i]);
            for (int n = 0; n < N; n++) sum[m][n] += x * keys[n];
          }
        }
        for (int m = 0; m < R; m++)
          for (int n = 0; n < N; n++) {
            float* to = scores + m * KEYS + panel * PANEL + n * W;
            store(to, first == 0 ? sum[m][n] : load(to) + sum[m][n]);
          }
      }
  }

  // out[m] += p[m] . v for R rows and C vectors of columns
  template <int R, int C>
  static void add(const float* p, const float* const* v, int64_t width, float* out) {
    vec sum[R][C] = {};
    for (int panel = 0; panel < PANELS; panel++)
      for (int j = 0; j < PANEL; j++) {
        vec values[C];
        for (int c = 0; c < C; c++) values[c] = load(v[panel] + j * width + c * W);
        for (int m = 0; m < R; m++) {
          const vec x = splat(p[m * KEYS + panel * PANEL + j]);
          for (int c = 0; c < C; c++) sum[m][c] += x * values[c];
        }
      }
    for (int m = 0; m < R; m++)
      for (int c = 0; c < C; c++) store(out + m * width + c * W, load(out + m * width + c * W) + sum[m][c]);
  }

  template <int R, int C>
  static void add_columns(const float* p, const float* const* v, int64_t column, int64_t width, float* out) {
    const float* from[PANELS];
    for (int i = 0; i < PANELS; i++) from[i] = v[i] + column;
    add<R, C>(p, from, width, out + column);
  }

  // Where the values of some panels are.
  struct Values {
    const float* of[PANELS];

    Values(const Job& job, const float* v, const Panel* panels, Scratch&) {
      for (int i = 0; i < PANELS; i++) of[i] = v + panels[i].index * v_size(job.dim);
    }
  };

  // out += scores . v for R rows
  template <int R>
  static void weigh(const float* const* v, const float* scores, int64_t wide, float* out) {
    int64_t column = 0;
    for (; column + N * W <= wide; column += N * W) add_columns<R, N>(scores, v, column, wide, out);
    if (N > 2 && wide - column == 3 * W) add_columns<R, 3>(scores, v, column, wide, out);
    if (N > 2 && wide - column == 2 * W) add_columns<R, 2>(scores, v, column, wide, out);
    if (wide - column == W) add_columns<R, 1>(scores, v, column, wide, out);
  }

  // The same for at most 16 rows from `row` on.
  static void weigh(const Job& job, const Values& values, int64_t row, int64_t rows, Scratch& scratch) {
    const int64_t wide = width(job.dim);
    const float* s = scratch.scores;
    float* out = scratch.out + row * wide;
    for (; rows >= M; rows -= M, s += M * KEYS, out += M * wide) weigh<M>(values.of, s, wide, out);
    switch (rows) {
      case 5: return weigh<5>(values.of, s, wide, out);
      case 4: return weigh<4>(values.of, s, wide, out);
      case 3: return weigh<3>(values.of, s, wide, out);
      case 2: return weigh<2>(values.of, s, wide, out);
      case 1: return weigh<1>(values.of, s, wide, out);
    }
  }

  template <int R>
  static void strip(const Job& job, const float* q, const float* const* k, const Values& values,
                    const Panel* panels, bool masked, int64_t row, Scratch& scratch) {
    const int64_t wide = width(job.dim);
    score<R>(q + row * job.q_stride[2], job.q_stride[2], k, job.dim, scratch.scores);
    bool counts = false;
    for (int m = 0; m < R; m++)
      counts |= soften(scratch.scores + m * KEYS, panels, masked, row + m, job.block_k / 8,
                       Floats{job.factor}, job.pv_threshold, scratch.top + row + m,
                       scratch.sum + (row + m) * W, scratch.out + (row + m) * wide, wide);
    if (counts) weigh<R>(values.of, scratch.scores, wide, scratch.out + row * wide);
  }

  static void begin(const Job&, int64_t, const float*, int64_t, Scratch&) {}

  // All rows of a query block with the keys of some panels.
  static void attend(const Job& job, const float* q, const float* k, const float* v, const Panel* panels,
                     bool masked, int64_t rows, Scratch& scratch) {
    const Values values(job, v, panels, scratch);
    const float* keys[PANELS];
    for (int i = 0; i < PANELS; i++) keys[i] = k + panels[i].index * k_size(job.dim);
    int64_t row = 0;
    for (; row + M <= rows; row += M) strip<M>(job, q, keys, values, panels, masked, row, scratch);
    switch (rows - row) {
      case 5: return strip<5>(job, q, keys, values, panels, masked, row, scratch);
      case 4: return strip<4>(job, q, keys, values, panels, masked, row, scratch);
      case 3: return strip<3>(job, q, keys, values, panels, masked, row, scratch);
      case 2: return strip<2>(job, q, keys, values, panels, masked, row, scratch);
      case 1: return strip<1>(job, q, keys, values, panels, masked, row, scratch);
    }
  }

  static float converted(float x) { return x; }
  static float widened(float x) { return x; }
};

// -- bfloat16 on AMX ----------------------------------------------------------------------------------------

#ifdef X86
#define BARRIER asm volatile("" ::: "memory")  // tile loads do not tell the compiler that they read memory

// All eight tiles 16 x 64 bytes while it lives; what other libraries had set before is back afterwards.
struct Configured {
  alignas(64) uint8_t before[64];

  __attribute__((target("amx-tile"))) explicit Configured(const Job&) {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_storeconfig(before);
    _tile_loadconfig(config);
  }
  __attribute__((target("amx-tile"))) ~Configured() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};
#endif

#ifdef TILES
struct Tiles {
  typedef uint16_t type;
  static constexpr bool INT8 = false;

  static int64_t width(int64_t dim) { return rounded(dim, 16); }
  static int64_t depth(int64_t dim) { return rounded(dim, 32); }
  static int64_t k_size(int64_t dim) { return depth(dim) * PANEL; }
  static int64_t v_size(int64_t dim) { return width(dim) * PANEL; }

  // Keys to (depth / 2, PANEL, 2), zero past `count` tokens and past dim.
  static void pack_keys(const Job& job, int64_t, int64_t, const type* k, int64_t stride, int64_t count,
                        type* packed) {
    memset(packed, 0, 2 * k_size(job.dim));
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < job.dim; i++) packed[(i / 2 * PANEL + j) * 2 + i % 2] = k[j * stride + i];
  }

  // Values to (width / 16, PANEL / 2, 16, 2), likewise.
  static void pack_values(const Job& job, const type* v, int64_t stride, int64_t count, type* packed) {
    memset(packed, 0, 2 * v_size(job.dim));
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < job.dim; i++)
        packed[((i / 16 * (PANEL / 2) + j / 2) * 16 + i % 16) * 2 + j % 2] = v[j * stride + i];
  }

  // The values of some panels, brought together: two panels make the 32 keys of a tile.
  struct Values {
    Values(const Job& job, const type* v, const Panel* panels, Scratch& scratch) {
      const int64_t wide = width(job.dim), half = PANEL / 2 * 32;
      for (int i = 0; i < PANELS; i++) {
        const type* from = v + panels[i].index * v_size(job.dim);
        for (int64_t c = 0; c < wide / 16; c++)
          memcpy(scratch.v + ((i / 2 * (wide / 16) + c) * 2 + i % 2) * half, from + c * half, 2 * half);
      }
    }
  };

  // out += scores . v for at most 16 rows from `row` on
  static void weigh(const Job& job, const Values&, int64_t row, int64_t rows, Scratch& scratch) {
    const int64_t wide = width(job.dim), half = PANEL / 2 * 32;
    const float* s = scratch.scores;
    for (int m = 0; m < rows; m++, s += KEYS)
      for (int i = 0; i < KEYS; i += 32) {
        const __m512bh p = _mm512_cvtne2ps_pbh((__m512)load(s + i + 16), (__m512)load(s + i));
        memcpy(scratch.p + m * KEYS + i, &p, 64);
      }
    BARRIER;
    for (int64_t c = 0; c < wide / 16; c++) {
      float* out = scratch.out + row * wide + c * 16;
      _tile_loadd(0, out, 4 * wide);
      _tile_loadd(4, scratch.p, 2 * KEYS);
      _tile_loadd(5, scratch.v + c * 2 * half, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, scratch.p + 32, 2 * KEYS);
      _tile_loadd(7, scratch.v + (wide / 16 + c) * 2 * half, 64);
      _tile_dpbf16ps(0, 6, 7);
      _tile_stored(0, out, 4 * wide);
    }
    BARRIER;
  }

  static void begin(const Job& job, int64_t, const type* q, int64_t rows, Scratch& scratch) {
    const int64_t deep = depth(job.dim);
    memset(scratch.q, 0, 2 * rounded(rows, 16) * deep);
    for (int64_t r = 0; r < rows; r++) memcpy(scratch.q + r * deep, q + r * job.q_stride[2], 2 * job.dim);
  }

  static void attend(const Job& job, const type*, const type* k, const type* v, const Panel* panels,
                     bool masked, int64_t rows, Scratch& scratch) {
    const int64_t deep = depth(job.dim), wide = width(job.dim);
    const Values values(job, v, panels, scratch);
    const type* keys[PANELS];
    for (int i = 0; i < PANELS; i++) keys[i] = k + panels[i].index * k_size(job.dim);
    for (int64_t row = 0; row < rows; row += 16) {
      BARRIER;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t i = 0; i < deep; i += 32) {
        _tile_loadd(4, scratch.q + row * deep + i, 2 * deep);
        _tile_loadd(5, keys[0] + i * PANEL, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, keys[1] + i * PANEL, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_loadd(7, keys[2] + i * PANEL, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_loadd(5, keys[3] + i * PANEL, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
      float* s = scratch.scores;
      _tile_stored(0, s, 4 * KEYS);
      _tile_stored(1, s + 16, 4 * KEYS);
      _tile_stored(2, s + 32, 4 * KEYS);
      _tile_stored(3, s + 48, 4 * KEYS);
      BARRIER;
      bool counts = false;
      for (int m = 0; m < 16 && row + m < rows; m++, s += KEYS) {
        const int64_t r = row + m;
        counts |= soften(s, panels, masked, r, job.block_k / 8, Floats{job.factor}, job.pv_threshold,
                         scratch.top + r, scratch.sum + r * W, scratch.out + r * wide, wide);
      }
      if (counts) weigh(job, values, row, std::min<int64_t>(16, rows - row), scratch);
    }
  }

  static type converted(float x) {  // round to nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }

  static float widened(type x) {
    const uint32_t bits = uint32_t(x) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
  }
};

#endif

// -- int8 ---------------------------------------------------------------------------------------------------

enum Products : int64_t { PLAIN, VNNI, AMX };  // as in native.py

// Keys of a panel: codes (deep / 4, PANEL, 4), their sums, int32 (PANEL), and their scale.
struct BytePanel {
  static int64_t deep(int64_t dim) { return rounded(dim, 64); }
  static int64_t bytes(int64_t dim) { return deep(dim) * PANEL + 128; }
};

// products[m] = q[m] . k of 16 rows of codes with the codes of some panels
typedef void Multiply(const int8_t* q, int64_t deep, const int8_t* const* k, int32_t* products);

void multiply_plain(const int8_t* q, int64_t deep, const int8_t* const* k, int32_t* products) {
  for (int64_t m = 0; m < 16; m++)
    for (int panel = 0; panel < PANELS; panel++) {
      int32_t sums[PANEL] = {};
      for (int64_t i = 0; i < deep; i += 4)
        for (int j = 0; j < PANEL; j++)
          for (int n = 0; n < 4; n++) sums[j] += q[m * deep + i + n] * k[panel][i * PANEL + 4 * j + n];
      memcpy(products + m * KEYS + panel * PANEL, sums, sizeof(sums));
    }
}

#ifdef X86
// Bytes of q are unsigned here: 128 is added to them, and 128 times the sum of a key's codes taken away.
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void multiply_vnni(const int8_t* q, int64_t deep,
                                                                          const int8_t* const* k,
                                                                          int32_t* products) {
  for (int panel = 0; panel < PANELS; panel++) {
    const __m512i sums = _mm512_slli_epi32(_mm512_loadu_si512(k[panel] + deep * PANEL), 7);
    for (int64_t m = 0; m < 16; m += 8) {
      __m512i sum[8];
      for (int n = 0; n < 8; n++) sum[n] = _mm512_sub_epi32(_mm512_setzero_si512(), sums);
      for (int64_t i = 0; i < deep; i += 4) {
        const __m512i keys = _mm512_loadu_si512(k[panel] + i * PANEL);
        for (int n = 0; n < 8; n++) {
          int32_t four;
          memcpy(&four, q + (m + n) * deep + i, 4);
          sum[n] = _mm512_dpbusd_epi32(sum[n], _mm512_set1_epi32(four ^ int32_t(0x80808080)), keys);
        }
      }
      for (int n = 0; n < 8; n++)
        _mm512_storeu_si512(products + (m + n) * KEYS + panel * PANEL, sum[n]);
    }
  }
}

__attribute__((target("amx-tile,amx-int8"))) void multiply_amx(const int8_t* q, int64_t deep,
                                                               const int8_t* const* k, int32_t* products) {
  BARRIER;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < deep; i += 64) {
    _tile_loadd(4, q + i, deep);
    _tile_loadd(5, k[0] + i * PANEL, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, k[1] + i * PANEL, 64);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, k[2] + i * PANEL, 64);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, k[3] + i * PANEL, 64);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, products, 4 * KEYS);
  _tile_stored(1, products + 16, 4 * KEYS);
  _tile_stored(2, products + 32, 4 * KEYS);
  _tile_stored(3, products + 48, 4 * KEYS);
  BARRIER;
}
#endif

inline Multiply* multiplication(int64_t products) {
#ifdef X86
  if (products == VNNI) return multiply_vnni;
  if (products == AMX) return multiply_amx;
#endif
  return multiply_plain;
}

// Codes of numbers, their size in units of `scale` at most 127: halves away from zero, 0 of no number.
inline void encode(const float* x, int64_t count, float scale, int8_t* codes) {
  for (int64_t i = 0; i < count; i++) {
    const float size = x[i] / scale, away = size + (size < 0 ? -0.5f : 0.5f);
    codes[i] = int8_t(int32_t(size == size ? away : 0.0f));
  }
}
constexpr float LEVELS = 127, LEAST = 1e-30f;  // as in quantized.py

// What each channel of a plane's queries and keys is changed by, rows of `job.channels`.
enum Channel { MEAN, K_FACTOR, Q_FACTOR, SHIFT, CHANNELS };

// Queries and keys in int8, the rest as in another format.
template <class Rest>
struct Bytes : Rest {
  typedef typename Rest::type type;
  static constexpr bool INT8 = true;

  static int64_t depth(int64_t dim) { return BytePanel::deep(dim) / 2; }  // of q, in pairs of bytes
  static int64_t k_size(int64_t dim) { return BytePanel::bytes(dim) / sizeof(type); }

  static const float* channels(const Job& job, int64_t plane) {
    return job.channels + plane * CHANNELS * sum_stride(job);
  }

  static bool hidden(const Job& job, int64_t plane, int64_t key) {
    return key >= valid_text_end(job, plane) && key < job.text_stop;
  }

  // What a plane's channels are changed by, of means and largest magnitudes of finite numbers.
  static void prepare(const Job& job, int64_t plane, const type* q, const type* k) {
    const int64_t dim = job.dim, stride = sum_stride(job);
    float sum[256] = {}, number[256] = {}, least[256], most[256], largest[256] = {};
    std::fill(least, least + dim, INFINITY), std::fill(most, most + dim, -INFINITY);
    for (int64_t j = 0; j < job.kv_len; j++) {
      if (hidden(job, plane, j)) continue;
      const type* row = k + j * job.k_stride[2];
      for (int64_t i = 0; i < dim; i++) {
        const float x = Rest::widened(row[i]);
        const bool finite = fabsf(x) < INFINITY;
        sum[i] += finite ? x : 0, number[i] += finite ? 1 : 0;
        least[i] = finite && x < least[i] ? x : least[i], most[i] = finite && x > most[i] ? x : most[i];
      }
    }
    for (int64_t j = 0; j < job.seq_len; j++) {
      const type* row = q + j * job.q_stride[2];
      for (int64_t i = 0; i < dim; i++) {
        const float x = fabsf(Rest::widened(row[i]));
        largest[i] = x < INFINITY && x > largest[i] ? x : largest[i];
      }
    }
    float* of = job.channels + plane * CHANNELS * stride;
    memset(of, 0, 4 * CHANNELS * stride);
    for (int64_t i = 0; i < dim; i++) {
      const float mean = sum[i] / std::max(number[i], 1.0f), keys = std::max(most[i] - mean, mean - least[i]);
      const float balance = keys > LEAST && largest[i] > LEAST ? sqrtf(keys / largest[i]) : 1.0f;
      of[MEAN * stride + i] = mean, of[K_FACTOR * stride + i] = 1.0f / balance;
      of[Q_FACTOR * stride + i] = balance * job.factor, of[SHIFT * stride + i] = mean * job.factor;
    }
  }

  // The scale of a panel's group of keys, then its codes and their sums.
  static void pack_keys(const Job& job, int64_t plane, int64_t key, const type* k, int64_t stride,
                        int64_t count, type* packed) {
    const float *mean = channels(job, plane), *factor = mean + K_FACTOR * sum_stride(job);
    const int64_t deep = BytePanel::deep(job.dim), first = key / job.group * job.group;
    float sizes[256] = {}, lost[256] = {}, largest = 0, nothing = 0;  // lost: no number where one is none
    for (int64_t j = first; j < std::min(first + job.group, job.kv_len); j++) {
      if (hidden(job, plane, j)) continue;
      const type* row = k + (j - key) * stride;
      for (int64_t i = 0; i < job.dim; i++) {
        const float x = fabsf((Rest::widened(row[i]) - mean[i]) * factor[i]);
        sizes[i] = x > sizes[i] ? x : sizes[i], lost[i] += x * 0;
      }
    }
    for (int64_t i = 0; i < job.dim; i++) largest = std::max(largest, sizes[i]), nothing += lost[i];
    const float scale = std::max(largest, LEAST) / LEVELS + nothing;
    int8_t* codes = (int8_t*)packed;
    int32_t* sums = (int32_t*)(codes + deep * PANEL);
    memset(packed, 0, BytePanel::bytes(job.dim));
    for (int64_t j = 0; j < count; j++) {
      if (hidden(job, plane, key + j)) continue;
      float x[256];
      int8_t row[256] = {};
      for (int64_t i = 0; i < job.dim; i++) x[i] = (Rest::widened(k[j * stride + i]) - mean[i]) * factor[i];
      encode(x, job.dim, scale, row);
      int32_t total = 0;
      for (int64_t i = 0; i < job.dim; i++) total += row[i];
      for (int64_t i = 0; i < job.dim; i += 4) memcpy(codes + i * PANEL + 4 * j, row + i, 4);
      sums[j] = total;
    }
    memcpy(sums + PANEL, &scale, 4);
  }

  // The codes of a block's queries, and what smoothing took from their scores.
  static void begin(const Job& job, int64_t plane, const type* q, int64_t rows, Scratch& scratch) {
    const float *factor = channels(job, plane) + Q_FACTOR * sum_stride(job), *lost = factor + sum_stride(job);
    const int64_t deep = BytePanel::deep(job.dim);
    memset(scratch.q, 0, rounded(rows, 16) * deep);
    for (int64_t r = 0; r < rows; r++) {
      const type* row = q + r * job.q_stride[2];
      int8_t* codes = (int8_t*)scratch.q + r * deep;
      float x[256] = {};
      vec largest = {}, shift = {}, nothing = {};  // nothing: 0, or no number where one of the row's is none
      for (int64_t i = 0; i < job.dim; i++) x[i] = Rest::widened(row[i]);
      for (int64_t i = 0; i < job.dim; i += W) {
        shift += load(x + i) * load(lost + i);
        const vec here = load(x + i) * load(factor + i);
        store(x + i, here);
        largest = larger(here, largest), largest = larger(-here, largest), nothing += here * 0.0f;
      }
      const float scale = std::max(greatest(largest), LEAST) / LEVELS + total(nothing);
      encode(x, job.dim, scale, codes);
      scratch.q_scale[r] = scale, scratch.shift[r] = total(shift);
    }
  }

  static void attend(const Job& job, const type*, const type* k, const type* v, const Panel* panels,
                     bool masked, int64_t rows, Scratch& scratch) {
    const int64_t deep = BytePanel::deep(job.dim), wide = Rest::width(job.dim);
    const typename Rest::Values values(job, v, panels, scratch);
    const int8_t* keys[PANELS];
    float scales[PANELS], factors[PANELS];
    for (int i = 0; i < PANELS; i++) {
      keys[i] = (const int8_t*)(k + panels[i].index * k_size(job.dim));
      memcpy(scales + i, keys[i] + deep * PANEL + 64, 4);
    }
    Multiply* const multiply = multiplication(job.products);
    for (int64_t row = 0; row < rows; row += 16) {
      multiply((const int8_t*)scratch.q + row * deep, deep, keys, (int32_t*)scratch.scores);
      const int64_t here = std::min<int64_t>(16, rows - row);
      bool counts = false;
      for (int64_t m = 0, r = row; m < here; m++, r++) {
        for (int i = 0; i < PANELS; i++) factors[i] = scratch.q_scale[r] * scales[i];
        counts |= soften(scratch.scores + m * KEYS, panels, masked, r, job.block_k / 8, Integers{factors},
                         job.pv_threshold, scratch.top + r, scratch.sum + r * W, scratch.out + r * wide, wide);
      }
      if (counts) Rest::weigh(job, values, row, here, scratch);
    }
  }
};

#ifdef X86
// Tiles where they multiply int8.
struct ConfiguredForBytes {
  alignas(Configured) char room[sizeof(Configured)];
  Configured* made = nullptr;

  explicit ConfiguredForBytes(const Job& job) {
    if (job.products == AMX) made = new (room) Configured(job);
  }
  ~ConfiguredForBytes() {
    if (made) made->~Configured();
  }
};
#endif

// Adds the rows of x (count, size) to sums.
inline void add(const float* x, int64_t count, int64_t size, float* sums) {
  for (int64_t i = 0; i < size; i += W) {
    vec sum = load(sums + i);
    for (int64_t row = 0; row < count; row++) sum += load(x + row * size + i);
    store(sums + i, sum);
  }
}

// Blocks of which a pooled key is the mean: those from `first` on that are dropped, or, alone, a whole group.
struct Pool {
  int64_t first, stop;
  float inverse;  // of how many tokens
  bool alone;
};

// The panels of one query block: full blocks first, then partial ones, then pooled keys.
template <class Format>
struct Panels {
  typedef typename Format::type type;

  const Job& job;
  Scratch& scratch;
  const int32_t *full, *full_end, *part, *part_end, *tile;
  const uint8_t* dropped;
  int64_t plane, per_block, sub = 0, block = 0, valid_end;
  struct {
    Pool of[PANEL];
    int count;
  } pools[PANELS];  // of the panels of pooled keys, by their place

  Panels(const Job& job, Scratch& scratch, int64_t plane, int64_t row)
      : job(job), scratch(scratch), plane(plane), per_block(job.block_k / PANEL) {
    const int64_t rows = ceil_div(job.seq_len, job.block_q), at = job.group_of_plane[plane] * rows + row;
    full = job.full_index + job.full_start[at], full_end = full + job.full_count[at];
    part = job.part_index + job.part_start[at], part_end = part + job.part_count[at];
    tile = job.part_tile + job.part_start[at];
    dropped = job.dropped ? job.dropped + at * job.groups * job.group_blocks : nullptr;
    valid_end = valid_text_end(job, plane);
  }

  // The next panel, the `place`-th of those that are attended at once; false at the end.
  bool next(Panel& panel, int place) {
    if (full == full_end && part == part_end) {
      if constexpr (!Format::INT8) return dropped && pooled(panel, place);
      return false;
    }
    const bool whole = full < full_end;
    panel.index = int64_t(whole ? *full : *part) * per_block + sub;
    panel.bits = whole ? nullptr : job.tiles + *tile * (job.block_q * job.block_k / 8) + sub * (PANEL / 8);
    panel.keep = 0xffff;
    panel.bias = nullptr;
    for (int64_t i = 0, key = panel.index * PANEL; i < PANEL && !whole; i++)
      if (key + i >= valid_end && key + i < job.text_stop) panel.keep &= ~(1 << i);
    if (++sub == per_block) {
      sub = 0;
      whole ? (void)full++ : (void)(part++, tile++);
    }
    return true;
  }

  // The next means: of groups of key blocks that the query block does not compute, and of what it leaves out of
  // the parts of others.
  bool pooled(Panel& panel, int place) {
    const int64_t stride = sum_stride(job), dim = job.dim;
    type *k = (type*)scratch.means, *v = k + PANEL * dim;
    float* bias = scratch.bias + place * PANEL;
    int count = 0;
    while (block < job.groups * job.group_blocks && count < PANEL) {
      const bool alone = block % job.group_blocks == 0 && all_dropped(block);
      const int64_t first = block, stop = block + (alone ? job.group_blocks : job.part_blocks);
      const int64_t n = left(block, stop);
      const float* sums = scratch.added;
      if (alone)
        sums = job.group_sums + (plane * job.groups + block / job.group_blocks) * 2 * stride;
      else if (n > 0)
        add_up(block, stop);
      block = stop;
      if (n == 0) continue;
      const float inverse = 1.0f / n;
      for (int64_t i = 0; i < dim; i++) {
        k[count * dim + i] = Format::converted(sums[i] * inverse);
        v[count * dim + i] = Format::converted(sums[stride + i] * inverse);
      }
      pools[place].of[count] = {first, stop, inverse, alone};
      bias[count++] = log2f(n);
    }
    if (count == 0) return false;
    pools[place].count = count;
    for (int i = count; i < PANEL; i++) bias[i] = 0;
    const int64_t slot = scratch.first_slot + place;
    Format::pack_keys(job, plane, 0, k, dim, count, (type*)job.k_packed + slot * Format::k_size(dim));
    Format::pack_values(job, v, dim, count, (type*)job.v_packed + slot * Format::v_size(dim));
    panel = {slot - plane * panels_of(job), nullptr, uint16_t((1 << count) - 1), bias};
    return true;
  }

  bool all_dropped(int64_t first) const {
    return std::all_of(dropped + first, dropped + first + job.group_blocks, [](uint8_t x) { return x; });
  }

  // How many tokens those of some blocks have that are not computed.
  int64_t left(int64_t from, int64_t to) const {
    int64_t n = 0;
    for (int64_t block = from; block < to; block++) {
      const int64_t first = block * job.block_k, stop = std::min(first + job.block_k, job.kv_len);
      if (!dropped[block] || first >= stop) continue;
      n += stop - first - std::max<int64_t>(std::min(stop, job.text_stop) - std::max(first, valid_end), 0);
    }
    return n;
  }

  // Sums of keys and of values over them.
  void add_up(int64_t from, int64_t to) {
    const int64_t size = 2 * sum_stride(job);
    const float* sums = job.sums + plane * panels_of(job) * size;
    memset(scratch.added, 0, 4 * size);
    for (int64_t block = from; block < std::min(to, panels_of(job) / per_block); block++)
      if (dropped[block]) add(sums + block * per_block * size, per_block, size, scratch.added);
  }
};

// Sums of the keys and of the values of a panel that are not padded text.
template <class Format>
void sum_panel(const Job& job, const typename Format::type* k, const typename Format::type* v, int64_t plane,
               int64_t key, int64_t count, float* __restrict sums) {
  const int64_t stride = sum_stride(job), end = valid_text_end(job, plane);
  memset(sums, 0, 8 * stride);
  for (int64_t j = 0; j < count; j++) {
    if (key + j >= end && key + j < job.text_stop) continue;
    const typename Format::type *key_row = k + j * job.k_stride[2], *value_row = v + j * job.v_stride[2];
    for (int64_t i = 0; i < job.dim; i++) sums[i] += Format::widened(key_row[i]);
    for (int64_t i = 0; i < job.dim; i++) sums[stride + i] += Format::widened(value_row[i]);
  }
}

struct Nothing {
  explicit Nothing(const Job&) {}
};

template <class T>
inline const T* of_plane(const Job& job, const void* x, const int64_t* stride, int64_t plane) {
  return (const T*)x + plane / job.heads * stride[0] + plane % job.heads * stride[1];
}

// Keys and values by panels, and with a tail their sums; for a team of threads.
template <class Format>
void pack(const Job& job) {
  typedef typename Format::type type;
  const int64_t planes = job.batch * job.heads, panels = panels_of(job), dim = job.dim;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < planes * panels; item++) {
    const int64_t plane = item / panels, key = item % panels * PANEL;
    const int64_t count = std::clamp<int64_t>(job.kv_len - key, 0, PANEL);
    const type* k = of_plane<type>(job, job.k, job.k_stride, plane) + key * job.k_stride[2];
    const type* v = of_plane<type>(job, job.v, job.v_stride, plane) + key * job.v_stride[2];
    type* k_packed = (type*)job.k_packed + item * Format::k_size(dim);
    type* v_packed = (type*)job.v_packed + item * Format::v_size(dim);
    Format::pack_keys(job, plane, key, k, job.k_stride[2], count, k_packed);
    Format::pack_values(job, v, job.v_stride[2], count, v_packed);
    if (job.dropped)
      sum_panel<Format>(job, k, v, plane, key, count, job.sums + item * 2 * sum_stride(job));
  }
  if (!job.dropped) return;
  const int64_t size = 2 * sum_stride(job), per_group = job.group_blocks * (job.block_k / PANEL);
#pragma omp for schedule(static)
  for (int64_t item = 0; item < planes * job.groups; item++) {
    const int64_t first = item % job.groups * per_group;
    float* sums = job.group_sums + item * size;
    memset(sums, 0, 4 * size);
    add(job.sums + (item / job.groups * panels + first) * size, std::min(per_group, panels - first), size, sums);
  }
}

template <class Format, class Setting>
void run(const Job& job) {
  typedef typename Format::type type;
  const int64_t planes = job.batch * job.heads, rows = ceil_div(job.seq_len, job.block_q);
  const int64_t panels = panels_of(job), dim = job.dim;
  const int64_t k_size = Format::k_size(dim), v_size = Format::v_size(dim), width = Format::width(dim);
  const auto at = [&](const void* x, const int64_t* stride, int64_t plane) {
    return of_plane<type>(job, x, stride, plane);
  };
#pragma omp parallel num_threads(job.threads)
  {
    if constexpr (Format::INT8) {
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; plane++)
        Format::prepare(job, plane, at(job.q, job.q_stride, plane), at(job.k, job.k_stride, plane));
    }
    pack<Format>(job);
    Setting setting(job);
    (void)setting;
    int64_t thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    Scratch scratch(rounded(job.block_q, 16), width, Format::depth(dim), sum_stride(job),
                    planes * panels + thread * PANELS);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < planes * rows; item++) {
      const int64_t plane = item / rows;
      const int64_t row = job.row_order[job.group_of_plane[plane] * rows + item % rows],
                    first = row * job.block_q;
      const int64_t count = std::min(job.seq_len - first, job.block_q);
      const type* q = at(job.q, job.q_stride, plane) + first * job.q_stride[2];
      const type* k = (const type*)job.k_packed + plane * panels * k_size;
      const type* v = (const type*)job.v_packed + plane * panels * v_size;
      memset(scratch.out, 0, 4 * rounded(count, 16) * width);
      memset(scratch.sum, 0, 4 * count * W);
      for (int64_t r = 0; r < count; r++) scratch.top[r] = -INFINITY;
      Format::begin(job, plane, q, count, scratch);
      Panels<Format> list(job, scratch, plane, row);
      Panel some[PANELS];
      while (list.next(some[0], 0)) {
        bool masked = !some[0].full();
        for (int i = 1; i < PANELS; i++) {
          if (!list.next(some[i], i)) some[i] = {some[0].index, nullptr, 0, nullptr};  // no more
          masked |= !some[i].full();
        }
        Format::attend(job, q, k, v, some, masked, count, scratch);
      }
      type* out = (type*)at(job.out, job.out_stride, plane) + first * job.out_stride[2];
      float* lse = job.lse ? job.lse + plane * job.seq_len + first : nullptr;
      for (int64_t r = 0; r < count; r++)
        finish<Format>(job, scratch, r, out + r * job.out_stride[2], lse ? lse + r : nullptr);
    }
  }
}

}  // namespace

#include "native_backward.h"

extern "C" {

void attend_float32(const Job* job) { run<Single, Nothing>(*job); }

void gradients_float32(const GradientsJob* job) { run_gradients(*job); }

#ifdef X86
void attend_int8_float32(const Job* job) { run<Bytes<Single>, ConfiguredForBytes>(*job); }

// Whether the system lets this process use tiles (Linux asks to be asked).
static bool may_use_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// The fastest instructions for products of int8 that this processor has, whatever this was compiled for.
int64_t products() {
  unsigned a, b, c, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 24 & d >> 25 & 1 && may_use_tiles()) return AMX;
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") ? VNNI : PLAIN;
}
#else
void attend_int8_float32(const Job* job) { run<Bytes<Single>, Nothing>(*job); }

int64_t products() { return PLAIN; }
#endif

#ifdef TILES
int has_tiles() { return may_use_tiles(); }

void attend_bfloat16(const Job* job) { run<Tiles, Configured>(*job); }

void attend_int8_bfloat16(const Job* job) { run<Bytes<Tiles>, Configured>(*job); }
#else
int has_tiles() { return 0; }

void attend_bfloat16(const Job*) {}

void attend_int8_bfloat16(const Job*) {}
#endif
}
