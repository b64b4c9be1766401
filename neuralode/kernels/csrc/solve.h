// A whole solve on the CPU, forwards and backwards, for a program and an explicit Runge-Kutta method.
//
// The rows of the state are dealt out in tiles. Where all samples share their steps, the threads take each step
// together, and meet once a step to agree on its error. Where the steps are given, or each sample has its own, a tile
// goes through the whole solve by itself. The backward pass takes one tile after the other in any case.
#pragma once
#include <chrono>
#include <memory>
#include <vector>

#include "arena.h"
#include "problem.h"
#include "program.h"

namespace neuralode::PRECISION {

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Feature d of row l of a tile.
inline T& entry(Vec* x, int d, int l) { return ((T*)x)[d * TILE + l]; }
inline T entry(const Vec* x, int d, int l) { return ((const T*)x)[d * TILE + l]; }

// The step of every row of a tile.
struct Steps {
    double t[TILE], h[TILE];
    Vec size[VECS];  // h again
    void set(double t_all, double h_all) {
        for (int l = 0; l < TILE; l++) t[l] = t_all, h[l] = h_all;
        spread();
    }
    void spread() {
        for (int l = 0; l < TILE; l++) ((T*)size)[l] = T(h[l]);
    }
};

// An accepted step of a tile; rows that rejected it, or had ended, have h = 0.
struct Record {
    double t[TILE], h[TILE];
    int32_t first[TILE], last[TILE];  // the output times in it
    Vec* y;                           // the state at its start
    Vec* slots;                       // its evaluations, or nothing where they are to be made again
    uint32_t moved;                   // a bit a row
};

struct Tile {
    Vec *y = nullptr, *y1 = nullptr;
    Vec* k[MOST_SLOPES] = {};
    Vec* pending = nullptr;  // slots of the step that is being tried
    Vec* begin = nullptr;    // slot of the first evaluation, if it is kept
    std::vector<Record*> records;
    std::vector<Progress> progress;  // of each row, where rows have their own
    int64_t evaluations = 0, products = 0;
};

// The gradient of the start and the size of a step, for each row.
struct TimeGradient {
    double start[TILE], size[TILE];
};

// One thread's memory.
struct Worker {
    Arena scratch, kept;
    Vec* slots = nullptr;  // one for each slope
    Vec* spare = nullptr;
    Tile tile;             // state and slopes of tiles that go through the whole solve at once
    int next_tile = -1;
    bool inside = false;   // whether the pass was paused within that tile
    int64_t taken = 0;     // steps of it, tried or of the grid
    int32_t next = 1;      // and the output time that comes next on the grid
    // for the backward pass:
    int next_back = -1;
    Vec* adjoints = nullptr;
    Gradients gradients;
    Vec *lambda = nullptr, *mu = nullptr;  // adjoints of the state and of the slope at the end of a step
    Vec *to_start = nullptr, *to_end = nullptr, *cotangent = nullptr;
    Vec* k[MOST_SLOPES] = {};       // adjoints of the slopes
    Vec* values[MOST_SLOPES] = {};  // the slopes
    Vec* stages = nullptr;          // slots of a step that is evaluated again
    Vec* ends[2] = {};
    std::vector<double> times;      // gradient of the output times
};

class Solve : public Solver {
  public:
    explicit Solve(const Problem& problem);
    bool forward(double seconds) override;
    bool backward(const void* grad_ys, void* grad_y0, void* const* grad_tensors, double* grad_times, double seconds,
                  int64_t pass, int most_threads) override;

  private:
    Problem p;
    Method m;
    Program program;
    std::vector<Tensor> tensors;
    std::vector<Vec*> row_gradients;
    std::vector<Tile> state;
    std::vector<std::unique_ptr<Worker>> workers;
    std::vector<double> parts[2];  // what the tiles add to the norms, of this meeting and of the last
    std::vector<double> time_rows;
    Arena arena;
    Team team;
    Progress common;
    bool shared, begun = false, paused = false;
    std::atomic<bool> stop{false};
    std::atomic<int> failed{0};
    int64_t tiles, last_pass = 0;
    int threads;
    double deadline = 0;
    const T* cotangents = nullptr;
    T* to_y0 = nullptr;

