// One optimiser step for rows of the class table, their gradient still in the cache: rows and state are decoded, updated and encoded
// again, a row at a time. Compiled once for each instruction set; plain C boundary. ops/formats.py and optim/rules.py say the
// same in PyTorch.
//
//     sgd      g += λ w                m = μ m + g                          w -= η m,  nesterov: η (g + μ m)
//     adamw    w -= η λ w              m = β1 m + (1 - β1) g                w -= η / c1 · m / (√v / c2 + ε)
//                                      v = β2 v + (1 - β2) g²

#include <math.h>
#include <omp.h>
#include <string.h>

#include "update.h"

namespace {

enum Format { FLOAT32, BFLOAT16, INT8, UINT8_SQUARE };
enum Rule { SGD, ADAMW };

// A permutation of words in which every bit of the result depends on every bit of the word (C. Wellons' lowbias32).
inline uint32_t mixed(uint32_t word) {
    word = (word ^ word >> 16) * 0x7feb352du;
    word = (word ^ word >> 15) * 0x846ca68bu;
    return word ^ word >> 16;
}

// 16 random bits for each column; streams 0 and 1 share a word, as do 2 and 3.
inline void random_bits(uint32_t row_key, int64_t size, int stream, uint32_t *bits) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        uint32_t word = mixed(row_key + (uint32_t)d * 0x9e3779b9u);
        if (stream >= 2) word = mixed(word ^ 0x85ebca6bu);
        bits[d] = stream % 2 ? word & 0xffff : word >> 16;
    }
}

inline uint32_t row_key(uint64_t key, uint64_t row) {
    return mixed(mixed((uint32_t)row ^ (uint32_t)key) ^ (uint32_t)(row >> 32) ^ (uint32_t)(key >> 32));
}

// A row as floats: where it lies if it has them, else in room.
inline float *decode(const Buffer &from, int64_t row, int64_t size, float *room) {
    if (from.format == FLOAT32) return (float *)from.data + row * size;
    if (from.format == BFLOAT16) {
        const uint16_t *halves = (const uint16_t *)from.data + row * size;
#pragma omp simd
        for (int64_t d = 0; d < size; d++) {
            const uint32_t word = (uint32_t)halves[d] << 16;
            memcpy(room + d, &word, sizeof word);
        }
        return room;
    }
    const float scale = from.scale[row];
    const int8_t *codes = (const int8_t *)from.data + row * size;
    if (from.format == INT8) {
#pragma omp simd
        for (int64_t d = 0; d < size; d++) room[d] = codes[d] * scale;
    } else {
#pragma omp simd
        for (int64_t d = 0; d < size; d++) {
            const float root = (uint8_t)codes[d] * scale;
            room[d] = root * root;
        }
    }
    return room;
}

inline void to_bfloat16(const float *row, int64_t size, const uint32_t *bits, uint16_t *halves) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        uint32_t word;
        memcpy(&word, row + d, sizeof word);
        word = (word & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : word + bits[d];
        halves[d] = (uint16_t)(word >> 16);
    }
}

// Returns the scale; NaN, and codes as they were, for a row that is not finite.
template <bool SQUARES>
inline float to_codes(float *row, int64_t size, const uint32_t *bits, uint8_t *codes) {
    constexpr int32_t LARGEST_CODE = SQUARES ? 255 : 127;
    int32_t largest_bits = 0;
#pragma omp simd reduction(max : largest_bits)
    for (int64_t d = 0; d < size; d++) {
        if (SQUARES) row[d] = sqrtf(row[d]);
        int32_t magnitude;  // ordered as the floats are, NaN last
        memcpy(&magnitude, row + d, sizeof magnitude);
        magnitude &= 0x7fffffff;
        largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    if (largest_bits >= 0x7f800000) return NAN;
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    const float scale = largest / LARGEST_CODE, inverse = scale == 0 ? 0 : 1 / scale;
    if (isinf(inverse)) return 0;  // so small that it is 0
    // Between 0 and 1 by more than a rounding of a code: a code that is read and written again stays.
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        const float number = row[d] * inverse + ((float)(int32_t)(bits[d] >> 1) + 0.5f) * 0x1p-15f;
        int32_t code = (int32_t)number;
        code -= (float)code > number ? 1 : 0;
        code = code > LARGEST_CODE ? LARGEST_CODE : code;
        code = code < -LARGEST_CODE ? -LARGEST_CODE : code;
        // A square that became 0 would make AdamW's step as large as 1 / eps.
        if (SQUARES) code = row[d] > 0 && code == 0 ? 1 : code;
        codes[d] = (uint8_t)code;
    }
    return scale;
}

// Overwrites row with its square roots for UINT8_SQUARE.
inline void encode(const Buffer &to, int64_t row_number, int64_t size, float *row, uint32_t row_key, int stream, uint32_t *bits) {
    if (to.format == FLOAT32) return;
    random_bits(row_key, size, stream, bits);
    uint8_t *codes = (uint8_t *)to.data + row_number * size;
    if (to.format == BFLOAT16) to_bfloat16(row, size, bits, (uint16_t *)to.data + row_number * size);
    else if (to.format == INT8) to.scale[row_number] = to_codes<false>(row, size, bits, codes);
    else to.scale[row_number] = to_codes<true>(row, size, bits, codes);
}

inline void sgd(const Step &h, int64_t size, float *w, const float *grad, float *m) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        const float g = h.sign * grad[d] + h.weight_decay * w[d];
        float step = g;
        if (m) {
            m[d] = h.first_decay * m[d] + g;
            step = h.nesterov != 0 ? g + h.first_decay * m[d] : m[d];
        }
        w[d] -= h.lr * step;
    }
}

inline void adamw(const Step &h, int64_t size, float *w, const float *grad, float *m, float *v) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        const float g = h.sign * grad[d];
        m[d] = h.first_decay * m[d] + h.first_rate * g;  // with β1 = 0 g to the bit
        v[d] = h.second_decay * v[d] + h.second_rate * g * g;
        const float kept = w[d] - h.lr * h.weight_decay * w[d];
        w[d] = kept - h.lr / h.first_correction * (m[d] / (sqrtf(v[d]) / h.second_correction + h.eps));
    }
}

}  // namespace

void JOIN(update_rows, INSTRUCTION_SET)(const Step *step, const float *grad, int64_t stride, const int64_t *index, int64_t first,
                                        int64_t rows, int thread) {
    const int64_t size = step->size;
    float *room = step->scratch + thread * 4 * size;
    uint32_t *bits = (uint32_t *)(room + 3 * size);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = index ? index[first + i] : first + i;
        const uint32_t random = row_key(step->key, row + step->first_of_shard);
        float *w = decode(step->table, row, size, room), *state[Step::STATES] = {};
        for (int k = 0; k < Step::STATES; k++)
            if (step->states[k].data) state[k] = decode(step->states[k], row, size, room + (k + 1) * size);
        if (step->rule == SGD) sgd(*step, size, w, grad + i * stride, state[0]);
        else adamw(*step, size, w, grad + i * stride, state[0], state[1]);
        encode(step->table, row, size, w, random, 0, bits);
        for (int k = 0; k < Step::STATES; k++)
            if (state[k]) encode(step->states[k], row, size, state[k], random, k + 1, bits);
    }
}

// The same in parallel, rows from the first of grad on.
EXPORT(void, update)(const Step *step, const float *grad, int64_t stride, const int64_t *index, int64_t first, int64_t rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++)
        JOIN(update_rows, INSTRUCTION_SET)(step, grad + i * stride, stride, index, first + i, 1, omp_get_thread_num());
}
