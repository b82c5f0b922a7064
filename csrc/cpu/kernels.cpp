// The slab loop's four steps on a CPU, for bfloat16 and float32. Compiled once for each instruction set; plain C boundary.
//
//     normalize           w̃ = w / ‖w‖, or w as it is
//     exponentials        Eᵀ = 2^{k w̃ xᵀ - shift}, E[n, y_n] = 0: the epilogue of the matmul, cosines live in registers only
//     maxima              each row's largest exponent, and with several centres to a class all exponents
//                         both also each row's largest product and its class, in a form of their own, where these are asked for;
//                         and with hard negatives of p0 + p1 c + p2 c² where a product c passes τ; E times its slope is stored
//     accumulate          U += E w̃, in float64
//     table_gradient      dw = (dw̃ - ŵ (ŵ·dw̃)) / ‖w‖, or dw̃ as it is, + the target's share; dw̃ = Eᵀ a x: the epilogue of that matmul;
//                         stored, or applied by an optimiser's step (update.cpp) while it is in the cache
//     forward, backward   the loop over all slabs, of loop.h
//
// The three products are of product.h, and read
//
//     cosines (class, n)  words along D:  w̃ as it is,   x in row panels, packed once a call
//     dw̃ (class, d)       words along N:  Eᵀ as it is,  a x in column panels, packed once a call
//     U (n, d)            words along C:  both in column panels, packed slab by slab
//
// So E is stored transposed, (classes, N). Every result has one owner and one order of summation: the same bits whatever the number
// of threads. Threads have copies of a kernel's arguments (firstprivate): read through a pointer, each would be read again after
// every store.

#include <math.h>
#include <omp.h>
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "product.h"
#include "rows.h"
#include "tiles_check.h"

namespace {

// Multiples of TILE, and of GROUP where there are tiles.
constexpr bool IN_GROUPS = HAS_TILES<bfloat16>;
constexpr int64_t SUM_CLASSES = IN_GROUPS ? 64 : 72;     // exponentials added in float32 before their sum leaves the kernel
constexpr int64_t CACHED_CLASSES = IN_GROUPS ? 64 : 48;  // class rows that a thread computes at a time, to read them again from its cache
constexpr int64_t SUM_ROWS = IN_GROUPS ? 64 : 48;        // rows of U that a thread computes at a time
constexpr int32_t NO_TARGET = INT32_MAX;                 // so far from every class that `class - target < centers` is false

template <class Number> void row_panels(const RowPanels<Number> &in, int threads) {
    const Number *rows = in.rows;
    uint32_t *panels = in.panels;
    const int64_t num_rows = in.num_rows, size = in.size, words = ceil_div(size, PER_WORD<Number>);
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < ceil_div(num_rows, PANEL); p++)
        for (int64_t k = 0; k < words; k++)
            for (int i = 0; i < PANEL; i++)
                panels[(p * words + k) * PANEL + i] = row_word(rows, num_rows, size, p * PANEL + i, k);
}

template <class Number> void column_panels(const ColumnPanels<Number> &given, int threads) {
    const ColumnPanels<Number> in = given;
    const int64_t words = ceil_div(in.num_rows, PER_WORD<Number>);
#pragma omp parallel for num_threads(threads) firstprivate(in)
    for (int64_t p = 0; p < ceil_div(in.size, PANEL); p++)
        column_panel(in.rows, in.num_rows, in.size, in.size, p, in.panels + p * words * PANEL);
}

// Floats of scratch for each thread: dw̃, rows of E.
inline int64_t scratch_of_gradient(int64_t size) { return CACHED_CLASSES * ceil_div(size, PANEL) * PANEL; }
inline int64_t scratch_numbers(int64_t num_rows, int64_t size) {
    return scratch_of_gradient(size) + CACHED_CLASSES * ceil_div(num_rows, LANES) * LANES;
}

