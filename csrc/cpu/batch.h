// The arguments of each kernel of batch.cpp: cpu_library.py has these fields, in this order. N: rows of the batch, D: their columns.

#pragma once

#include "kernel.h"
#include "vector.h"

namespace {

struct Enter {
    const void *x, *table;      // (N, D), (classes, D)
    const int64_t *labels;      // (N,)
    int64_t *targets;           // (N,), -1 for none
    float *unit, *target_unit;  // (N, D)
    float *inverse_norms, *products;  // (N,)
    int64_t num_rows, size, classes, ignore_index, foreign_index;
    bool x_is_bfloat16, table_is_bfloat16;
};

struct Losses {
    const float *lse, *logits;  // (N,)
    const bool *counted;        // (N,)
    float *losses;              // (N,), or one number if it is reduced
    float *slopes;              // (N,)
    int64_t num_rows;
    float scale;
    bool is_reduced, is_mean;
};

struct XGradient {
    const float *lse_grads, *product_grads, *inverse_norms;  // (N,)
    const float *unit, *target_unit, *pull;                  // (N, D)
    void *grad;                                              // (N, D)
    int64_t num_rows, size;
    float scale;
    bool grad_is_bfloat16;
};

struct Slot {
    int64_t target, row;
};

struct SlabFactors {
    const int64_t *labels;                               // (N,)
    const float *lse_grads, *product_grads, *totals;     // (N,)
    const float *unit;                                   // (N, D)
    const void *table;                                   // (classes, D)
    int64_t *targets, *target_rows;                      // (N,)
    float *row_scales, *target_sums, *unscale;           // (N,), (N, D), one number
    Slot *slots;                                         // (2 N,) of room
    int64_t num_rows, size, classes, ignore_index;
    float scale;
    bool is_bfloat16;
};

// In the order of the table.
enum { ENTER, LOSSES, X_GRADIENT, SLAB_FACTORS };

}  // namespace

EXPORT(const Kernel *, batch_kernels)();
