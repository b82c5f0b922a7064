// The slab loop's four steps on a CPU, for bfloat16 and float32. Compiled once for each instruction set; plain C boundary.
//
//     normalize           w̃ = w / ‖w‖, or w as it is
//     exponentials        Eᵀ = 2^{k w̃ xᵀ - shift}, E[n, y_n] = 0: the epilogue of the matmul, cosines live in registers only
//     maxima              each row's largest exponent, and with several centres to a class all exponents
//     accumulate          U += E w̃, in float64
//     table_gradient      dw = (dw̃ - ŵ (ŵ·dw̃)) / ‖w‖, or dw̃ as it is, + the target's share; dw̃ = Eᵀ a x: the epilogue of that matmul;
//                         stored, or used up by an optimiser's step (update.cpp) while it is in the cache
//
// Matrix products are sums over words of 32 bits (two bfloat16, or one float32: vector.h's Operand says which). One operand is read a
// word at a time and spread over a vector's lanes; the other lies in panels of PANEL columns, one word of each next to each other:
//
//     cosines (class, n)  words along D:  w̃ as it is,   x in row panels, packed once a call
//     dw̃ (class, d)       words along N:  Eᵀ as it is,  a x in column panels, packed once a call
//     U (n, d)            words along C:  both in column panels, packed slab by slab
//
// So E is stored transposed, (classes, N). Every result has one owner and one order of summation: the same bits whatever the number
// of threads.

#include <math.h>
#include <omp.h>

#include "update.h"
#include "vector.h"

namespace {

constexpr int TILE = LANES == 16 ? 8 : 6;  // rows of a register tile: its sums, and what is multiplied, fill the registers
constexpr int VECTORS = 2;                 // vectors in each of its rows
constexpr int PANEL = VECTORS * LANES;
constexpr int WIDEST_PANEL = 32;           // of any instruction set: callers leave room for it
constexpr int64_t SUM_WORDS = 128;         // products added one after another in float32
// Of a panel, read by one tile after another: where the first-level cache has to keep it, because a tile takes as long as its
// operands take to come from the second level.
constexpr int64_t PIECE_WORDS = LANES == 16 ? INT64_MAX / 2 : SUM_WORDS;
constexpr int64_t SUM_CLASSES = 72;        // exponentials added in float32 before their sum leaves the kernel
constexpr int64_t CACHED_CLASSES = 48;     // class rows that a thread makes at a time, to be read again while in its cache
constexpr int64_t SUM_ROWS = 48;           // rows of U that a thread makes at a time
constexpr int32_t NO_TARGET = INT32_MAX;   // no class of a slab is within `centers` of it
constexpr double TINY_NORM = 1e-12;        // normalize.py: a shorter row has no direction

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Accumulator {
    Vector at[TILE][VECTORS];
};

// sum[i] += word · panel, for the word of each row.
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

// Σ_k row[i][k·step] · panel[k][:] over `count` numbers, for as many rows as `tiles` have; a last odd bfloat16 is paired with 0.
// Summed in blocks, because a long float32 sum loses digits with every term. begin(t, first) is called as tile t begins with the words
// from first on.
template <class Number, class Begin>
inline void multiply(Accumulator *sums, int64_t tiles, const Number *const *row, int64_t step, const uint32_t *panel, int64_t count,
                     Begin begin) {
    const int64_t words = count / PER_WORD<Number>;
    for (int64_t t = 0; t < tiles; t++) sums[t] = {};
    for (int64_t first = 0; first < words; first += PIECE_WORDS) {
        for (int64_t t = 0; t < tiles; t++) {
            begin(t, first);
            const int64_t last = smaller(first + PIECE_WORDS, words);
            for (int64_t k = first; k < last; k += SUM_WORDS)
                add_tile(sums[t], row + t * TILE, step, panel, k, smaller(k + SUM_WORDS, last));
        }
    }
    if (count % PER_WORD<Number>)
        for (int64_t t = 0; t < tiles; t++) add_words<Number, uint16_t>(sums[t], row + t * TILE, words * step, panel + words * PANEL);
}

// Word `k` of row n, zero past the edges.
template <class Number>
inline uint32_t row_word(const Number *rows, int64_t num_rows, int64_t size, int64_t n, int64_t k) {
    uint32_t word = 0;
    const int64_t first = k * PER_WORD<Number>;
    if (n < num_rows) memcpy(&word, rows + n * size + first, sizeof(Number) * smaller(PER_WORD<Number>, size - first));
    return IS_WIDENED<Number> ? word << 16 : word;
}

template <class Number>
void row_panels(const Number *rows, int64_t num_rows, int64_t size, uint32_t *panels, int threads) {
    const int64_t words = ceil_div(size, PER_WORD<Number>);
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < ceil_div(num_rows, PANEL); p++)
        for (int64_t k = 0; k < words; k++)
            for (int i = 0; i < PANEL; i++)
                panels[(p * words + k) * PANEL + i] = row_word(rows, num_rows, size, p * PANEL + i, k);
}