template <class Number> void normalize(const Normalize<Number> &given, int threads) {
    const Normalize<Number> in = given;
    const int64_t words = ceil_div(in.classes, PER_WORD<Number>) * PANEL, size = in.size;
#pragma omp parallel for num_threads(threads) firstprivate(in)
    for (int64_t first = 0; first < in.classes; first += CACHED_CLASSES) {
        const int64_t last = smaller(first + CACHED_CLASSES, in.classes);
        with_rows(in.table, in.is_bfloat16, first * size, [&](const auto *weight) {
            // All norms first, so that no row waits for the root and division of the row before.
            Factor factors[CACHED_CLASSES];
            for (int64_t j = 0; j < last - first; j++) factors[j] = Factor(in.normalized ? inverse_norm(weight + j * size, size) : 1.0);
            for (int64_t word = first; word < last; word += PER_WORD<Number>) {
                const int64_t classes = smaller(PER_WORD<Number>, last - word);
                Operand<Number> *rows = in.unit + word * size;
                for (int64_t j = 0; j < classes; j++) {
                    const Factor factor = factors[word - first + j];
                    const auto *row = weight + (word - first + j) * size;
                    by_lanes(size, [&](int64_t d, int64_t count) {
                        store(rows + j * size + d, as_operand<Number>(factor * load_lanes(row + d, count)), count);
                    });
                }
                // At once, while they are in the first-level cache: rows lie so that few of them fit into it.
                for (int64_t q = 0; in.panels && q < ceil_div(size, PANEL); q++)
                    column_panel(rows, classes, size, size, q, in.panels + q * words + word / PER_WORD<Number> * PANEL);
            }
        });
    }
}

// read(n) for the rows of a panel, one in each lane; past num_rows, the last row again.
template <class Lanes, class Read> inline void fill(Lanes *lanes, int64_t first_row, int64_t num_rows, Read read) {
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < LANES; i++) lanes[v][i] = read(smaller(first_row + v * LANES + i, num_rows - 1));
}

// The exponents of some classes with the rows of a panel, and those rows' targets.
template <class Number> struct ExponentTile {
    int64_t first, last;  // classes of the slab
    int64_t row;          // the panel's first
    float log2_scale;
    Integers target[VECTORS];
    Accumulator cosines[SUM_CLASSES / TILE];

    Vector product(int64_t j, int v) const { return cosines[(j - first) / TILE].at[(j - first) % TILE][v]; }
    // Round before subtracting the shift: the row maxima that became shifts were rounded products too.
    Vector exponent(Vector product) const { return rounded(product * log2_scale); }
};

// Hard negatives of the rows of a tile; none if not GIVEN.
template <bool GIVEN> struct Hard {
    Vector threshold[VECTORS], p0[VECTORS], p1[VECTORS], p2[VECTORS];

    Hard(const float *hard, int64_t row, int64_t num_rows) {
        if (!GIVEN) return;
        Vector *columns[] = {threshold, p0, p1, p2};
        for (int i = 0; i < 4; i++) fill(columns[i], row, num_rows, [&](int64_t n) { return hard[i * num_rows + n]; });
    }
    Vector value(int v, Vector c) const { return GIVEN ? c > threshold[v] ? p0[v] + c * (p1[v] + c * p2[v]) : c : c; }
    // e times the slope of value.
    Vector times_slope(int v, Vector c, Vector e) const {
        return GIVEN ? c > threshold[v] ? e * (p1[v] + 2.0f * c * p2[v]) : e : e;
    }
};

// The largest product of each row of a tile, and its class, the first of equal ones; nothing if none is WANTED.
template <bool WANTED> struct Largest {
    Vector value[VECTORS];
    Integers place[VECTORS] = {};

    Largest() {
        for (Vector &lanes : value) lanes = splat(-INFINITY);
    }
    // left_out: lanes of -1 where class j is a row's target.
    template <class Lanes> void see(int64_t j, int v, Vector product, Lanes left_out) {
        if (!WANTED) return;
        const Integers larger = (product > value[v]) & ~(Integers)left_out;
        value[v] = larger ? product : value[v];
        place[v] = larger ? Integers{} + (int32_t)j : place[v];
    }
};

// Calls epilogue(tile) for every tile of a slab, in any order and on any thread.
template <class Number, class Epilogue>
inline void exponent_tiles(const Exponents<Number> &given, int threads, Epilogue epilogue) {
    const Exponents<Number> in = given;
    const int64_t panel_words = ceil_div(in.size, PER_WORD<Number>) * PANEL;
#pragma omp parallel num_threads(threads) firstprivate(in, epilogue)
    {
        const TileRegisters<Number> registers;
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t first = 0; first < in.classes; first += SUM_CLASSES) {
            for (int64_t p = 0; p < ceil_div(in.num_rows, PANEL); p++) {
                ExponentTile<Number> tile;
                tile.first = first;
                tile.last = smaller(first + SUM_CLASSES, in.classes);
                tile.row = p * PANEL;
                tile.log2_scale = in.log2_scale;
                const Rows<Operand<Number>, SUM_CLASSES> unit(in.unit + first * in.size, tile.last - first, in.size);
                multiply(tile.cosines, unit, in.x_panels + p * panel_words, in.size, [](int64_t, int64_t) {});
                fill(tile.target, tile.row, in.num_rows, [&](int64_t n) {
                    const int64_t column = in.targets[n] - in.first_class;
                    return column >= 0 && column < in.classes ? (int32_t)column : NO_TARGET;
                });
                epilogue(tile);
            }
        }
    }
}

