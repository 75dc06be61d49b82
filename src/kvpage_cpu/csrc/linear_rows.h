// Where the rows of a product lie.
#pragma once
#include "linear_kernels.h"
#include "linear_scales.h"

namespace KVP_NS {

// Most rows of a block: what the tallest tile of the product's kind takes.
KVP_INLINE constexpr int tallest(int type, int group, RowForm form) {
    if (KVP_ISA < 2) return 6;
    if (form == RowForm::s8_group) return KVP_ISA == 3 ? 8 : 12;
    if (group == 0 || form == RowForm::f32) return 14;
    return type == KVP_I4 || type == KVP_C4 ? 12 : 7;  // of bytes groups are often small: totals stay in registers
}

KVP_INLINE int columns_of_piece(RowForm form) {
    if (form == RowForm::f32) return PIECE / 4;
    return form == RowForm::bf16 || KVP_ISA < 3 ? PIECE / 2
                                                : PIECE;  // without VNNI s8 values are kept as 16 bits
}

KVP_INLINE int pieces_of_row(const Rows& rows) {
    const int columns = columns_of_piece(rows.form);
    return (rows.columns + columns - 1) / columns;
}

// Blocks are of even height, so that none is much slower per row than the others: 32 rows = 11, 11, 10.
struct Blocks {
    int count, height, taller;  // the first `taller` blocks have height + 1
};

KVP_INLINE int first_row(const Blocks& blocks, int block) {
    return block * blocks.height + (block < blocks.taller ? block : blocks.taller);
}

KVP_INLINE int height_of(const Blocks& blocks, int block) { return blocks.height + (block < blocks.taller); }

KVP_INLINE Blocks blocks_of(const Rows& rows) {
    const int count = (rows.count + rows.block_height - 1) / rows.block_height;
    return {count, rows.count / count, rows.count % count};
}

// The pieces of one row: the first at `data`, `step` bytes apart.
struct RowPieces {
    char* data;
    size_t step;
};

KVP_INLINE RowPieces pieces_at(const Rows& rows, const Blocks& blocks, int block, int row_of_block) {
    const size_t before = (size_t)first_row(blocks, block) * pieces_of_row(rows) + row_of_block;
    return {rows.data + before * PIECE, (size_t)height_of(blocks, block) * PIECE};
}

KVP_INLINE RowPieces pieces_of(const Rows& rows, int row) {
    const Blocks blocks = blocks_of(rows);
    const int in_taller = blocks.taller * (blocks.height + 1);
    const int block =
        row < in_taller ? row / (blocks.height + 1) : blocks.taller + (row - in_taller) / blocks.height;
    return pieces_at(rows, blocks, block, row - first_row(blocks, block));
}

// Columns [column, column + 32) of a row of form f32 or bf16.
KVP_INLINE void store_columns(const Rows& rows, const RowPieces& pieces, int row, int column,
                              const float* x) {
    if (rows.form == RowForm::f32) {
        char* const data = pieces.data + (size_t)(column / 16) * pieces.step;
        memcpy(data, x, PIECE);
        if (column + 16 < rows.columns) memcpy(data + pieces.step, x + 16, PIECE);
        return;
    }
    uint16_t* const data = (uint16_t*)(pieces.data + (size_t)(column / 32) * pieces.step);
    F total = zero();
    KVP_UNROLL for (int i = 0; i < 32; i += W) store_bf16(data + i, load(x + i));
    if (!rows.scales) return;
    float* const sums = rows.scales + ((size_t)row * rows.columns + column) / rows.group;
    for (int i = 0; i < 32; i += W) {
        total = total + load(x + i);
        if ((i + W) % rows.group) continue;
        if (column + i < rows.columns) sums[i / rows.group] = sum(total);
        total = zero();
    }
}

}  // namespace KVP_NS
