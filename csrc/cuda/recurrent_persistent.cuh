// One launch for a whole sequence: every block keeps its share of the weights in shared memory and its units' states in
// shared memory too, for all steps, and the blocks of the grid exchange h (backward: du, the gradient of the products)
// through global memory, with one barrier of the grid a step.
//
//   forward   a block owns `units` hidden units: their rows of w_hh for all gates. Step: barrier; tile of h; product;
//             gates, c, h of its units; h, masked and rounded, to the exchange.
//   backward  it owns the same units as columns of w_hh. Step: gradients of its units' gates from dh and dc, to the
//             exchange; barrier; tile of du; product, which gives dh before the step.
//
// The exchange has two buffers, used in turn: who is a step ahead writes to the one that nobody reads any more. Takes
// everything but layer norm and projection, whose steps need more barriers. The method is that of Diamos et al., "Persistent
// RNNs" (2016). How the grid is cut, and when this is used: recurrent_plan.h.
#pragma once

#include "cuda/recurrent.cuh"
#include "cuda/recurrent_product.cuh"

namespace fastdl::cuda {

template <class T>
struct Persistent {
  PersistentPlan plan;
  const T* weights;   // w_hh [D, G * H, P], P = H
  T* exchange;        // [2, D, B, plan.depth], zeros before the launch
  unsigned* barrier;  // 0 before the launch
};

// The shared memory of a block, and its place in the grid.
template <class T>
struct PersistentBlock {
  T* weights;                  // [rows][weight_stride]
  T* tile;                     // [columns][tile_stride]
  float* partial;              // [parts][rows][partial_stride]
  float* states;               // [kStates][batch][units]
  int rows, units, batch;      // rows of the weights; units and sequences that this block has
  int64_t direction, unit, b;  // its direction, first unit and first sequence