// Stores a tile's number for each row into piece first / SUM_CLASSES of partial (pieces, N).
template <class Number, class To, class Lanes>
inline void store_partial(To *partial, const ExponentTile<Number> &tile, int64_t num_rows, const Lanes *numbers) {
    for (int v = 0; v < VECTORS; v++) {
        const int64_t n = tile.row + v * LANES;
        if (n < num_rows) store_lanes(partial + tile.first / SUM_CLASSES * num_rows + n, numbers[v], num_rows - n);
    }
}

template <class Number, class Out, bool WANTED>
inline void store_largest(const Out &out, const ExponentTile<Number> &tile, const Largest<WANTED> &largest) {
    if (!WANTED) return;
    store_partial(out.values, tile, out.of.num_rows, largest.value);
    store_partial(out.places, tile, out.of.num_rows, largest.place);
}

template <class Number, bool LARGEST, bool HARD> void exponentials_and(const Exponentials<Number> &out, int threads) {
    const int64_t num_rows = out.of.num_rows, e_words = ceil_div(out.of.classes, PER_WORD<Number>) * PANEL;
    exponent_tiles<Number>(out.of, threads, [=](const ExponentTile<Number> &tile) {
        Vector shift[VECTORS], sum[VECTORS] = {};
        Largest<LARGEST> largest;
        const Hard<HARD> hard(out.hard, tile.row, num_rows);
        fill(shift, tile.row, num_rows, [&](int64_t n) { return out.shifts[n]; });
        uint32_t *panel = out.e_panels ? out.e_panels + tile.row / PANEL * e_words : nullptr;
        for (int64_t j = tile.first; j < tile.last; j += PER_WORD<Number>) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const int64_t n = tile.row + v * LANES;
                Vector of_word[PER_WORD<Number>] = {};
#pragma GCC unroll 2
                for (int i = 0; i < PER_WORD<Number>; i++) {
                    if (j + i == tile.last) break;
                    const Vector product = tile.product(j + i, v);
                    const auto is_target = tile.target[v] == (int32_t)(j + i);
                    const Vector e = exp2(tile.exponent(hard.value(v, product)) - shift[v]);
                    of_word[i] = is_target ? Vector{} : e;
                    largest.see(j + i, v, product, is_target);
                    sum[v] += of_word[i];
                    of_word[i] = as_operand<Number>(hard.times_slope(v, product, of_word[i]));
                    if (out.e && n < num_rows) store_operand(out.e + (j + i) * num_rows + n, of_word[i], num_rows - n);
                }
                if (panel) put_words<Number>(panel + j / PER_WORD<Number> * PANEL + v * LANES, of_word);
            }
        }
        store_partial(out.partial, tile, num_rows, sum);
        store_largest(out, tile, largest);
    });
}

template <class Number> void exponentials(const Exponentials<Number> &out, int threads) {
    constexpr void (*FORMS[])(const Exponentials<Number> &, int) = {
        exponentials_and<Number, false, false>, exponentials_and<Number, true, false>,  //
        exponentials_and<Number, false, true>, exponentials_and<Number, true, true>};
    FORMS[(out.values != nullptr) + 2 * (out.hard != nullptr)](out, threads);
}