// The word that pairs an element with the one in the next row, or with 0 where there is none, or has it alone.
inline uint32_t word(const float *here, const float *) { return load<uint32_t>(here); }
inline uint32_t word(const bfloat16 *here, const bfloat16 *next) {
    return IS_WIDENED<bfloat16> ? (uint32_t)here->bits << 16 : here->bits | (next ? (uint32_t)next->bits << 16 : 0);
}
inline Words words(const float *here, const float *) { return load<Words>(here); }
inline Words words(const bfloat16 *here, const bfloat16 *next) {
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
                const Words packed = words(here + i, next ? next + i : nullptr);
                memcpy(panel + i, &packed, sizeof packed);
            }
        } else {
            for (int64_t i = 0; i < PANEL; i++) panel[i] = i < width ? word(here + i, next ? next + i : nullptr) : 0;
        }
    }
}

template <class Number>
void column_panels(const Number *rows, int64_t num_rows, int64_t size, uint32_t *panels, int threads) {
    const int64_t words = ceil_div(num_rows, PER_WORD<Number>);
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < ceil_div(size, PANEL); p++)
        column_panel(rows, num_rows, size, size, p, panels + p * words * PANEL);
}

// A factor of any magnitude that a row of any magnitude can be multiplied with in float32: first by a power of two, which is
// exact, then by what remains.
struct Factor {
    float power = 0, rest = 0;

    Factor() = default;
    explicit Factor(double value) {
        if (value == 0) return;
        const int64_t exponent = (int64_t)(load<uint64_t>(&value) >> 52 & 0x7ff) - 1023;
        // Both halves of what lies further out are 0 or infinite in float32 anyway.
        const int64_t half = exponent / 2 < -126 ? -126 : exponent / 2 > 126 ? 126 : exponent / 2;
        const uint32_t bits = (uint32_t)(half + 127) << 23;
        power = load<float>(&bits);
        rest = (float)(value / power);
    }
    Vector operator*(Vector x) const { return x * power * rest; }
    float operator*(float x) const { return x * power * rest; }
};

// 1 / ‖row‖, 0 for a row without direction, NaN for an infinite one. In double: the square of 1e20 is no float.
inline double inverse_norm(const float *row, int64_t size) {
    Doubles sums[2] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
        for (int half = 0; half < 2; half++) {
            const Doubles part = widen(row + d + half * LANES / 2);
            sums[half] += part * part;
        }
    }
    double sum = 0;
    for (; d < size; d++) sum += (double)row[d] * row[d];
    for (int i = 0; i < LANES / 2; i++) sum += sums[0][i] + sums[1][i];
    const double norm = sqrt(sum);
    return norm < TINY_NORM ? 0.0 : isinf(norm) ? NAN : 1.0 / norm;
}

// Numbers of scratch that each thread has. Its parts: dw̃, rows of the table and of E as floats.
inline int64_t scratch_of_gradient(int64_t size) { return CACHED_CLASSES * ceil_div(size, PANEL) * PANEL; }
inline int64_t scratch_of_rows(int64_t size) { return CACHED_CLASSES * ceil_div(size, LANES) * LANES; }
inline int64_t scratch_numbers(int64_t num_rows, int64_t size) {
    return scratch_of_gradient(size) + scratch_of_rows(size) + scratch_of_rows(num_rows);
}

// Rows first .. last of a table as floats: where they lie if it has them, else in room.
inline const float *table_rows(const void *table, bool is_bfloat16, int64_t size, int64_t first, int64_t last, float *room) {
    if (!is_bfloat16) return (const float *)table + first * size;
    widen_row((const bfloat16 *)table + first * size, (last - first) * size, room);
    return room;
}