    // tensors and rows
    void load_tensors();
    int valid(int64_t tile) const;
    void load(int64_t tile, const T* from, int width, Vec* to) const;
    void store(int64_t tile, const Vec* from, T* to) const;
    void store(int64_t tile, const Vec* from, int width, T* to) const;
    const double* times(int64_t row) const;
    const double* times(int64_t tile, int l) const;
    double direction(int64_t row = 0) const;
    int64_t first_tile(int index) const;

    // evaluations
    Vec* slot(Vec* slots, int i) const;
    void prepare(Worker& w);
    void prepare(Arena& from, Tile& tile);
    void set_time(Vec* slot, const Steps& steps, double c) const;
    void evaluate_slot(int64_t index, Vec* slot, const Steps& steps, double c, Vec* k) const;
    void advance(const Vec* y, Vec* const* k, const double* weights, int count, const Vec* size, Vec* out) const;
    void take_stages(int64_t index, const Vec* y, Vec* const* k, const Steps& steps, Vec* slots) const;
    void begin(Worker& w, int64_t index, Tile& tile);
    void compare(int64_t index, const Vec* k);
    bool affords(const Worker& w, int64_t bytes) const;
    void fail(Status status);

    // one step
    void attempt(Worker& w, int64_t index, Tile& tile, const Steps& steps);
    void take_end(int64_t index, Tile& tile, const Steps& steps, Vec* slots);
    void square_errors(const Tile& tile, const Steps& steps, T (*sums)[TILE]) const;
    int group_size(int g) const;
    double norm(const double* sums, int64_t rows) const;
    void commit(Worker& w, int64_t index, Tile& tile, const Steps& steps, const int32_t* first, const int32_t* last,
                uint32_t moved, bool ends);
    void keep_rows(Vec* to, const Vec* from, uint32_t moved) const;
    bool at_end(const double* ts, int j, double t, double h) const;
    template <typename Use>
    void each_reading(int64_t index, int l, double t, double h, int first, int last, Use use) const;
    void read_row(int64_t index, int l, const Tile& tile, const Steps& steps, int first, int last);
    void read_outputs(int64_t index, const Tile& tile, const Steps& steps, const int32_t* first, const int32_t* last);
    void read(const Reading& r, const Vec* y, const Vec* y1, Vec* const* k, const Vec* size, Vec* out) const;

    // the forward pass where samples share adaptive steps
    void add_parts(const std::vector<double>& part, int which, double* sums) const;
    void put_part(std::vector<double>& part, int64_t index, int which, T (*sums)[TILE]) const;
    void squares(const Vec* x, const Vec* y, T (*sums)[TILE]) const;
    void change_of_slope(Worker& w, int64_t index, Tile& tile, const Steps& steps);
    void begin_shared(Worker& w, int64_t from, int64_t to, Progress& progress);
    void forward_shared(int index);
    void accept_shared(Worker& w, int64_t from, int64_t to, Progress& progress, const Steps& steps, double h,
                       double wanted);
    bool hopeless(const Progress& progress, double h, int64_t from, int64_t to) const;
    bool finite(const Vec* x) const;

    // the forward pass of tiles that have steps of their own, or given ones
    void forward_tiles(int index);
    bool through_grid(Worker& w, int64_t index, Tile& tile);
    void begin_rows(Worker& w, int64_t index, Tile& tile);
    bool through_rows(Worker& w, int64_t index, Tile& tile);
    void commit_rows(Worker& w, int64_t index, Tile& tile, const Steps& steps, const int32_t* first,
                     const int32_t* last, uint32_t moved, uint32_t sound);
    bool row_finite(const Tile& tile, int l) const;
    bool lost(const Tile& tile, int l, const Progress& r, double h, int64_t index) const;
    void first_steps(Worker& w, int64_t index, Tile& tile);
    void finish_report();

