// Gradients of block-sparse attention on a CPU (formulas: backward.py); a part of native.cpp.
//
// One pass: scores of a query block and 64 keys are computed again, and what follows from them is added to dQ,
// dK and dV at once, five products of matrices instead of the seven of two passes. Each thread takes a run of
// query blocks, of all heads one after the other, that is about as long to compute as another's; where a run
// begins within a head, its dK and dV of that head are kept apart and added at the end, so that nobody adds to
// what another writes, and results repeat to the bit with the same number of threads. With a tail its means are
// keys like others; what they get is added up over groups and blocks, and passed on to tokens at the end.

struct GradientsJob {
  Job job;  // of the forward pass, whose out and lse are read
  const float *dout, *dlse;  // dlse: (batch, heads, seq_len), or null
  float* dq;
  float *dk, *dv;  // (batch, heads, keys of all panels, stride)
  float* apart;    // the same two of each thread but the first, (threads - 1, 2, keys of all panels, stride)
  float* pooled;   // what means give to blocks and groups, of k and v: (planes + threads - 1,
                   // groups * (group_blocks + 1), 2, stride), or null
  int64_t dout_stride[3], dq_stride[3];
  float scale;
};

namespace {

// strip(R, row) for strips of at most R rows; R is a constant.
template <int R, class Strip>
__attribute__((always_inline)) inline void in_strips(int64_t row, int64_t rows, const Strip& strip) {
  for (; row + R <= rows; row += R) strip(std::integral_constant<int, R>(), row);
  if constexpr (R > 1) in_strips<R - 1>(row, rows, strip);
}

// Panels as the products of this pass read them: keys and values as `Single` has keys, keys also as values.
struct Twofold {
  typedef float type;
  static constexpr bool INT8 = false;

  static int64_t k_size(int64_t dim) { return Single::k_size(dim) + Single::v_size(dim); }
  static int64_t v_size(int64_t dim) { return Single::k_size(dim); }
  static float widened(float x) { return x; }
  static float converted(float x) { return x; }

  static void pack_keys(const Job& job, int64_t plane, int64_t key, const float* k, int64_t stride,
                        int64_t count, float* packed) {
    Single::pack_keys(job, plane, key, k, stride, count, packed);
    Single::pack_values(job, k, stride, count, packed + Single::k_size(job.dim));
  }

  static void pack_values(const Job& job, const float* v, int64_t stride, int64_t count, float* packed) {
    Single::pack_keys(job, 0, 0, v, stride, count, packed);
  }
};

// What a thread holds of a query block.
struct Held {
  float *q, *dout, *p, *ds;     // (rows, width) twice, (rows, KEYS) twice
  float *rest, *delta, *means;  // (rows): of lse in base 2 past fp32; (rows); (2, PANEL, stride)

  Held(int64_t rows, int64_t width, int64_t stride) {
    const int64_t sizes[] = {rows * width, rows * width, rows * KEYS,       rows * KEYS,
                             rows,         rows,         2 * PANEL * stride};
    int64_t floats = 0;
    for (int64_t n : sizes) floats += n;
    float* at = (float*)aligned_alloc(64, rounded(4 * floats, 64));
    float** all[] = {&q, &dout, &p, &ds, &rest, &delta, &means};
    for (int i = 0; i < 7; i++) *all[i] = at, at += sizes[i];
    memset(q, 0, 8 * rows * width);  // columns past dim, of dout too, stay so
  }
  ~Held() { free(q); }
  Held(const Held&) = delete;
};

// Where gradients of the keys of a head are added up: see `GradientsJob`.
struct Target {
  float *dk, *dv, *blocks, *groups;
  int64_t size, sums;  // of dk and of dv, and of blocks and groups together

