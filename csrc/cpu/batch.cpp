// The work on a batch before and after the slab loop, for cosines with one row to a class: ops/batch_rows.py, in one pass over the
// rows for each function, where PyTorch takes a hundred small operators. Compiled once for each instruction set; plain C boundary.
//
//     enter           x̂, 1 / ‖x‖, ŵ_{y_n}, x̂_n·ŵ_{y_n} and each row's target, from raw features, table and labels
//     losses          softplus(lse - s logit) and its derivative, reduced
//     x_gradient      dx = (dx̂ - x̂ (x̂·dx̂)) / ‖x‖,  dx̂ = s g pull + p ŵ_{y_n}
//     slab_factors    row_scale = g / total; p x̂_n added up class by class in row order, and projected
//
// g and p are the gradients of a row's lse and of x̂_n·ŵ_{y_n}. A row and a class have one owner each: the same bits whatever the
// number of threads.

#include <math.h>
#include <omp.h>

#include "batch.h"
#include "rows.h"

namespace {

// Below this many numbers of a batch waking other threads takes longer than the work.
constexpr int64_t PARALLEL_NUMBERS = 1 << 16;

// Row n of a matrix over its norm, as floats; returns 1 / its norm. In double: a row of one number is then exactly 1 or -1, and its
// gradient exactly 0.
inline double unit_row(const void *rows, bool is_bfloat16, int64_t n, int64_t size, float *to) {
    return with_rows(rows, is_bfloat16, n * size, [=](const auto *row) {
        const double inverse = inverse_norm(row, size);
        int64_t d = 0;
        for (; d + LANES / 2 <= size; d += LANES / 2) {
            const Pieces unit = __builtin_convertvector(widen(row + d) * inverse, Pieces);
            memcpy(to + d, &unit, sizeof unit);
        }
        for (; d < size; d++) to[d] = (float)(widened(row[d]) * inverse);
        return inverse;
    });
}

inline void fill_row(float *row, int64_t size, float value) {
    for (int64_t d = 0; d < size; d++) row[d] = value;
}

inline double dot(const float *a, const float *b, int64_t size) {
    Doubles sums[2] = {};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES)
        for (int half = 0; half < 2; half++) sums[half] += widen(a + d + half * LANES / 2) * widen(b + d + half * LANES / 2);
    double sum = 0;
    for (; d < size; d++) sum += (double)a[d] * b[d];
    for (int i = 0; i < LANES / 2; i++) sum += sums[0][i] + sums[1][i];
    return sum;
}

inline bool is_class(int64_t label, int64_t classes, int64_t ignore_index) {
    return label >= 0 && label < classes && label != ignore_index;
}

void enter(const Enter &given, int threads) {
    const Enter in = given;
    const int64_t size = in.size;
#pragma omp parallel for num_threads(threads) firstprivate(in) if (in.num_rows * size > PARALLEL_NUMBERS)
    for (int64_t n = 0; n < in.num_rows; n++) {
        const int64_t label = in.labels[n];
        const bool found = is_class(label, in.classes, in.ignore_index), ignored = label == in.ignore_index;
        float *unit = in.unit + n * size, *target_unit = in.target_unit + n * size;
        in.targets[n] = found ? label : -1;
        if (ignored) fill_row(unit, size, 0);
        in.inverse_norms[n] = ignored ? 0 : (float)unit_row(in.x, in.x_is_bfloat16, n, size, unit);
        // A label that is no class: NaN, so that every result that depends on this row is NaN.
        if (!found && !ignored && label != in.foreign_index) fill_row(unit, size, NAN);
        if (found) unit_row(in.table, in.table_is_bfloat16, label, size, target_unit);
        else fill_row(target_unit, size, 0);
        in.products[n] = (float)dot(unit, target_unit, size);
    }
}

void losses(const Losses &in, int) {
    int64_t counted = 0;
    for (int64_t n = 0; n < in.num_rows; n++) counted += in.counted[n];
    const float rows = in.is_mean && counted > 0 ? (float)counted : 1;
    double total = 0;
    for (int64_t n = 0; n < in.num_rows; n++) {
        const float exponent = in.lse[n] - in.scale * in.logits[n], small = expf(-fabsf(exponent));
        // -log σ(-z) = softplus(z): 1 - p_y is never formed by subtraction, so a converged row keeps its relative accuracy.
        const float loss = in.counted[n] ? (exponent > 0 ? exponent : 0) + log1pf(small) : 0;
        in.slopes[n] = in.counted[n] ? (exponent < 0 ? small : 1) / (1 + small) / rows : 0;
        if (in.is_reduced) total += loss;
        else in.losses[n] = loss;
    }
    if (in.is_reduced) in.losses[0] = (float)(total / rows);
}

