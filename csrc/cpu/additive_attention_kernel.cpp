// Additive attention forward for one level: a block of queries passes tiles of keys, with the softmax as it goes.
//
// Method: a tile's exponentials are computed once and stay in the first-level cache while up to 64 queries pass (see
// additive_tile.h). The scores of a block of queries and a chunk of keys are kept; then each row has its softmax, and the
// values pass. Chunks are merged by their largest scores (Milakov and Gimelshein 2018).
//
// Test: pytest tests/test_additive_attention.py
#include "cpu/additive_tile.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// e [padded keys] = exp(s - largest) of a row of scores, zeros behind; a row that sees nothing gives largest -inf, sum 0.
// NaN makes both NaN.
void softmax_row(float* row, int64_t keys, float* most_out, float* sum_out) {
  const int64_t padded = additive_padded(keys);
  for (int64_t j = keys; j < padded; ++j) row[j] = MINUS_INFINITY;
  vf most = vset1(MINUS_INFINITY), sum = vset1(0.0f);
  for (int64_t j = 0; j < padded; j += LANES) most = vmax(vload(row + j), most);  // in this order NaN is passed over
  const float found = vhmax(most), shift = found == MINUS_INFINITY ? 0.0f : found;
  for (int64_t j = 0; j < padded; j += LANES) {
    const vf e = decay(vsub(vload(row + j), vset1(shift)));
    sum = vadd(sum, e);
    vstore(row + j, e);
  }
  const float total = vsum(sum);
  *most_out = total != total ? total : found;
  *sum_out = total;
}

// out [padded d_v] += sum over keys of a tile of e_j v_j. Keys of weight 0, masked ones among them, are not read.
void add_values(const float* v, int64_t padded_v, const float* e, int64_t keys, float* out) {
  int64_t at[ADDITIVE_TILE], count = 0;
  for (int64_t j = 0; j < keys; ++j) {
    at[count] = j;
    count += e[j] != 0.0f;
  }
  if (count == 0) return;
  if (count == ADDITIVE_TILE) {  // the weights stay in registers
    vf weight[ADDITIVE_TILE];
#pragma GCC unroll 8
    for (int j = 0; j < ADDITIVE_TILE; ++j) weight[j] = vset1(e[j]);
    for (int64_t d = 0; d < padded_v; d += LANES) {
      vf sum = vset1(0.0f);
#pragma GCC unroll 8
      for (int j = 0; j < ADDITIVE_TILE; ++j) sum = vfma(weight[j], vload(v + j * padded_v + d), sum);
      vstore(out + d, vadd(vload(out + d), sum));
    }
    return;
  }
  for (int64_t d = 0; d < padded_v; d += LANES) {
    vf sum = vset1(0.0f);
    for (int64_t c = 0; c < count; ++c) sum = vfma(vset1(e[at[c]]), vload(v + at[c] * padded_v + d), sum);
    vstore(out + d, vadd(vload(out + d), sum));
  }
}

template <class T>
void forward(const AdditiveArgs& a, const AdditivePiece& piece, const float* queries, float* work, float* scores,
             const AdditiveState& state, float* scores_out) {
  Tile tile(a, work);
  const int64_t count = piece.i1 - piece.i0, all = piece.j1 - piece.j0, row = additive_padded(all);
  for (int64_t j0 = piece.j0; j0 < piece.j1; j0 += ADDITIVE_TILE) {
    const int64_t keys = piece.j1 - j0 < ADDITIVE_TILE ? piece.j1 - j0 : ADDITIVE_TILE;
    bool ready = false;
    for (int64_t i = 0; i < count; ++i) {
      const Active active(a, piece.n, piece.i0 + i, j0, keys);
      float found[16];
      if (!ready && active.count > 0) {
        tile.prepare_keys<T>(a, piece.n, j0, j0 + keys);
        ready = true;
      }
      score<false>(a, query_of(queries, i, tile.padded), tile, active, found);
      memcpy(scores + i * row + j0 - piece.j0, found, (size_t)keys * sizeof(float));
      if (scores_out) memcpy(scores_out + i * a.keys + j0, found, (size_t)keys * sizeof(float));
    }
  }
  for (int64_t i = 0; i < count; ++i) softmax_row(scores + i * row, all, state.largest + i, state.sum + i);
  if (!state.out) return;
  for (int64_t at = 0; at < count * tile.padded_v; at += LANES) vstore(state.out + at, vset1(0.0f));
  for (int64_t j0 = piece.j0; j0 < piece.j1; j0 += ADDITIVE_TILE) {
    const int64_t keys = piece.j1 - j0 < ADDITIVE_TILE ? piece.j1 - j0 : ADDITIVE_TILE;
    tile.prepare_values<T>(a, piece.n, j0, j0 + keys);
    for (int64_t i = 0; i < count; ++i)
      add_values(tile.v, tile.padded_v, scores + i * row + j0 - piece.j0, keys, state.out + i * tile.padded_v);
  }
}