  Target(const GradientsJob& it, int64_t plane, int64_t part, bool apart) {
    const Job& job = it.job;
    const int64_t planes = job.batch * job.heads, stride = sum_stride(job);
    size = panels_of(job) * PANEL * stride, sums = job.groups * (job.group_blocks + 1) * 2 * stride;
    dk = apart ? it.apart + (part - 1) * 2 * size : it.dk + plane * size;
    dv = apart ? dk + size : it.dv + plane * size;
    blocks = it.pooled ? it.pooled + (apart ? planes + part - 1 : plane) * sums : nullptr;
    groups = it.pooled ? blocks + job.groups * job.group_blocks * 2 * stride : nullptr;
  }

  void clear() const {
    memset(dk, 0, 4 * size);
    memset(dv, 0, 4 * size);
    if (blocks) memset(blocks, 0, 4 * sums);
  }
};

inline float dot(const float* x, const float* y, int64_t n) {
  vec sum = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) sum += load(x + i) * load(y + i);
  float rest = 0;
  for (; i < n; i++) rest += x[i] * y[i];
  return total(sum) + rest;
}

// A row's scores to weights p, and its products of dout and values to gradients of scores.
inline void weights(float* p, float* ds, const Panel* panels, bool masked, int64_t row, int64_t bits_stride,
                    float factor, float top, float rest, float delta) {
  for (int i = 0; i < VECTORS; i++) {
    const Panel& panel = panels[i * W / PANEL];
    vec x = load(p + i * W) * factor;
    if (masked && panel.bias) x += load(panel.bias + i * W % PANEL);
    x = exp2(x - top - rest);
    vec d = x * (load(ds + i * W) - delta);
    if (masked && !panel.full()) {
      const ivec here = shown(panel, row, bits_stride, i);
      x = here != 0 ? x : vec{}, d = here != 0 ? d : vec{};
    }
    store(p + i * W, x), store(ds + i * W, d);
  }
}

// out[j] += sum over rows of p[row][j] x[row], for R keys and C vectors of columns
template <int R, int C>
void add_rows(const float* p, int64_t rows, const float* x, int64_t width, float* out, int64_t stride) {
  vec sum[R][C] = {};
  for (int64_t row = 0; row < rows; row++) {
    vec values[C];
    for (int c = 0; c < C; c++) values[c] = load(x + row * width + c * W);
    for (int m = 0; m < R; m++) {
      const vec weight = splat(p[row * KEYS + m]);
      for (int c = 0; c < C; c++) sum[m][c] += weight * values[c];
    }
  }
  for (int m = 0; m < R; m++)
    for (int c = 0; c < C; c++) store(out + m * stride + c * W, load(out + m * stride + c * W) + sum[m][c]);
}

// The same for the keys of a panel and all columns.
inline void pass_on(const float* p, int64_t rows, const float* x, int64_t width, float* out, int64_t stride) {
  in_strips<N>(0, width / W, [&](auto columns, int64_t c) {
    in_strips<M>(0, PANEL, [&](auto keys, int64_t j) {
      add_rows<keys, columns>(p + j, rows, x + c * W, width, out + j * stride + c * W, stride);
    });
  });
}

// What the means of a panel got, of k and v, in equal parts to the tokens they are of.
inline void share_out(const Job& job, const Panels<Twofold>& list, int place, const float* means,
                      const Target& target) {
  const int64_t stride = sum_stride(job);
  const auto give = [&](int column, float inverse, float* to) {
    for (int of = 0; of < 2; of++)
      for (int64_t i = 0; i < stride; i++)
        to[of * stride + i] += means[(of * PANEL + column) * stride + i] * inverse;
  };
  for (int column = 0; column < list.pools[place].count; column++) {
    const Pool& pool = list.pools[place].of[column];
    if (pool.alone) {
      give(column, pool.inverse, target.groups + pool.first / job.group_blocks * 2 * stride);
      continue;
    }
    for (int64_t block = pool.first; block < pool.stop; block++)
      if (list.dropped[block]) give(column, pool.inverse, target.blocks + block * 2 * stride);
  }
}

