// Products of packed rows and packed weights.
//
// Threads take panels; a panel's sums run over all rows before the next. Where several blocks of rows use it,
// a panel goes in chunks of K that stay in L1 while all blocks pass, and meanwhile the next chunk is
// prefetched. Where there is one block only, the panel is streamed, prefetched a fixed distance ahead. Scales of
// groups become floats a chunk at a time, but for those that are bfloat16 and nothing else.
#include "linear_activation.h"
#include "linear_rows.h"

namespace KVP_NS {
namespace {

constexpr int CHUNK_LINES = 128;                      // 16 KB in L1; whole groups and pieces of every kind
constexpr int TALLEST_DIRECT = KVP_ISA >= 2 ? 8 : 6;  // rows, above which expanding costs less than it saves
constexpr size_t SUMS_BYTES = (size_t)MAX_ROWS * LINE;
constexpr size_t EXPANDED_BYTES = (size_t)CHUNK_LINES * LINE;
constexpr size_t MOST_GROUPS = CHUNK_LINES * 8 / 16;  // of a chunk
constexpr size_t SCALES_BYTES = MOST_GROUPS * PANEL * sizeof(float);

struct Product {
    const KvpLinear& linear;
    const Rows& rows;
    Blocks blocks;
    int panel_lines;
    CodeNumbers numbers;
    char* expanded;  // scratch
    float *scales, *offsets;  // of the groups of a chunk; offsets may be null
};

CodeNumbers numbers_of(const KvpLinear& linear) {
    CodeNumbers numbers{{}, (float)linear.zero};
    for (int i = 0; i < 16; i++)
        numbers.of_nibbles[i] = linear.type == KVP_C4 ? linear.table[i] : (float)(i - linear.zero);
    return numbers;
}

// One panel, and what is prefetched when it ends.
struct Panel {
    int index;
    const char* weights;
    const char* next;
};

int elements_of_dword(int type) {
    return type == KVP_F32 ? 1 : type == KVP_BF16 ? 2 : type == KVP_I8 || type == KVP_F8 ? 4 : 8;
}

Panel panel_at(const Product& product, int index, int next) {
    const KvpLinear& linear = product.linear;
    const auto weights = [&](int panel) {
        const bool whole = panel < linear.outputs / PANEL;
        return (const char*)(whole ? linear.panels : linear.tail) +
               (whole ? (size_t)panel * product.panel_lines * LINE : 0);
    };
    return {index, weights(index), weights(next)};
}

// of[first .. first + count) of a panel's groups as floats: out [count][PANEL].
template <int TYPE>
void read_numbers(const KvpGroupNumbers& of, int panel, int groups, int first, int count, float* out) {
    const size_t at = ((size_t)panel * groups + first) * PANEL;
    const char* const next = (const char*)of.values + (at + (size_t)count * PANEL) * size_of(TYPE);
    for (int byte = 0; byte < count * PANEL * size_of(TYPE); byte += 64) prefetch(next + byte);
    if (!of.shared) {
        for (int i = 0; i < count * PANEL; i += W) store(out + i, numbers_at(TYPE, of.values, at + i));
        return;
    }
    const size_t of_panel = (size_t)panel * (groups / of.per_shared);
    for (int group = first, end; group < first + count; group = end) {
        const int index = group / of.per_shared;
        end = (index + 1) * of.per_shared < first + count ? (index + 1) * of.per_shared : first + count;
        for (int n = 0; n < PANEL; n += W) {
            const F shared = numbers_at(of.shared_type, of.shared, (of_panel + index) * PANEL + n);
            for (int i = (group - first) * PANEL + n; i < (end - first) * PANEL; i += PANEL)
                store(out + i, shared * numbers_at(TYPE, of.values, at + i));
        }
    }
}

void read_numbers(const KvpGroupNumbers& of, int panel, int groups, int first, int count, float* out) {
    switch (of.type) {
        case KVP_F32: return read_numbers<KVP_F32>(of, panel, groups, first, count, out);
        case KVP_BF16: return read_numbers<KVP_BF16>(of, panel, groups, first, count, out);
        case KVP_F16: return read_numbers<KVP_F16>(of, panel, groups, first, count, out);
        case KVP_U8: return read_numbers<KVP_U8>(of, panel, groups, first, count, out);
        case KVP_I8: return read_numbers<KVP_I8>(of, panel, groups, first, count, out);
        default: return read_numbers<KVP_I16>(of, panel, groups, first, count, out);
    }
}

// scales, offsets [count][PANEL] of groups from `first` on: weight = (q - linear.zero) * scale + offset; `offsets` may
// be null.
void read_groups(const KvpLinear& linear, int panel, int first, int count, float* scales, float* offsets) {
    const int groups = linear.padded / linear.group;
    read_numbers(linear.scales, panel, groups, first, count, scales);
    if (!offsets) return;
    if (linear.offsets.values) return read_numbers(linear.offsets, panel, groups, first, count, offsets);
    read_numbers(linear.zeros, panel, groups, first, count, offsets);
    for (int i = 0; i < count * PANEL; i += W)
        store(offsets + i, (splat((float)linear.zero) - load(offsets + i)) * load(scales + i));
}

// The work of `lines` lines of the panel from `line` on, but for its rows.
template <class Kind>
Work work_at(const Product& product, const Panel& panel, int line, int lines) {
    Work work{};
    work.weights = panel.weights + (size_t)line * LINE;
    work.lines = lines;
    work.first = line == 0;
    work.numbers = product.numbers;
    if constexpr (Kind::SCALING != Scaling::none) {
        const KvpLinear& linear = product.linear;
        const int group = linear.group, groups = linear.padded / group;
        work.group_lines = group / elements_of_dword(linear.type);
        work.num_groups = groups;
        work.group_pieces = group / summed_columns(group);
        work.num_pieces = linear.padded / summed_columns(group);
        const int first = line / work.group_lines;
        if (has_plain_scales(linear)) {
            work.plain_scales =
                (const uint16_t*)linear.scales.values + ((size_t)panel.index * groups + first) * PANEL;
        } else {
            read_groups(linear, panel.index, first, lines / work.group_lines, product.scales, product.offsets);
            work.scales = product.scales;
            work.offsets = product.offsets;
        }
    }
    return work;
}

// Points `work` to a block's rows, `dwords` into K.
template <class Kind>
void enter_block(Work& work, const Product& product, int block, int dwords, char* sums) {
    const int row = first_row(product.blocks, block);
    const RowPieces pieces = pieces_at(product.rows, product.blocks, block, 0);
    work.x = pieces.data + (size_t)(dwords / 16) * pieces.step;
    work.sums = sums + (size_t)row * LINE;
    if constexpr (Kind::SCALING == Scaling::of_sums) {
        const int column = dwords / 16 * columns_of_piece(product.rows.form);
        if (product.rows.form == RowForm::s8_group) {
            const size_t at = (size_t)row * work.num_groups + column / product.linear.group;
            work.row_scales = product.rows.scales + at;
            work.row_sums = product.rows.sums + at;
        } else if (product.offsets) {
            work.piece_sums = product.rows.scales + (size_t)row * work.num_pieces + column / product.rows.group;
        }
    }
}

// How far ahead of its use a streamed line is prefetched: few rows pass quickly, and then too far ahead costs
// most; with more rows less of the panel is in flight in the processor itself.
int lines_ahead(int rows) { return (rows <= 2 ? 4096 : rows <= 8 ? 8192 : 16384) / LINE; }

// One block whose tile is as wide as the panel: each line is read once, from memory.
template <class Kind, int TALLEST>
void stream_panel(const Product& product, const Panel& panel, char* sums) {
    const int lines = product.panel_lines;
    const bool on = panel.next == panel.weights + (size_t)lines * LINE;
    const int reach = lines_ahead(product.rows.count);
    // From line `last` on `next` is prefetched.
    const int last = on ? lines : lines <= reach ? 0 : (lines - reach + 31) / 32 * 32;
    const bool in_chunks = Kind::SCALING != Scaling::none && !has_plain_scales(product.linear);
    for (int line = 0; line < lines;) {
        const int rest = (line < last && last < lines ? last : lines) - line;
        const int count = in_chunks && rest > CHUNK_LINES ? CHUNK_LINES : rest;
        Work work = work_at<Kind>(product, panel, line, count);
        enter_block<Kind>(work, product, 0, line * Kind::STEPS, sums);
        work.ahead = line < last ? work.weights + (size_t)reach * LINE : panel.next + (size_t)(line - last) * LINE;
        work.stride = LINE;
        add_block<Kind, TALLEST>(product.rows.count, work);
        line += count;
    }
}

// In chunks; where EXPAND, lines of Kind become lines of Plain first.
template <class Kind, class Plain, int TALLEST, bool EXPAND>
void pass_chunks(const Product& product, const Panel& panel, char* sums) {
    constexpr int EXPANSION = EXPAND ? Kind::STEPS / Plain::STEPS : 1;
    constexpr int CHUNK = CHUNK_LINES / EXPANSION;
    const int passes = product.blocks.count * tiles_of_panel(height_of(product.blocks, 0));
    for (int line = 0; line < product.panel_lines; line += CHUNK) {
        const int rest = product.panel_lines - line;
        const int lines = rest < CHUNK ? rest : CHUNK;
        Work work = work_at<Kind>(product, panel, line, lines);
        work.ahead = rest > CHUNK ? work.weights + (size_t)CHUNK * LINE : panel.next;
        if (EXPAND) {
            expand_lines<Kind>(work, product.expanded);
            work.weights = product.expanded;
            work.lines = lines * EXPANSION;
            work.group_lines *= EXPANSION;
        }
        const int next_lines = rest >= 2 * CHUNK || rest <= CHUNK ? CHUNK : rest - CHUNK;
        work.stride = (next_lines * LINE + passes * work.lines - 1) / (passes * work.lines);
        for (int block = 0; block < product.blocks.count; block++) {
            const int height = height_of(product.blocks, block);
            enter_block<Plain>(work, product, block, line * Kind::STEPS, sums);
            add_block<Plain, TALLEST>(height, work);
            work.ahead += (size_t)tiles_of_panel(height) * work.lines * work.stride;
        }
    }
}

using PanelSums = void (*)(const Product&, const Panel&, char* sums);

// Kinds whose lines are multiplied as they are.
template <class Kind, int TALLEST>
void sum_panel(const Product& product, const Panel& panel, char* sums) {
    if (product.blocks.count * tiles_of_panel(product.rows.count) == 1)
        stream_panel<Kind, TALLEST>(product, panel, sums);
    else pass_chunks<Kind, Kind, TALLEST, false>(product, panel, sums);
}

// Kinds that cost much to expand: in registers for few rows, once a chunk for more. The same products either
// way.
template <class Kind, class Plain, int TALLEST>
void sum_expanded_panel(const Product& product, const Panel& panel, char* sums) {
    constexpr int DIRECT = TALLEST < TALLEST_DIRECT ? TALLEST : TALLEST_DIRECT;
    if (product.rows.count > DIRECT) pass_chunks<Kind, Plain, TALLEST, true>(product, panel, sums);
    else if (tiles_of_panel(product.rows.count) == 1) stream_panel<Kind, DIRECT>(product, panel, sums);
    else pass_chunks<Kind, Kind, DIRECT, false>(product, panel, sums);
}

PanelSums panel_sums(const KvpLinear& linear, RowForm form) {
    constexpr int TALL = tallest(KVP_F32, 0, RowForm::f32);
    if (form == RowForm::s8) return sum_panel<DynamicInt8, tallest(KVP_I8, 0, RowForm::s8)>;
    if (form == RowForm::s8_group) return sum_panel<DynamicInt4, tallest(KVP_I4, 32, RowForm::s8_group)>;
    if (linear.type == KVP_F32) return sum_panel<Float32, TALL>;
#if KVP_ISA == 3
    constexpr int TALL_CODES = tallest(KVP_I4, 32, RowForm::bf16);
    constexpr int TALL_BYTES = tallest(KVP_I8, 32, RowForm::bf16);
    if (linear.type == KVP_BF16) return sum_panel<Bfloat16, TALL>;
    if (linear.type == KVP_I4 || linear.type == KVP_C4) return sum_panel<Codes4, TALL_CODES>;
    if (linear.group == 0) {
        if (linear.type == KVP_F8) return sum_expanded_panel<Float8, Bfloat16, TALL>;
        return sum_expanded_panel<Int8, Bfloat16, TALL>;
    }
    if (linear.type == KVP_F8) return sum_expanded_panel<Groups<Float8>, Groups<Bfloat16>, TALL_BYTES>;
    return sum_expanded_panel<Groups<Int8>, Groups<Bfloat16>, TALL_BYTES>;
#else
    if (linear.type == KVP_BF16) return sum_expanded_panel<Bfloat16, Float32, TALL>;
    if (linear.type == KVP_I4 || linear.type == KVP_C4)
        return sum_expanded_panel<Scaled<NibbleCodes>, Float32, TALL>;
    if (linear.group == 0) {
        if (linear.type == KVP_F8) return sum_expanded_panel<Float8, Float32, TALL>;
        return sum_expanded_panel<Int8, Float32, TALL>;
    }
    if (linear.type == KVP_F8) return sum_expanded_panel<Scaled<Float8Codes>, Float32, TALL>;
    return sum_expanded_panel<Scaled<ByteCodes>, Float32, TALL>;
#endif
}

// What a panel's sums still lack: scales of outputs, and the bias.
struct Finish {
    bool integers, scaled;
    F scales[PANEL_VECTORS], bias[PANEL_VECTORS];
};

Finish finish_of(const Product& product, int panel) {
    const KvpLinear& linear = product.linear;
    Finish finish{product.rows.form == RowForm::s8, linear.output_scales != nullptr, {}, {}};
    const int column = panel * PANEL;
    float bias[PANEL] = {};
    if (linear.bias)
        memcpy(bias, linear.bias + column,
               (linear.outputs - column < PANEL ? linear.outputs - column : PANEL) * sizeof(float));
    for (int n = 0; n < PANEL_VECTORS; n++) {
        finish.scales[n] = finish.scaled ? load(linear.output_scales + column + n * W) : splat(1.0f);
        finish.bias[n] = load(bias + n * W);
    }
    return finish;
}

KVP_INLINE void finish_row(const Finish& finish, const Rows& rows, int row, const char* sums,
                           F (&out)[PANEL_VECTORS]) {
    const char* const at = sums + (size_t)row * LINE;
    KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) {
        if (finish.integers) {  // weights are stored 128 too high
            const F sum = to_float(add(load_bits(at + n * W * 4), splat_int(-128 * rows.sums[row])));
            out[n] = sum * (finish.scales[n] * splat(rows.scales[row]));
        } else {
            out[n] = load((const float*)at + n * W);
            if (finish.scaled) out[n] = out[n] * finish.scales[n];
        }
        out[n] = out[n] + finish.bias[n];
    }
}

// Writes `count` <= PANEL values of a row of y.
KVP_INLINE void write_row(const Target& target, float* y, int count, const F (&values)[PANEL_VECTORS]) {
    float last[PANEL];
    float* const out = count == PANEL ? y : last;
    if (out == last && target.store == Store::add) memcpy(last, y, count * sizeof(float));
    KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) {
        F value = values[n];
        if (target.store == Store::add) value = fma(value, splat(target.multiplier), load(out + n * W));
        store(out + n * W, value);
    }
    if (out == last) memcpy(y, last, count * sizeof(float));
}