// Numbers in a row one after another as operands: as they lie, or widened into room.
inline const float *operands(const float *numbers, int64_t, float *) { return numbers; }
inline const Operand<bfloat16> *operands(const bfloat16 *numbers, int64_t count, float *room) {
    if (!IS_WIDENED<bfloat16>) return (const Operand<bfloat16> *)numbers;
    widen_row(numbers, count, room);
    return (const Operand<bfloat16> *)room;
}

template <class Number>
void normalize(const void *table, bool is_bfloat16, int64_t classes, int64_t size, bool normalized, float *scratch, int64_t scratch_size,
               Operand<Number> *unit, uint32_t *panels, int threads) {
    const int64_t words = ceil_div(classes, PER_WORD<Number>) * PANEL;
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < classes; first += CACHED_CLASSES) {
        const int64_t last = smaller(first + CACHED_CLASSES, classes);
        const float *weight = table_rows(table, is_bfloat16, size, first, last, scratch + omp_get_thread_num() * scratch_size);
        // All norms first: a root and a division that the next row need not wait for.
        Factor factors[CACHED_CLASSES];
        for (int64_t j = 0; j < last - first; j++) factors[j] = Factor(normalized ? inverse_norm(weight + j * size, size) : 1.0);
        for (int64_t j = 0; j < last - first; j++) {
            const Factor factor = factors[j];
            Operand<Number> *row = unit + (first + j) * size;
            by_lanes(size, [&](int64_t d, int64_t count) {
                store_operands<Number>(row + d, factor * load_lanes(weight + j * size + d, count), count);
            });
        }
        for (int64_t q = 0; panels && q < ceil_div(size, PANEL); q++)
            column_panel(unit + first * size, last - first, size, size, q, panels + q * words + first / PER_WORD<Number> * PANEL);
    }
}

// Rows first .. of a matrix (count, stride), a multiple of TILE; past its end the last one, whose products are dropped.
template <class Number>
inline int64_t tile_rows(const Number **row, const Number *matrix, int64_t stride, int64_t first, int64_t last, int64_t count) {
    const int64_t tiles = ceil_div(last - first, TILE);
    for (int64_t i = 0; i < tiles * TILE; i++) row[i] = matrix + smaller(first + i, count - 1) * stride;
    return tiles;
}

template <class Number, bool MAXIMUM>
void exponentials(const uint32_t *x_panels, int64_t num_rows, const Operand<Number> *unit, int64_t classes, int64_t size,
                  const int64_t *targets, int64_t centers, int64_t first_class, const float *shifts, float log2_scale, Number *e,
                  uint32_t *e_panels, float *exponents, float *partial, int threads) {
    const int64_t panel_words = ceil_div(size, PER_WORD<Number>) * PANEL, e_words = ceil_div(classes, PER_WORD<Number>) * PANEL;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < classes; first += SUM_CLASSES) {
        for (int64_t p = 0; p < ceil_div(num_rows, PANEL); p++) {
            const int64_t last = smaller(first + SUM_CLASSES, classes);
            const Operand<Number> *row[SUM_CLASSES];
            Accumulator cosines[SUM_CLASSES / TILE];
            const int64_t tiles = tile_rows(row, unit, size, first, last, classes);
            multiply(cosines, tiles, row, PER_WORD<Number>, x_panels + p * panel_words, size, [](int64_t, int64_t) {});
            Vector shift[VECTORS], sum[VECTORS];
            Integers target[VECTORS];
            for (int v = 0; v < VECTORS; v++) {
                sum[v] = MAXIMUM ? splat(-INFINITY) : Vector{};
                for (int i = 0; i < LANES; i++) {
                    const int64_t n = smaller(p * PANEL + v * LANES + i, num_rows - 1), column = targets[n] - first_class;
                    target[v][i] = column >= 0 && column < classes ? (int32_t)column : NO_TARGET;
                    shift[v][i] = MAXIMUM ? 0.0f : shifts[n];
                }
            }
            for (int64_t j = first; j < last; j += PER_WORD<Number>) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const int64_t n = p * PANEL + v * LANES;
                    Vector ones[PER_WORD<Number>] = {};  // of the classes that share a word
#pragma GCC unroll 2
                    for (int i = 0; i < PER_WORD<Number>; i++) {
                        if (j + i == classes) break;
                        const int64_t place = j + i - first;
                        // Rounded before the shift is subtracted, as it was when a row's largest became the shift.
                        const Vector exponent = rounded(cosines[place / TILE].at[place % TILE][v] * log2_scale);
                        if (MAXIMUM) {
                            const auto is_target = (Words)((int32_t)(j + i) - target[v]) < (uint32_t)centers;
                            const Vector other = is_target ? splat(-INFINITY) : exponent;
                            sum[v] = other > sum[v] ? other : sum[v];
                            if (exponents && n < num_rows) store(exponents + (j + i) * num_rows + n, other, num_rows - n);
                            continue;
                        }
                        ones[i] = target[v] == (int32_t)(j + i) ? Vector{} : exp2(exponent - shift[v]);
                        sum[v] += ones[i];
                        if (e && n < num_rows) store(e + (j + i) * num_rows + n, ones[i], num_rows - n);
                    }
                    if (e_panels) put_words<Number>(e_panels + p * e_words + j / PER_WORD<Number> * PANEL + v * LANES, ones);
                }
            }
            for (int v = 0; v < VECTORS; v++) {
                const int64_t n = p * PANEL + v * LANES;
                if (n < num_rows) store(partial + first / SUM_CLASSES * num_rows + n, sum[v], num_rows - n);
            }
        }
    }
}