// A query block: dQ written, the rest added to the target.
inline void query_block(const GradientsJob& it, int64_t plane, int64_t row, const Target& target,
                        Scratch& scratch, const Held& held) {
  const Job& job = it.job;
  const int64_t dim = job.dim, wide = Single::width(dim), stride = sum_stride(job), first = row * job.block_q;
  const int64_t count = std::min(job.seq_len - first, job.block_q);
  const auto at = [&](const void* x, const int64_t* strides) {
    return (float*)x + plane / job.heads * strides[0] + plane % job.heads * strides[1] + first * strides[2];
  };
  const float *q = at(job.q, job.q_stride), *dout = at(it.dout, it.dout_stride);
  const float* out = at(job.out, job.out_stride);
  for (int64_t r = 0; r < count; r++) {
    const int64_t place = plane * job.seq_len + first + r;
    const bool nothing = job.lse[place] == -INFINITY;
    memcpy(held.q + r * wide, q + r * job.q_stride[2], 4 * dim);
    memcpy(held.dout + r * wide, dout + r * it.dout_stride[2], 4 * dim);
    const float delta = dot(held.dout + r * wide, out + r * job.out_stride[2], dim);
    held.delta[r] = nothing ? 0.0f : delta - (it.dlse ? it.dlse[place] : 0.0f);
    const double lse = job.lse[place] * M_LOG2E;
    scratch.top[r] = nothing ? INFINITY : float(lse), held.rest[r] = nothing ? 0.0f : float(lse - float(lse));
  }
  memset(scratch.out, 0, 4 * count * wide);
  const float* k = (const float*)job.k_packed + plane * panels_of(job) * Twofold::k_size(dim);
  const float* v = (const float*)job.v_packed + plane * panels_of(job) * Twofold::v_size(dim);
  Panels<Twofold> list(job, scratch, plane, row);
  Panel some[PANELS];
  while (list.next(some[0], 0)) {
    bool masked = !some[0].full();
    int panels = 1;
    const float *keys[PANELS], *key_rows[PANELS], *values[PANELS];
    for (int i = 0; i < PANELS; i++) {
      if (i > 0 && list.next(some[i], i))
        panels = i + 1;
      else if (i > 0)
        some[i] = {some[0].index, nullptr, 0, nullptr};  // no more
      masked |= !some[i].full();
      keys[i] = k + some[i].index * Twofold::k_size(dim), key_rows[i] = keys[i] + Single::k_size(dim);
      values[i] = v + some[i].index * Twofold::v_size(dim);
    }
    in_strips<M>(0, count, [&](auto rows, int64_t r) {
      float *p = held.p + r * KEYS, *ds = held.ds + r * KEYS;
      Single::score<rows>(held.q + r * wide, wide, keys, dim, p);
      Single::score<rows>(held.dout + r * wide, wide, values, dim, ds);
      for (int m = 0; m < rows; m++)
        weights(p + m * KEYS, ds + m * KEYS, some, masked, r + m, job.block_k / 8, job.factor,
                scratch.top[r + m], held.rest[r + m], held.delta[r + m]);
      Single::weigh<rows>(key_rows, ds, wide, scratch.out + r * wide);
    });
    for (int i = 0; i < panels; i++) {
      const int64_t place = some[i].index * PANEL * stride;
      float *dk = target.dk + place, *dv = target.dv + place;
      if (some[i].bias) {
        dk = held.means, dv = dk + PANEL * stride;
        memset(dk, 0, 8 * PANEL * stride);
      }
      pass_on(held.ds + i * PANEL, count, held.q, wide, dk, stride);
      pass_on(held.p + i * PANEL, count, held.dout, wide, dv, stride);
      if (some[i].bias) share_out(job, list, i, held.means, target);
    }
  }
  float* dq = at(it.dq, it.dq_stride);
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < dim; i++) dq[r * it.dq_stride[2] + i] = scratch.out[r * wide + i] * it.scale;
}

