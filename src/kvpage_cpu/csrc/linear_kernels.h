// Micro-kernels of linear layers: a block of up to 14 rows times one panel, sums kept in registers.
//
// A Kind (linear_decode.h) says what a line of a panel holds. Every sum runs along K alone and in order, so that
// tiles of any height give the same bits; integers are exact anyway.
#pragma once
#include "linear_decode.h"

namespace KVP_NS {

constexpr int LINE = PANEL * 4;           // bytes
constexpr int PANEL_VECTORS = PANEL / W;  // in a line
constexpr int PIECE = 64;                 // bytes of a row that lie together
constexpr int STEPS_AT_ONCE = 8;          // dwords of a row in the unrolled loop body: half a piece

// Not for the outer caches: weights pass once a step, and would drive out all that the host and the next layer need.
KVP_INLINE void prefetch(const char* address) { __builtin_prefetch(address, 0, 0); }

// Some lines of a panel times a block of rows. `sums` is [height][PANEL] floats or integers, and goes on
// where it stands unless `first`.
struct Work {
    const char* x;        // [piece][height][PIECE]
    const char* weights;  // [lines][LINE]
    int lines;            // a multiple of 16, or of STEPS_AT_ONCE dwords of x where Kind has a scaling
    bool first;
    char* sums;
    const char* ahead;  // prefetched: two cache lines every line,
    int stride;         // this many bytes further on each time
    // groups
    int group_lines, num_groups;     // num_groups: of a row, over the whole K
    const uint16_t* plain_scales;    // [group][PANEL] as the weight has them, or
    const float *scales, *offsets;   // as read_groups wrote them; offsets may be null
    CodeNumbers numbers;
    const float* row_scales;           // of integers, [height][num_groups]
    const int32_t* row_sums;           // likewise
    const float* piece_sums;           // of bf16 rows, [height][num_pieces], where there are offsets
    int num_pieces, group_pieces;
};

// A group's vectors of scales and offsets.
template <int NV>
struct GroupScales {
    F scales[NV], offsets[NV];
};

template <int NV>
KVP_INLINE void load_scales(GroupScales<NV>& group, const Work& work, int index, int column) {
    const int at = index * PANEL + column;
    if (work.plain_scales) prefetch((const char*)(work.plain_scales + at + 8 * PANEL));
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        group.scales[n] =
            work.plain_scales ? load_bf16(work.plain_scales + at + n * W) : load(work.scales + at + n * W);
    }
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        group.offsets[n] = work.offsets ? load(work.offsets + at + n * W) : zero();
    }
}

// Where a tile stands along K.
struct Position {
    const char *x, *weights, *ahead;
    int x_step;  // to the next half of a piece of x: alternates between the second half and the next piece
};

// sums[height][NV] += x * weights over `lines`.
template <class Kind, int HEIGHT, int NV>
KVP_INLINE void add_lines(typename Kind::Sum (&sums)[HEIGHT][NV], Position& at, int lines, int stride,
                          const typename Kind::Table& table, const GroupScales<NV>* group) {
    constexpr int BODY_LINES = STEPS_AT_ONCE / Kind::STEPS;
    for (int line = 0; line < lines; line += BODY_LINES) {
        KVP_UNROLL for (int i = 0; i < BODY_LINES; i++) {
            I bits[NV];
            KVP_UNROLL for (int n = 0; n < NV; n++) bits[n] = load_bits(at.weights + i * LINE + n * W * 4);
            prefetch(at.ahead);
            prefetch(at.ahead + 64);
            at.ahead += stride;
            KVP_UNROLL for (int step = 0; step < Kind::STEPS; step++) {
                typename Kind::Value weights[NV];
                KVP_UNROLL for (int n = 0; n < NV; n++) {
                    if constexpr (Kind::SCALING == Scaling::of_weights)
                        weights[n] = Kind::weights(bits[n], step, table, group->scales[n], group->offsets[n]);
                    else weights[n] = Kind::weights(bits[n], step, table);
                }
                KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
                    const auto x = Kind::value(at.x + m * PIECE + (i * Kind::STEPS + step) * 4);
                    KVP_UNROLL for (int n = 0; n < NV; n++) sums[m][n] = Kind::dot(sums[m][n], weights[n], x);
                }
            }
        }
        at.weights += BODY_LINES * LINE;
        at.x += at.x_step;
        at.x_step = HEIGHT * PIECE - at.x_step;
    }
}

