// One row of the class table, float32 of any magnitude or bfloat16: its norm, and the projection of its gradient.

#pragma once

#include <math.h>

#include "vector.h"

namespace {

constexpr double TINY_NORM = 1e-12;  // normalize.py: a shorter row has no direction

// A factor of any magnitude, as a power of two and a remainder: a row of any magnitude is multiplied by both in float32, by the
// power exactly.
struct Factor {
    float power = 0, rest = 0;

    Factor() = default;
    explicit Factor(double value) {
        if (value == 0) return;
        const int64_t exponent = (int64_t)(load<uint64_t>(&value) >> 52 & 0x7ff) - 1023;
        // Beyond this range both halves are 0 or infinite in float32 anyway.
        const int64_t half = exponent / 2 < -126 ? -126 : exponent / 2 > 126 ? 126 : exponent / 2;
        const uint32_t bits = (uint32_t)(half + 127) << 23;
        power = load<float>(&bits);
        rest = (float)(value / power);
    }
    Vector operator*(Vector x) const { return x * power * rest; }
    float operator*(float x) const { return x * power * rest; }
};

// Σ x² in double: the square of 1e20 is no float.
template <class Number> inline double square_sum_in_double(const Number *row, int64_t size) {
    Doubles sums[2] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        for (int half = 0; half < 2; half++) {
            const Doubles part = widen(row + d + half * LANES / 2);
            sums[half] += part * part;
        }
    }
    double sum = 0;
    for (; d < size; d++) sum += (double)widened(row[d]) * widened(row[d]);
    for (int i = 0; i < LANES / 2; i++) sum += sums[0][i] + sums[1][i];
    return sum;
}
inline double square_sum(const float *row, int64_t size) { return square_sum_in_double(row, size); }

// The square of a bfloat16 is exact in float32: a pair of them is rounded once. Those below its range do not count: a row of such
// has no direction.
inline double square_sum(const bfloat16 *row, int64_t size) {
    Doubles sums[2] = {};
    const auto add = [&](const Vector &squares) {
        Pieces halves[2];
        memcpy(halves, &squares, sizeof squares);
        for (int half = 0; half < 2; half++) sums[half] += widen(halves[half]);
    };
    int64_t d = 0;
    for (; d + 2 * LANES <= size; d += 2 * LANES) {
        const Pairs x = load_pairs(row + d, 2 * LANES);
        add(x.of[0] * x.of[0] + x.of[1] * x.of[1]);
    }
    for (; d + LANES <= size; d += LANES) {
        const Vector x = load_lanes(row + d, LANES);
        add(x * x);
    }
    double sum = 0;
    for (; d < size; d++) sum += (double)widened(row[d]) * widened(row[d]);
    for (int i = 0; i < LANES / 2; i++) sum += sums[0][i] + sums[1][i];
    return sum < INFINITY ? sum : square_sum_in_double(row, size);
}

// 1 / ‖row‖, 0 for a row without direction, NaN for an infinite one.
template <class Number> inline double inverse_norm(const Number *row, int64_t size) {
    const double norm = sqrt(square_sum(row, size));
    return norm < TINY_NORM ? 0.0 : isinf(norm) ? NAN : 1.0 / norm;
}

// body(the rows from number `first` on), float or bfloat16: widened as they are read.
template <class Body> inline auto with_rows(const void *table, bool is_bfloat16, int64_t first, Body body) {
    return is_bfloat16 ? body((const bfloat16 *)table + first) : body((const float *)table + first);
}

// ŵ·dw̃ of one class.
template <class Number> inline float component(const Number *row, const float *unit_grad, int64_t size, Factor normalize) {
    Vector sums = {};
    by_lanes(size, [&](int64_t d, int64_t count) {
        sums += normalize * load_lanes(row + d, count) * load_lanes(unit_grad + d, count);
    });
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

// dw of one class from dw̃ and, if the table is normalised, along = ŵ·dw̃; share: the targets' share, or null.
template <class Number>
inline void project(const Number *row, const float *unit_grad, int64_t size, bool normalized, double inverse, float along,
                    double unscale, const float *share, float *grad) {
    const Factor normalize(inverse), factor(inverse * unscale);
    by_lanes(size, [&](int64_t d, int64_t count) {
        Vector across = load_lanes(unit_grad + d, count);
        if (normalized) across -= normalize * load_lanes(row + d, count) * along;
        Vector out = inverse == 0 ? Vector{} : factor * across;
        if (share) out += load_lanes(share + d, count);
        store(grad + d, out, count);
    });
}

}  // namespace