// Where the runs of query blocks begin that each thread takes, and the end.
inline std::vector<int64_t> runs(const Job& job, int64_t planes, int64_t rows) {
  const auto work = [&](int64_t item) {
    const int64_t at = job.group_of_plane[item / rows] * rows + item % rows;
    const int64_t means = job.dropped ? job.groups / job.block_k : 0;  // in blocks, at least
    return job.full_count[at] + job.part_count[at] + means + 1;
  };
  int64_t all = 0, done = 0;
  for (int64_t item = 0; item < planes * rows; item++) all += work(item);
  std::vector<int64_t> starts(1, 0);
  for (int64_t item = 0; item < planes * rows; done += work(item++))
    while (done * job.threads >= all * int64_t(starts.size())) starts.push_back(item);
  starts.resize(job.threads + 1, planes * rows);
  return starts;
}

// The gradients of the keys and values of a panel from all that was added up for them.
inline void complete(const GradientsJob& it, int64_t plane, int64_t panel, const std::vector<int64_t>& starts,
                     int64_t rows, float* added) {
  const Job& job = it.job;
  const int64_t stride = sum_stride(job), size = PANEL * stride, per_block = job.block_k / PANEL;
  const Target own(it, plane, 0, false);
  float *dk = own.dk + panel * size, *dv = own.dv + panel * size;
  memset(added, 0, 8 * stride);
  const auto add_tail = [&](const Target& from) {
    if (!it.pooled) return;
    const int64_t block = panel / per_block;
    add(from.blocks + block * 2 * stride, 1, 2 * stride, added);
    add(from.groups + block / job.group_blocks * 2 * stride, 1, 2 * stride, added);
  };
  add_tail(own);
  for (int64_t part = 1; part < job.threads; part++) {
    if (starts[part] <= plane * rows || starts[part] >= (plane + 1) * rows || starts[part] == starts[part + 1])
      continue;
    const Target other(it, plane, part, true);
    add(other.dk + panel * size, 1, size, dk);
    add(other.dv + panel * size, 1, size, dv);
    add_tail(other);
  }
  const int64_t end = valid_text_end(job, plane);
  for (int64_t j = 0; j < PANEL; j++) {
    const int64_t key = panel * PANEL + j;
    const bool valid = it.pooled && key < job.kv_len && !(key >= end && key < job.text_stop);
    for (int64_t i = 0; i < stride; i++) {
      float &k = dk[j * stride + i], &v = dv[j * stride + i];
      k = (valid ? k + added[i] : k) * it.scale;
      if (valid) v += added[stride + i];
    }
  }
}

void run_gradients(const GradientsJob& it) {
  const Job& job = it.job;
  const int64_t planes = job.batch * job.heads, rows = ceil_div(job.seq_len, job.block_q);
  const int64_t panels = panels_of(job), width = Single::width(job.dim), tall = rounded(job.block_q, 16);
  const std::vector<int64_t> starts = runs(job, planes, rows);
#pragma omp parallel num_threads(job.threads)
  {
    pack<Twofold>(job);
#pragma omp for schedule(static, 1)
    for (int64_t part = 0; part < job.threads; part++) {
      Scratch scratch(tall, width, 0, sum_stride(job), planes * panels + part * PANELS);
      const Held held(tall, width, sum_stride(job));
      for (int64_t item = starts[part]; item < starts[part + 1]; item++) {
        const int64_t plane = item / rows;
        const Target target(it, plane, part, starts[part] > plane * rows);
        if (item == std::max(starts[part], plane * rows)) target.clear();
        query_block(it, plane, item % rows, target, scratch, held);
      }
    }
    std::vector<float> added(2 * sum_stride(job));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < planes * panels; item++)
      complete(it, item / panels, item % panels, starts, rows, added.data());
  }
}

}  // namespace
