// Additive attention backward for one level: all queries of a sequence against one chunk of keys.
//
//   ds_ij = p_ij grad_i . (v_j - out_i)                pointer: grad_ij - p_ij sum_j grad_ij
//   dv_j += p_ij grad_i,  dq_i += ds_ij (1 - t^2),  dk_j += ds_ij (1 - t^2),  dw += ds_ij t;  dq and dk times w at the end
//
// Method: as in the forward, a tile of keys stays while queries pass; tanh of one query and the tile is computed once,
// for the scores, and kept in the first-level cache for the derivative, so that forward and backward take two tanh an
// element. Lanes are hidden units: nothing is summed across lanes but scores. After the score's operations an element
// costs 4 multiply-adds, of which 3 are the gradients' own. Sums run over a tile, then over a block of queries or a chunk
// of keys, then over all.
//
// Test: pytest tests/test_additive_attention.py
#include "cpu/additive_tile.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

constexpr int GROUP = 8;  // keys whose derivatives are added up in one pass over the hidden units

// dq, dw [padded] and dk of the active keys; ds [ADDITIVE_TILE] by place in the tile.
void derivative(const Tile& t, const Active& active, const float* ds, float* dq, float* dk, float* dw) {
  const vf one = vset1(1.0f);
  for (int64_t c = 0; c < active.count; c += GROUP) {
    const float* kept[GROUP];
    float* mine[GROUP];
    vf factor[GROUP];
    for (int64_t j = 0; j < GROUP; ++j) {
      const int64_t at = active.at[c + j < active.count ? c + j : c];
      kept[j] = t.tanh + at * t.padded;
      mine[j] = dk + at * t.padded;
      factor[j] = vset1(c + j < active.count ? ds[at] : 0.0f);
    }
    for (int64_t h = 0; h < t.padded; h += LANES) {
      vf q = vset1(0.0f), w = vset1(0.0f);
#pragma GCC unroll 8
      for (int j = 0; j < GROUP; ++j) {
        const vf x = vload(kept[j] + h), g = vfma(vsub(vset1(0.0f), x), x, one);
        q = vfma(factor[j], g, q);
        w = vfma(factor[j], x, w);
        vstore(mine[j] + h, vfma(factor[j], g, vload(mine[j] + h)));
      }
      vstore(dq + h, vadd(vload(dq + h), q));
      vstore(dw + h, vadd(vload(dw + h), w));
    }
  }
}

// dp [ADDITIVE_TILE] = grad_i . (v_j - out_i). Subtracted first: where one key has all the weight the two products cancel,
// and their errors would not.
void products(const Tile& t, const float* grad, const float* out, float* dp) {
  vf sums[ADDITIVE_TILE];
#pragma GCC unroll 8
  for (int j = 0; j < ADDITIVE_TILE; ++j) sums[j] = vset1(0.0f);
  for (int64_t d = 0; d < t.padded_v; d += LANES) {
    const vf g = vload(grad + d), o = vload(out + d);
#pragma GCC unroll 8
    for (int j = 0; j < ADDITIVE_TILE; ++j) sums[j] = vfma(g, vsub(vload(t.v + j * t.padded_v + d), o), sums[j]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < ADDITIVE_TILE; j += 4) vsum4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3], dp + j);
}

