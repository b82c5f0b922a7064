// The arguments of each kernel of kernels.cpp: cpu_library.py has these fields, in this order. N: rows of x, D: its columns.

#pragma once

#include "update.h"
#include "vector.h"

namespace {

template <class Number> struct RowPanels {
    const Number *rows;  // (num_rows, size)
    uint32_t *panels;
    int64_t num_rows, size;
};

template <class Number> struct ColumnPanels {
    const Number *rows;  // (num_rows, size)
    uint32_t *panels;
    int64_t num_rows, size;
};

template <class Number> struct Normalize {
    const void *table;  // (classes, size)
    Operand<Number> *unit;
    uint32_t *panels;  // of unit's columns, or null
    int64_t classes, size;
    bool is_bfloat16, normalized;
};

// The operands of k w̃ xᵀ of a slab; exponentials and maxima consume the product while it is in registers.
template <class Number> struct Exponents {
    const uint32_t *x_panels;
    const Operand<Number> *unit;
    const int64_t *targets;  // (N,) each row's class, or the first of its `centers` rows
    int64_t num_rows, classes, size, first_class;
    float log2_scale;
};

template <class Number> struct Exponentials {
    Exponents<Number> of;
    const float *shifts;  // (N,)
    Number *e;            // (classes, N), or null
    uint32_t *e_panels;   // of E's columns, or null
    float *partial;       // (pieces of SUM_CLASSES, N)
    float *values;        // (the same), each piece's largest product, or null
    int32_t *places;      // (the same), and its class in the slab
    const float *hard;    // (4, N), each row's τ, p0, p1, p2, or null
};

template <class Number> struct Maxima {
    Exponents<Number> of;
    float *exponents;  // (classes, N), or null
    float *partial;    // (pieces of SUM_CLASSES, N)
    float *values;     // as Exponentials has them
    int32_t *places;
    const float *hard;
    int64_t centers;
};

template <class Number> struct Accumulate {
    uint32_t *e_panels;           // of columns of a slab; tiles rearrange them in place
    const uint32_t *unit_panels;  // the same
    double *pull;                 // (N, D rounded up to WIDEST_PANEL)
    int64_t num_rows, classes, size;
};

template <class Number> struct TableGradient {
    const Number *e;           // (classes, N)
    const uint32_t *x_panels;  // of the columns of a x
    const void *table;         // (classes, D)
    const int64_t *target_classes;  // (num_targets,), ascending
    const float *target_sums;       // (num_targets, D)
    const float *common;            // (D rounded up to WIDEST_PANEL,), added to each row of dw̃, or null
    float *scratch;                 // (threads, scratch_size)
    void *grad;                     // (classes, D), or null if the step consumes it
    const Step *step;               // or null
    int64_t num_rows, classes, size, first_class, num_targets, scratch_size;
    double unscale;
    bool is_bfloat16, normalized, grad_is_bfloat16;
};

// total_n += Σ_i partial[i, n], piece by piece.
struct AddUp {
    const float *partial;  // (pieces, N)
    double *totals;        // (N,)
    int64_t pieces, num_rows;
};

// total_n once more, and lse_n = log total_n + shift_n log 2.
struct FinishSums {
    const double *totals;  // (N,)
    const float *shifts;   // (N,)
    float *rounded, *lse;  // (N,)
    int64_t num_rows;
};

struct Sizes {
    int64_t num_rows, size, slab, threads;  // N, D, B, and threads that have scratch
};

// The operands of loop.h's two.
template <class Number> struct Loop {
    const void *table;      // (classes, D)
    const int64_t *labels;  // (N,)
    float *unit;            // x̂ (N, D), which forward writes
    float *shifts;          // (N,), which forward writes
    Number *kept;           // (kept_numbers,), (kept_classes, N) exponentials of the first slabs and then zeros
    float *room;            // of so many numbers as `room` says
    Sizes of;
    int64_t classes, kept_classes, kept_numbers, products_of_thread, ignore_index;
    float scale, log2_scale;
    bool is_bfloat16;
};

template <class Number> struct Forward {
    Loop<Number> loop;
    const void *x;                    // (N, D)
    float *target_unit;               // (N, D)
    float *inverse_norms, *products;  // (N,)
    float *totals, *lse;              // (N,)
    float *pull;                      // (N, D), or null
    int64_t *unknown;                 // how many labels are of no class, whose rows are NaN
    int64_t foreign_index;
    float shift;
    bool x_is_bfloat16;
};

template <class Number> struct Backward {
    Loop<Number> loop;
    const float *lse_grads, *product_grads, *totals;  // (N,)
    void *grad;                                       // (classes, D), or null if the step consumes it
    const Step *step;                                 // or null
    bool grad_is_bfloat16;
};

}  // namespace
