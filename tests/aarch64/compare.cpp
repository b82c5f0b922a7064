// Compares the kernels of each instruction set with the same in double, where neither Python nor PyTorch is: under user-mode
// emulation.   compare libcosface_cpu.so SET ...
//
// One slab, forward and backward: E, its row sums, U = Σ_j E_nj ŵ_j, dW, and dW applied by SGD; the loop over two slabs, one of them
// kept, from raw features to dW; a step of SGD and of AdamW where the table and its state are bfloat16; exp2 and the rounding to
// bfloat16 for every kind of float. A result may be as far from the exact one as roundings explain: of the exponent in float32, of
// operands and of E in the precision of the products; and 3 times as far as the portable kernels' result.

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <vector>

#define INSTRUCTION_SET portable
#include "../../csrc/cpu/kernels.h"

constexpr float LOG2_SCALE = 92.332482f, SHIFT = 4;  // s = 64
constexpr float RATE = 0.1f, MOMENTUM = 0.9f;
constexpr int THREADS = 2;
using Numbers = std::vector<double>;

static void *library;
template <class Function> static Function *symbol(const std::string &name) {
    void *found = dlsym(library, ("cosface_" + name).c_str());
    if (!found) fprintf(stderr, "the library has no cosface_%s\n", name.c_str()), exit(2);
    return (Function *)found;
}

static float random_number() {  // uniform in [-1, 1)
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (float)(state >> 40) * 0x1p-23f - 1;
}

