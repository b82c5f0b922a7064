// One optimiser step for rows of the class table, their gradient still in the cache: rows and state are decoded, updated and encoded
// again, a row at a time; in one pass if all are bfloat16. Compiled once for each instruction set; plain C boundary. ops/formats.py and
// optim/rules.py do the same in PyTorch.
//
//     sgd      g += λ w                m = μ m + g                          w -= η m,  nesterov: η (g + μ m)
//     adamw    w -= η λ w              m = β1 m + (1 - β1) g                w -= η / c1 · m / (√v / c2 + ε)
//                                      v = β2 v + (1 - β2) g²
//
// with g = ± the gradient, times max_row_norm / its norm where that is less than 1.

#include <math.h>
#include <omp.h>
#include <string.h>

#include "update.h"
#include "vector.h"

namespace {

enum Format { FLOAT32, BFLOAT16, INT8, UINT8_SQUARE, FLOAT8 };
enum Rule { SGD, ADAMW };

// A permutation of words in which every bit of the result depends on every bit of the word (C. Wellons' lowbias32).
inline uint32_t mixed(uint32_t word) {
    word = (word ^ word >> 16) * 0x7feb352du;
    word = (word ^ word >> 15) * 0x846ca68bu;
    return word ^ word >> 16;
}

// 32 random bits for a column: 16 each for streams 0 and 1; of these the 32 for streams 2 and 3.
constexpr uint32_t OF_COLUMN = 0x9e3779b9;
inline uint32_t second_word(uint32_t word) { return mixed(word ^ 0x85ebca6bu); }

inline void random_words(uint32_t column, int64_t size, uint32_t *words) {
#pragma omp simd linear(column : OF_COLUMN)
    for (int64_t d = 0; d < size; d++) {
        words[d] = mixed(column);
        column += OF_COLUMN;
    }
}
inline void second_words(int64_t size, uint32_t *words) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) words[d] = second_word(words[d]);
}

// The 16 bits of a stream: of two streams that share a word the first has the upper ones.
template <int STREAM> inline uint32_t random_bits(uint32_t word) { return STREAM % 2 ? word & 0xffff : word >> 16; }

inline uint32_t row_key(uint64_t key, uint64_t row) {
    return mixed(mixed((uint32_t)row ^ (uint32_t)key) ^ (uint32_t)(row >> 32) ^ (uint32_t)(key >> 32));
}

inline bool is_rounded(const Buffer &buffer) { return buffer.data && buffer.format != FLOAT32; }
inline bool is_bfloat16(const Buffer &buffer) { return buffer.data && buffer.format == BFLOAT16; }

// A row as the optimisers read and write it: floats, in place or decoded, or bfloat16, each number rounded by its random word.
struct Floats {
    float *row;

    float read(int64_t d) const { return row[d]; }
    void write(int64_t d, float number, uint32_t) const { row[d] = number; }
};
template <int STREAM> struct Rounded {
    bfloat16 *row;

    Rounded(const Buffer &buffer, int64_t number, int64_t size) : row((bfloat16 *)buffer.data + number * size) {}
    float read(int64_t d) const { return widened(row[d]); }
    void write(int64_t d, float number, uint32_t random) const {
        // What is added must not carry into the sign of a NaN, which is quiet, as every result of arithmetic, and stays NaN without.
        const uint32_t added = number == number ? random_bits<STREAM>(random) : 0;
        row[d].bits = (uint16_t)(load<uint32_t>(&number) + added >> 16);
    }
};