  __device__ __forceinline__ PersistentBlock(const Sequence& q, const PersistentPlan& p, int unit_rows,
                                             unsigned char* memory) {
    rows = unit_rows * p.units;
    weights = reinterpret_cast<T*>(memory);
    tile = weights + rows * p.weight_stride;
    partial = reinterpret_cast<float*>(tile + p.columns * p.tile_stride);
    states = partial + p.parts * rows * p.partial_stride;
    const auto index = static_cast<int64_t>(blockIdx.x);
    unit = index % p.slices * p.units;
    direction = index / p.slices % q.directions;
    b = index / p.slices / q.directions * p.batch;
    units = static_cast<int>(q.hidden - unit < p.units ? q.hidden - unit : p.units);
    batch = static_cast<int>(q.batch - b < p.batch ? q.batch - b : p.batch);
  }
};

// tile [Columns][chunk] = rows of `from` [.., depth], zeros from row `count` on. Begins after all reads of the last tile.
template <int Columns, class T>
__device__ __forceinline__ void load_tile(const PersistentPlan& p, T* tile, const T* from, int count, int chunk) {
  constexpr int kPiece = 16 / sizeof(T);
  const int pieces = chunk / kPiece;
  for (int i = static_cast<int>(threadIdx.x); i < Columns * pieces; i += kPersistentThreads) {
    const int row = i / pieces, at = i % pieces * kPiece;
    const bool valid = row < count;
    ptx::cp_async<16>(tile + row * p.tile_stride + at, from + (valid ? static_cast<int64_t>(row) * p.depth : 0) + at,
                      valid);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// block.partial = weights times sequences [base, base + Columns) of `from` [batch, depth]. Ends with a barrier.
template <int Columns, class T>
__device__ __forceinline__ void persistent_product(const PersistentPlan& p, const PersistentBlock<T>& block,
                                                   const T* from, int base) {
  for (int k = 0; k < p.depth; k += p.chunk) {
    const int chunk = p.depth - k < p.chunk ? p.depth - k : p.chunk;
    load_tile<Columns>(p, block.tile, from + static_cast<int64_t>(base) * p.depth + k, block.batch - base, chunk);
    block_product<Columns>(p, block.weights + k, block.tile, block.rows, chunk, block.partial, k > 0);
    __syncthreads();
  }
}

// Sequences base .. base + Columns and all units of a block, each pair by the same thread in every step: body(sequence,
// unit, index of its states).
template <int Columns, class T, class Body>
__device__ __forceinline__ void for_each_unit(const PersistentPlan& p, const PersistentBlock<T>& block, int base,
                                              const Body& body) {
  for (int i = static_cast<int>(threadIdx.x); i < Columns * p.units; i += kPersistentThreads) {
    const int b = base + i / p.units, j = i % p.units;
    if (b < block.batch && j < block.units) body(b, j, b * p.units + j);
  }
}

// ---- Forward --------------------------------------------------------------------------------------------------------

template <class Cell, int Columns>
__device__ __forceinline__ void persistent_forward(const Cell& a, const Persistent<typename Cell::Type>& w) {
  using T = typename Cell::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  FASTDL_DYNAMIC_SHARED(unsigned char, memory);
  const Sequence& q = a.q;
  const PersistentPlan& p = w.plan;
  const PersistentBlock<T> block(q, p, G, memory);
  const int64_t d = block.direction, H = q.hidden;
  const int plane = p.batch * p.units;  // of one state
  const auto exchange_of = [&](int64_t k) { return w.exchange + ((k & 1) * q.directions + d) * q.batch * p.depth; };

  // Row g * units + j: gate g of unit j; zeros where there is no unit or no column.
  for (int row = 0; row < block.rows; ++row) {
    const int g = row / p.units, j = row % p.units;
    const T* from = w.weights + ((d * G + g) * H + block.unit + j) * H;
    for (int i = static_cast<int>(threadIdx.x); i < p.weight_stride; i += kPersistentThreads)
      block.weights[row * p.weight_stride + i] = j < block.units && i < H ? from[i] : from_float<T>(0.0f);
  }
  for (int base = 0; base < block.batch; base += Columns)
    for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
      const int64_t row = state_row(q, block.b + b, d), i = row * H + block.unit + j;
#pragma unroll
      for (int s = 0; s < S; ++s) block.states[s * plane + at] = a.initial(s)[i];
      exchange_of(0)[(block.b + b) * p.depth + block.unit + j] = operand_of<T>(q, i, a.initial(0)[i]);
    });

  for (int64_t k = 0; k < q.steps; ++k) {
    const int64_t t = time_of(q, k, d);
    const auto load_x = [&](int b, int j, float (&x)[G]) {
      const T* from = a.gates_x + row_of(q, t, block.b + b, d) * G * H + block.unit + j;
#pragma unroll
      for (int g = 0; g < G; ++g) x[g] = to_float(from[g * H]);
    };
    // What the first unit of each thread needs from memory does not wait for h.
    float ahead[G] = {};
    const int first_b = static_cast<int>(threadIdx.x) / p.units, first_j = static_cast<int>(threadIdx.x) % p.units;
    if (first_b < (block.batch < Columns ? block.batch : Columns) && first_j < block.units)
      load_x(first_b, first_j, ahead);
    ptx::grid_barrier(w.barrier);
    for (int base = 0; base < block.batch; base += Columns) {
      persistent_product<Columns>(p, block, exchange_of(k) + block.b * p.depth, base);
      for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
        float x[G], u[G], state[S];
        if (base == 0 && b == first_b && j == first_j) {
#pragma unroll
          for (int g = 0; g < G; ++g) x[g] = ahead[g];
        } else {
          load_x(b, j, x);
        }
#pragma unroll
        for (int g = 0; g < G; ++g) u[g] = sum_of_parts(p, block.partial, block.rows, g * p.units + j, b - base);
#pragma unroll
        for (int s = 0; s < S; ++s) state[s] = block.states[s * plane + at];
        a.element({t, block.b + b, d, block.unit + j}, x, u, state);
#pragma unroll
        for (int s = 0; s < S; ++s) block.states[s * plane + at] = state[s];
        exchange_of(k + 1)[(block.b + b) * p.depth + block.unit + j] =
            operand_of<T>(q, state_row(q, block.b + b, d) * H + block.unit + j, state[0]);
      });
    }
  }

  for (int base = 0; base < block.batch; base += Columns)
    for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
#pragma unroll
      for (int s = 0; s < S; ++s)
        a.last(s)[state_row(q, block.b + b, d) * H + block.unit + j] = block.states[s * plane + at];
    });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <class Cell, int Columns>