// Columns of `next` that no output fills are zero.
void pad_row(const Rows& next, const RowPieces& pieces, int row, int column) {
    const float zeros[PANEL] = {};
    for (; column < next.columns; column += PANEL) store_columns(next, pieces, row, column, zeros);
}

// All rows of a panel, or of a gating panel and the one it gates.
void write_panel(const Product& product, const Target& target, int panel, const char* sums,
                 const char* gated_sums) {
    const bool gated = target.store == Store::gated;
    const int outputs = gated ? product.linear.outputs / 2 : product.linear.outputs;
    const int column = panel * PANEL;
    const int count = outputs - column < PANEL ? outputs - column : PANEL;
    const Finish finish = finish_of(product, panel);
    const Finish gated_finish = gated ? finish_of(product, panel + outputs / PANEL) : finish;
    const Blocks next_blocks = target.next ? blocks_of(*target.next) : Blocks{};
    int block = 0, row_of_block = 0;
    for (int row = 0; row < product.rows.count; row++) {
        F values[PANEL_VECTORS];
        finish_row(finish, product.rows, row, sums, values);
        if (target.store != Store::add) {
            KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++)
                values[n] = activated(target.activation, values[n]);
        }
        if (gated) {
            F others[PANEL_VECTORS];
            finish_row(gated_finish, product.rows, row, gated_sums, others);
            KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) values[n] = values[n] * others[n];
        }
        if (!target.next) {
            write_row(target, target.y + row * target.stride + column, count, values);
            continue;
        }
        float columns[PANEL];
        KVP_UNROLL for (int n = 0; n < PANEL_VECTORS; n++) store(columns + n * W, values[n]);
        const RowPieces pieces = pieces_at(*target.next, next_blocks, block, row_of_block);
        store_columns(*target.next, pieces, row, column, columns);
        if (column + PANEL >= outputs) pad_row(*target.next, pieces, row, column + PANEL);
        if (++row_of_block == height_of(next_blocks, block)) block++, row_of_block = 0;
    }
}

}  // namespace