template <class Number, bool LARGEST, bool HARD> void maxima_and(const Maxima<Number> &out, int threads) {
    const int64_t num_rows = out.of.num_rows;
    exponent_tiles<Number>(out.of, threads, [=](const ExponentTile<Number> &tile) {
        Vector maximum[VECTORS];
        for (Vector &lanes : maximum) lanes = splat(-INFINITY);
        Largest<LARGEST> largest;
        const Hard<HARD> hard(out.hard, tile.row, num_rows);
        for (int64_t j = tile.first; j < tile.last; j++) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const int64_t n = tile.row + v * LANES;
                const auto is_target = (Words)((int32_t)j - tile.target[v]) < (uint32_t)out.centers;
                const Vector product = tile.product(j, v);
                const Vector exponent = is_target ? splat(-INFINITY) : tile.exponent(hard.value(v, product));
                maximum[v] = exponent > maximum[v] ? exponent : maximum[v];
                largest.see(j, v, product, is_target);
                if (out.exponents && n < num_rows) store(out.exponents + j * num_rows + n, exponent, num_rows - n);
            }
        }
        store_partial(out.partial, tile, num_rows, maximum);
        store_largest(out, tile, largest);
    });
}

template <class Number> void maxima(const Maxima<Number> &out, int threads) {
    constexpr void (*FORMS[])(const Maxima<Number> &, int) = {
        maxima_and<Number, false, false>, maxima_and<Number, true, false>,  //
        maxima_and<Number, false, true>, maxima_and<Number, true, true>};
    FORMS[(out.values != nullptr) + 2 * (out.hard != nullptr)](out, threads);
}

inline int64_t pieces_of(int64_t classes) { return ceil_div(classes, SUM_CLASSES); }

void add_up(const AddUp &in, int) {
    for (int64_t i = 0; i < in.pieces; i++)
        for (int64_t n = 0; n < in.num_rows; n++) in.totals[n] += in.partial[i * in.num_rows + n];
}

void finish_sums(const FinishSums &in, int) {
    for (int64_t n = 0; n < in.num_rows; n++) {
        in.rounded[n] = (float)in.totals[n];
        in.lse[n] = (float)(log(in.totals[n]) + in.shifts[n] * M_LN2);
    }
}

// E's panels as the tiles read them, in place, if there are tiles: a loop of all threads. Whole blocks; the words after them stay.
template <class Number> inline void turn_panels(uint32_t *panels, int64_t num_rows, int64_t words) {
    if (!HAS_TILES<Number>) return;
#pragma omp for collapse(2)
    for (int64_t p = 0; p < ceil_div(num_rows, PANEL); p++)
        for (int64_t b = 0; b < words / (BLOCK * PANEL); b++) turn_block(panels + p * words + b * BLOCK * PANEL);
}

// U of rows first .. last and columns q·PANEL .., a slab's share.
template <class Number> inline void accumulate_block(const Accumulate<Number> &in, int64_t first, int64_t last, int64_t q) {
    const int64_t words = ceil_div(in.classes, PER_WORD<Number>) * PANEL, width = ceil_div(in.size, WIDEST_PANEL) * WIDEST_PANEL;
    for (int64_t n = first; n < last; n++)
        for (int i = 0; i < PANEL; i += 8) __builtin_prefetch(in.pull + n * width + q * PANEL + i, 1);
    Accumulator sums[SUM_ROWS / TILE];
    const Rows<Operand<Number>, SUM_ROWS> e(in.e_panels, words, first, last - first);
    // An odd class is paired with zeros.
    const int64_t padded = words / PANEL * PER_WORD<Number>;
    const uint32_t *panel = in.unit_panels + q * words;
    multiply(sums, e, panel, padded, [&](int64_t tile, int64_t piece) {
        // Prefetch the next piece: a slab comes from the third-level cache.
        const int64_t next = smaller(PIECE_WORDS, words / PANEL - piece - PIECE_WORDS);
        if (next > 0) prefetch(panel + (piece + PIECE_WORDS) * PANEL, next * PANEL * sizeof(uint32_t), tile, e.tiles);
    });
    for (int64_t n = first; n < last; n++) {
        const float *from = (const float *)sums + (n - first) * PANEL;
        double *to = in.pull + n * width + q * PANEL;
        for (int i = 0; i < PANEL; i += LANES / 2) {
            const Doubles total = load<Doubles>(to + i) + widen(from + i);
            memcpy(to + i, &total, sizeof total);
        }
    }
}

template <class Number> void accumulate(const Accumulate<Number> &given, int threads) {
    const Accumulate<Number> in = given;
#pragma omp parallel num_threads(threads) firstprivate(in)
    {
        const TileRegisters<Number> registers;
        turn_panels<Number>(in.e_panels, in.num_rows, ceil_div(in.classes, PER_WORD<Number>) * PANEL);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t first = 0; first < in.num_rows; first += SUM_ROWS)
            for (int64_t q = 0; q < ceil_div(in.size, PANEL); q++)
                accumulate_block(in, first, smaller(first + SUM_ROWS, in.num_rows), q);
    }
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

