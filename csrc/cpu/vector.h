// One vector type for every instruction set, and its operations beyond + and *: 2^x, bfloat16, a dot product of words.
//
// This header is compiled once for each instruction set (see setup.py), so everything in it is local to its translation unit:
// a shared inline function would be merged by the linker, and the machine without AVX-512 might be given the copy that uses it.

#pragma once

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Vectors that the sums and operands of a register tile may take: NEON's are as short as the portable ones, but twice as many.
#ifdef COSFACE_NEON
constexpr bool HAS_NEON = true;
#else
constexpr bool HAS_NEON = false;
#endif

// The processor multiplies pairs of bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_PAIRS
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
// Half as many as a Vector has lanes.
typedef float Pieces __attribute__((vector_size(2 * LANES)));
typedef uint32_t PieceWords __attribute__((vector_size(2 * LANES)));
typedef uint16_t PieceHalves __attribute__((vector_size(LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

// Matrix products read words of 32 bits: one float32, or two bfloat16 that are neighbours along the summed dimension where the
// processor multiplies such pairs. Elsewhere bfloat16 is widened once, before the product: in its inner loop that would take half
// of the time.
template <class Number> struct OperandOf {
    typedef float type;
};
#ifdef HAS_PAIRS
template <> struct OperandOf<bfloat16> {
    typedef bfloat16 type;
};
#endif
template <class Number> using Operand = typename OperandOf<Number>::type;
template <class Number> constexpr int PER_WORD = 4 / sizeof(Operand<Number>);
template <class Number> constexpr bool IS_WIDENED = sizeof(Operand<Number>) > sizeof(Number);

template <class To, class From> inline To load(const From *from) {
    To to;
    memcpy(&to, from, sizeof to);
    return to;
}

// Intrinsics where GCC makes three to five instructions of the generic form.
inline Doubles widen(Pieces x) {
#if defined(__AVX512F__)
    return (Doubles)_mm512_cvtps_pd((__m256)x);
#elif defined(__AVX2__)
    return (Doubles)_mm256_cvtps_pd((__m128)x);
#else
    return __builtin_convertvector(x, Doubles);
#endif
}
inline Doubles widen(const float *from) { return widen(load<Pieces>(from)); }
inline Doubles widen(const bfloat16 *from) {
    return widen((Pieces)(__builtin_convertvector(load<PieceHalves>(from), PieceWords) << 16));
}
inline Vector splat(float value) { return Vector{} + value; }
inline Words splat(uint32_t value) { return Words{} + value; }

// x, which a compiler could otherwise keep unrounded in a fused multiply-add.
inline Vector rounded(Vector x) {
#if defined(__AVX512F__) && defined(__FMA__)
    asm("" : "+v"(x));
#elif defined(__FMA__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}

// √x of each lane.
inline Vector root(Vector x) {
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

// sum + a·b, a word at a time.
template <class Number> inline Vector add_product(Vector sum, Words a, Words b) { return sum + (Vector)a * (Vector)b; }

#ifdef __AVX512BF16__
template <> inline Vector add_product<bfloat16>(Vector sum, Words a, Words b) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(HAS_PAIRS)
template <> inline Vector add_product<bfloat16>(Vector sum, Words a, Words b) {
    return (Vector)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#endif

inline Words zero_extended(Halves x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Words);
#endif
}
inline Vector widened(Halves x) { return (Vector)(zero_extended(x) << 16); }
inline float widened(bfloat16 x) {
    const uint32_t word = (uint32_t)x.bits << 16;
    return load<float>(&word);
}
inline float widened(float x) { return x; }

// x rounded to bfloat16, to nearest even, in the upper halves; NaN stays NaN.
inline Words rounded_halves(Vector x) {
    const Words bits = (Words)x;
    return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}
inline Halves upper_halves(Words x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // GCC takes four instructions for the generic form.
    const __m256i order = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                           2, 3, 6, 7, 10, 11, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, order), 0x08));
#else
    return __builtin_convertvector(x >> 16, Halves);
#endif
}

inline Halves to_bfloat16(Vector x) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    return upper_halves(rounded_halves(x));
#endif
}

// x, a result of arithmetic, as a sum of products reads it: rounded where bfloat16 is widened. (A NaN is quiet: it stays one.)
template <class Number> inline Vector as_operand(Vector x) { return x; }
template <> inline Vector as_operand<bfloat16>(Vector x) {
    if (!IS_WIDENED<bfloat16>) return x;
    const Words bits = (Words)x, added = 0x7fff + (bits >> 16 & 1);
    return (Vector)(bits + (x == x ? added : Words{}) & 0xffff0000u);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Some of a vector's lanes, the first ones: memcpy of a number that is not known would be a call, and zeros that it writes into could
// not be read again before they are all there.
inline Vector load_some(const float *from, int64_t count) {
    const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Vector)_mm256_maskload_ps(from, (__m256i)(lanes < (int32_t)count));
}
// Words, and once more the last number, which may have none.
inline Halves load_some(const uint16_t *from, int64_t count) {
    typedef int32_t Four __attribute__((vector_size(2 * LANES)));
    const Four words = {0, 1, 2, 3};
    const Halves lanes = {0, 1, 2, 3, 4, 5, 6, 7}, last = (Halves)(lanes == (uint16_t)(count - 1)) & from[count - 1];
    return (Halves)_mm_maskload_epi32((const int *)from, (__m128i)(words < (int32_t)(count / 2))) | last;
}
inline void store_some(float *to, Vector x, int64_t count) {
    __m128 part = _mm256_castps256_ps128((__m256)x);
    if (count & 4) memcpy(to, &part, 16), part = _mm256_extractf128_ps((__m256)x, 1), to += 4;
    if (count & 2) memcpy(to, &part, 8), part = _mm_movehl_ps(part, part), to += 2;
    if (count & 1) memcpy(to, &part, 4);
}
inline void store_some(uint16_t *to, Halves x, int64_t count) {
    __m128i part = (__m128i)x;
    if (count & 4) memcpy(to, &part, 8), part = _mm_srli_si128(part, 8), to += 4;
    if (count & 2) memcpy(to, &part, 4), part = _mm_srli_si128(part, 4), to += 2;
    if (count & 1) memcpy(to, &part, 2);
}
#else
inline Vector load_some(const float *from, int64_t count) {
    Vector x = {};
    memcpy(&x, from, sizeof(float) * count);
    return x;
}
inline Halves load_some(const uint16_t *from, int64_t count) {
    Halves x = {};
    memcpy(&x, from, sizeof(uint16_t) * count);
    return x;
}
inline void store_some(float *to, Vector x, int64_t count) { memcpy(to, &x, sizeof(float) * count); }
inline void store_some(uint16_t *to, Halves x, int64_t count) { memcpy(to, &x, sizeof(uint16_t) * count); }
#endif

// `count` numbers as floats, then zeros.
inline Vector load_lanes(const float *from, int64_t count) {
    return count >= LANES ? load<Vector>(from) : load_some(from, count);
}
inline Halves load_lanes(const uint16_t *from, int64_t count) {
    return count >= LANES ? load<Halves>(from) : load_some(from, count);
}
inline Vector load_lanes(const bfloat16 *from, int64_t count) { return widened(load_lanes(&from->bits, count)); }

// body(first, how many) for each vector of a row; whole ones in a loop of their own, which has no branch.
template <int WIDTH = LANES, class Body> inline void by_lanes(int64_t size, Body body) {
    int64_t d = 0;
    for (; d + WIDTH <= size; d += WIDTH) body(d, WIDTH);
    if (d < size) body(d, size - d);
}

// The first `count` lanes of x, as floats or rounded to bfloat16.
template <class Lanes, class Number> inline void store_lanes(Number *to, Lanes lanes, int64_t count) {
    if (count >= LANES) memcpy(to, &lanes, sizeof lanes);
    else if constexpr (sizeof(Number) == sizeof(float)) store_some((float *)to, (Vector)lanes, count);
    else store_some((uint16_t *)to, (Halves)lanes, count);
}

inline void store(float *to, Vector x, int64_t count) { store_lanes(to, x, count); }
inline void store(bfloat16 *to, Vector x, int64_t count) { store_lanes(to, to_bfloat16(x), count); }

inline void round_row(const float *from, int64_t count, bfloat16 *to) {
    by_lanes(count, [&](int64_t i, int64_t lanes) { store(to + i, load_lanes(from + i, lanes), lanes); });
}

// The first `count` lanes of what as_operand gave.
inline void store_operand(float *to, Vector x, int64_t count) { store(to, x, count); }
inline void store_operand(bfloat16 *to, Vector x, int64_t count) {
    if (IS_WIDENED<bfloat16>) store_lanes(to, upper_halves((Words)x), count);
    else store(to, x, count);
}

// `count` bfloat16 as floats.
inline void widen_row(const bfloat16 *from, int64_t count, float *to) {
    by_lanes(count, [&](int64_t i, int64_t lanes) { store(to + i, load_lanes(from + i, lanes), lanes); });
}

// Two neighbours of a row in each lane: of[0] those in even columns, of[1] those in odd ones.
struct Pairs {
    Vector of[2];
};

// `count` numbers of up to 2 LANES, then zeros.
inline Pairs load_pairs(const bfloat16 *from, int64_t count) {
    if (count == 1) return {Vector{widened(*from)}};
    Words both = {};
    if (count >= 2 * LANES) both = load<Words>(from);
    else memcpy(&both, from, sizeof(bfloat16) * count);
    return {(Vector)(both << 16), (Vector)(both & 0xffff0000u)};
}
inline Pairs load_pairs(const float *from, int64_t count) {
    if (count == 1) return {Vector{*from}};
    float room[2 * LANES] = {};
    if (count < 2 * LANES) from = (const float *)memcpy(room, from, sizeof(float) * count);
#if defined(__AVX2__) && !defined(__AVX512F__)
    // GCC takes twelve instructions for the generic form.
    const auto numbers = [&](int i) { return _mm_loadu_ps(from + i); };
    const __m256 first = _mm256_set_m128(numbers(8), numbers(0)), second = _mm256_set_m128(numbers(12), numbers(4));
    return {(Vector)_mm256_shuffle_ps(first, second, 0x88), (Vector)_mm256_shuffle_ps(first, second, 0xdd)};
#else
    typedef uint64_t Doubled __attribute__((vector_size(8 * LANES)));
    const Doubled both = load<Doubled>(from);
    return {(Vector)__builtin_convertvector(both, Words), (Vector)__builtin_convertvector(both >> 32, Words)};
#endif
}
// The first `count` numbers, of each its upper half.
inline void store_pairs(bfloat16 *to, const Pairs &numbers, int64_t count) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const Words both = (Words)_mm256_blend_epi16(_mm256_srli_epi32((__m256i)numbers.of[0], 16), (__m256i)numbers.of[1], 0xaa);
#else
    const Words both = (Words)numbers.of[0] >> 16 | ((Words)numbers.of[1] & 0xffff0000u);
#endif
    if (count >= 2 * LANES) memcpy(to, &both, sizeof both);
    else memcpy(to, &both, sizeof(bfloat16) * count);
}