size_t multiply_scratch_bytes() { return 2 * (SUMS_BYTES + SCALES_BYTES) + EXPANDED_BYTES; }

void multiply(const KvpLinear& linear, const Rows& rows, const Target& target, char* scratch, int thread,
              int threads) {
    if (rows.count == 0) return;
    char* const sums = scratch;
    char* const gated_sums = scratch + SUMS_BYTES;
    char* const expanded = scratch + 2 * SUMS_BYTES;
    float* const scales = (float*)(expanded + EXPANDED_BYTES);
    float* const offsets = has_offsets(linear) ? scales + SCALES_BYTES / sizeof(float) : nullptr;
    const int panel_lines = linear.padded / elements_of_dword(linear.type);
    const Product product{linear, rows, blocks_of(rows), panel_lines, numbers_of(linear), expanded, scales, offsets};
    const PanelSums sum = panel_sums(linear, rows.form);
    const bool gated = target.store == Store::gated;
    const int panels = (linear.outputs + PANEL - 1) / PANEL / (gated ? 2 : 1);
    const int end = (int)((int64_t)panels * (thread + 1) / threads);
    for (int panel = (int)((int64_t)panels * thread / threads); panel < end; panel++) {
        const int next = panel + 1 < end ? panel + 1 : panel;
        if (gated) {
            sum(product, panel_at(product, panel, panel + panels), sums);
            sum(product, panel_at(product, panel + panels, next), gated_sums);
        } else {
            sum(product, panel_at(product, panel, next), sums);
        }
        write_panel(product, target, panel, sums, gated_sums);
    }
}

void activate(Activation activation, float* x, int n) {
    int i = 0;
    for (; i + W <= n; i += W) store(x + i, activated(activation, load(x + i)));
    if (i == n) return;
    float rest[W] = {};
    memcpy(rest, x + i, (n - i) * sizeof(float));
    store(rest, activated(activation, load(rest)));
    memcpy(x + i, rest, (n - i) * sizeof(float));
}

}  // namespace KVP_NS