constexpr int BYTES[] = {4, 2, 1, 1};  // bytes of a number in each of update.cpp's formats

// dw̃ of classes first .. last into unit_grad (last - first, D rounded up to PANEL). Prefetches the rows that the rest of the block
// reads: with a small N nothing else brings them from memory in time.
template <class Number>
inline void unit_gradients(const TableGradient<Number> &in, int64_t first, int64_t last, float *widened_e, float *unit_grad) {
    const int64_t words = ceil_div(in.num_rows, PER_WORD<Number>) * PANEL, width = ceil_div(in.size, PANEL) * PANEL;
    const int64_t row_bytes = in.size * (in.is_bfloat16 ? sizeof(bfloat16) : sizeof(float)), count = last - first;
    const auto *numbers = operands(in.e + first * in.num_rows, count * in.num_rows, widened_e);
    const Rows<Operand<Number>, CACHED_CLASSES> e(numbers, count, in.num_rows);
    for (int64_t q = 0; q < width / PANEL; q++) {
        Accumulator sums[CACHED_CLASSES / TILE];
        multiply(sums, e, in.x_panels + q * words, in.num_rows, [&](int64_t tile, int64_t piece) {
            if (piece) return;
            for (int64_t j = first + tile * TILE; j < smaller(first + (tile + 1) * TILE, last); j++) {
                prefetch((const char *)in.table + j * row_bytes, row_bytes, q, width / PANEL);
                for (int k = 0; in.step && k < Step::STATES; k++) {
                    const Buffer &state = in.step->states[k];
                    const int64_t bytes = in.size * BYTES[state.format];
                    if (state.data) prefetch((const char *)state.data + (in.first_class + j) * bytes, bytes, q, width / PANEL);
                }
            }
        });
        for (int64_t i = 0; i < count; i++) {
            float *to = unit_grad + i * width + q * PANEL;
            memcpy(to, sums[i / TILE].at[i % TILE], PANEL * sizeof(float));
            for (int d = 0; in.common && d < PANEL; d++) to[d] += in.common[q * PANEL + d];
        }
    }
}

// dw of classes first .. last, rows of `stride` in `out`, which may be unit_grad.
template <class Number, class Weight>
inline void project_block(const TableGradient<Number> &in, int64_t first, int64_t last, const Weight *weight, const float *unit_grad,
                          float *out, int64_t stride) {
    const int64_t size = in.size, width = ceil_div(size, PANEL) * PANEL, count = last - first;
    // Norms and components are long dependency chains: compute those of all rows first, so that no row waits for the one before.
    double inverse[CACHED_CLASSES];
    float along[CACHED_CLASSES] = {};
    for (int64_t i = 0; i < count; i++) inverse[i] = in.normalized ? inverse_norm(weight + i * size, size) : 1.0;
    for (int64_t i = 0; in.normalized && i < count; i++)
        along[i] = component(weight + i * size, unit_grad + i * width, size, Factor(inverse[i]));
    int64_t slot = lower_bound(in.target_classes, in.num_targets, in.first_class + first);
    for (int64_t i = 0; i < count; i++) {
        const int64_t j = in.first_class + first + i;
        while (slot < in.num_targets && in.target_classes[slot] < j) slot++;
        const bool held = slot < in.num_targets && in.target_classes[slot] == j;
        project(weight + i * size, unit_grad + i * width, size, in.normalized, inverse[i], along[i], in.unscale,
                held ? in.target_sums + slot * size : nullptr, out + i * stride);
    }
}

// dw of classes first .. last, stored or applied; room: this thread's scratch.
template <class Number> inline void gradient_block(const TableGradient<Number> &in, int64_t first, int64_t last, float *room) {
    const int64_t size = in.size;
    float *unit_grad = room;
    unit_gradients(in, first, last, room + scratch_of_gradient(size), unit_grad);
    // If the gradient is not stored, or not in float32, its rows overwrite those of dw̃.
    const bool in_place = in.step || in.grad_is_bfloat16;
    float *out = in_place ? unit_grad : (float *)in.grad + first * size;
    const int64_t stride = in_place ? ceil_div(size, PANEL) * PANEL : size;
    with_rows(in.table, in.is_bfloat16, first * size,
              [&](const auto *weight) { project_block(in, first, last, weight, unit_grad, out, stride); });
    if (in.step) {
        const int thread = omp_get_thread_num();
        JOIN(update_rows, INSTRUCTION_SET)(in.step, out, stride, nullptr, in.first_class + first, last - first, thread);
    } else if (in.grad_is_bfloat16) {
        for (int64_t i = 0; i < last - first; i++) round_row(out + i * stride, size, (bfloat16 *)in.grad + (first + i) * size);
    }
}