void x_gradient(const XGradient &given, int threads) {
    const XGradient in = given;
    const int64_t size = in.size;
#pragma omp parallel for num_threads(threads) firstprivate(in) if (in.num_rows * size > PARALLEL_NUMBERS)
    for (int64_t n = 0; n < in.num_rows; n++) {
        const float lse_grad = in.scale * in.lse_grads[n], product_grad = in.product_grads[n], inverse = in.inverse_norms[n];
        const float *unit = in.unit + n * size, *target_unit = in.target_unit + n * size, *pull = in.pull + n * size;
        // Rounded, so that both loops below get the same bits: of a row of one number the gradient is then exactly 0.
        const auto unit_grad = [&](int64_t d, int64_t count) {
            const Vector own = rounded(product_grad * load_lanes(target_unit + d, count));
            return rounded(lse_grad * load_lanes(pull + d, count) + own);
        };
        Vector sums = {};
        by_lanes(size, [&](int64_t d, int64_t count) { sums += load_lanes(unit + d, count) * unit_grad(d, count); });
        float along = 0;
        for (int i = 0; i < LANES; i++) along += sums[i];
        by_lanes(size, [&](int64_t d, int64_t count) {
            const Vector across = (unit_grad(d, count) - load_lanes(unit + d, count) * along) * inverse;
            const Vector out = inverse == 0 ? Vector{} : across;
            if (in.grad_is_bfloat16) store((bfloat16 *)in.grad + n * size + d, out, count);
            else store((float *)in.grad + n * size + d, out, count);
        });
    }
}

// Merges runs of twice the length each time, so that slots of one class stay in their order. Returns the buffer that has the result.
inline Slot *sorted(Slot *slots, Slot *room, int64_t count) {
    for (int64_t run = 1; run < count; run *= 2) {
        for (int64_t first = 0; first < count; first += 2 * run) {
            const int64_t middle = first + run < count ? first + run : count, last = middle + run < count ? middle + run : count;
            for (int64_t i = first, left = first, right = middle; i < last; i++) {
                const bool from_left = right == last || (left < middle && slots[left].target <= slots[right].target);
                room[i] = from_left ? slots[left++] : slots[right++];
            }
        }
        Slot *other = slots;
        slots = room, room = other;
    }
    return slots;
}

// A power of two that brings the largest finite |gradient| to [0.5, 1): total may reach 2^112.
inline float power_of_two(const float *gradients, int64_t count) {
    float largest = 0;
    for (int64_t n = 0; n < count; n++) {
        const float magnitude = fabsf(gradients[n]);
        if (magnitude > largest && !isinf(magnitude)) largest = magnitude;
    }
    int exponent;
    frexpf(largest, &exponent);
    return ldexpf(1, -(exponent < -126 ? -126 : exponent > 126 ? 126 : exponent));
}

void slab_factors(const SlabFactors &given, int threads) {
    const SlabFactors in = given;
    const int64_t size = in.size, num_rows = in.num_rows;
    const float power = power_of_two(in.lse_grads, num_rows);
    *in.unscale = in.scale / power;
    for (int64_t n = 0; n < num_rows; n++) {
        const bool found = is_class(in.labels[n], in.classes, in.ignore_index);
        // An ignored row's 0 over a total that a class of NaN made NaN would reach every row of the table.
        const bool left_out = in.totals[n] == 0 || in.labels[n] == in.ignore_index;
        in.row_scales[n] = left_out ? 0 : in.lse_grads[n] * power / in.totals[n];
        in.targets[n] = found ? in.labels[n] : -1;
        in.slots[n] = {found ? in.labels[n] : in.classes, n};
    }
    const Slot *slots = sorted(in.slots, in.slots + num_rows, num_rows);
#pragma omp parallel for num_threads(threads) firstprivate(in) if (num_rows * size > PARALLEL_NUMBERS)
    for (int64_t slot = 0; slot < num_rows; slot++) {
        const int64_t target = slots[slot].target;
        float *sum = in.target_sums + slot * size;
        in.target_rows[slot] = target;
        fill_row(sum, size, 0);
        if (target == in.classes || (slot && slots[slot - 1].target == target)) continue;
        for (int64_t i = slot; i < num_rows && slots[i].target == target; i++) {
            const float *unit = in.unit + slots[i].row * size, product_grad = in.product_grads[slots[i].row];
            for (int64_t d = 0; d < size; d++) sum[d] += product_grad * unit[d];
        }
        with_rows(in.table, in.is_bfloat16, target * size, [=](const auto *row) {
            const double inverse = inverse_norm(row, size);
            project(row, sum, size, true, inverse, component(row, sum, size, Factor(inverse)), 1, nullptr, sum);
        });
    }
}

// In cpu_library.py's order, and batch.h's.
constexpr Kernel KERNELS[] = {KERNEL<Enter, enter>, KERNEL<Losses, losses>, KERNEL<XGradient, x_gradient>,
                              KERNEL<SlabFactors, slab_factors>};

}  // namespace

EXPORT(const Kernel *, batch_kernels)() { return KERNELS; }
