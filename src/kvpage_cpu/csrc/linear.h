// Linear layers over packed weights: rows of x packed for the micro-kernels, products, and what is done with them.
//
// A row's result has the same bits whatever the number of rows beside it and the number of threads: every product sums
// along K in one order, which neither the height of a block of rows nor the split of the panels changes.
#pragma once
#include "simd.h"

namespace KVP_NS {

constexpr int PANEL = 32;      // outputs in a panel
constexpr int MAX_ROWS = 128;  // of one product; longer batches go in tiles, which stay in the second-level cache

// How rows of x enter a product: as they are, rounded, or as int8 with one scale a row or one a group.
enum class RowForm : int32_t { f32, bf16, s8, s8_group };

// Rows of x as the micro-kernels read them: blocks of rows, [64-byte piece of K][row of the block][64 bytes].
struct Rows {
    RowForm form;
    int count;          // M
    int columns;        // K, padded as the weight is
    int group;          // s8_group: columns that share a scale; bf16: that share one of `scales`
    int block_height;   // most rows of a block
    char* data;
    float* scales;      // s8: [M], s8_group: [M][groups]; bf16 where groups have offsets: sums of x
    int32_t* sums;      // of the int8 values, likewise
    const int32_t* permutation;  // [K]: column j is input permutation[j] of x; null = j
};

RowForm row_form(const KvpLinear& linear);

// Whether rows that were packed for `a` are those of `b` too.
bool same_rows(const KvpLinear& a, const KvpLinear& b);

// Bytes that rows_at needs for `count` <= MAX_ROWS rows: a multiple of 64.
size_t rows_bytes(const KvpLinear& linear, int count);

// `memory` (64-byte aligned) laid out for `count` rows of the linear layer's input.
Rows rows_at(const KvpLinear& linear, int count, char* memory);

// Row `row` of the product's input, x [inputs]; different rows may be packed by different threads at once.
void pack_row(const Rows& rows, int inputs, int row, const float* x);

enum class Store : int32_t { set, add, gated };
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, none };

// What becomes of c = x * weight^T + bias.
//   set    y[m][n] = activation(c)        add  y[m][n] += multiplier * c
//   gated  the first half of the outputs gates the second (N / 2 a multiple of 32): h = activation(c[n]) * c[N/2 + n],
//          into pieces of `next` where it is given, else y[m][n] = h
// `set` into `next` likewise where it is given (N a multiple of 32).
struct Target {
    Store store = Store::set;
    Activation activation = Activation::none;
    float multiplier = 1.0f;
    float* y = nullptr;
    int64_t stride = 0;          // elements from row to row of y
    const Rows* next = nullptr;  // forms f32 and bf16
};

// Bytes of scratch that a thread needs for multiply().
size_t multiply_scratch_bytes();

// This thread's share of the product. Every thread of a team calls it with the same rows, which are complete; the
// results are complete once all have returned (the caller's barriers).
void multiply(const KvpLinear& linear, const Rows& rows, const Target& target, char* scratch, int thread, int threads);

// activation(x) of n floats, in place.
void activate(Activation activation, float* x, int n);

// Row `row` of the weight, as the numbers that it stands for: out [inputs] (a table that is also the head).
void read_row(const KvpLinear& linear, int row, float* out);

// Packs this thread's panels of `linear` from the plain weight: rows `row_bytes` apart, of the type of `linear`; int8:
// signed where an output has one scale, else q; int4, c4: [N][K / 2] bytes, even k in the low nibble. `source` may be
// linear.panels itself where linear.padded == linear.inputs and rows are contiguous. `scratch`: 32 rows of the padded K.
void pack_weight(const KvpLinear& linear, const char* source, int64_t row_bytes, char* scratch, int thread, int threads);

}  // namespace KVP_NS