template <class Number> void table_gradient(const TableGradient<Number> &given, int threads) {
    const TableGradient<Number> in = given;
#pragma omp parallel num_threads(threads) firstprivate(in)
    {
        const TileRegisters<Number> registers;
        float *room = in.scratch + omp_get_thread_num() * in.scratch_size;
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < in.classes; first += CACHED_CLASSES)
            gradient_block(in, first, smaller(first + CACHED_CLASSES, in.classes), room);
    }
}

}  // namespace

#include "loop.h"  // it calls these kernels

namespace {

// In cpu_library.py's order.
template <class Number>
constexpr Kernel KERNELS[] = {
    KERNEL<RowPanels<Number>, row_panels<Number>>,       KERNEL<ColumnPanels<Number>, column_panels<Number>>,
    KERNEL<Normalize<Number>, normalize<Number>>,        KERNEL<Exponentials<Number>, exponentials<Number>>,
    KERNEL<Maxima<Number>, maxima<Number>>,              KERNEL<Accumulate<Number>, accumulate<Number>>,
    KERNEL<TableGradient<Number>, table_gradient<Number>>, KERNEL<AddUp, add_up>,
    KERNEL<FinishSums, finish_sums>,
    KERNEL<Forward<Number>, forward<Number>>,            KERNEL<Backward<Number>, backward<Number>>,
};

}  // namespace

EXPORT(const Kernel *, kernels_float)() { return KERNELS<float>; }
EXPORT(const Kernel *, kernels_bfloat16)() { return KERNELS<bfloat16>; }

// The number of this interface: cpu_library.py refuses a library with another one. Raise it with any change of kernels.h, batch.h or update.h.
EXPORT(int, interface)() { return 18; }

// Sizes that callers need for their buffers: cpu_library.py reads these.
EXPORT(int, widest_panel)() { return WIDEST_PANEL; }
EXPORT(int, sum_classes)() { return SUM_CLASSES; }
// Numbers of one dtype in a word of panels; scratch of a thread, in floats.
EXPORT(int, per_word_float)() { return PER_WORD<float>; }
EXPORT(int, per_word_bfloat16)() { return PER_WORD<bfloat16>; }
EXPORT(int64_t, scratch_numbers)(int64_t num_rows, int64_t size) { return scratch_numbers(num_rows, size); }
// Floats of room for the loops.
EXPORT(int64_t, forward_room_float)(Sizes of, bool pulls) { return ForwardRoom<float>(nullptr, of, pulls).room.numbers; }
EXPORT(int64_t, forward_room_bfloat16)(Sizes of, bool pulls) { return ForwardRoom<bfloat16>(nullptr, of, pulls).room.numbers; }
EXPORT(int64_t, backward_room_float)(Sizes of, bool recomputes) { return BackwardRoom<float>(nullptr, of, recomputes).room.numbers; }
EXPORT(int64_t, backward_room_bfloat16)(Sizes of, bool recomputes) { return BackwardRoom<bfloat16>(nullptr, of, recomputes).room.numbers; }

// 1 if this processor can run the instructions of this library's part, 0 if it cannot; below 0 with AMX that cannot be used: -1 where
// the operating system refuses, -2 where its products differ.
EXPORT(int, supported)() {
#if defined(__AVX512F__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(__AVX512BF16__)
    const bool all = avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(__AMX_BF16__)
    return all ? tiles_supported() : 0;
#else
    return all;
#endif
#elif defined(__AVX512F__)
    return avx512;
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
    return 1;
#endif
}

// The two elementary functions, for tests.
EXPORT(void, exp2)(const float *x, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, exp2(load_lanes(x + i, count - i)), count - i);
}
EXPORT(void, to_bfloat16)(const float *x, int64_t count, bfloat16 *out) {
    for (int64_t i = 0; i < count; i += LANES) store(out + i, load_lanes(x + i, count - i), count - i);
}
