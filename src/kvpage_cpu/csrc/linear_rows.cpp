// Rows of x: their form, their memory, and how they are packed.
#include "linear_rows.h"

namespace KVP_NS {

RowForm row_form(const KvpLinear& linear) {
    if (linear.dynamic && linear.type == KVP_I8 && linear.group == 0) return RowForm::s8;
    if (linear.dynamic && linear.type == KVP_I4) return RowForm::s8_group;
    return linear.type != KVP_F32 && KVP_ISA == 3 ? RowForm::bf16 : RowForm::f32;
}

namespace {

// Numbers beside a row's values, see Rows::scales.
int scales_of_row(const KvpLinear& linear, RowForm form) {
    if (form == RowForm::s8) return 1;
    if (form == RowForm::s8_group) return linear.padded / linear.group;
    return form == RowForm::bf16 && has_offsets(linear) ? linear.padded / summed_columns(linear.group) : 0;
}

size_t whole_lines(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

// The columns [column, column + 32) of a row, with zeros beyond `inputs`; `padded` is used where they do not lie so.
const float* columns_at(const Rows& rows, const float* x, int inputs, int column, float (&padded)[32]) {
    if (rows.permutation) {
        for (int i = 0; i < 32; i++) padded[i] = column + i < inputs ? x[rows.permutation[column + i]] : 0.0f;
        return padded;
    }
    if (column + 32 <= inputs) return x + column;
    for (int i = 0; i < 32; i++) padded[i] = column + i < inputs ? x[column + i] : 0.0f;
    return padded;
}

#if KVP_ISA == 3

// Codes of 32 columns as the product reads them: int4 lines hold k = 0 4 1 5 and 2 6 3 7 of each eight.
I store_codes(bool of_int4, char* out, const float* x, float inverse) {
    I total = splat_int(0);
    for (int i = 0; i < 32; i += W) {
        const I codes = to_int(load(x + i) * splat(inverse));
        __m128i bytes = _mm512_cvtepi32_epi8(codes);
        if (of_int4)
            bytes =
                _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
        _mm_storeu_si128((__m128i*)(out + i), bytes);
        total = add(total, codes);
    }
    return total;
}

#else

// Codes of 32 columns as 16-bit integers: int8 lines hold the even and the odd two of each four, int4 lines
// pairs.
I store_codes(bool of_int4, char* out, const float* x, float inverse) {
    I total = splat_int(0);
    int32_t codes[32];
    for (int i = 0; i < 32; i += W) {
        const I code = to_int(load(x + i) * splat(inverse));
        store_bits(codes + i, code);
        total = add(total, code);
    }
    int16_t* const shorts = (int16_t*)out;
    for (int i = 0; i < 32; i += 4) {
        shorts[i] = (int16_t)codes[i];
        shorts[i + 1] = (int16_t)codes[of_int4 ? i + 1 : i + 2];
        shorts[i + 2] = (int16_t)codes[of_int4 ? i + 2 : i + 1];
        shorts[i + 3] = (int16_t)codes[i + 3];
    }
    return total;
}

#endif

// `count` columns that share a scale, from `column` on.
void pack_group(const Rows& rows, const RowPieces& pieces, int inputs, int column, int count, const float* x,
                float* scale, int32_t* sum_of_codes) {
    float padded[32];
    F most = zero();
    for (int at = column; at < column + count; at += 32) {
        const float* columns = columns_at(rows, x, inputs, at, padded);
        for (int i = 0; i < 32; i += W) most = max(abs(load(columns + i)), most);
    }
    const float range = largest(most);
    const float inverse = range > 1e-30f ? 127.0f / range : 0.0f;
    const int piece_columns = columns_of_piece(rows.form);
    I total = splat_int(0);
    for (int at = column; at < column + count; at += 32) {
        char* const out =
            pieces.data + at / piece_columns * pieces.step + at % piece_columns * (PIECE / piece_columns);
        const float* columns = columns_at(rows, x, inputs, at, padded);
        total = add(total, store_codes(rows.form == RowForm::s8_group, out, columns, inverse));
    }
    int32_t sums[W];
    store_bits(sums, total);
    for (int i = 1; i < W; i++) sums[0] += sums[i];
    *sum_of_codes = sums[0];
    *scale = range * (1.0f / 127.0f);
}

}  // namespace

bool same_rows(const KvpLinear& a, const KvpLinear& b) {
    const RowForm form = row_form(a);
    return form == row_form(b) && a.padded == b.padded && scales_of_row(a, form) == scales_of_row(b, form) &&
           tallest(a.type, a.group, form) == tallest(b.type, b.group, form) && a.permutation == b.permutation;
}

size_t rows_bytes(const KvpLinear& linear, int count) {
    Rows rows{};
    rows.form = row_form(linear);
    rows.columns = linear.padded;
    const size_t scales = whole_lines((size_t)count * scales_of_row(linear, rows.form) * sizeof(float));
    return (size_t)count * pieces_of_row(rows) * PIECE + 2 * scales;
}

Rows rows_at(const KvpLinear& linear, int count, char* memory) {
    Rows rows{};
    rows.form = row_form(linear);
    rows.count = count;
    rows.columns = linear.padded;
    rows.group = rows.form == RowForm::s8_group ? linear.group : summed_columns(linear.group);
    rows.block_height = tallest(linear.type, linear.group, rows.form);
    rows.permutation = linear.permutation;
    rows.data = memory;
    const int scales = scales_of_row(linear, rows.form);
    if (scales == 0) return rows;
    memory += (size_t)count * pieces_of_row(rows) * PIECE;
    rows.scales = (float*)memory;
    rows.sums = (int32_t*)(memory + whole_lines((size_t)count * scales * sizeof(float)));
    return rows;
}

void pack_row(const Rows& rows, int inputs, int row, const float* x) {
    const RowPieces pieces = pieces_of(rows, row);
    if (rows.form == RowForm::s8) {
        pack_group(rows, pieces, inputs, 0, rows.columns, x, rows.scales + row, rows.sums + row);
    } else if (rows.form == RowForm::s8_group) {
        const int groups = rows.columns / rows.group;
        for (int group = 0; group < groups; group++) {
            const size_t at = (size_t)row * groups + group;
            pack_group(rows, pieces, inputs, group * rows.group, rows.group, x, rows.scales + at,
                       rows.sums + at);
        }
    } else {
        float padded[32];
        for (int column = 0; column < rows.columns; column += 32)
            store_columns(rows, pieces, row, column, columns_at(rows, x, inputs, column, padded));
    }
}

}  // namespace KVP_NS