    // the backward pass: the exact gradient of the steps that were taken
    void prepare_backward(Worker& w);
    static int64_t sums_of(const Tensor& tensor);
    void backward_tiles(int index);
    void zero(Vec* x) const;
    void add(const Vec* x, Vec* to) const;
    void add(double weight, const Vec* x, Vec* to) const;
    void add(double weight, const Vec* size, const Vec* x, Vec* to) const;
    const Vec* reverse_slot(Worker& w, int64_t index, Tile& tile, const Vec* slot, const Vec* slope, const Vec* next);
    const Vec* start_slot(int64_t index, Tile& tile, int64_t n, const Vec* y, const Steps& steps, Vec* room) const;
    bool end_kept(const Tile& tile, int64_t n) const;
    void backward_tile(Worker& w, int64_t index);
    void pass_by(uint32_t moved, Vec* from, Vec* to) const;
    void load_cotangent(int64_t index, int j, Vec* to) const;
    bool pull_outputs(Worker& w, int64_t index, const Record& r, const Vec* y1, TimeGradient& dt);
    bool pull_row(Worker& w, int64_t index, int l, const Record& r, const Vec* y1, TimeGradient& dt);

    // gradients of the times
    double* time_total(Worker& w, int64_t index, int l);
    void collect_slopes(Worker& w, int64_t index, Tile& tile, int64_t n, const Steps& steps, const Vec* start,
                        const Vec* slots, const Vec* y1);
    void pull_time(Worker& w, TimeGradient& dt, double c) const;
    void pull_size(TimeGradient& dt, const Vec* adjoint, Vec* const* k, const double* weights, int count) const;
    void pull_reading(Worker& w, int64_t index, int l, const Record& r, const Vec* y1, int j, const Reading& reading,
                      const Slope& slope, double theta, const T* g, int stride, TimeGradient& dt);
    void give_times(Worker& w, int64_t index, const Record& r, const TimeGradient& dt);
    void collect(void* const* grad_tensors, double* grad_times);
};

inline Solve::Solve(const Problem& problem) : p(problem), m(problem.method) {
    program.slot = p.slot, program.width = p.width, program.output = p.output, program.time = p.time;
    program.operation_count = p.operation_count, program.cleared_count = p.cleared_count;
    program.operations = p.operations, program.constants = p.constants, program.cleared = p.cleared;
    tiles = (p.rows + TILE - 1) / TILE;
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(p.threads, tiles));
    shared = m.adaptive && !p.per_sample;
    load_tensors();
    state.resize(tiles);
    for (int i = 0; i < threads; i++) workers.emplace_back(new Worker);
    for (auto& part : parts) part.resize(tiles * p.groups * 2);
}

inline bool Solve::forward(double seconds) {
    deadline = now() + seconds;
    paused = stop = false;
    team.run(p.runtime, threads, [this](int index) { shared ? forward_shared(index) : forward_tiles(index); });
    if (!paused) finish_report();
    return paused;
}

inline bool Solve::backward(const void* grad_ys, void* grad_y0, void* const* grad_tensors, double* grad_times,
                            double seconds, int64_t pass, int most_threads) {
    deadline = now() + seconds;
    const bool begins = pass != last_pass;
    last_pass = pass;
    if (begins) {
        for (auto& w : workers) w->next_back = -1;
        for (Tile& tile : state) tile.products = 0;
    }
    if (begins && p.times_move && p.times_per_sample) time_rows.assign(p.rows * p.times, 0.0);
    paused = stop = false;
    cotangents = (const T*)grad_ys, to_y0 = (T*)grad_y0;
    team.run(p.runtime, std::min(threads, most_threads), [this](int index) { backward_tiles(index); });
    if (!paused) collect(grad_tensors, grad_times);
    return paused;
}

}  // namespace neuralode::PRECISION
