// The slab loop and the work on a batch around it as one call each way, for cosines with a table that the kernels read in place,
// one row to a class: no caller runs between two kernels.
//
//     forward     enter; for each slab: normalize, exponentials, totals += Σ E, accumulate;        lse, pull = U / total
//     backward    slab_factors; for each slab: its kept E, or normalize and exponentials again; table_gradient
//
// What a slab takes beside that lies in one block of memory, `room`: ForwardRoom and BackwardRoom say how it is divided.

#pragma once

#include "batch.h"
#include "kernels.h"
#include "product.h"

namespace {

// A total of 0, of no negatives, is divided by this one: the pull is 0.
constexpr double SMALLEST_TOTAL = 0x1p-1022;

// Parts of a block of floats, each at the start of a cache line; of a block that is null only their number counts.
struct Room {
    float *start;
    int64_t numbers = 0;

    template <class T> T *take(int64_t count) {
        T *part = start ? (T *)(start + numbers) : nullptr;
        numbers += ceil_div(count * (int64_t)sizeof(T), 64) * 16;
        return part;
    }
    // A matrix whose products are summed along `summed` numbers, in panels of its columns.
    template <class Number> uint32_t *panels(int64_t summed, int64_t columns) {
        return take<uint32_t>(ceil_div(summed, PER_WORD<Number>) * ceil_div(columns, PANEL) * PANEL);
    }
};

// Of a row of U.
inline int64_t width_of(int64_t size) { return ceil_div(size, WIDEST_PANEL) * WIDEST_PANEL; }

// What makes a slab's exponentials.
template <class Number> struct ExponentialsRoom {
    uint32_t *x_panels;
    Operand<Number> *unit;
    float *partial;

    ExponentialsRoom(Room &room, const Sizes &of)
        : x_panels(room.panels<Number>(of.size, of.num_rows)), unit(room.take<Operand<Number>>(of.slab * of.size)),
          partial(room.take<float>(pieces_of(of.slab) * of.num_rows)) {}
};

template <class Number> struct ForwardRoom {
    Room room;
    Number *x;
    ExponentialsRoom<Number> exponentials;
    int64_t *targets;
    double *totals, *pull;
    uint32_t *e_panels, *unit_panels;

    ForwardRoom(float *start, const Sizes &of, bool pulls)
        : room{start}, x(room.take<Number>(sizeof(Number) == 2 ? of.num_rows * of.size : 0)), exponentials(room, of),
          targets(room.take<int64_t>(of.num_rows)), totals(room.take<double>(of.num_rows)),
          pull(room.take<double>(pulls ? of.num_rows * width_of(of.size) : 0)),
          e_panels(room.panels<Number>(of.slab, pulls ? of.num_rows : 0)),
          unit_panels(room.panels<Number>(of.slab, pulls ? of.size : 0)) {}
};

template <class Number> struct BackwardRoom {
    Room room;
    float *scratch;
    Number *x;  // x̃, and then a x̃
    uint32_t *factor_panels;
    ExponentialsRoom<Number> exponentials;
    Number *e;
    int64_t *targets, *target_classes;
    float *row_scales, *target_sums;
    Slot *slots;

    // recomputes: whether there are exponentials that were not kept.
    BackwardRoom(float *start, const Sizes &of, bool recomputes)
        : room{start}, scratch(room.take<float>(of.threads * scratch_numbers(of.num_rows, of.size))),
          x(room.take<Number>(of.num_rows * of.size)), factor_panels(room.panels<Number>(of.num_rows, of.size)),
          exponentials(room, recomputes ? of : Sizes{}), e(room.take<Number>(recomputes ? of.slab * of.num_rows : 0)),
          targets(room.take<int64_t>(of.num_rows)), target_classes(room.take<int64_t>(of.num_rows)),
          row_scales(room.take<float>(of.num_rows)), target_sums(room.take<float>(of.num_rows * of.size)),
          slots(room.take<Slot>(2 * of.num_rows)) {}
};

// A slab: its first class and how many it has.
struct Slab {
    int64_t first, classes;
};

template <class Body> inline void each_slab(int64_t classes, int64_t slab, Body body) {
    for (int64_t first = 0; first < classes; first += slab) body(Slab{first, smaller(slab, classes - first)});
}

// Threads of every kernel of a loop: a team of another size than the last one costs threads. Waking one takes as long as so many
// products.
template <class Number> inline int useful(const Loop<Number> &in, int threads) {
    const int64_t products = in.of.num_rows * smaller(in.of.slab, in.classes) * in.of.size;
    return (int)larger(smaller(threads, products / in.products_of_thread), 1);
}

template <class Number> inline const void *rows_of(const Loop<Number> &in, const Slab &slab) {
    return (const char *)in.table + slab.first * in.of.size * (in.is_bfloat16 ? sizeof(bfloat16) : sizeof(float));
}

template <class Number> inline bool is_kept(const Loop<Number> &in, const Slab &slab) { return slab.first < in.kept_classes; }

// The place of a slab's kept exponentials, or null; of no rows they have no address either.
template <class Number> inline Number *kept_of(const Loop<Number> &in, const Slab &slab) {
    return is_kept(in, slab) ? in.kept + slab.first * in.of.num_rows : nullptr;
}

// Numbers as they are, or rounded into room.
inline const float *as_numbers(const float *from, int64_t, float *) { return from; }
inline const bfloat16 *as_numbers(const float *from, int64_t count, bfloat16 *room) {
    round_row(from, count, room);
    return room;
}

template <class Number> inline void pack_rows(const Loop<Number> &in, Number *room, uint32_t *panels, int threads) {
    const int64_t num_rows = in.of.num_rows, size = in.of.size;
    row_panels(RowPanels<Number>{as_numbers(in.unit, num_rows * size, room), panels, num_rows, size}, threads);
}

// The panels of a x̃.
template <class Number>
inline void pack_scaled_rows(const Loop<Number> &in, const float *factors, Number *room, uint32_t *panels, int threads) {
    const int64_t num_rows = in.of.num_rows, size = in.of.size;
    for (int64_t n = 0; n < num_rows; n++)
        by_lanes(size, [&](int64_t d, int64_t count) {
            store(room + n * size + d, load_lanes(in.unit + n * size + d, count) * factors[n], count);
        });
    column_panels(ColumnPanels<Number>{room, panels, num_rows, size}, threads);
}

// E of a slab to e and to its panels, where given, and its sums to room.partial.
template <class Number>
inline void exponentials_of(const Loop<Number> &in, const Slab &slab, const ExponentialsRoom<Number> &room, const int64_t *targets,
                            uint32_t *unit_panels, Number *e, uint32_t *e_panels, int threads) {
    const int64_t num_rows = in.of.num_rows, size = in.of.size;
    normalize(Normalize<Number>{rows_of(in, slab), room.unit, unit_panels, slab.classes, size, in.is_bfloat16, true}, threads);
    const Exponents<Number> of{room.x_panels, room.unit, targets, num_rows, slab.classes, size, slab.first, in.log2_scale};
    exponentials(Exponentials<Number>{of, in.shifts, e, e_panels, room.partial, nullptr, nullptr, nullptr}, threads);
}

template <class Arguments> inline void of_batch(int kernel, const Arguments &arguments, int threads) {
    JOIN(batch_kernels, INSTRUCTION_SET)()[kernel].function(&arguments, threads);
}

// x̂ and all else that `enter` gives; returns how many labels are of no class.
template <class Number> inline int64_t enter_batch(const Forward<Number> &in, int64_t *targets, int threads) {
    const Loop<Number> &loop = in.loop;
    of_batch(ENTER,
             Enter{in.x, loop.table, loop.labels, targets, loop.unit, in.target_unit, in.inverse_norms, in.products, loop.of.num_rows,
                   loop.of.size, loop.classes, loop.ignore_index, in.foreign_index, in.x_is_bfloat16, loop.is_bfloat16},
             threads);
    int64_t unknown = 0;
    for (int64_t n = 0; n < loop.of.num_rows; n++)
        unknown += targets[n] < 0 && loop.labels[n] != loop.ignore_index && loop.labels[n] != in.foreign_index;
    return unknown;
}

// a x̃ and the targets' share of dW, in room; returns what all is multiplied with.
template <class Number> inline float factors_of(const Backward<Number> &in, const BackwardRoom<Number> &room, int threads) {
    const Loop<Number> &loop = in.loop;
    float unscale;
    of_batch(SLAB_FACTORS,
             SlabFactors{loop.labels, in.lse_grads, in.product_grads, in.totals, loop.unit, loop.table, room.targets,
                         room.target_classes, room.row_scales, room.target_sums, &unscale, room.slots,
                         loop.of.num_rows, loop.of.size, loop.classes, loop.ignore_index, loop.scale, loop.is_bfloat16},
             threads);
    return unscale;
}

template <class Number> void forward(const Forward<Number> &in, int given_threads) {
    const Loop<Number> &loop = in.loop;
    const int threads = useful(loop, given_threads);
    const int64_t num_rows = loop.of.num_rows, size = loop.of.size, width = width_of(size);
    const ForwardRoom<Number> room(loop.room, loop.of, in.pull);
    *in.unknown = enter_batch(in, room.targets, threads);
    for (int64_t n = 0; n < num_rows; n++) loop.shifts[n] = in.shift;
    pack_rows(loop, room.x, room.exponentials.x_panels, threads);
    memset(room.totals, 0, num_rows * sizeof(double));
    const int64_t kept = loop.kept_classes * num_rows;
    if (kept < loop.kept_numbers) memset(loop.kept + kept, 0, (loop.kept_numbers - kept) * sizeof(Number));
    if (in.pull) memset(room.pull, 0, num_rows * width * sizeof(double));
    each_slab(loop.classes, loop.of.slab, [&](const Slab &slab) {
        Number *e = kept_of(loop, slab);
        uint32_t *e_panels = in.pull ? room.e_panels : nullptr, *unit_panels = in.pull ? room.unit_panels : nullptr;
        exponentials_of(loop, slab, room.exponentials, room.targets, unit_panels, e, e_panels, threads);
        add_up(AddUp{room.exponentials.partial, room.totals, pieces_of(slab.classes), num_rows}, 1);
        if (in.pull) accumulate(Accumulate<Number>{e_panels, unit_panels, room.pull, num_rows, slab.classes, size}, threads);
    });
    finish_sums(FinishSums{room.totals, loop.shifts, in.totals, in.lse, num_rows}, 1);
    if (!in.pull) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < num_rows; n++) {
        const double total = room.totals[n] < SMALLEST_TOTAL ? SMALLEST_TOTAL : room.totals[n];
        for (int64_t d = 0; d < size; d++) in.pull[n * size + d] = (float)(room.pull[n * width + d] / total);
    }
}