KVP_INLINE void load_sum(F& sum, const char* p) { sum = load((const float*)p); }
KVP_INLINE void load_sum(I& sum, const char* p) { sum = load_bits(p); }
KVP_INLINE void store_sum(char* p, F sum) { store((float*)p, sum); }
KVP_INLINE void store_sum(char* p, I sum) { store_bits(p, sum); }

// A row's sums of a group, of (q - zero) * x or, in integers, of q * x - zero * sum(x), scaled and added to its total.
template <bool OFFSETS, int NV>
KVP_INLINE void add_group(F (&total)[NV], const F (&sums)[NV], const GroupScales<NV>& group, const Work& work,
                          int row, int index) {
    float x = 0.0f;
    if (OFFSETS)
        for (int i = 0; i < work.group_pieces; i++)
            x += work.piece_sums[row * work.num_pieces + index * work.group_pieces + i];
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        total[n] = fma(sums[n], group.scales[n], total[n]);
        if (OFFSETS) total[n] = fma(splat(x), group.offsets[n], total[n]);
    }
}

template <bool OFFSETS, int NV>
KVP_INLINE void add_group(F (&total)[NV], const I (&sums)[NV], const GroupScales<NV>& group, const Work& work,
                          int row, int index) {
    const F scale = splat(work.row_scales[row * work.num_groups + index]);
    const F x = to_float(splat_int(work.row_sums[row * work.num_groups + index]));
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        F sum = to_float(sums[n]) * group.scales[n];
        if (OFFSETS) sum = fma(x, group.offsets[n], sum);
        total[n] = fma(sum, scale, total[n]);
    }
}

template <class Kind, int NV>
KVP_INLINE void begin_group(typename Kind::Sum (&sums)[NV], const Work& work, int row, int index) {
    KVP_UNROLL for (int n = 0; n < NV; n++) {
        if constexpr (__is_same(typename Kind::Sum, I))
            sums[n] = splat_int(-(int)work.numbers.zero * work.row_sums[row * work.num_groups + index]);
        else sums[n] = zero();
    }
}

// Tiles whose totals stay in registers beside the sums of a group.
template <class Kind>
KVP_INLINE constexpr bool keeps_totals(int height) {
    return KVP_ISA >= 2 && height <= (__is_same(typename Kind::Sum, I) ? 6 : 7);
}

template <int NV>
KVP_INLINE void load_total(F (&total)[NV], const float* memory) {
    KVP_UNROLL for (int n = 0; n < NV; n++) total[n] = load(memory + n * W);
}

template <int NV>
KVP_INLINE void store_total(float* memory, const F (&total)[NV]) {
    KVP_UNROLL for (int n = 0; n < NV; n++) store(memory + n * W, total[n]);
}

// What a group gives to the totals of a tile: in `kept`, or else in `memory`.
template <bool OFFSETS, bool KEEPS, int HEIGHT, int NV, class Sum>
KVP_INLINE void add_groups(F (&kept)[HEIGHT][NV], float* memory, const Sum (&sums)[HEIGHT][NV],
                           const GroupScales<NV>& group, const Work& work, int index) {
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
        if constexpr (!KEEPS) load_total(kept[m], memory + m * PANEL);
        add_group<OFFSETS, NV>(kept[m], sums[m], group, work, m, index);
        if constexpr (!KEEPS) store_total(memory + m * PANEL, kept[m]);
    }
}

// The lines of a tile in groups, whose sums are scaled at their end.
template <class Kind, int HEIGHT, int NV>
KVP_INLINE void tile_of_groups(const Work& work, Position& at, int column, float* memory) {
    constexpr bool KEEPS = keeps_totals<Kind>(HEIGHT);
    const typename Kind::Table table = Kind::table(work.numbers);
    typename Kind::Sum sums[HEIGHT][NV];
    F totals[HEIGHT][NV];
    if (work.first)
        for (int m = 0; m < HEIGHT; m++) memset(memory + m * PANEL, 0, NV * W * 4);
    if constexpr (KEEPS)
        KVP_UNROLL for (int m = 0; m < HEIGHT; m++) load_total(totals[m], memory + m * PANEL);
    for (int index = 0; index * work.group_lines < work.lines; index++) {
        KVP_UNROLL for (int m = 0; m < HEIGHT; m++) begin_group<Kind, NV>(sums[m], work, m, index);
        add_lines<Kind, HEIGHT, NV>(sums, at, work.group_lines, work.stride, table, nullptr);
        GroupScales<NV> group;
        load_scales<NV>(group, work, index, column);
        if (work.offsets) add_groups<true, KEEPS>(totals, memory, sums, group, work, index);
        else add_groups<false, KEEPS>(totals, memory, sums, group, work, index);
    }
    if constexpr (KEEPS)
        KVP_UNROLL for (int m = 0; m < HEIGHT; m++) store_total(memory + m * PANEL, totals[m]);
}

