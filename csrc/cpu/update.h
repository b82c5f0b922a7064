// One optimiser step of a class table: update.cpp applies it to rows, kernels.cpp calls that, cpu_library.py has the same fields.

#pragma once

#include <stdint.h>

#include "kernel.h"

struct Buffer {
    void *data;    // (R, D), null if the rule has no such state
    float *scale;  // (R,) for 8 bits
    int32_t format;
};

struct Step {
    static constexpr int STATES = 2;  // at most, for each number of the table

    int32_t rule;
    // η, λ, sign, nesterov, ε, μ or β1, β2, and 1 - β, which β in float32 is too coarse for
    float lr, weight_decay, sign, nesterov, eps, first_decay, second_decay, first_rate, second_rate;
    float first_correction, second_correction, max_row_norm;  // of each row's gradient; 0: any
    Buffer table, states[STATES];
    int64_t size, first_of_shard;
    uint64_t key;    // of the random bits for rounding
    float *scratch;  // 4 D numbers for each thread
};

// A step for some rows: the arguments of update.cpp's one kernel.
struct Update {
    const Step *step;
    const float *grad;     // (rows, D)
    const int64_t *index;  // (rows,), null for the rows from `first` on
    int64_t size, first, rows;
};

EXPORT(const Kernel *, update_kernels)();

// Rows first .. of the table, or index[first] .., with their gradients grad (rows, stride).
extern "C" void JOIN(update_rows, INSTRUCTION_SET)(const Step *step, const float *grad, int64_t stride, const int64_t *index,
                                                   int64_t first, int64_t rows, int thread);
