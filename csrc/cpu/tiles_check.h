// Whether this process may multiply in AMX's tiles, and whether they multiply right.

#pragma once

#include "product.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// True if tiles and vectors agree on the products of a group of rows and of columns with a panel, of whole numbers, whose sums are exact in
// any order.
inline bool tiles_agree() {
    constexpr int64_t SIZE = 4 * BLOCK;  // numbers of a row: two blocks of words
    alignas(64) uint16_t rows[GROUP * SIZE];
    alignas(64) uint32_t panel[SIZE / 2 * PANEL], columns[SIZE / 2 * PANEL];
    auto number = [](int64_t i) {
        const float whole = (float)(i * i % 31 - 15);
        return (uint16_t)(load<uint32_t>(&whole) >> 16);
    };
    for (int64_t i = 0; i < GROUP * SIZE; i++) rows[i] = number(i);
    for (int64_t i = 0; i < SIZE / 2 * PANEL; i++) {
        panel[i] = number(3 * i) | (uint32_t)number(7 * i + 1) << 16;
        columns[i] = number(5 * i + 2) | (uint32_t)number(11 * i) << 16;
    }
    const Rows<bfloat16, GROUP> by_row((const bfloat16 *)rows, GROUP, SIZE), by_column(columns, SIZE / 2 * PANEL, 0, GROUP);
    auto product = [&](const Rows<bfloat16, GROUP> &left, bool in_tiles, Accumulator *sums) {
        Rows<bfloat16, GROUP> either = left;
        if (!in_tiles) either.blocks.groups = 0;
        multiply(sums, either, panel, SIZE, [](int64_t, int64_t) {});
    };
    Accumulator wanted[2][GROUP / TILE], found[2][GROUP / TILE];
    product(by_row, false, wanted[0]);
    product(by_column, false, wanted[1]);
    const TileRegisters<bfloat16> registers;
    for (int64_t b = 0; b < SIZE / 2 / BLOCK; b++) turn_block(columns + b * BLOCK * PANEL);
    product(by_row, true, found[0]);
    product(by_column, true, found[1]);
    return memcmp(wanted, found, sizeof wanted) == 0;
}

// 1: tiles can be used; 0: the processor has none for bfloat16; -1: the operating system refuses them; -2: their products differ.
inline int tiles_supported() {
    unsigned a, b, c, features;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || !(features >> 22 & 1) || !(features >> 24 & 1)) return 0;
    const long ask_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: of a process, since Linux 5.16
    if (syscall(SYS_arch_prctl, ask_permission, tile_data) != 0) return -1;
    return tiles_agree() ? 1 : -2;
}

}  // namespace
#else
namespace {
inline int tiles_supported() { return 0; }
}  // namespace
#endif