// dv [ADDITIVE_TILE][padded d_v] += sum over rows i of p_ij grad_i, p [rows][ADDITIVE_TILE].
void add_outer(const float* p, const float* rows, int64_t count, int64_t row, int64_t padded_v, int64_t keys,
               float* dv) {
  for (int64_t d = 0; d < padded_v; d += LANES) {
    vf sums[ADDITIVE_TILE];
#pragma GCC unroll 8
    for (int j = 0; j < ADDITIVE_TILE; ++j) sums[j] = vset1(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const vf g = vload(rows + i * row + d);
#pragma GCC unroll 8
      for (int j = 0; j < ADDITIVE_TILE; ++j) sums[j] = vfma(vset1(p[i * ADDITIVE_TILE + j]), g, sums[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < ADDITIVE_TILE; ++j)
      if (j < keys) vstore(dv + j * padded_v + d, vadd(vload(dv + j * padded_v + d), sums[j]));
  }
}

void clear(float* x, int64_t count) { memset(x, 0, (size_t)count * sizeof(float)); }

// Rows of a block: grad (zeros where a query sees nothing) and out as float32; of the pointer the sum of grad_i over the
// keys that query i sees.
template <class T>
void prepare_rows(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* rows) {
  const int64_t padded = additive_padded(a.d_v);
  for (int64_t i = i0; i < i1; ++i) {
    float* const row = rows + (i - i0) * additive_row_floats(a.d_v);
    if (a.v) {
      const bool blind = a.sum[n * a.queries + i] == 0.0f;
      copy_row<T>((const typename T::Element*)a.grad + n * a.grad_batch + i * a.grad_row, a.d_v, row);
      if (blind) clear(row, padded);
      copy_row<T>((const typename T::Element*)a.out + (n * a.queries + i) * a.d_v, a.d_v, row + padded);
      continue;
    }
    const float* const grad = (const float*)a.grad + n * a.grad_batch + i * a.grad_row;
    float parts[LANES] = {};
    for (int64_t j0 = 0; j0 < a.keys; j0 += ADDITIVE_TILE) {
      const Active active(a, n, i, j0, a.keys - j0 < ADDITIVE_TILE ? a.keys - j0 : ADDITIVE_TILE);
      for (int64_t c = 0; c < active.count; ++c) parts[active.at[c] % LANES] += grad[j0 + active.at[c]];
    }
    row[0] = vsum(vload(parts));
  }
}

// Queries i0 .. i1, prepared in `queries` and b.rows, against the tile at j0. dw: of the tile, cleared here.
template <class T>
void backward_tile(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, int64_t j0, int64_t keys, Tile& tile,
                   const float* queries, const AdditiveBackward& b, float* dk, float* dv, float* dw) {
  const int64_t row = additive_row_floats(a.d_v);
  float p[ADDITIVE_QUERIES * ADDITIVE_TILE], ds[ADDITIVE_QUERIES * ADDITIVE_TILE];
  tile.prepare_keys<T>(a, n, j0, j0 + keys);
  clear(dw, tile.padded);
  clear(p, ADDITIVE_QUERIES * ADDITIVE_TILE);
  if (a.v) {
    tile.prepare_values<T>(a, n, j0, j0 + keys);
    for (int64_t i = 0; i < i1 - i0; ++i)
      products(tile, b.rows + i * row, b.rows + i * row + tile.padded_v, ds + i * ADDITIVE_TILE);
  }
  for (int64_t i = i0; i < i1; ++i) {
    const float most = a.largest[n * a.queries + i], sum = a.sum[n * a.queries + i];
    const Active active(a, n, i, j0, keys);
    if (sum == 0.0f || active.count == 0) continue;
    float scores[16], e[16];
    float *const mine = p + (i - i0) * ADDITIVE_TILE, *const slope = ds + (i - i0) * ADDITIVE_TILE;
    score<true>(a, query_of(queries, i - i0, tile.padded), tile, active, scores);
    decays(scores, most, e);
    for (int j = 0; j < 16; j += LANES) vstore(e + j, vdiv(vload(e + j), vset1(sum)));
    const float* const grad = a.v ? nullptr : (const float*)a.grad + n * a.grad_batch + i * a.grad_row + j0;
    for (int64_t c = 0; c < active.count; ++c) {
      const int64_t j = active.at[c];
      mine[j] = e[j];
      slope[j] = a.v ? e[j] * slope[j] : grad[j] - e[j] * b.rows[(i - i0) * row];
    }
    derivative(tile, active, slope, b.dq + i * tile.padded, dk, dw);
  }
  if (a.v) add_outer(p, b.rows, i1 - i0, row, tile.padded_v, keys, dv);
}

// Whether a query of the block attends to a key of the tile.
bool seen(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, int64_t j0, int64_t keys) {
  for (int64_t i = i0; i < i1; ++i)
    if (a.sum[n * a.queries + i] != 0.0f && Active(a, n, i, j0, keys).count > 0) return true;
  return false;
}

template <class T>
void backward(const AdditiveArgs& a, const AdditivePiece& piece, float* queries, float* work,
              const AdditiveBackward& b) {
  Tile tile(a, work);
  float* const dw = tile.v + ADDITIVE_TILE * tile.padded_v;  // of a tile and a block of queries
  const int64_t keys_here = piece.j1 - piece.j0;
  clear(b.dq, a.queries * tile.padded);
  clear(b.dk, keys_here * tile.padded);
  if (b.dv) clear(b.dv, keys_here * tile.padded_v);
  clear(b.dw, tile.padded);
  for (int64_t i0 = 0; i0 < a.queries; i0 += ADDITIVE_QUERIES) {
    const int64_t i1 = a.queries - i0 < ADDITIVE_QUERIES ? a.queries : i0 + ADDITIVE_QUERIES;
    prepare_queries<T>(a, piece.n, i0, i1, queries);
    prepare_rows<T>(a, piece.n, i0, i1, b.rows);
    for (int64_t j0 = piece.j0; j0 < piece.j1; j0 += ADDITIVE_TILE) {
      const int64_t keys = piece.j1 - j0 < ADDITIVE_TILE ? piece.j1 - j0 : ADDITIVE_TILE, at = j0 - piece.j0;
      if (!seen(a, piece.n, i0, i1, j0, keys)) continue;
      backward_tile<T>(a, piece.n, i0, i1, j0, keys, tile, queries, b, b.dk + at * tile.padded,
                       b.dv ? b.dv + at * tile.padded_v : nullptr, dw);
      for (int64_t h = 0; h < tile.padded; h += LANES) vstore(b.dw + h, vadd(vload(b.dw + h), vload(dw + h)));
    }
  }
}

void backward_any(const AdditiveArgs& a, const AdditivePiece& piece, float* queries, float* work,
                  const AdditiveBackward& b) {
  dispatch(a.format, [&](auto type) { backward<decltype(type)>(a, piece, queries, work, b); });
}

}  // namespace

extern const AdditiveBackwardKernels additive_attention_backward_kernels;
const AdditiveBackwardKernels additive_attention_backward_kernels = {backward_any};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