// A row as floats: in place if it is float32, else decoded into room.
inline float *decode(const Buffer &from, int64_t row, int64_t size, float *room) {
    if (from.format == FLOAT32) return (float *)from.data + row * size;
    if (from.format == BFLOAT16) {
        const bfloat16 *numbers = (const bfloat16 *)from.data + row * size;
#pragma omp simd
        for (int64_t d = 0; d < size; d++) room[d] = widened(numbers[d]);
        return room;
    }
    const float scale = from.scale[row];
    const int8_t *codes = (const int8_t *)from.data + row * size;
    if (from.format == FLOAT8) {
#pragma omp simd
        for (int64_t d = 0; d < size; d++) {
            const uint32_t code = (uint8_t)codes[d], is_subnormal = -(uint32_t)((code & 0x78) == 0);
            uint32_t word = (code & 0x7f) + (120 << 3) << 20, other;
            float number;
            memcpy(&number, &word, sizeof number);
            number = 2 * number - 0x1p-6f;  // m 2^-9 of a subnormal, whose word is 2^-7 (1 + m / 8)
            memcpy(&other, &number, sizeof other);
            // Masks, as the compiler does not vectorise a choice between floats.
            word = (word & ~is_subnormal) | (other & is_subnormal) | (code & 0x80) << 24;
            memcpy(&number, &word, sizeof number);
            room[d] = number * scale;
        }
    } else if (from.format == INT8) {
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

// The bits of the largest magnitude. They are ordered as the floats are, NaN last.
inline int32_t largest_magnitude(const float *row, int64_t size) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < size; d++) {
        int32_t magnitude;
        memcpy(&magnitude, row + d, sizeof magnitude);
        magnitude &= 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// Returns the scale; NaN, and numbers as they were, for a row that is not finite. formats._float8 has the reasons.
template <int STREAM> inline float to_float8(const float *row, int64_t size, const uint32_t *random, uint8_t *numbers) {
    const int32_t largest = largest_magnitude(row, size);
    if (largest >= 0x7f800000) return NAN;
    int32_t exponent = ((largest + 0x1fffff) >> 23) - 8;
    exponent = exponent < 1 ? 1 : exponent > 246 ? 246 : exponent;
    const int32_t words[] = {exponent << 23, 254 - exponent << 23};
    float scale, inverse;
    memcpy(&scale, words, sizeof scale);
    memcpy(&inverse, words + 1, sizeof inverse);
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        uint32_t sign, word, raised;
        memcpy(&sign, row + d, sizeof sign);
        float number = fabsf(row[d]) * inverse;
        memcpy(&word, &number, sizeof word);
        number += 0x1p-6f;
        memcpy(&raised, &number, sizeof raised);
        const uint32_t is_subnormal = -(uint32_t)(word < 121u << 23);
        word = word > 0x43e00000u ? 0x43e00000u : word;  // 448
        word = (word & ~is_subnormal) | (raised & is_subnormal);
        word = (word + (random_bits<STREAM>(random[d]) << 4) + 8 >> 20) - (120 << 3) - (is_subnormal & 8);
        numbers[d] = (uint8_t)(word | (sign >> 24 & 0x80));
    }
    return scale;
}

// Returns the scale; NaN, and codes as they were, for a row that is not finite.
template <bool SQUARES, int STREAM> inline float to_codes(float *row, int64_t size, const uint32_t *random, uint8_t *codes) {
    constexpr int32_t LARGEST_CODE = SQUARES ? 255 : 127;
    if (SQUARES) {
#pragma omp simd
        for (int64_t d = 0; d < size; d++) row[d] = sqrtf(row[d]);
    }
    const int32_t largest_bits = largest_magnitude(row, size);
    if (largest_bits >= 0x7f800000) return NAN;
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    const float scale = largest / LARGEST_CODE, inverse = scale == 0 ? 0 : 1 / scale;
    if (isinf(inverse)) return 0;  // so small that it is 0
    // Further from 0 and 1 than a rounding of a code: a code that is read and written again stays.
#pragma omp simd
    for (int64_t d = 0; d < size; d++) {
        const float number = row[d] * inverse + ((float)(int32_t)(random_bits<STREAM>(random[d]) >> 1) + 0.5f) * 0x1p-15f;
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

// random: the row's words, those of STREAM. Overwrites row with its square roots for UINT8_SQUARE.
template <int STREAM> inline void encode(const Buffer &to, int64_t row_number, int64_t size, float *row, const uint32_t *random) {
    uint8_t *codes = (uint8_t *)to.data + row_number * size;
    if (to.format == BFLOAT16) {
        const Rounded<STREAM> rounded(to, row_number, size);
#pragma omp simd
        for (int64_t d = 0; d < size; d++) rounded.write(d, row[d], random[d]);
    } else if (to.format == INT8) to.scale[row_number] = to_codes<false, STREAM>(row, size, random, codes);
    else if (to.format == FLOAT8) to.scale[row_number] = to_float8<STREAM>(row, size, random, codes);
    else if (to.format == UINT8_SQUARE) to.scale[row_number] = to_codes<true, STREAM>(row, size, random, codes);
}

// The number to multiply a row's gradient by. Squares in double: those of float end at 1e19.
inline float signed_factor(const Step &h, int64_t size, const float *grad) {
    if (h.max_row_norm == 0) return h.sign;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; d++) sum += (double)grad[d] * grad[d];
    const double norm = sqrt(sum);
    return norm > h.max_row_norm ? h.sign * (float)(h.max_row_norm / norm) : h.sign;
}

template <class W> inline void sgd(const Step &h, int64_t size, float factor, W w, const float *grad, uint32_t column) {
#pragma omp simd linear(column : OF_COLUMN)
    for (int64_t d = 0; d < size; d++) {
        const float row = w.read(d);
        w.write(d, row - h.lr * (factor * grad[d] + h.weight_decay * row), mixed(column));
        column += OF_COLUMN;
    }
}

template <class W, class M>
inline void sgd(const Step &h, int64_t size, float factor, W w, const float *grad, M m, uint32_t column) {
    const bool nesterov = h.nesterov != 0;
#pragma omp simd linear(column : OF_COLUMN)
    for (int64_t d = 0; d < size; d++) {
        const uint32_t word = mixed(column);
        column += OF_COLUMN;
        const float row = w.read(d), g = factor * grad[d] + h.weight_decay * row, momentum = h.first_decay * m.read(d) + g;
        m.write(d, momentum, word);
        w.write(d, row - h.lr * (nesterov ? g + h.first_decay * momentum : momentum), word);
    }
}

template <class W, class M, class V>
inline void adamw(const Step &h, int64_t size, float factor, W w, const float *grad, M m, V v, uint32_t column) {
#pragma omp simd linear(column : OF_COLUMN)
    for (int64_t d = 0; d < size; d++) {
        const uint32_t word = mixed(column);
        column += OF_COLUMN;
        const float g = factor * grad[d], row = w.read(d);
        const float mean = h.first_decay * m.read(d) + h.first_rate * g;  // with β1 = 0 g to the bit
        const float square = h.second_decay * v.read(d) + h.second_rate * g * g;
        const float kept = row - h.lr * h.weight_decay * row;
        m.write(d, mean, word);
        v.write(d, square, second_word(word));
        w.write(d, kept - h.lr / h.first_correction * (mean / (sqrtf(square) / h.second_correction + h.eps)), word);
    }
}

}  // namespace

void JOIN(update_rows, INSTRUCTION_SET)(const Step *step, const float *grad, int64_t stride, const int64_t *index, int64_t first,
                                        int64_t rows, int thread) {
    const int64_t size = step->size;
    float *room = step->scratch + thread * 4 * size;
    uint32_t *random = (uint32_t *)(room + 3 * size);
    const Buffer &table = step->table, &first_state = step->states[0], &second_state = step->states[1];
    const bool is_sgd = step->rule == SGD;
    const bool in_bfloat16 = is_bfloat16(table) && is_bfloat16(first_state) && (is_sgd || is_bfloat16(second_state));
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = index ? index[first + i] : first + i;
        const uint32_t key = row_key(step->key, row + step->first_of_shard);
        const float *of_row = grad + i * stride;
        const float factor = signed_factor(*step, size, of_row);
        if (in_bfloat16) {  // the commonest formats of a large table, in one pass
            const Rounded<0> w(table, row, size);
            const Rounded<1> m(first_state, row, size);
            if (is_sgd) sgd(*step, size, factor, w, of_row, m, key);
            else adamw(*step, size, factor, w, of_row, m, Rounded<2>(second_state, row, size), key);
            continue;
        }
        const Floats w{decode(table, row, size, room)};
        const Floats m{first_state.data ? decode(first_state, row, size, room + size) : nullptr};
        const Floats v{second_state.data ? decode(second_state, row, size, room + 2 * size) : nullptr};
        if (!is_sgd) adamw(*step, size, factor, w, of_row, m, v, key);
        else if (m.row) sgd(*step, size, factor, w, of_row, m, key);
        else sgd(*step, size, factor, w, of_row, key);
        if (is_rounded(table) || is_rounded(first_state)) random_words(key, size, random);
        encode<0>(table, row, size, w.row, random);
        if (m.row) encode<1>(first_state, row, size, m.row, random);
        if (!is_rounded(second_state)) continue;
        second_words(size, random);
        encode<2>(second_state, row, size, v.row, random);
    }
}

namespace {

// The same in parallel, rows from the first of grad on.
void update(const Update &given, int threads) {
    const Update in = given;
#pragma omp parallel for num_threads(threads) firstprivate(in)
    for (int64_t i = 0; i < in.rows; i++)
        JOIN(update_rows, INSTRUCTION_SET)(in.step, in.grad + i * in.size, in.size, in.index, in.first + i, 1, omp_get_thread_num());
}

constexpr Kernel KERNELS[] = {KERNEL<Update, update>};

}  // namespace

EXPORT(const Kernel *, update_kernels)() { return KERNELS; }
