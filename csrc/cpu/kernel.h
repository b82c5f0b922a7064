// The plain C boundary: every kernel is a function of one structure of arguments, in a table that cpu_library.py reads.

#pragma once

#include <stdint.h>

// Exported for each instruction set: cosface_<name>_<set>.
#define JOIN_(name, set) cosface_##name##_##set
#define JOIN(name, set) JOIN_(name, set)
#define EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type JOIN(name, INSTRUCTION_SET)

namespace {

// A kernel, and the size of its arguments in bytes.
struct Kernel {
    void (*function)(const void *arguments, int threads);
    int64_t bytes;
};

template <class Arguments, void function(const Arguments &, int)>
constexpr Kernel KERNEL = {[](const void *arguments, int threads) { function(*(const Arguments *)arguments, threads); },
                           sizeof(Arguments)};

}  // namespace