// One of `parts` of some memory, into the second-level cache: the first is a product's.
inline void prefetch(const void *row, int64_t bytes, int64_t part, int64_t parts) {
    for (int64_t i = bytes * part / parts; i < bytes * (part + 1) / parts; i += 64) __builtin_prefetch((const char *)row + i, 0, 2);
}

// Both operands in column panels of a slab; pull (N, D rounded up to WIDEST_PANEL).
template <class Number>
void accumulate(const uint32_t *e_panels, const uint32_t *unit_panels, int64_t classes, int64_t num_rows, int64_t size,
                double *pull, int threads) {
    const int64_t words = ceil_div(classes, PER_WORD<Number>) * PANEL, width = ceil_div(size, WIDEST_PANEL) * WIDEST_PANEL;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < num_rows; first += SUM_ROWS) {
        for (int64_t q = 0; q < ceil_div(size, PANEL); q++) {
            const int64_t last = smaller(first + SUM_ROWS, num_rows), tiles = ceil_div(last - first, TILE);
            const Operand<Number> *row[SUM_ROWS];
            for (int64_t i = 0; i < tiles * TILE; i++) {
                const int64_t n = smaller(first + i, num_rows - 1);
                row[i] = (const Operand<Number> *)(e_panels + n / PANEL * words + n % PANEL);
            }
            for (int64_t n = first; n < last; n++)
                for (int i = 0; i < PANEL; i += 8) __builtin_prefetch(pull + n * width + q * PANEL + i, 1);
            Accumulator sums[SUM_ROWS / TILE];
            // An odd class is paired with zeros.
            const int64_t padded = words / PANEL * PER_WORD<Number>;
            const uint32_t *panel = unit_panels + q * words;
            multiply(sums, tiles, row, PANEL * PER_WORD<Number>, panel, padded, [&](int64_t tile, int64_t piece) {
                // The next piece: of a slab, and on its way from the third level.
                const int64_t next = smaller(PIECE_WORDS, words / PANEL - piece - PIECE_WORDS);
                if (next > 0) prefetch(panel + (piece + PIECE_WORDS) * PANEL, next * PANEL * sizeof(uint32_t), tile, tiles);
            });
            for (int64_t n = first; n < last; n++) {
                const float *from = (const float *)sums + (n - first) * PANEL;
                double *to = pull + n * width + q * PANEL;
                for (int i = 0; i < PANEL; i += LANES / 2) {
                    const Doubles total = load<Doubles>(to + i) + widen(from + i);
                    memcpy(to + i, &total, sizeof total);
                }
            }
        }
    }
}