static float read(float x) { return x; }
static float read(bfloat16 x) {
    const uint32_t word = (uint32_t)x.bits << 16;
    return load<float>(&word);
}
static void write(float x, float *to) { *to = x; }
static void write(float x, bfloat16 *to) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    to->bits = (uint16_t)((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class Number> static Number rounded_to(float x) {
    Number number;
    write(x, &number);
    return number;
}

struct Results {
    Numbers e, sums, pull, grad, stepped;
};

template <class Number> struct Problem {
    int64_t n, c, d;
    std::vector<Number> x, factors;  // x̂ and a x, rounded
    std::vector<float> table, target_sums;
    std::vector<int64_t> targets, target_classes;

    Problem(int64_t n, int64_t c, int64_t d) : n(n), c(c), d(d), table(c * d), target_sums(n * d) {
        for (float &each : table) each = random_number();
        for (float &each : target_sums) each = random_number();
        for (int64_t i = 0; i < n; i++) {
            targets.push_back(i % 5 == 4 ? -1 : i * 7 % c), target_classes.push_back(i * (c / n));
            std::vector<float> row(table.begin() + (i * 3 % c) * d, table.begin() + (i * 3 % c + 1) * d);
            for (float &each : row) each += random_number() / 2;  // near one class, so that exponents have every size
            double norm = 0;
            for (float each : row) norm += (double)each * each;
            for (float each : row) {
                x.push_back(rounded_to<Number>(each / sqrt(norm)));
                factors.push_back(rounded_to<Number>(0.01f * each));
            }
        }
    }

    // In double, of the operands that the kernels round: x̂, a x, ŵ.
    Results exact() const {
        Results found{Numbers(c * n), Numbers(n), Numbers(n * d), Numbers(c * d), Numbers(c * d)};
        std::vector<float> unit(c * d);
        for (int64_t j = 0; j < c; j++) {
            double norm = 0;
            for (int64_t k = 0; k < d; k++) norm += (double)table[j * d + k] * table[j * d + k];
            for (int64_t k = 0; k < d; k++) unit[j * d + k] = read(rounded_to<Number>((float)(table[j * d + k] / sqrt(norm))));
            Numbers across(d);
            for (int64_t i = 0; i < n; i++) {
                double cosine = 0;
                for (int64_t k = 0; k < d; k++) cosine += (double)read(x[i * d + k]) * unit[j * d + k];
                const double e = targets[i] == j ? 0 : ::exp2(LOG2_SCALE * cosine - SHIFT);
                found.e[j * n + i] = e, found.sums[i] += e;
                for (int64_t k = 0; k < d; k++) {
                    found.pull[i * d + k] += e * unit[j * d + k];
                    across[k] += e * read(factors[i * d + k]);
                }
            }
            double along = 0;
            for (int64_t k = 0; k < d; k++) along += across[k] * table[j * d + k] / sqrt(norm);
            for (int64_t k = 0; k < d; k++) {
                double &grad = found.grad[j * d + k];
                grad = (across[k] - along * table[j * d + k] / sqrt(norm)) / sqrt(norm);
                for (int64_t i = 0; i < n; i++) grad += target_classes[i] == j ? target_sums[i * d + k] : 0;
                found.stepped[j * d + k] = RATE * (MOMENTUM * table[j * d + k] + grad);
            }
        }
        return found;
    }

    Results computed(const std::string &set) const {
        const std::string kind = sizeof(Number) == 2 ? "bfloat16" : "float";
        const Kernel *kernel = symbol<const Kernel *()>("kernels_" + kind + "_" + set)();
        const int64_t per_word = symbol<int()>("per_word_" + kind + "_" + set)(), widest = symbol<int()>("widest_panel_" + set)();
        const int64_t pieces = (c - 1) / symbol<int()>("sum_classes_" + set)() + 1;
        const int64_t room = symbol<int64_t(int64_t, int64_t)>("scratch_numbers_" + set)(n, d);
        auto padded = [=](int64_t count) { return (count + widest - 1) / widest * widest; };
        auto panels = [=](int64_t summed, int64_t columns) {
            return std::vector<uint32_t>((summed + per_word - 1) / per_word * padded(columns), 0x7fc07fc0);  // NaN
        };
        auto run = [=](int index, const void *arguments) { kernel[index].function(arguments, THREADS); };
        std::vector<uint32_t> x_panels = panels(d, n), a_panels = panels(n, d), e_panels = panels(c, n), unit_panels = panels(c, d);
        std::vector<float> scratch(THREADS * room), unit(c * d), shifts(n, SHIFT), partial(pieces * n), grad(c * d);
        std::vector<Number> e(c * n);
        Numbers pull(n * padded(d));
        auto *operands = (Operand<Number> *)unit.data();  // or half as many bytes
        run(0, &(const RowPanels<Number> &)RowPanels<Number>{x.data(), x_panels.data(), n, d});
        run(1, &(const ColumnPanels<Number> &)ColumnPanels<Number>{factors.data(), a_panels.data(), n, d});
        float *to = scratch.data();
        const Normalize<Number> normalize{table.data(), operands, unit_panels.data(), c, d, false, true};
        run(2, &normalize);
        const Exponents<Number> of{x_panels.data(), operands, targets.data(), n, c, d, 0, LOG2_SCALE};
        const Exponentials<Number> exponentials{of, shifts.data(), e.data(), e_panels.data(), partial.data()};
        run(3, &exponentials);
        const Accumulate<Number> accumulate{e_panels.data(), unit_panels.data(), pull.data(), n, c, d};
        run(5, &accumulate);
        TableGradient<Number> gradient{};
        gradient.e = e.data(), gradient.x_panels = a_panels.data(), gradient.table = table.data(), gradient.grad = grad.data();
        gradient.target_classes = target_classes.data(), gradient.target_sums = target_sums.data(), gradient.num_targets = n;
        gradient.scratch = to, gradient.scratch_size = room, gradient.unscale = 1, gradient.normalized = true;
        gradient.num_rows = n, gradient.classes = c, gradient.size = d;
        run(6, &gradient);
        Results found{Numbers(c * n), Numbers(n), Numbers(n * d), Numbers(grad.begin(), grad.end()), Numbers(c * d)};
        // The same into a step of SGD, whose momentum begins as the table.
        std::vector<float> table_of_step = table, momentum = table, room_of_step(THREADS * 4 * d);
        Step step{};
        step.lr = RATE, step.sign = 1, step.first_decay = MOMENTUM, step.size = d, step.scratch = room_of_step.data();
        step.table.data = table_of_step.data(), step.states[0].data = momentum.data();
        TableGradient<Number> into_step = gradient;
        into_step.table = table_of_step.data(), into_step.grad = nullptr, into_step.step = &step;
        run(6, &into_step);
        for (int64_t i = 0; i < c * d; i++) found.stepped[i] = (double)table[i] - table_of_step[i];
        for (int64_t i = 0; i < c * n; i++) found.e[i] = read(e[i]);
        for (size_t i = 0; i < partial.size(); i++) found.sums[i % n] += partial[i];
        for (int64_t i = 0; i < n * d; i++) found.pull[i] = pull[i / d * padded(d) + i % d];
        return found;
    }
};

// The loop of csrc/cpu/loop.h: x̂_n·ŵ_{y_n}, totals, their log-sum-exps, the pull, and dW from the gradients g of the log-sum-exps and p of the products.
template <class Number> struct Loops {
    static constexpr int64_t SLAB = 128, IGNORED = -100;
    static constexpr float SCALE = 64;
    int64_t n, c, d;
    std::vector<float> x, table, g, p;
    std::vector<int64_t> labels;

    struct Found {
        Numbers products, totals, lse, pull, grad;
    };

    Loops(int64_t n, int64_t c, int64_t d) : n(n), c(c), d(d), table(c * d) {
        for (float &each : table) each = random_number();
        for (int64_t i = 0; i < n; i++) {
            labels.push_back(i % 5 == 4 ? IGNORED : i * 3 % (c / 2));  // some twice
            g.push_back(random_number()), p.push_back(random_number());
            if (labels[i] == IGNORED) g[i] = p[i] = 0;
            for (int64_t k = 0; k < d; k++) x.push_back(3 * table[i * 7 % c * d + k] + random_number());
        }
    }

    Numbers unit_rows(const std::vector<float> &rows, bool is_rounded) const {
        Numbers unit(rows.size());
        for (size_t first = 0; first < rows.size(); first += d) {
            double norm = 0;
            for (int64_t k = 0; k < d; k++) norm += (double)rows[first + k] * rows[first + k];
            for (int64_t k = 0; k < d; k++) {
                const float number = (float)(rows[first + k] / sqrt(norm));
                unit[first + k] = is_rounded ? read(rounded_to<Number>(number)) : number;
            }
        }
        return unit;
    }

    Found exact() const {
        Found found{Numbers(n), Numbers(n), Numbers(n), Numbers(n * d), Numbers(c * d)};
        Numbers x_hat = unit_rows(x, false), w_hat = unit_rows(table, false), e(c * n), unit_grad(c * d), low_x = unit_rows(x, true);
        const Numbers low_w = unit_rows(table, true);
        for (int64_t i = 0; i < n; i++) {
            if (labels[i] == IGNORED)
                for (int64_t k = 0; k < d; k++) x_hat[i * d + k] = low_x[i * d + k] = 0;
            for (int64_t j = 0; j < c; j++) {
                double cosine = 0;
                for (int64_t k = 0; k < d; k++) cosine += low_x[i * d + k] * low_w[j * d + k];
                found.totals[i] += e[j * n + i] = labels[i] == j ? 0 : ::exp2(LOG2_SCALE * cosine - SHIFT);
                for (int64_t k = 0; k < d; k++) {
                    found.pull[i * d + k] += e[j * n + i] * low_w[j * d + k];
                    found.products[i] += labels[i] == j ? x_hat[i * d + k] * w_hat[j * d + k] : 0;
                }
            }
            for (int64_t j = 0; j < c; j++)
                for (int64_t k = 0; k < d; k++)
                    unit_grad[j * d + k] += (SCALE * g[i] * e[j * n + i] / found.totals[i] + (labels[i] == j ? p[i] : 0)) * x_hat[i * d + k];
            for (int64_t k = 0; k < d; k++) found.pull[i * d + k] /= found.totals[i];
            found.lse[i] = log(found.totals[i]) + SHIFT * M_LN2;
        }
        for (int64_t j = 0; j < c; j++) {
            double along = 0, norm = 0;
            for (int64_t k = 0; k < d; k++) {
                along += unit_grad[j * d + k] * w_hat[j * d + k];
                norm += (double)table[j * d + k] * table[j * d + k];
            }
            for (int64_t k = 0; k < d; k++) found.grad[j * d + k] = (unit_grad[j * d + k] - along * w_hat[j * d + k]) / sqrt(norm);
        }
        return found;
    }

    Found computed(const std::string &set) const {
        const std::string kind = sizeof(Number) == 2 ? "bfloat16" : "float";
        const Kernel *kernel = symbol<const Kernel *()>("kernels_" + kind + "_" + set)();
        const Sizes of{n, d, SLAB, THREADS};
        auto room = [&](const std::string &direction) {
            return std::vector<float>(symbol<int64_t(Sizes, bool)>(direction + "_room_" + kind + "_" + set)(of, true), NAN);
        };
        std::vector<float> forward_room = room("forward"), backward_room = room("backward"), unit(n * d), shifts(n), target_unit(n * d);
        std::vector<float> inverse_norms(n), products(n), totals(n), lse(n), pull(n * d), grad(c * d);
        std::vector<Number> kept(SLAB * n);
        int64_t unknown;
        Loop<Number> loop{table.data(), labels.data(), unit.data(), shifts.data(), kept.data(), forward_room.data(), of, c, SLAB,
                          SLAB * n, 1, IGNORED, SCALE, LOG2_SCALE, false};
        const Forward<Number> forward{loop, x.data(), target_unit.data(), inverse_norms.data(), products.data(), totals.data(),
                                      lse.data(), pull.data(), &unknown, IGNORED, SHIFT, false};
        kernel[9].function(&forward, THREADS);
        loop.room = backward_room.data();
        const Backward<Number> backward{loop, g.data(), p.data(), totals.data(), grad.data(), nullptr, false};
        kernel[10].function(&backward, THREADS);
        auto wide = [](const std::vector<float> &numbers) { return Numbers(numbers.begin(), numbers.end()); };
        return {wide(products), wide(totals), wide(lse), wide(pull), wide(grad)};
    }
};

static double relative_error(const Numbers &got, const Numbers &exact) {
    double error = 0, size = 0;
    for (size_t i = 0; i < exact.size(); i++) error += (got[i] - exact[i]) * (got[i] - exact[i]), size += exact[i] * exact[i];
    return sqrt(error / size);
}

static int failures;
static void judge(const std::string &what, double error, double allowed) {
    const bool right = error <= allowed;  // so that NaN is wrong
    printf("%-40s %.2e of %.2e%s\n", what.c_str(), error, allowed, right ? "" : "   WRONG");
    failures += !right;
}

template <class Number> static void compare(const std::string &set, int64_t n, int64_t c, int64_t d) {
    const bool low = sizeof(Number) == 2;
    const Problem<Number> problem(n, c, d);
    const Results exact = problem.exact(), portable = problem.computed("portable"), got = problem.computed(set);
    // Of the exponent in float32, up to 92, and its cosine, whose sum has at most 128 + d / 128 roundings, half of them on average:
    // an absolute error of the exponent is a relative one of E. A rounding of ŵ to bfloat16 that falls to the other side in float32
    // than in double moves a cosine by 2^-9 of one product.
    const double exponent = LOG2_SCALE * M_LN2 * (sqrt(d) + 1) * 0x1p-24 + (low ? LOG2_SCALE * M_LN2 * 0x1p-9 / d : 0);
    const double stored = exponent + (low ? 0x1p-8 : 0x1p-23);
    const std::string name = set + (low ? " bfloat16 " : " float32 ");
    auto one = [&](const char *what, Numbers Results::*field, double roundings) {
        const double reference = relative_error(portable.*field, exact.*field);
        judge(name + what, relative_error(got.*field, exact.*field), fmin(roundings, 3 * reference + 0x1p-24));
    };
    one("E", &Results::e, stored);
    one("row sums", &Results::sums, exponent + 0x1p-22);
    one("U", &Results::pull, stored);
    one("dW", &Results::grad, stored);
    one("SGD", &Results::stepped, stored);
}

template <class Number> static void compare_loops(const std::string &set, int64_t n, int64_t c, int64_t d) {
    const bool low = sizeof(Number) == 2;
    const Loops<Number> loops(n, c, d);
    const auto exact = loops.exact(), portable = loops.computed("portable"), got = loops.computed(set);
    const double exponent = LOG2_SCALE * M_LN2 * (sqrt(d) + 1) * 0x1p-24 + (low ? LOG2_SCALE * M_LN2 * 0x1p-9 / d : 0);
    const std::string name = set + (low ? " bfloat16 loop's " : " float32 loop's ");
    auto one = [&](const char *what, Numbers Loops<Number>::Found::*field, double roundings) {
        const double reference = relative_error(portable.*field, exact.*field);
        judge(name + what, relative_error(got.*field, exact.*field), fmin(roundings, 3 * reference + 0x1p-24));
    };
    one("products", &Loops<Number>::Found::products, 0x1p-22);
    one("totals", &Loops<Number>::Found::totals, exponent + 0x1p-22);
    one("log-sum-exps", &Loops<Number>::Found::lse, exponent + 0x1p-22);
    one("pull", &Loops<Number>::Found::pull, 2 * exponent + (low ? 0x1p-8 : 0x1p-22));
    // Of E and of a x̂, each in the precision of the products.
    one("dW", &Loops<Number>::Found::grad, 2 * exponent + (low ? 0x1p-7 : 0x1p-22));
}

// A step of rows whose table and state are bfloat16, rounded with random bits.
struct Rounded {
    static constexpr int64_t ROWS = 200;
    static constexpr uint64_t KEY = 0x123456789abcdef0;
    int64_t d;
    Step step{};
    std::vector<float> grad, room;
    std::vector<bfloat16> stored[3];  // the table and its states

    Rounded(int rule, int64_t d) : d(d), grad(ROWS * d), room(THREADS * 4 * d) {
        for (float &each : grad) each = random_number();
        for (auto &numbers : stored)
            for (int64_t i = 0; i < ROWS * d; i++) numbers.push_back(rounded_to<bfloat16>(fabsf(random_number())));
        step.rule = rule, step.sign = 1, step.lr = RATE, step.first_decay = MOMENTUM, step.size = d, step.key = KEY;
        step.second_decay = 0.99f, step.first_rate = 0.1f, step.second_rate = 0.01f, step.eps = 1e-8f;
        step.first_correction = 0.5f, step.second_correction = 0.25f, step.scratch = room.data();
        for (int k = 0; k < 2 + rule; k++) (k ? step.states[k - 1] : step.table) = {stored[k].data(), nullptr, 1};
    }

    // formats.random_bits
    static uint32_t mixed(uint32_t word) {
        word = (word ^ word >> 16) * 0x7feb352du;
        word = (word ^ word >> 15) * 0x846ca68bu;
        return word ^ word >> 16;
    }
    static uint32_t random_bits(uint32_t row, int64_t column, int stream) {
        uint32_t word = mixed(mixed(mixed(row ^ (uint32_t)KEY) ^ (uint32_t)(KEY >> 32)) + (uint32_t)(column / 2) * 0x9e3779b9u);
        for (; stream; stream--) word = (word ^ word >> 16) * 0xac564b05u;
        return word >> column % 2 * 16 & 0xffff;
    }

    // The share of numbers that are not those of a step in double with the same bits, which differ where a sum of float32 fell to
    // the other side of a rounding; infinity if one is further off.
    double step_by(const std::string &set) {
        std::vector<bfloat16> before[3] = {stored[0], stored[1], stored[2]};
        const Update update{&step, grad.data(), nullptr, d, 0, ROWS};
        symbol<const Kernel *()>("update_kernels_" + set)()[0].function(&update, THREADS);
        int64_t others = 0;
        for (int64_t i = 0; i < ROWS * d; i++) {
            const double g = grad[i], w = read(before[0][i]), m = read(before[1][i]), v = read(before[2][i]);
            double now[3] = {w - step.lr * (step.first_decay * m + g), step.first_decay * m + g, v};
            if (step.rule) {
                now[1] = step.first_decay * m + step.first_rate * g, now[2] = step.second_decay * v + step.second_rate * g * g;
                now[0] = w - step.lr / step.first_correction * now[1] / (sqrt(now[2]) / step.second_correction + step.eps);
            }
            for (int k = 0; k < 2 + step.rule; k++) {
                const float number = (float)now[k];
                uint32_t bits;
                memcpy(&bits, &number, sizeof bits);
                const int off = (int)(bits + random_bits(i / d, i % d, k) >> 16) - stored[k][i].bits;
                if (off > 1 || off < -1) return INFINITY;
                others += off != 0;
            }
        }
        return (double)others / (ROWS * d * (2 + step.rule));
    }
};

static void compare_rounded(const std::string &set) {
    for (int rule : {0, 1})
        for (int64_t d : {37, 64, 76})  // an odd number of columns, whole vectors, and a rest of them
            judge(set + (rule ? " AdamW" : " SGD") + " in bfloat16, D = " + std::to_string(d), Rounded(rule, d).step_by(set), 1e-3);
}

static void elementary(const std::string &set) {
    std::vector<float> x, power, low(1);
    for (uint64_t bits = 0; bits < 1ull << 32; bits += 100003) {
        const uint32_t word = (uint32_t)bits;
        x.push_back(load<float>(&word));
    }
    power.resize(x.size());
    symbol<void(const float *, int64_t, float *)>("exp2_" + set)(x.data(), x.size(), power.data());
    std::vector<bfloat16> rounded(x.size());
    symbol<void(const float *, int64_t, bfloat16 *)>("to_bfloat16_" + set)(x.data(), x.size(), rounded.data());
    double ulps = 0;
    int64_t wrong = 0;
    for (size_t i = 0; i < x.size(); i++) {
        const double exact = ::exp2((double)x[i]);
        const float nearest = (float)exact;
        if (x[i] != x[i]) wrong += power[i] == power[i];
        else if (isinf(nearest)) wrong += x[i] >= 128 && !isinf(power[i]);
        else ulps = fmax(ulps, fabs(power[i] - exact) / (nextafterf(nearest, INFINITY) - nearest));
        bfloat16 expected;
        write(x[i], &expected);
        wrong += x[i] == x[i] ? rounded[i].bits != expected.bits : read(rounded[i]) == read(rounded[i]);
    }
    judge(set + " exp2, ulp", ulps, 2);
    judge(set + " exp2 and bfloat16 at NaN and infinity", wrong, 0);
}

int main(int count, char **arguments) {
    library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
    for (int i = 2; i < count; i++) {
        const std::string set = arguments[i];
        if (!symbol<int()>("supported_" + set)()) return fprintf(stderr, "%s cannot run here\n", set.c_str()), 2;
        elementary(set);
        compare_rounded(set);
        for (int64_t n : {16, 37}) {  // whole panels and tiles, and none
            const int64_t c = n == 16 ? 144 : 151, d = n == 16 ? 64 : 71;
            compare<float>(set, n, c, d), compare<bfloat16>(set, n, c, d);
            compare_loops<float>(set, n, c, d), compare_loops<bfloat16>(set, n, c, d);
        }
    }
    if (failures) fprintf(stderr, "%d results are wrong\n", failures);
    return failures != 0;
}