__device__ __forceinline__ void persistent_backward(const Cell& a, const Persistent<typename Cell::Type>& w) {
  using T = typename Cell::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  FASTDL_DYNAMIC_SHARED(unsigned char, memory);
  const Sequence& q = a.q;
  const PersistentPlan& p = w.plan;
  const PersistentBlock<T> block(q, p, 1, memory);
  const int64_t d = block.direction, H = q.hidden;
  const int plane = p.batch * p.units;
  const auto exchange_of = [&](int64_t k) { return w.exchange + ((k & 1) * q.directions + d) * q.batch * p.depth; };

  // Row j: column `unit + j` of w_hh, [G * H].
  const int columns = static_cast<int>(G * H);
  for (int i = static_cast<int>(threadIdx.x); i < p.units * p.weight_stride; i += kPersistentThreads) {
    const int j = i % p.units, row = i / p.units;
    const bool inside = j < block.units && row < columns;
    block.weights[j * p.weight_stride + row] =
        inside ? w.weights[(d * columns + row) * H + block.unit + j] : from_float<T>(0.0f);
  }
  for (int base = 0; base < block.batch; base += Columns)
    for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
      const int64_t i = state_row(q, block.b + b, d) * H + block.unit + j;
#pragma unroll
      for (int s = 0; s < S; ++s) block.states[s * plane + at] = a.initial(s) ? a.initial(s)[i] : 0.0f;
    });

  for (int64_t k = q.steps - 1; k >= 0; --k) {
    const int64_t t = time_of(q, k, d);
    for (int base = 0; base < block.batch; base += Columns)
      for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
        const Place place{t, block.b + b, d, block.unit + j};
        const int64_t row = row_of(q, t, place.b, d);
        float da[G] = {}, du[G] = {}, state[S];
#pragma unroll
        for (int s = 0; s < S; ++s) state[s] = block.states[s * plane + at];
        if (runs(q, t, place.b)) {
          if (a.dy) state[0] += to_float(a.dy[row * H + place.j]);
          a.element(place, state, da, du);
#pragma unroll
          for (int s = 0; s < S; ++s) block.states[s * plane + at] = state[s];
        }
#pragma unroll
        for (int g = 0; g < G; ++g) {
          const int64_t i = g * H + place.j;
          exchange_of(k)[place.b * p.depth + i] = from_float<T>(du[g]);
          a.da[row * G * H + i] = from_float<T>(da[g]);
          if (a.du) a.du[row * G * H + i] = from_float<T>(du[g]);
        }
      });
    ptx::grid_barrier(w.barrier);
    for (int base = 0; base < block.batch; base += Columns) {
      persistent_product<Columns>(p, block, exchange_of(k) + block.b * p.depth, base);
      for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
        if (!runs(q, t, block.b + b)) return;
        const float through = sum_of_parts(p, block.partial, block.rows, j, b - base);
        const int64_t i = state_row(q, block.b + b, d) * H + block.unit + j;
        block.states[at] += q.h_mask ? through * q.h_mask[i] : through;
      });
    }
  }

  for (int base = 0; base < block.batch; base += Columns)
    for_each_unit<Columns>(p, block, base, [&](int b, int j, int at) {
#pragma unroll
      for (int s = 0; s < S; ++s)
        a.last(s)[state_row(q, block.b + b, d) * H + block.unit + j] = block.states[s * plane + at];
    });
}

// ---- Launching ------------------------------------------------------------------------------------------------------

template <class Cell>
using PersistentKernel = void (*)(Cell, Persistent<typename Cell::Type>);

// narrow: compiled for 8 columns, wide: for kWideColumns.
template <class T>
constexpr int kWideColumns = sizeof(T) == 2 ? 32 : 16;

template <class Cell>
cudaError_t persistent_launch(PersistentKernel<Cell> narrow, PersistentKernel<Cell> wide, const Cell& a,
                              const Persistent<typename Cell::Type>& w, cudaStream_t stream) {
  const PersistentPlan& p = w.plan;
  return launch_cooperative(p.columns == 8 ? narrow : wide,
                            dim3(static_cast<unsigned>(a.q.directions * p.slices * p.groups)), dim3(kPersistentThreads),
                            static_cast<size_t>(p.shared), stream, a, w);
}

}  // namespace fastdl::cuda
