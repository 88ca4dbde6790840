// Block-sparse attention on a CPU, the twin of the Triton kernel; compiled and called by native.py.
//
// For every query block, online softmax (Milakov and Gimelshein 2018, FlashAttention) over its key blocks, 64
// keys at a time: scores of a strip of rows, their powers of two, their product with V, all in the
// first-level cache. Keys and values are first packed by panels of 16 keys, so that the blocks of a list need
// not be gathered. Where the processor has AMX, bfloat16 inputs stay bfloat16 and its tiles compute the
// products.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TILES
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

// 2^x for x <= 0 to a relative error of 1e-7. What would vanish in any sum with 1 is 0: denormal numbers are
// slow.
inline vec exp2(vec x) {
  const vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits are now round(x)
  const vec f = x - (shifted - 12582912.0f);
  vec p = f * 1.53533590e-04f + 1.33988762e-03f;
  p = p * f + 9.61843692e-03f;
  p = p * f + 5.55033237e-02f;
  p = p * f + 2.40226477e-01f;
  p = p * f + 6.93147182e-01f;
  p = p * f + 1.0f;
  return x < -80.0f ? vec{} : (vec)((ivec)p + ((ivec)shifted << 23));
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
  const int32_t *full_ptr, *full_idx, *part_ptr, *part_idx, *part_tile, *group_of_head, *row_order;
  const uint8_t* tiles;
  const int64_t* text_valid;  // or null
  int64_t batch, heads, seq_len, kv_len, dim, block_q, block_k, text_start, text_stop, threads;
  float factor;  // of scores: scale * log2(e)
};

namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t rounded(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Panel {
  int64_t index;        // of its keys among all panels
  const uint8_t* bits;  // of row 0, or null: all attended
  uint16_t keep;        // keys that any row may attend: not padded text

  bool full() const { return !bits && keep == 0xffff; }
};

// The panels of one query block, full blocks first.
struct Panels {
  const Job& job;
  const int32_t *full, *full_end, *part, *part_end, *tile;
  int64_t per_block, sub = 0, valid_end;

  Panels(const Job& job, int64_t batch, int64_t head, int64_t row)
      : job(job), per_block(job.block_k / PANEL), valid_end(job.text_stop) {
    const int64_t rows = ceil_div(job.seq_len, job.block_q), at = job.group_of_head[head] * (rows + 1) + row;
    full = job.full_idx + job.full_ptr[at], full_end = job.full_idx + job.full_ptr[at + 1];
    part = job.part_idx + job.part_ptr[at], part_end = job.part_idx + job.part_ptr[at + 1];
    tile = job.part_tile + job.part_ptr[at];
    if (job.text_valid) valid_end = job.text_start + job.text_valid[batch];
  }

  bool next(Panel& panel) {
    if (full == full_end && part == part_end) return false;
    const bool whole = full < full_end;
    panel.index = int64_t(whole ? *full : *part) * per_block + sub;
    panel.bits = whole ? nullptr : job.tiles + *tile * (job.block_q * job.block_k / 8) + sub * (PANEL / 8);
    panel.keep = 0xffff;
    for (int64_t i = 0, key = panel.index * PANEL; i < PANEL && !whole; i++)
      if (key + i >= valid_end && key + i < job.text_stop) panel.keep &= ~(1 << i);
    if (++sub == per_block) {
      sub = 0;
      whole ? (void)full++ : (void)(part++, tile++);
    }
    return true;
  }
};

// One thread's memory for a query block.
struct Scratch {
  float *out, *top, *sum, *scores;  // (rows, width), (rows), (rows, W), (16, KEYS)
  uint16_t *q, *p, *v;              // bfloat16: (rows, depth), (16, KEYS), the values of KEYS keys

  Scratch(int64_t rows, int64_t width, int64_t depth) {
    const int64_t floats[] = {rows * width, rounded(rows, 16), rows * W, 16 * KEYS};
    const int64_t halves[] = {rows * depth, 16 * KEYS, KEYS * width};
    int64_t bytes = 0;
    for (int64_t n : floats) bytes += 4 * n;
    for (int64_t n : halves) bytes += rounded(2 * n, 64);
    char* at = (char*)aligned_alloc(64, rounded(bytes, 64));
    float** f[] = {&out, &top, &sum, &scores};
    for (int i = 0; i < 4; i++) *f[i] = (float*)at, at += 4 * floats[i];
    uint16_t** h[] = {&q, &p, &v};
    for (int i = 0; i < 3; i++) *h[i] = (uint16_t*)at, at += rounded(2 * halves[i], 64);
  }
  ~Scratch() { free(out); }
  Scratch(const Scratch&) = delete;
};

// Scores of one row with KEYS keys to powers of two in place, below the row's largest so far.
__attribute__((always_inline)) inline void soften(float* scores, const Panel* panels, bool masked,
                                                  int64_t row, int64_t bits_stride, float factor, float* top,
                                                  float* sum, float* out, int64_t width) {
  ivec bit;
  for (int i = 0; i < W; i++) bit[i] = 1 << i;
  vec x[VECTORS];
  for (int i = 0; i < VECTORS; i++) x[i] = load(scores + i * W) * factor;
  if (masked)
    for (int i = 0; i < VECTORS; i++) {
      const Panel& panel = panels[i * W / PANEL];
      if (panel.full()) continue;
      uint16_t bits = 0xffff;
      if (panel.bits) memcpy(&bits, panel.bits + row * bits_stride, 2);
      const ivec here = ivec{} + ((bits & panel.keep) >> (i * W % PANEL));
      x[i] = (here & bit) != 0 ? x[i] : splat(-INFINITY);
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
}

// A finished row: its result, and its log-sum-exp where wanted.
template <class Format>
inline void finish(const Job& job, const Scratch& scratch, int64_t r, typename Format::type* out,
                   float* lse) {
  const float top = scratch.top[r], sum = total(load(scratch.sum + r * W));
  const float inverse = top == -INFINITY ? 0.0f : 1.0f / sum;
  const float* result = scratch.out + r * Format::width(job.dim);
  for (int64_t i = 0; i < job.dim; i++) out[i] = Format::converted(result[i] * inverse);
  if (lse) *lse = top == -INFINITY ? -INFINITY : (top + log2f(sum)) * float(M_LN2);
}

// -- float32 ------------------------------------------------------------------------------------------------

struct Single {
  typedef float type;

  static int64_t width(int64_t dim) { return rounded(dim, W); }
  static int64_t depth(int64_t) { return 0; }
  static int64_t k_size(int64_t dim) { return dim * PANEL; }
  static int64_t v_size(int64_t dim) { return width(dim) * PANEL; }

  // k to (dim, PANEL), v to (PANEL, width), zero past `count` tokens and past dim.
  static void pack(const float* k, const float* v, int64_t k_stride, int64_t v_stride, int64_t count,
                   int64_t dim, float* k_packed, float* v_packed) {
    memset(v_packed, 0, 4 * v_size(dim));
    if (count < PANEL) memset(k_packed, 0, 4 * k_size(dim));
    for (int64_t j = 0; j < count; j++) {
      for (int64_t i = 0; i < dim; i++) k_packed[i * PANEL + j] = k[j * k_stride + i];
      memcpy(v_packed + j * width(dim), v + j * v_stride, 4 * dim);
    }
  }

  // scores[m] = q[m] . k for R rows and all keys of the panels
  template <int R>
  static void score(const float* q, int64_t stride, const float* const* k, int64_t dim, float* scores) {
    constexpr int at_once = N * W / PANEL;
    const float* rows[R];
    for (int m = 0; m < R; m++) rows[m] = q + m * stride;
    for (int panel = 0; panel < PANELS; panel += at_once) {
      vec sum[R][N] = {};
      for (int64_t i = 0; i < dim; i++) {
        vec keys[N];
        for (int n = 0; n < N; n++) keys[n] = load(k[panel + n * W / PANEL] + i * PANEL + n * W % PANEL);
        for (int m = 0; m < R; m++) {
          const vec x = splat(rows[m][i]);
          for (int n = 0; n < N; n++) sum[m][n] += x * keys[n];
        }
      }
      for (int m = 0; m < R; m++)
        for (int n = 0; n < N; n++) store(scores + m * KEYS + panel * PANEL + n * W, sum[m][n]);
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

  template <int R>
  static void strip(const Job& job, const float* q, const float* const* k, const float* const* v,
                    const Panel* panels, bool masked, int64_t row, Scratch& scratch) {
    const int64_t wide = width(job.dim);
    score<R>(q + row * job.q_stride[2], job.q_stride[2], k, job.dim, scratch.scores);
    for (int m = 0; m < R; m++)
      soften(scratch.scores + m * KEYS, panels, masked, row + m, job.block_k / 8, job.factor,
             scratch.top + row + m, scratch.sum + (row + m) * W, scratch.out + (row + m) * wide, wide);
    float* out = scratch.out + row * wide;
    int64_t column = 0;
    for (; column + N * W <= wide; column += N * W) add_columns<R, N>(scratch.scores, v, column, wide, out);
    if (N > 2 && wide - column == 3 * W) add_columns<R, 3>(scratch.scores, v, column, wide, out);
    if (N > 2 && wide - column == 2 * W) add_columns<R, 2>(scratch.scores, v, column, wide, out);
    if (wide - column == W) add_columns<R, 1>(scratch.scores, v, column, wide, out);
  }

  static void begin(const Job&, const float*, int64_t, Scratch&) {}

  // All rows of a query block with the keys of some panels.
  static void attend(const Job& job, const float* q, const float* k, const float* v, const Panel* panels,
                     bool masked, int64_t rows, Scratch& scratch) {
    const float *keys[PANELS], *values[PANELS];
    for (int i = 0; i < PANELS; i++) {
      keys[i] = k + panels[i].index * k_size(job.dim);
      values[i] = v + panels[i].index * v_size(job.dim);
    }
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
};

// -- bfloat16 on AMX ----------------------------------------------------------------------------------------

#ifdef TILES

#define BARRIER asm volatile("" ::: "memory")  // tile loads do not tell the compiler that they read memory

struct Tiles {
  typedef uint16_t type;

  static int64_t width(int64_t dim) { return rounded(dim, 16); }
  static int64_t depth(int64_t dim) { return rounded(dim, 32); }
  static int64_t k_size(int64_t dim) { return depth(dim) * PANEL; }
  static int64_t v_size(int64_t dim) { return width(dim) * PANEL; }

  // k to (depth / 2, PANEL, 2), v to (width / 16, PANEL / 2, 16, 2), zero past `count` tokens and past dim.
  static void pack(const type* k, const type* v, int64_t k_stride, int64_t v_stride, int64_t count,
                   int64_t dim, type* k_packed, type* v_packed) {
    memset(k_packed, 0, 2 * k_size(dim));
    memset(v_packed, 0, 2 * v_size(dim));
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < dim; i++) {
        k_packed[(i / 2 * PANEL + j) * 2 + i % 2] = k[j * k_stride + i];
        v_packed[((i / 16 * (PANEL / 2) + j / 2) * 16 + i % 16) * 2 + j % 2] = v[j * v_stride + i];
      }
  }

  static void begin(const Job& job, const type* q, int64_t rows, Scratch& scratch) {
    const int64_t deep = depth(job.dim);
    memset(scratch.q, 0, 2 * rounded(rows, 16) * deep);
    for (int64_t r = 0; r < rows; r++) memcpy(scratch.q + r * deep, q + r * job.q_stride[2], 2 * job.dim);
  }

  static void attend(const Job& job, const type*, const type* k, const type* v, const Panel* panels,
                     bool masked, int64_t rows, Scratch& scratch) {
    const int64_t deep = depth(job.dim), wide = width(job.dim), half = PANEL / 2 * 32;
    const type* keys[PANELS];
    for (int i = 0; i < PANELS; i++) {
      keys[i] = k + panels[i].index * k_size(job.dim);
      const type* from = v + panels[i].index * v_size(job.dim);
      for (int64_t c = 0; c < wide / 16; c++)  // two panels make the 32 keys of a tile
        memcpy(scratch.v + ((i / 2 * (wide / 16) + c) * 2 + i % 2) * half, from + c * half, 2 * half);
    }
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
      for (int m = 0; m < 16 && row + m < rows; m++, s += KEYS) {
        const int64_t r = row + m;
        soften(s, panels, masked, r, job.block_k / 8, job.factor, scratch.top + r, scratch.sum + r * W,
               scratch.out + r * wide, wide);
        for (int i = 0; i < KEYS; i += 32) {
          const __m512bh p = _mm512_cvtne2ps_pbh((__m512)load(s + i + 16), (__m512)load(s + i));
          memcpy(scratch.p + m * KEYS + i, &p, 64);
        }
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
  }

  static type converted(float x) {  // round to nearest even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

// All eight tiles 16 x 64 bytes while it lives; what other libraries had set before is back afterwards.
struct Configured {
  alignas(64) uint8_t before[64];

  Configured() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_storeconfig(before);
    _tile_loadconfig(config);
  }
  ~Configured() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};

#endif

struct Nothing {};

template <class Format, class Setting>
void run(const Job& job) {
  typedef typename Format::type type;
  const int64_t planes = job.batch * job.heads, rows = ceil_div(job.seq_len, job.block_q);
  const int64_t panels = ceil_div(job.kv_len, job.block_k) * (job.block_k / PANEL), dim = job.dim;
  const int64_t k_size = Format::k_size(dim), v_size = Format::v_size(dim), width = Format::width(dim);
  const auto at = [&](const void* x, const int64_t* stride, int64_t plane) {
    return (const type*)x + plane / job.heads * stride[0] + plane % job.heads * stride[1];
  };
#pragma omp parallel num_threads(job.threads)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < planes * panels; item++) {
      const int64_t plane = item / panels, key = item % panels * PANEL;
      Format::pack(at(job.k, job.k_stride, plane) + key * job.k_stride[2],
                   at(job.v, job.v_stride, plane) + key * job.v_stride[2], job.k_stride[2], job.v_stride[2],
                   std::clamp<int64_t>(job.kv_len - key, 0, PANEL), dim, (type*)job.k_packed + item * k_size,
                   (type*)job.v_packed + item * v_size);
    }
    Setting setting;
    (void)setting;
    Scratch scratch(rounded(job.block_q, 16), width, Format::depth(dim));
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < planes * rows; item++) {
      const int64_t plane = item / rows, head = plane % job.heads;
      const int64_t row = job.row_order[job.group_of_head[head] * rows + item % rows],
                    first = row * job.block_q;
      const int64_t count = std::min(job.seq_len - first, job.block_q);
      const type* q = at(job.q, job.q_stride, plane) + first * job.q_stride[2];
      const type* k = (const type*)job.k_packed + plane * panels * k_size;
      const type* v = (const type*)job.v_packed + plane * panels * v_size;
      memset(scratch.out, 0, 4 * rounded(count, 16) * width);
      memset(scratch.sum, 0, 4 * count * W);
      for (int64_t r = 0; r < count; r++) scratch.top[r] = -INFINITY;
      Format::begin(job, q, count, scratch);
      Panels list(job, plane / job.heads, head, row);
      Panel some[PANELS];
      while (list.next(some[0])) {
        bool masked = !some[0].full();
        for (int i = 1; i < PANELS; i++) {
          if (!list.next(some[i])) some[i] = {some[0].index, nullptr, 0};  // no more
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

extern "C" {

void attend_float32(const Job* job) { run<Single, Nothing>(*job); }

#ifdef TILES
// Whether the system lets this process use tiles (Linux asks to be asked).
int has_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

void attend_bfloat16(const Job* job) { run<Tiles, Configured>(*job); }
#else
int has_tiles() { return 0; }

void attend_bfloat16(const Job*) {}
#endif
}