template <class Number> void backward(const Backward<Number> &in, int given_threads) {
    const Loop<Number> &loop = in.loop;
    const int threads = useful(loop, given_threads);
    const int64_t num_rows = loop.of.num_rows, size = loop.of.size;
    const bool recomputes = loop.kept_classes < loop.classes;
    const BackwardRoom<Number> room(loop.room, loop.of, recomputes);
    const float unscale = factors_of(in, room, threads);
    if (recomputes) pack_rows(loop, room.x, room.exponentials.x_panels, threads);
    pack_scaled_rows(loop, room.row_scales, room.x, room.factor_panels, threads);
    each_slab(loop.classes, loop.of.slab, [&](const Slab &slab) {
        const Number *e = kept_of(loop, slab);
        if (!is_kept(loop, slab)) {
            uint32_t *const none = nullptr;
            exponentials_of(loop, slab, room.exponentials, room.targets, none, room.e, none, threads);
            e = room.e;
        }
        const int64_t grad_bytes = in.grad_is_bfloat16 ? sizeof(bfloat16) : sizeof(float);
        void *grad = in.grad ? (char *)in.grad + slab.first * size * grad_bytes : nullptr;
        const int64_t scratch_size = scratch_numbers(num_rows, size);
        table_gradient(
            TableGradient<Number>{e, room.factor_panels, rows_of(loop, slab), room.target_classes, room.target_sums, nullptr,
                                  room.scratch, grad, in.step, num_rows, slab.classes, size, slab.first, num_rows,
                                  scratch_size, unscale, loop.is_bfloat16, true, in.grad_is_bfloat16},
            threads);
    });
}

}  // namespace
