// Products of bfloat16 by AMX, on Intel Sapphire Rapids and later, in place of the register tile of product.h:
//
//     sums[i][c] = Σ_k row[i][k] · panel[k][c]      a group of 32 rows, a panel's 32 columns, k over whole blocks of 16 words
//
// A tile register has 16 rows of 16 words: four hold sums, two rows, two a panel. One instruction adds the 32 products of a block before it
// adds them to a sum, so that no sum is so long that it needs a partial one in float32. Rows and words beyond whole groups and
// blocks are left to product.h.

#pragma once

#include "vector.h"

namespace {

constexpr int64_t BLOCK = 16, GROUP = 32;  // words, rows and columns
constexpr int64_t TILE_BYTES = 4 * BLOCK;  // of a row of a tile

// Rows as tiles read them: the first word, groups, and bytes from group to group, from row to row, from block to block.
struct Blocks {
    const void *first;
    int64_t groups, group, row, block;
};

// True if the kernels for `Number` multiply in tiles.
template <class Number> constexpr bool HAS_TILES = false;

// While one lives, its thread may multiply in tiles.
template <class Number> struct TileRegisters {
    TileRegisters() {}
};

// Sums of whole groups over whole blocks of `words` words. Returns how many words these have.
template <class Number> inline int64_t multiply_blocks(float *, const Blocks &, const uint32_t *, int64_t) { return 0; }

// A block of a panel, [word][column], as the rows of tiles, [column][word]; in place.
inline void turn_block(uint32_t *block);

#ifdef __AMX_BF16__
template <> constexpr bool HAS_TILES<bfloat16> = true;

template <> struct TileRegisters<bfloat16> {
    TileRegisters() {
        static constexpr struct {
            uint8_t palette = 1, first_row = 0, unused[14] = {};
            uint16_t row_bytes[16] = {TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES, TILE_BYTES};
            uint8_t rows[16] = {BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() { _tile_release(); }
};

template <> inline int64_t multiply_blocks<bfloat16>(float *sums, const Blocks &rows, const uint32_t *panel, int64_t words) {
    const int64_t blocks = words / BLOCK;
    asm volatile("" ::: "memory");  // the loads below do not say that they read
    for (int64_t g = 0; g < rows.groups; g++, sums += GROUP * GROUP) {
        const char *upper = (const char *)rows.first + g * rows.group, *lower = upper + BLOCK * rows.row;
        const uint32_t *left = panel;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t b = 0; b < blocks; b++, upper += rows.block, lower += rows.block, left += BLOCK * GROUP) {
            _tile_loadd(4, upper, rows.row);
            _tile_loadd(5, lower, rows.row);
            _tile_loadd(6, left, 2 * TILE_BYTES);
            _tile_loadd(7, left + BLOCK, 2 * TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 2 * TILE_BYTES);
        _tile_stored(1, sums + BLOCK, 2 * TILE_BYTES);
        _tile_stored(2, sums + BLOCK * GROUP, 2 * TILE_BYTES);
        _tile_stored(3, sums + BLOCK * GROUP + BLOCK, 2 * TILE_BYTES);
    }
    return blocks * BLOCK;
}

// Swaps bit DISTANCE of the row's number and the lane's.
template <int DISTANCE> inline void swap_lanes(Words *rows) {
    const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Integers upper = (lane & DISTANCE) != 0;
    const __m512i first = (__m512i)(upper ? lane - DISTANCE + LANES : lane), second = (__m512i)(upper ? lane + LANES : lane + DISTANCE);
#pragma GCC unroll 16
    for (int i = 0; i < BLOCK; i++) {
        if (i & DISTANCE) continue;
        const __m512i here = (__m512i)rows[i], there = (__m512i)rows[i + DISTANCE];
        rows[i] = (Words)_mm512_permutex2var_epi32(here, first, there);
        rows[i + DISTANCE] = (Words)_mm512_permutex2var_epi32(here, second, there);
    }
}

inline void turn_block(uint32_t *block) {
    Words words[GROUP];
    for (int64_t i = 0; i < GROUP; i++) words[i] = load<Words>(block + i % BLOCK * GROUP + i / BLOCK * BLOCK);
    for (Words *half = words; half < words + GROUP; half += BLOCK)
        swap_lanes<1>(half), swap_lanes<2>(half), swap_lanes<4>(half), swap_lanes<8>(half);
    memcpy(block, words, sizeof words);
}
#else
inline void turn_block(uint32_t *) {}
#endif

}  // namespace