// ŵ·dw̃ of one class.
inline float component(const float *row, const float *unit_grad, int64_t size, Factor normalize) {
    Vector sums = {};
    by_lanes(size, [&](int64_t d, int64_t count) {
        sums += normalize * load_lanes(row + d, count) * load_lanes(unit_grad + d, count);
    });
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

// dw of one class from dw̃ and, where it is normalised, along = ŵ·dw̃; share: what its targets add, or null.
inline void project(const float *row, const float *unit_grad, int64_t size, bool normalized, double inverse, float along,
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

// The first of `count` ascending classes that is not below `wanted`.
inline int64_t lower_bound(const int64_t *classes, int64_t count, int64_t wanted) {
    int64_t low = 0;
    while (low < count) {
        const int64_t middle = (low + count) / 2;
        if (classes[middle] < wanted) low = middle + 1;
        else count = middle;
    }
    return low;
}

constexpr int BYTES[] = {4, 2, 1, 1};  // of a number in each of update.cpp's formats

template <class Number>
void table_gradient(const Number *e, int64_t num_rows, const uint32_t *x_panels, const void *table, bool is_bfloat16, int64_t classes,
                    int64_t size, bool normalized, double unscale, int64_t first_class, int64_t num_targets,
                    const int64_t *target_classes, const float *target_sums, float *scratch, int64_t scratch_size, void *grad,
                    bool grad_is_bfloat16, const Step *step, int threads) {
    const int64_t words = ceil_div(num_rows, PER_WORD<Number>) * PANEL, width = ceil_div(size, PANEL) * PANEL;
    const int64_t row_bytes = size * (is_bfloat16 ? sizeof(bfloat16) : sizeof(float));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < classes; first += CACHED_CLASSES) {
        const int64_t last = smaller(first + CACHED_CLASSES, classes), count = last - first;
        float *unit_grad = scratch + omp_get_thread_num() * scratch_size, *room = unit_grad + scratch_of_gradient(size);
        float *widened_e = room + scratch_of_rows(size);
        const Operand<Number> *row[CACHED_CLASSES];
        const int64_t tiles = tile_rows(row, operands(e + first * num_rows, count * num_rows, widened_e), num_rows, 0, count, count);
        for (int64_t q = 0; q < width / PANEL; q++) {
            Accumulator sums[CACHED_CLASSES / TILE];
            multiply(sums, tiles, row, PER_WORD<Number>, x_panels + q * words, num_rows, [&](int64_t tile, int64_t piece) {
                if (piece) return;
                // What the rest of the block will read; where N is small, nothing else of it is on its way from memory.
                for (int64_t j = first + tile * TILE; j < smaller(first + (tile + 1) * TILE, last); j++) {
                    prefetch((const char *)table + j * row_bytes, row_bytes, q, width / PANEL);
                    for (int k = 0; step && k < Step::STATES; k++)
                        if (step->states[k].data) {
                            const int64_t bytes = size * BYTES[step->states[k].format];
                            prefetch((const char *)step->states[k].data + (first_class + j) * bytes, bytes, q, width / PANEL);
                        }
                }
            });
            for (int64_t i = 0; i < count; i++)
                memcpy(unit_grad + i * width + q * PANEL, sums[i / TILE].at[i % TILE], PANEL * sizeof(float));
        }
        const float *weight = table_rows(table, is_bfloat16, size, first, last, room);
        // Norms and components are long chains: those of all rows first, so that no row waits for the one before.
        double inverse[CACHED_CLASSES];
        float along[CACHED_CLASSES] = {};
        for (int64_t i = 0; i < count; i++) inverse[i] = normalized ? inverse_norm(weight + i * size, size) : 1.0;
        for (int64_t i = 0; normalized && i < count; i++)
            along[i] = component(weight + i * size, unit_grad + i * width, size, Factor(inverse[i]));
        // Where the gradient is not kept, or not as floats, its rows take the place of dw̃'s.
        const bool in_place = step || grad_is_bfloat16;
        float *out = in_place ? unit_grad : (float *)grad + first * size;
        const int64_t stride = in_place ? width : size;
        int64_t slot = lower_bound(target_classes, num_targets, first_class + first);
        for (int64_t i = 0; i < count; i++) {
            const int64_t j = first_class + first + i;
            while (slot < num_targets && target_classes[slot] < j) slot++;
            const bool held = slot < num_targets && target_classes[slot] == j;
            project(weight + i * size, unit_grad + i * width, size, normalized, inverse[i], along[i], unscale,
                    held ? target_sums + slot * size : nullptr, out + i * stride);
            if (grad_is_bfloat16 && !step) round_row(out + i * stride, size, (bfloat16 *)grad + (first + i) * size);
        }
        if (step)
            JOIN(update_rows, INSTRUCTION_SET)(step, out, stride, nullptr, first_class + first, count, omp_get_thread_num());
    }
}

}  // namespace

// What callers are written for: cpu_library.py refuses a library of another number. Changes with any signature or layout.
EXPORT(int, interface)() { return 6; }

