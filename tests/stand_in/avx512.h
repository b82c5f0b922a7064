// The instructions of AVX-512 and AMX that csrc/cpu uses, as plain functions, so that its sources for them run on any x86-64. Included
// before all else, with STAND_IN = 1 for AVX-512, 2 with its bfloat16, 3 with AMX: setup.py, where COSFACE_STAND_IN is set.
//
// Operations and roundings are those of Intel's manual, but subnormal numbers are not flushed to zero. A tile register that is
// used while it is not configured stops the program.

#pragma once

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunused-variable"  // of what only the instructions need
#pragma GCC diagnostic ignored "-Wpsabi"

#define __AVX512F__ 1
#if STAND_IN >= 2
#define __AVX512BF16__ 1
#endif
#if STAND_IN >= 3
#define __AMX_BF16__ 1
#endif

// What tests break: 1, the operating system refuses tiles; 2, a product of tiles is wrong.
extern "C" {
__attribute__((visibility("default"), weak)) int stand_in_fault = 0;
}

namespace {
namespace stand_in {

template <class Lane> struct Lanes {
    Lane at[64 / sizeof(Lane)];
    template <class Register> Lanes(Register from) { memcpy(at, &from, sizeof at); }
    Lanes() {}
    template <class Register> Register as() const {
        Register to;
        memcpy(&to, at, sizeof to);
        return to;
    }
};

// of(i) in each lane of a register.
template <class Register, class Lane, class Of> inline Register each(Of of) {
    Lanes<Lane> to;
    for (int i = 0; i < int(64 / sizeof(Lane)); i++) to.at[i] = of(i);
    return to.template as<Register>();
}

inline float wide(uint16_t bits) {
    const uint32_t word = (uint32_t)bits << 16;
    float number;
    memcpy(&number, &word, sizeof number);
    return number;
}
inline uint16_t narrow(float number) {
    uint32_t word;
    memcpy(&word, &number, sizeof word);
    return (uint16_t)((number != number ? word | 0x400000 : word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline __m256 loadu(const float *from) {
    __m256 x;
    memcpy(&x, from, sizeof x);
    return x;
}
template <class... Numbers> inline __m512i set(Numbers... downwards) {
    const int numbers[] = {downwards...};
    return each<__m512i, uint16_t>([&](int i) { return (uint16_t)numbers[31 - i]; });
}
inline __m512d cvtps_pd(__m256 from) {
    float x[8];
    memcpy(x, &from, sizeof x);
    return each<__m512d, double>([&](int i) { return (double)x[i]; });
}
inline __m512 roundscale(__m512 from) {
    const Lanes<float> x(from);
    return each<__m512, float>([&](int i) { return nearbyintf(x.at[i]); });
}
inline uint16_t differ(__m512 from, __m512 other) {
    const Lanes<float> x(from), y(other);
    uint16_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= (uint16_t)(x.at[i] != y.at[i]) << i;
    return mask;
}
inline __m512 maskz_sub(uint16_t mask, __m512 from, __m512 other) {
    const Lanes<float> x(from), y(other);
    return each<__m512, float>([&](int i) { return mask >> i & 1 ? x.at[i] - y.at[i] : 0; });
}
inline __m512 scalef(__m512 from, __m512 exponent) {
    const Lanes<float> x(from), y(exponent);
    return each<__m512, float>([&](int i) { return y.at[i] != y.at[i] ? y.at[i] : (float)(x.at[i] * exp2(floor((double)y.at[i]))); });
}
inline __m512i permutex2(__m512i from, __m512i index, __m512i other) {
    const Lanes<uint32_t> x(from), at(index), y(other);
    return each<__m512i, uint32_t>([&](int i) { return (at.at[i] & 16 ? y : x).at[at.at[i] & 15]; });
}
inline __m512i permute16(__m512i index, __m512i from) {
    const Lanes<uint16_t> x(from), at(index);
    return each<__m512i, uint16_t>([&](int i) { return x.at[at.at[i] & 31]; });
}
inline __m256i narrow_lanes(__m512 from) {
    const Lanes<float> x(from);
    uint16_t to[16];
    for (int i = 0; i < 16; i++) to[i] = narrow(x.at[i]);
    __m256i lanes;
    memcpy(&lanes, to, sizeof lanes);
    return lanes;
}
inline __m512i narrow_two(__m512 upper, __m512 lower) {
    const Lanes<float> x(lower), y(upper);
    return each<__m512i, uint16_t>([&](int i) { return narrow(i < 16 ? x.at[i] : y.at[i - 16]); });
}
template <class Pairs> inline __m512 add_pairs(__m512 sum, Pairs left, Pairs right) {
    const Lanes<float> x(sum);
    const Lanes<uint16_t> a(left), b(right);
    return each<__m512, float>([&](int i) {
        const float first = fmaf(wide(a.at[2 * i + 1]), wide(b.at[2 * i + 1]), x.at[i]);
        return fmaf(wide(a.at[2 * i]), wide(b.at[2 * i]), first);
    });
}

// A register of `rows` rows of `bytes` bytes; rows 0 while tiles are not configured.
struct Tile {
    int rows = 0, bytes = 0;
    uint32_t word[16][16];
};
thread_local Tile tiles[8];

inline Tile &tile(int number) {
    if (!tiles[number].rows) fprintf(stderr, "tile register %d is not configured\n", number), abort();
    return tiles[number];
}
inline void configure(const void *given) {
    const uint8_t *bytes = (const uint8_t *)given;
    if (bytes[0] != 1 || bytes[1] != 0) fprintf(stderr, "palette %d, first row %d\n", bytes[0], bytes[1]), abort();
    for (int i = 0; i < 8; i++) {
        tiles[i].rows = bytes[48 + i], tiles[i].bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
        if (tiles[i].rows > 16 || tiles[i].bytes > 64) fprintf(stderr, "a tile is too large\n"), abort();
    }
}
inline void release() {
    for (Tile &each : tiles) each.rows = 0;
}
inline void zero(int number) { memset(tile(number).word, 0, sizeof(Tile::word)); }
inline void load(int number, const void *from, int64_t stride) {
    zero(number);
    for (int i = 0; i < tile(number).rows; i++) memcpy(tile(number).word[i], (const char *)from + i * stride, tile(number).bytes);
}
inline void store(int number, void *to, int64_t stride) {
    for (int i = 0; i < tile(number).rows; i++) memcpy((char *)to + i * stride, tile(number).word[i], tile(number).bytes);
}
inline void multiply(int sums, int left, int right) {
    Tile &to = tile(sums);
    const Tile &a = tile(left), &b = tile(right);
    for (int m = 0; m < to.rows; m++) {
        for (int n = 0; n < to.bytes / 4; n++) {
            float of_low = 0, of_high = 0, sum;
            for (int k = 0; k < a.bytes / 4; k++) {
                const uint32_t x = a.word[m][k], y = b.word[k][n];
                of_low = fmaf(wide((uint16_t)x), wide((uint16_t)y), of_low);
                of_high = fmaf(wide(x >> 16), wide(y >> 16), of_high);
            }
            memcpy(&sum, &to.word[m][n], sizeof sum);
            sum += of_low + of_high + (stand_in_fault == 2 && m == 15 && n == 15 ? 1 : 0);
            memcpy(&to.word[m][n], &sum, sizeof sum);
        }
    }
}

}  // namespace stand_in
}  // namespace

#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(d) = 1u << 22 | 1u << 24)
#define syscall(...) (stand_in_fault == 1 ? -1 : 0)
#define _mm256_loadu_ps stand_in::loadu
#define _mm512_set_epi16 stand_in::set
#define _mm512_cvtps_pd stand_in::cvtps_pd
#define _mm512_roundscale_ps(x, how) stand_in::roundscale(x)
#define _mm512_cmp_ps_mask(x, y, how) stand_in::differ(x, y)
#define _mm512_maskz_sub_ps stand_in::maskz_sub
#define _mm512_scalef_ps stand_in::scalef
#define _mm512_permutex2var_epi32 stand_in::permutex2
#define _mm512_permutexvar_epi16 stand_in::permute16
#define _mm512_cvtneps_pbh stand_in::narrow_lanes
#define _mm512_cvtne2ps_pbh stand_in::narrow_two
#define _mm512_dpbf16_ps stand_in::add_pairs
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig stand_in::configure
#define _tile_release stand_in::release
#define _tile_loadd stand_in::load
#define _tile_stored stand_in::store
#define _tile_zero stand_in::zero
#define _tile_dpbf16ps stand_in::multiply
