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

constexpr int GROUP = 4;  // keys whose derivatives are added up in one pass over the hidden units

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
#pragma GCC unroll 4
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

// grad_i . (v_j - out_i) for the active keys, by place in the tile. Subtracted first: where one key has all the weight the
// two products cancel, and their errors would not.
void products(const Tile& t, const Active& active, const float* grad, const float* out, float* dp) {
  for (int64_t c = 0; c < active.count; c += 4) {
    int64_t at[4];
    float found[4];
    vf sums[4];
    for (int64_t j = 0; j < 4; ++j) {
      at[j] = active.at[c + j < active.count ? c + j : c];
      sums[j] = vset1(0.0f);
    }
    for (int64_t d = 0; d < t.padded_v; d += LANES) {
      const vf g = vload(grad + d), o = vload(out + d);
      for (int j = 0; j < 4; ++j) sums[j] = vfma(g, vsub(vload(t.v + at[j] * t.padded_v + d), o), sums[j]);
    }
    vsum4(sums[0], sums[1], sums[2], sums[3], found);
    for (int j = 0; j < 4; ++j) dp[at[j]] = found[j];
  }
}

// Rows of a block: grad and out as float32; of the pointer the sum of grad_i over the keys that query i sees.
template <class T>
void prepare_rows(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* rows) {
  const int64_t padded = additive_padded(a.d_v);
  for (int64_t i = i0; i < i1; ++i) {
    float* const row = rows + (i - i0) * additive_row_floats(a.d_v);
    if (a.v) {
      copy_row<T>((const typename T::Element*)a.grad + n * a.grad_batch + i * a.grad_row, a.d_v, row);
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

template <class T>
void backward(const AdditiveArgs& a, const AdditivePiece& piece, float* queries, float* work,
              const AdditiveBackward& b) {
  Tile tile(a, work);
  float* const dw = tile.v + ADDITIVE_TILE * tile.padded_v;  // of a tile and a block of queries
  const int64_t keys_here = piece.j1 - piece.j0, padded_v = tile.padded_v;
  for (int64_t at = 0; at < a.queries * tile.padded; at += LANES) vstore(b.dq + at, vset1(0.0f));
  for (int64_t at = 0; at < keys_here * tile.padded; at += LANES) vstore(b.dk + at, vset1(0.0f));
  if (b.dv)
    for (int64_t at = 0; at < keys_here * padded_v; at += LANES) vstore(b.dv + at, vset1(0.0f));
  for (int64_t at = 0; at < tile.padded; at += LANES) vstore(b.dw + at, vset1(0.0f));
  for (int64_t i0 = 0; i0 < a.queries; i0 += ADDITIVE_QUERIES) {
    const int64_t i1 = a.queries - i0 < ADDITIVE_QUERIES ? a.queries : i0 + ADDITIVE_QUERIES;
    prepare_queries<T>(a, piece.n, i0, i1, queries);
    prepare_rows<T>(a, piece.n, i0, i1, b.rows);
    for (int64_t j0 = piece.j0; j0 < piece.j1; j0 += ADDITIVE_TILE) {
      const int64_t keys = piece.j1 - j0 < ADDITIVE_TILE ? piece.j1 - j0 : ADDITIVE_TILE;
      float* const dk = b.dk + (j0 - piece.j0) * tile.padded;
      float* const dv = b.dv ? b.dv + (j0 - piece.j0) * padded_v : nullptr;
      bool ready = false;
      for (int64_t i = i0; i < i1; ++i) {
        const float most = a.largest[piece.n * a.queries + i], sum = a.sum[piece.n * a.queries + i];
        if (sum == 0.0f) continue;
        const Active active(a, piece.n, i, j0, keys);
        if (active.count == 0) continue;
        if (!ready) {
          tile.prepare_keys<T>(a, piece.n, j0, j0 + keys);
          if (a.v) tile.prepare_values<T>(a, piece.n, j0, j0 + keys);
          for (int64_t at = 0; at < tile.padded; at += LANES) vstore(dw + at, vset1(0.0f));
          ready = true;
        }
        const float* const row = b.rows + (i - i0) * additive_row_floats(a.d_v);
        float scores[16], p[16], ds[16] = {};
        score<true>(a, query_of(queries, i - i0, tile.padded), tile, active, scores);
        decays(scores, most, p);
        for (int j = 0; j < 16; j += LANES) vstore(p + j, vdiv(vload(p + j), vset1(sum)));
        if (a.v) {
          products(tile, active, row, row + padded_v, ds);
          for (int64_t c = 0; c < active.count; ++c) {
            const int64_t j = active.at[c];
            ds[j] *= p[j];
            float* const to = dv + j * padded_v;
            const vf factor = vset1(p[j]);
            for (int64_t d = 0; d < padded_v; d += LANES) vstore(to + d, vfma(factor, vload(row + d), vload(to + d)));
          }
        } else {
          const float* const grad = (const float*)a.grad + piece.n * a.grad_batch + i * a.grad_row + j0;
          for (int64_t c = 0; c < active.count; ++c) {
            const int64_t j = active.at[c];
            ds[j] = grad[j] - p[j] * row[0];
          }
        }
        derivative(tile, active, ds, b.dq + i * tile.padded, dk, dw);
      }
      if (ready)
        for (int64_t at = 0; at < tile.padded; at += LANES) vstore(b.dw + at, vadd(vload(b.dw + at), vload(dw + at)));
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