// How much room callers leave: cpu_library.py reads these.
EXPORT(int, widest_panel)() { return WIDEST_PANEL; }
EXPORT(int, sum_classes)() { return SUM_CLASSES; }
// Numbers of one dtype in a word of panels; scratch of a thread, in floats.
EXPORT(int, per_word_float)() { return PER_WORD<float>; }
EXPORT(int, per_word_bfloat16)() { return PER_WORD<bfloat16>; }
EXPORT(int64_t, scratch_numbers)(int64_t num_rows, int64_t size) { return scratch_numbers(num_rows, size); }

// Whether this processor can run what this file was compiled to.
EXPORT(int, supported)() {
#if defined(__AVX512F__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(__AVX512BF16__)
    return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__AVX512F__)
    return avx512;
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 1;
#endif
}

#define EXPORT_ALL(Number)                                                                                                         \
    EXPORT(void, row_panels_##Number)(const Number *rows, int64_t num_rows, int64_t size, uint32_t *panels, int threads) {         \
        row_panels(rows, num_rows, size, panels, threads);                                                                         \
    }                                                                                                                              \
    EXPORT(void, column_panels_##Number)(const Number *rows, int64_t num_rows, int64_t size, uint32_t *panels, int threads) {      \
        column_panels(rows, num_rows, size, panels, threads);                                                                      \
    }                                                                                                                              \
    EXPORT(void, normalize_##Number)(const void *table, bool is_bfloat16, int64_t classes, int64_t size, bool normalized,          \
                                     float *scratch, int64_t scratch_size, Operand<Number> *unit, uint32_t *panels, int threads) { \
        normalize<Number>(table, is_bfloat16, classes, size, normalized, scratch, scratch_size, unit, panels, threads);            \
    }                                                                                                                              \
    EXPORT(void, exponentials_##Number)(const uint32_t *x_panels, int64_t num_rows, const Operand<Number> *unit, int64_t classes,  \
                                        int64_t size, const int64_t *targets, int64_t first_class, const float *shifts,            \
                                        float log2_scale, Number *e, uint32_t *e_panels, float *partial, int threads) {            \
        exponentials<Number, false>(x_panels, num_rows, unit, classes, size, targets, 1, first_class, shifts, log2_scale, e, e_panels,\
                                    nullptr, partial, threads);                                                                    \
    }                                                                                                                              \
    EXPORT(void, maxima_##Number)(const uint32_t *x_panels, int64_t num_rows, const Operand<Number> *unit, int64_t classes,        \
                                  int64_t size, const int64_t *targets, int64_t centers, int64_t first_class, float log2_scale, float *exponents,\
                                  float *partial, int threads) {                                                                   \
        exponentials<Number, true>(x_panels, num_rows, unit, classes, size, targets, centers, first_class, nullptr, log2_scale,    \
                                   nullptr, nullptr, exponents, partial, threads);                                                 \
    }                                                                                                                              \
    EXPORT(void, accumulate_##Number)(const uint32_t *e_panels, const uint32_t *unit_panels, int64_t classes, int64_t num_rows,    \
                               int64_t size, double *pull, int threads) {                                                          \
        accumulate<Number>(e_panels, unit_panels, classes, num_rows, size, pull, threads);                                         \
    }                                                                                                                              \
    EXPORT(void, table_gradient_##Number)(const Number *e, int64_t num_rows, const uint32_t *x_panels, const void *table,          \
                                          bool is_bfloat16, int64_t classes, int64_t size, bool normalized, double unscale,        \
                                          int64_t first_class, int64_t num_targets, const int64_t *target_classes,                 \
                                          const float *target_sums, float *scratch, int64_t scratch_size, void *grad,              \
                                          bool grad_is_bfloat16, const Step *step, int threads) {                                  \
        table_gradient<Number>(e, num_rows, x_panels, table, is_bfloat16, classes, size, normalized, unscale, first_class,         \
                               num_targets, target_classes, target_sums, scratch, scratch_size, grad, grad_is_bfloat16, step, threads);\
    }

EXPORT_ALL(bfloat16)
EXPORT_ALL(float)

// The two elementary functions, for tests.
EXPORT(void, exp2)(const float *x, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, exp2(load_lanes(x + i, count - i)), count - i);
}
EXPORT(void, to_bfloat16)(const float *x, int64_t count, bfloat16 *out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, load_lanes(x + i, count - i), count - i);
}
