// Additive attention forward for one level: a block of queries passes tiles of keys, with the softmax as it goes.
//
// Method: a tile's exponentials are computed once and stay in the first-level cache while up to 64 queries pass (see
// additive_tile.h). Each query keeps the largest score of the chunk, the sum of its exponentials and the sum of v, which
// are scaled when a larger score comes (Milakov and Gimelshein 2018). Floor: 4 multiply-adds and a reciprocal an element
// of [queries, keys, hidden], of which the score itself is one.
//
// Test: pytest tests/test_additive_attention.py
#include "cpu/additive_tile.h"

namespace fastdl {
namespace FASTDL_LEVEL {
namespace {

// The largest of the scores; NaN where one is NaN.
float largest_score(const float* scores, const Active& active, float most) {
  for (int64_t c = 0; c < active.count; ++c) {
    const float s = scores[active.at[c]];
    if (s != s) return s;
    most = s > most ? s : most;
  }
  return most;
}

// out [padded] = scale * out + sum over active keys of e_j v_j
void add_values(const Tile& t, const Active& active, const float* e, float scale, float* out) {
  for (int64_t d = 0; d < t.padded_v; d += LANES) {
    vf sum = vmul(vset1(scale), vload(out + d));
    for (int64_t c = 0; c < active.count; ++c)
      sum = vfma(vset1(e[active.at[c]]), vload(t.v + active.at[c] * t.padded_v + d), sum);
    vstore(out + d, sum);
  }
}

template <class T>
void forward(const AdditiveArgs& a, const AdditivePiece& piece, const float* queries, float* work,
             const AdditiveState& state, float* scores_out) {
  Tile tile(a, work);
  const int64_t count = piece.i1 - piece.i0;
  for (int64_t i = 0; i < count; ++i) {
    state.largest[i] = MINUS_INFINITY;
    state.sum[i] = 0.0f;
  }
  if (state.out)
    for (int64_t at = 0; at < count * tile.padded_v; at += LANES) vstore(state.out + at, vset1(0.0f));
  for (int64_t j0 = piece.j0; j0 < piece.j1; j0 += ADDITIVE_TILE) {
    const int64_t keys = piece.j1 - j0 < ADDITIVE_TILE ? piece.j1 - j0 : ADDITIVE_TILE;
    bool ready = false;
    for (int64_t i = 0; i < count; ++i) {
      const Active active(a, piece.n, piece.i0 + i, j0, keys);
      float scores[16], e[16];
      if (active.count > 0) {
        if (!ready) tile.prepare<T>(a, piece.n, j0, j0 + keys);
        ready = true;
        score<false>(a, query_of(queries, i, tile.padded), tile, active, scores);
      } else if (scores_out) {
        for (int j = 0; j < 16; ++j) scores[j] = MINUS_INFINITY;
      }
      if (scores_out) memcpy(scores_out + i * a.keys + j0, scores, (size_t)keys * sizeof(float));
      if (active.count == 0) continue;
      const float most = largest_score(scores, active, state.largest[i]);
      if (most == MINUS_INFINITY) continue;
      const float scale = state.largest[i] == most ? 1.0f : decay(state.largest[i] - most);
      state.largest[i] = most;
      decays(scores, most, e);
      float sum = 0.0f;
      for (int j = 0; j < 16; j += LANES) sum += vsum(vload(e + j));
      state.sum[i] = state.sum[i] * scale + sum;
      if (state.out) add_values(tile, active, e, scale, state.out + i * tile.padded_v);
    }
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

void store(const float* from, int64_t rows, int64_t cols, const float* factor, float scale, int format, void* to) {
  const int64_t padded = additive_padded(cols);
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < rows; ++i)
      for_each(cols, [&](int64_t c, const auto& part) FASTDL_STEP {
        const vf v = vmul(vset1(scale), vload(from + i * padded + c));
        part.template store<T>((typename T::Element*)to + i * cols + c, factor ? vmul(v, vload(factor + c)) : v);
      });
  });
}

void add(const float* from, int64_t count, float* to) {
  for (int64_t at = 0; at < count; at += LANES) vstore(to + at, vadd(vload(to + at), vload(from + at)));
}

void weights(const void* w, int format, int64_t hidden, float* to) {
  const int64_t padded = additive_padded(hidden);
  dispatch(format, [&](auto type) {
    using T = decltype(type);
    copy_row<T>((const typename T::Element*)w, hidden, to);
  });
  for (int64_t at = 0; at < padded; at += LANES) vstore(to + padded + at, vmul(vset1(-2.0f), vload(to + at)));
}

void queries_any(const AdditiveArgs& a, int64_t n, int64_t i0, int64_t i1, float* to) {
  dispatch(a.format, [&](auto type) { prepare_queries<decltype(type)>(a, n, i0, i1, to); });
}

void forward_any(const AdditiveArgs& a, const AdditivePiece& piece, const float* queries, float* work,
                 const AdditiveState& state, float* scores) {
  dispatch(a.format, [&](auto type) { forward<decltype(type)>(a, piece, queries, work, state, scores); });
}

}  // namespace

extern const AdditiveKernels additive_attention_kernels;
const AdditiveKernels additive_attention_kernels = {weights, queries_any, forward_any, merge, finish, store, add};

}  // namespace FASTDL_LEVEL
}  // namespace fastdl