inline Words pair(Halves low, Halves high) {
    return zero_extended(low) | zero_extended(high) << 16;
}

// A word of each lane, of what as_operand gave: one operand, or two of bfloat16, the first in the low half.
template <class Number> inline void put_words(uint32_t *to, const Vector *operands) { memcpy(to, operands, sizeof *operands); }

#ifdef __AVX512BF16__
template <> inline void put_words<bfloat16>(uint32_t *to, const Vector *operands) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i words = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh((__m512)operands[1], (__m512)operands[0]));
    memcpy(to, &words, sizeof words);
}
#elif defined(HAS_PAIRS)
template <> inline void put_words<bfloat16>(uint32_t *to, const Vector *operands) {
    const Words words = pair(to_bfloat16(operands[0]), to_bfloat16(operands[1]));
    memcpy(to, &words, sizeof words);
}
#endif

// 2^x within 2 ulp, subnormal results included; 0 for -inf, inf above 128, NaN for NaN.
inline Vector exp2(Vector x) {
#ifdef __AVX512F__
    Vector whole = (Vector)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    // 2^-inf and 2^inf: inf - inf would be NaN.
    Vector fraction = (Vector)_mm512_maskz_sub_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)whole, _CMP_NEQ_UQ), (__m512)x, (__m512)whole);
#else
    x = x < -160.0f ? splat(-160.0f) : x;
    x = x > 130.0f ? splat(130.0f) : x;
    const float magic = 0x1.8p23f;  // float32 has no bits below 1 there, so that adding it rounds to an integer
    Vector whole = (x + magic) - magic;
    Vector fraction = x - whole;
#endif
    // Minimax for the relative error (2e-9) on [-1/2, 1/2].
    Vector power = splat(0x1.41d334p-13f);
    power = power * fraction + 0x1.5f456ap-10f;
    power = power * fraction + 0x1.3b2dbcp-7f;
    power = power * fraction + 0x1.c6aed4p-5f;
    power = power * fraction + 0x1.ebfbdap-3f;
    power = power * fraction + 0x1.62e430p-1f;
    power = power * fraction + 1.0f;
#ifdef __AVX512F__
    return (Vector)_mm512_scalef_ps((__m512)power, (__m512)whole);
#else
    // In two factors: 2^-149 and 2^128 are not normal numbers.
    Integers exponent = __builtin_convertvector(whole, Integers), half = exponent >> 1;
    return power * (Vector)((half + 127) << 23) * (Vector)((exponent - half + 127) << 23);
#endif
}

}  // namespace
