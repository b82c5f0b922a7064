// Matrix products on a CPU: sums over words of 32 bits (two bfloat16, or one float32: vector.h's Operand says which).
//
// One operand is read a word at a time and spread over a vector's lanes; the other lies in panels of PANEL columns, one word of each
// next to each other. A panel is packed from rows whose products are summed along the row, or along the column.

#pragma once

#include "tiles.h"
#include "vector.h"

namespace {

constexpr int TILE = LANES == 16 ? 8 : 6;  // rows of a register tile: its sums and operands fill the registers
constexpr int VECTORS = HAS_NEON ? 4 : 2;  // vectors in each of its rows
constexpr int PANEL = VECTORS * LANES;
constexpr int WIDEST_PANEL = 32;           // of all instruction sets: callers leave room for it
constexpr int64_t SUM_WORDS = 128;         // products added one after another in float32
// Words of a panel that one tile after another reads: so few that the first-level cache keeps them, where operands from the second
// level take as long as the tile; else all.
constexpr int64_t PIECE_WORDS = LANES == 16 ? INT64_MAX / 2 : SUM_WORDS;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Accumulator {
    Vector at[TILE][VECTORS];
};

// sum[i] += word · panel, with the word of row i.
template <class Number, class Word>
inline void add_words(Accumulator &sum, const Number *const *row, int64_t offset, const uint32_t *panel) {
    Words right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) right[v] = load<Words>(panel + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++) {
        const Words left = splat((uint32_t)load<Word>(row[i] + offset));
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum.at[i][v] = add_product<Number>(sum.at[i][v], left, right[v]);
    }
}

// sum[i] += Σ_k row[i][k·step] · panel[k][:] over words first .. last. A function of its own, so that the compiler gives it all the
// registers.
template <class Number>
__attribute__((noinline)) void add_tile(Accumulator &sum, const Number *const *row, int64_t step, const uint32_t *panel, int64_t first,
                                        int64_t last) {
    Accumulator part = {};
    for (int64_t k = first; k < last; k++) add_words<Number, uint32_t>(part, row, k * step, panel + k * PANEL);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum.at[i][v] += part.at[i][v];
}

// The operand that is read a word at a time, by rows: word k of row i is at row[i][k·step]. Up to ROWS of them in tiles; past the
// last, the last again, whose products are dropped.
template <class Number, int64_t ROWS> struct Rows {
    const Number *row[ROWS];
    int64_t step, tiles;
    Blocks blocks;

    // Rows of a matrix, `stride` numbers apart.
    Rows(const Number *matrix, int64_t count, int64_t stride) : step(PER_WORD<Number>), tiles(ceil_div(count, TILE)) {
        for (int64_t i = 0; i < tiles * TILE; i++) row[i] = matrix + smaller(i, count - 1) * stride;
        const int64_t bytes = stride * sizeof(Number);
        blocks = {matrix, count / GROUP, GROUP * bytes, bytes, TILE_BYTES};
    }

    // Columns first .. of panels of `words` words; with tiles, of panels after turn_panels.
    Rows(const uint32_t *panels, int64_t words, int64_t first, int64_t count)
        : step(PANEL * PER_WORD<Number>), tiles(ceil_div(count, TILE)) {
        for (int64_t i = 0; i < tiles * TILE; i++) {
            const int64_t n = first + smaller(i, count - 1);
            row[i] = (const Number *)(panels + n / PANEL * words + n % PANEL);
        }
        blocks = {panels + first / PANEL * words, ceil_div(count, PANEL), words * 4, TILE_BYTES, GROUP * TILE_BYTES};
    }
};

