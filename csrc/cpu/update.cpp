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

// A permutation of words, or of each lane's, in which every bit of the result depends on every bit of the word (C. Wellons'
// lowbias32).
template <class Word> inline Word mixed(Word word) {
    word = (word ^ word >> 16) * 0x7feb352du;
    word = (word ^ word >> 15) * 0x846ca68bu;
    return word ^ word >> 16;
}

// Random words of a row, one for each pair of columns: the lower half for the even column, the upper one for the odd.
constexpr uint32_t OF_PAIR = 0x9e3779b9, OF_STREAM = 0xac564b05;

// Those of the next stream. See formats.random_bits.
inline Words of_next_stream(Words words) { return (words ^ words >> 16) * OF_STREAM; }

// A vector of words at a time, from a pair of columns on.
struct FirstStream {
    Words word;

    explicit FirstStream(uint32_t key, uint32_t pair = 0) {
        for (int i = 0; i < LANES; i++) word[i] = key + (pair + i) * OF_PAIR;
    }
    Words next() {
        const Words random = mixed(word);
        word += LANES * OF_PAIR;
        return random;
    }
};

inline void first_words(uint32_t key, int64_t count, uint32_t *words) {
    FirstStream stream(key);
    by_lanes(count, [&](int64_t i, int64_t lanes) { store_lanes(words + i, stream.next(), lanes); });
}
inline void next_words(int64_t count, uint32_t *words) {
    by_lanes(count, [&](int64_t i, int64_t lanes) {
        store_lanes(words + i, of_next_stream((Words)load_lanes((const float *)words + i, lanes)), lanes);
    });
}

inline uint32_t row_key(uint64_t key, uint64_t row) {
    return mixed(mixed((uint32_t)row ^ (uint32_t)key) ^ (uint32_t)(row >> 32) ^ (uint32_t)(key >> 32));
}

inline bool is_rounded(const Buffer &buffer) { return buffer.data && buffer.format != FLOAT32; }
// Or absent.
inline bool is_bfloat16(const Buffer &buffer) { return !buffer.data || buffer.format == BFLOAT16; }

// NaN with a lower half of 0: random bits that are added to that do not carry into its sign. Arithmetic hands it on as it is.
inline Vector with_plain_nan(Vector x) { return x == x ? x : splat(NAN); }

// Numbers whose upper halves are these rounded to bfloat16.
inline Words rounded_by(Vector numbers, Words bits) { return (Words)numbers + bits; }
inline Pairs rounded_by(const Pairs &numbers, Words random) {
    return {(Vector)rounded_by(numbers.of[0], random & 0xffff), (Vector)rounded_by(numbers.of[1], random >> 16)};
}

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
inline float to_float8(const float *row, int64_t size, const uint16_t *bits, uint8_t *numbers) {
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
        word = (word + ((uint32_t)bits[d] << 4) + 8 >> 20) - (120 << 3) - (is_subnormal & 8);
        numbers[d] = (uint8_t)(word | (sign >> 24 & 0x80));
    }
    return scale;
}