void merge(int64_t queries, int64_t d_v, const AdditiveState& part, const AdditiveState& whole) {
  const int64_t padded = additive_padded(d_v);
  for (int64_t i = 0; i < queries; ++i) {
    const float theirs = part.largest[i], ours = whole.largest[i];
    if (theirs == MINUS_INFINITY) continue;
    const bool first = ours == MINUS_INFINITY;
    const float most = theirs != theirs || ours != ours ? theirs + ours : theirs > ours ? theirs : ours;
    const float f = first ? 0.0f : ours == most ? 1.0f : decay(ours - most);
    const float g = theirs == most ? 1.0f : decay(theirs - most);
    whole.largest[i] = most;
    whole.sum[i] = (first ? 0.0f : whole.sum[i] * f) + part.sum[i] * g;
    if (!part.out) continue;
    const float* const from = part.out + i * padded;
    float* const to = whole.out + i * padded;
    for (int64_t d = 0; d < padded; d += LANES) {
      const vf v = vmul(vset1(g), vload(from + d));
      vstore(to + d, first ? v : vfma(vset1(f), vload(to + d), v));
    }
  }
}

void finish(int64_t queries, int64_t d_v, const AdditiveState& state, int format, void* out) {
  const int64_t padded = additive_padded(d_v);
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < queries; ++i) {
      const float* const from = state.out + i * padded;
      auto* const to = (typename T::Element*)out + i * d_v;
      const bool blind = state.largest[i] == MINUS_INFINITY;
      const vf sum = vset1(blind ? 1.0f : state.sum[i]);
      for_each(d_v, [&](int64_t d, const auto& part) FASTDL_STEP {
        part.template store<T>(to + d, blind ? vset1(0.0f) : vdiv(vload(from + d), sum));
      });
    }
  });
}

void store(const float* from, int64_t rows, int64_t cols, const float* factor, int format, void* to) {
  const int64_t padded = additive_padded(cols);
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < rows; ++i)
      for_each(cols, [&](int64_t c, const auto& part) FASTDL_STEP {
        const vf v = vload(from + i * padded + c);
        part.template store<T>((typename T::Element*)to + i * cols + c, factor ? vmul(v, vload(factor + c)) : v);
      });
  });
}

void add(const float* from, int64_t count, float* to) {
  for (int64_t at = 0; at < count; at += LANES) vstore(to + at, vadd(vload(to + at), vload(from + at)));
}

void weights(const void* w, int format, int64_t hidden, float* to) {
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    copy_row<T>((const typename T::Element*)w, hidden, to);
  });
}

void queries_any(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* to) {
  dispatch(a.format, [&](auto type) { prepare_queries<decltype(type)>(a, n, i0, i1, to); });
}

void forward_any(const AdditiveArgs& a, const AdditivePiece& piece, const float* queries, float* work, float* scores,
                 const AdditiveState& state, float* scores_out) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, piece, queries, work, scores, state, scores_out); });
}

}  // namespace

extern const AdditiveKernels additive_attention_kernels;
const AdditiveKernels additive_attention_kernels = {weights, queries_any, forward_any, merge, finish, store, add};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