// Σ_k left.row[i][k·step] · panel[k][:] over `count` numbers; a last odd bfloat16 is paired with 0.
// Summed in blocks, because a long float32 sum loses digits with every term. begin(t, first) is called as tile t begins with the words
// from first on.
template <class Number, int64_t ROWS, class Begin>
inline void multiply(Accumulator *sums, const Rows<Number, ROWS> &left, const uint32_t *panel, int64_t count, Begin begin) {
    const int64_t words = count / PER_WORD<Number>, step = left.step;
    for (int64_t t = 0; t < left.tiles; t++) sums[t] = {};
    const int64_t in_blocks = multiply_blocks<Number>((float *)sums, left.blocks, panel, words);
    for (int64_t first = 0; first < words; first += PIECE_WORDS) {
        for (int64_t t = 0; t < left.tiles; t++) {
            begin(t, first);
            const int64_t done = t * TILE < left.blocks.groups * GROUP ? in_blocks : 0;
            const int64_t last = smaller(first + PIECE_WORDS, words);
            for (int64_t k = larger(first, done); k < last; k += SUM_WORDS)
                add_tile(sums[t], left.row + t * TILE, step, panel, k, smaller(k + SUM_WORDS, last));
        }
    }
    if (count % PER_WORD<Number>)
        for (int64_t t = 0; t < left.tiles; t++)
            add_words<Number, uint16_t>(sums[t], left.row + t * TILE, words * step, panel + words * PANEL);
}

// Word `k` of row n, zero past the edges.
template <class Number>
inline uint32_t row_word(const Number *rows, int64_t num_rows, int64_t size, int64_t n, int64_t k) {
    constexpr int64_t COUNT = PER_WORD<Number>;
    uint32_t word = 0;
    const Number *from = rows + n * size + k * COUNT;
    if (n < num_rows && (k + 1) * COUNT <= size) memcpy(&word, from, COUNT * sizeof(Number));
    else if (n < num_rows) memcpy(&word, from, sizeof(Number));  // the last of an odd number
    return IS_WIDENED<Number> ? word << 16 : word;
}

// A word with an element and the one below it (0 past the last row), or with the element alone.
inline uint32_t paired(const float *here, const float *) { return load<uint32_t>(here); }
inline uint32_t paired(const bfloat16 *here, const bfloat16 *next) {
    return IS_WIDENED<bfloat16> ? (uint32_t)here->bits << 16 : here->bits | (next ? (uint32_t)next->bits << 16 : 0);
}
inline Words paired_lanes(const float *here, const float *) { return load<Words>(here); }
inline Words paired_lanes(const bfloat16 *here, const bfloat16 *next) {
    const Halves first = load<Halves>(here);
    return IS_WIDENED<bfloat16> ? (Words)widened(first) : pair(first, next ? load<Halves>(next) : Halves{});
}

// Columns p·PANEL .. of rows (num_rows, stride) with `size` columns, as [word along rows][column].
template <class Number>
inline void column_panel(const Number *rows, int64_t num_rows, int64_t stride, int64_t size, int64_t p, uint32_t *panel) {
    const int64_t width = smaller(PANEL, size - p * PANEL);
    for (int64_t n = 0; n < num_rows; n += PER_WORD<Number>, panel += PANEL) {
        const Number *here = rows + n * stride + p * PANEL, *next = n + 1 < num_rows ? here + stride : nullptr;
        if (width == PANEL) {
            for (int i = 0; i < PANEL; i += LANES) {
                const Words packed = paired_lanes(here + i, next ? next + i : nullptr);
                memcpy(panel + i, &packed, sizeof packed);
            }
        } else {
            for (int64_t i = 0; i < PANEL; i++) panel[i] = i < width ? paired(here + i, next ? next + i : nullptr) : 0;
        }
    }
}

// A row of numbers as operands: in place, or widened into room.
inline const float *operands(const float *numbers, int64_t, float *) { return numbers; }
inline const Operand<bfloat16> *operands(const bfloat16 *numbers, int64_t count, float *room) {
    if (!IS_WIDENED<bfloat16>) return (const Operand<bfloat16> *)numbers;
    widen_row(numbers, count, room);
    return (const Operand<bfloat16> *)room;
}

// Prefetch one of `parts` of some memory into the second-level cache; the first level belongs to the product.
inline void prefetch(const void *row, int64_t bytes, int64_t part, int64_t parts) {
    for (int64_t i = bytes * part / parts; i < bytes * (part + 1) / parts; i += 64) __builtin_prefetch((const char *)row + i, 0, 2);
}

}  // namespace