// Returns the scale; NaN, and codes as they were, for a row that is not finite.
template <bool SQUARES> inline float to_codes(float *row, int64_t size, const uint16_t *bits, uint8_t *codes) {
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
        const float number = row[d] * inverse + ((float)(bits[d] >> 1) + 0.5f) * 0x1p-15f;
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

// bits: 16 for each column. Overwrites row with its square roots for UINT8_SQUARE.
inline void encode(const Buffer &to, int64_t row_number, int64_t size, float *row, const uint16_t *bits) {
    uint8_t *codes = (uint8_t *)to.data + row_number * size;
    if (to.format == BFLOAT16) {
        by_lanes(size, [&](int64_t d, int64_t count) {
            const Words rounded = rounded_by(with_plain_nan(load_lanes(row + d, count)), zero_extended(load_lanes(bits + d, count)));
            store_lanes((bfloat16 *)to.data + row_number * size + d, upper_halves(rounded), count);
        });
    } else if (to.format == INT8) to.scale[row_number] = to_codes<false>(row, size, bits, codes);
    else if (to.format == FLOAT8) to.scale[row_number] = to_float8(row, size, bits, codes);
    else if (to.format == UINT8_SQUARE) to.scale[row_number] = to_codes<true>(row, size, bits, codes);
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

// A rule, and of SGD which of its sums there are.
enum Form { WITHOUT_MOMENTUM, MOMENTUM, NESTEROV, ADAM };

// The rule for some numbers of a row, g: their gradient.
template <int FORM> inline void apply(const Step &h, Vector g, Vector &w, Vector &m, Vector &v) {
    if constexpr (FORM == ADAM) {
        m = h.first_decay * m + h.first_rate * g;  // with β1 = 0 g to the bit
        v = h.second_decay * v + h.second_rate * g * g;
        const Vector kept = w - h.lr * h.weight_decay * w;
        w = kept - h.lr / h.first_correction * (m / (root(v) * (1 / h.second_correction) + h.eps));
    } else {
        g += h.weight_decay * w;
        if constexpr (FORM != WITHOUT_MOMENTUM) {
            m = h.first_decay * m + g;
            g = FORM == NESTEROV ? g + h.first_decay * m : m;
        }
        w -= h.lr * g;
    }
}

// To a row of floats and its state.
template <int FORM> inline void step_floats(const Step &h, float factor, const float *grad, float *w, float *m, float *v) {
    by_lanes(h.size, [&](int64_t d, int64_t count) {
        Vector row = load_lanes(w + d, count), first = {}, second = {};
        if (FORM != WITHOUT_MOMENTUM) first = load_lanes(m + d, count);
        if (FORM == ADAM) second = load_lanes(v + d, count);
        apply<FORM>(h, factor * load_lanes(grad + d, count), row, first, second);
        store(w + d, row, count);
        if (FORM != WITHOUT_MOMENTUM) store(m + d, first, count);
        if (FORM == ADAM) store(v + d, second, count);
    });
}

// To a row that is bfloat16 as its state is, in one pass: a vector of even columns and one of odd ones lie in the same words.
template <int FORM>
inline void step_bfloat16(const Step &h, float factor, const float *grad, bfloat16 *w, bfloat16 *m, bfloat16 *v, uint32_t key) {
    constexpr int64_t WIDTH = 2 * LANES;
    struct Columns {
        Pairs grad, row, first, second;
    };
    const auto read = [&](int64_t d, int64_t count) {
        Columns x = {load_pairs(grad + d, count), load_pairs(w + d, count)};
        if (FORM != WITHOUT_MOMENTUM) x.first = load_pairs(m + d, count);
        if (FORM == ADAM) x.second = load_pairs(v + d, count);
        return x;
    };
    const auto step = [&](Columns x, Words random, int64_t d, int64_t count) {
        // The gradient's NaN alone: those of the table and its state, being bfloat16, have lower halves of 0.
        for (int i = 0; i < 2; i++) apply<FORM>(h, factor * with_plain_nan(x.grad.of[i]), x.row.of[i], x.first.of[i], x.second.of[i]);
        const Words of_first = of_next_stream(random), of_second = of_next_stream(of_first);
        store_pairs(w + d, rounded_by(x.row, random), count);
        if (FORM != WITHOUT_MOMENTUM) store_pairs(m + d, rounded_by(x.first, of_first), count);
        if (FORM == ADAM) store_pairs(v + d, rounded_by(x.second, of_second), count);
    };
    // Of a row of one whole vector or more a rest goes as the last whole vector of pairs: columns before the rest come out twice, from
    // what was read before any was stored. Behind them an odd column goes alone.
    const bool is_long = h.size >= WIDTH;
    const int64_t columns = is_long ? h.size / 2 * 2 : h.size, rest = is_long ? columns % WIDTH : 0, last = columns - WIDTH;
    Columns of_last;
    if (rest > 0) of_last = read(last, WIDTH);
    FirstStream stream(key);
    by_lanes<WIDTH>(columns - rest, [&](int64_t d, int64_t count) { step(read(d, count), stream.next(), d, count); });
    if (rest > 0) step(of_last, FirstStream(key, last / 2).next(), last, WIDTH);
    if (columns < h.size) step(read(columns, 1), FirstStream(key, columns / 2).next(), columns, 1);
}

// See update_rows. IN_BFLOAT16: the table and its state, the commonest formats of a large one.
template <int FORM, bool IN_BFLOAT16>
void step_rows(const Step *step, const float *grad, int64_t stride, const int64_t *index, int64_t first, int64_t rows, int thread) {
    const Step h = *step;  // read through a pointer, its numbers would be read again after every store
    const int64_t size = h.size, pairs = (size + 1) / 2;
    float *room = h.scratch + thread * 4 * size;
    uint32_t *words = (uint32_t *)(room + 3 * size);
    const uint16_t *bits = (const uint16_t *)words;
    const Buffer &table = h.table, &first_state = h.states[0], &second_state = h.states[1];
    const bool is_any_rounded = is_rounded(table) || is_rounded(first_state) || is_rounded(second_state);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t row = index ? index[first + i] : first + i;
        const uint32_t key = row_key(h.key, row + h.first_of_shard);
        const float *of_row = grad + i * stride;
        const float factor = signed_factor(h, size, of_row);
        if constexpr (IN_BFLOAT16) {
            const auto row_of = [&](const Buffer &buffer) { return buffer.data ? (bfloat16 *)buffer.data + row * size : nullptr; };
            step_bfloat16<FORM>(h, factor, of_row, row_of(table), row_of(first_state), row_of(second_state), key);
        } else {
            float *w = decode(table, row, size, room), *m = nullptr, *v = nullptr;
            if (FORM != WITHOUT_MOMENTUM) m = decode(first_state, row, size, room + size);
            if (FORM == ADAM) v = decode(second_state, row, size, room + 2 * size);
            step_floats<FORM>(h, factor, of_row, w, m, v);
            if (!is_any_rounded) continue;
            first_words(key, pairs, words);
            encode(table, row, size, w, bits);
            if (!m) continue;
            next_words(pairs, words);
            encode(first_state, row, size, m, bits);
            if (!v) continue;
            next_words(pairs, words);
            encode(second_state, row, size, v, bits);
        }
    }
}

inline int form_of(const Step &h) {
    if (h.rule == ADAMW) return ADAM;
    return !h.states[0].data ? WITHOUT_MOMENTUM : h.nesterov != 0 ? NESTEROV : MOMENTUM;
}

}  // namespace

void JOIN(update_rows, INSTRUCTION_SET)(const Step *step, const float *grad, int64_t stride, const int64_t *index, int64_t first,
                                        int64_t rows, int thread) {
    constexpr decltype(&step_rows<ADAM, true>) FORMS[][2] = {
        {step_rows<WITHOUT_MOMENTUM, false>, step_rows<WITHOUT_MOMENTUM, true>},
        {step_rows<MOMENTUM, false>, step_rows<MOMENTUM, true>},
        {step_rows<NESTEROV, false>, step_rows<NESTEROV, true>},
        {step_rows<ADAM, false>, step_rows<ADAM, true>},
    };
    const bool in_bfloat16 = is_bfloat16(step->table) && is_bfloat16(step->states[0]) && is_bfloat16(step->states[1]);
    FORMS[form_of(*step)][in_bfloat16](step, grad, stride, index, first, rows, thread);
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