template <class Kind, int HEIGHT, int NV>
static void tile(const Work& work_of_all, int column, const char* ahead) {
    const Work work = work_of_all;  // a copy, which no store can change
    Position at{work.x, work.weights + column * 4, ahead, PIECE / 2};
    char* const total = work.sums + column * 4;
    if constexpr (Kind::SCALING == Scaling::of_sums) {
        return tile_of_groups<Kind, HEIGHT, NV>(work, at, column, (float*)total);
    }
    const typename Kind::Table table = Kind::table(work.numbers);
    typename Kind::Sum sums[HEIGHT][NV];
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) KVP_UNROLL for (int n = 0; n < NV; n++) {
        sums[m][n] = typename Kind::Sum{};
        if (!work.first) load_sum(sums[m][n], total + m * LINE + n * W * 4);
    }
    if constexpr (Kind::SCALING == Scaling::of_weights) {
        for (int index = 0; index * work.group_lines < work.lines; index++) {
            GroupScales<NV> group;
            load_scales<NV>(group, work, index, column);
            add_lines<Kind, HEIGHT, NV>(sums, at, work.group_lines, work.stride, table, &group);
        }
    } else {
        add_lines<Kind, HEIGHT, NV>(sums, at, work.lines, work.stride, table, nullptr);
    }
    KVP_UNROLL for (int m = 0; m < HEIGHT; m++) {
        KVP_UNROLL for (int n = 0; n < NV; n++) store_sum(total + m * LINE + n * W * 4, sums[m][n]);
    }
}

// Vectors of outputs that a tile of this height holds: 32 registers take 14 x 2, 16 registers 6 x 2 or 2 x 4.
KVP_INLINE constexpr int tile_vectors(int height) { return KVP_ISA >= 2 || height > 2 ? 2 : 4; }
KVP_INLINE constexpr int tiles_of_panel(int height) { return PANEL_VECTORS / tile_vectors(height); }

// A block of `height` <= TALLEST rows times the panel.
template <class Kind, int TALLEST>
static void add_block(int height, const Work& work) {
    if constexpr (TALLEST > 1) {
        if (height < TALLEST) return add_block<Kind, TALLEST - 1>(height, work);
    }
    constexpr int NV = tile_vectors(TALLEST);
    for (int part = 0; part < tiles_of_panel(TALLEST); part++)
        tile<Kind, TALLEST, NV>(work, part * NV * W, work.ahead + (size_t)part * work.lines * work.stride);
}

// Lines as `Plain` lines: [line][step][PANEL] values, for kinds whose weights are cheaper to expand once than
// in every block of rows.
template <class Kind>
static void expand_lines(const Work& work, char* out) {
    const typename Kind::Table table = Kind::table(work.numbers);
    GroupScales<PANEL_VECTORS> group;
    for (int line = 0; line < work.lines; line++) {
        if constexpr (Kind::SCALING == Scaling::of_weights)
            if (line % work.group_lines == 0)
                load_scales<PANEL_VECTORS>(group, work, line / work.group_lines, 0);
        KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) {
            const I bits = load_bits(work.weights + line * LINE + n * W * 4);
            KVP_UNROLL for (int step = 0; step < Kind::STEPS; step++) {
                char* const to = out + (line * Kind::STEPS + step) * LINE + n * W * 4;
                if constexpr (Kind::SCALING == Scaling::of_weights)
                    store_sum(to, Kind::weights(bits, step, table, group.scales[n], group.offsets[n]));
                else store_sum(to, Kind::weights(bits, step, table));
            }
        }
    }
}

}  // namespace KVP_NS
