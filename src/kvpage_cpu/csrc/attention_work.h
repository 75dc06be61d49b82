// How attention is cut into units of work, and the memory that threads do them in.
#pragma once
#include <sched.h>

#include <atomic>

#include "attention.h"
#include "attention_cache.h"

namespace KVP_NS {

namespace {

constexpr int SPLIT = 1024;         // keys of a partial result; partial results are merged in order
constexpr int ROWS_OF_UNIT = 112;   // rows (query, head) of a unit of work, at least one query
constexpr size_t LINE_BYTES = 64;

int group_of(const KvpAttention& layer) { return layer.heads / layer.kv_heads; }

int queries_of_unit(const KvpAttention& layer) {
    const int queries = ROWS_OF_UNIT / group_of(layer);
    return queries > 1 ? queries : 1;
}

// Units of one sequence.
int units_of(const KvpAttention& layer, int row) {
    const int queries = layer.cu_seqlens[row + 1] - layer.cu_seqlens[row], per_unit = queries_of_unit(layer);
    return layer.seq_lens[row] > 0 ? (queries + per_unit - 1) / per_unit * layer.kv_heads : 0;
}

// What some keys give to the rows of a unit: sums of V under weights 2^(score - largest), and the sum of these weights.
struct Partial {
    float* sums = nullptr;                         // [rows][padded Dv]
    float *largest = nullptr, *weights = nullptr;  // [rows]

    Partial() = default;
    Partial(char* memory, size_t rows, size_t dim)
        : sums((float*)memory), largest(sums + rows * dim), weights(largest + rows) {}

    static size_t bytes(size_t rows, size_t dim) { return rows * (dim + 2) * sizeof(float); }
};

// Memory of one thread.
struct Scratch {
    char* queries;         // blocks of rows, each [elements / LINE][rows][LINE]
    Partial split, total;  // of the keys that are being computed, and of all before them
    F* weight_sums;        // [rows] lanes, of the split
    float* scores;         // [TALLEST][TILE]
    char* weights;         // [PIECES][TALLEST][PIECE]
    char* staged_keys;     // int8: [PIECES][D / 2][PIECE] pairs
    char* staged_values;   // [PIECES][PIECE][padded Dv]
    float *k_scales, *v_scales;  // int8: [TILE]
    size_t bytes;

    Scratch(const KvpAttention& layer, char* memory) {
        const size_t rows = (size_t)queries_of_unit(layer) * group_of(layer), dim = padded(layer.v_head_dim);
        const bool codes = layer.kv_type == KVP_I8;
        char* at = memory;
        const auto take = [&at](size_t size) {
            char* const part = at;
            at += (size + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
            return part;
        };
        queries = take(rows * (((size_t)layer.head_dim + LINE - 1) / LINE * LINE) * 4);
        split = Partial(take(Partial::bytes(rows, dim)), rows, dim);
        total = Partial(take(Partial::bytes(rows, dim)), rows, dim);
        weight_sums = (F*)take(rows * sizeof(F));
        scores = (float*)take((size_t)TALLEST * TILE * 4);
        weights = take((size_t)TALLEST * TILE * 4);
        staged_keys = take(codes ? (size_t)TILE * layer.head_dim * 2 : 0);
        staged_values = take(TILE * dim * 4);
        k_scales = (float*)take(codes ? TILE * 4 : 0);
        v_scales = (float*)take(codes ? TILE * 4 : 0);
        bytes = (size_t)(at - memory);
    }
};

// Some queries of one sequence, with one KV head. Its rows are queries x heads of the group, queries outermost.
struct Unit {
    int row, head, first_query, queries;
};

// Walks over the units of a layer: rows from the last to the first (long prompts come last in a step, and go first
// here), a row's last queries first, then its heads.
class Units {
  public:
    explicit Units(const KvpAttention& layer)
        : layer_(layer), per_unit_(queries_of_unit(layer)), row_(layer.num_rows) {}

    // Unit number `index`, not below that of the call before; false after the last.
    bool find(int index, Unit& unit) {
        while (index >= first_ + count_) {
            if (--row_ < 0) return false;
            first_ += count_;
            count_ = units_of(layer_, row_);
        }
        const int queries = layer_.cu_seqlens[row_ + 1] - layer_.cu_seqlens[row_];
        const int tile = (queries + per_unit_ - 1) / per_unit_ - 1 - (index - first_) / layer_.kv_heads;
        unit.row = row_;
        unit.head = (index - first_) % layer_.kv_heads;
        unit.first_query = tile * per_unit_;
        unit.queries = queries - unit.first_query < per_unit_ ? queries - unit.first_query : per_unit_;
        return true;
    }

  private:
    const KvpAttention& layer_;
    const int per_unit_;
    int row_, first_ = 0, count_ = 0;
};

// Few units of long sequences: each split of their keys becomes work of its own, and its result waits in memory that
// the threads share until all splits are done. Then the units' results are put together, in the same order and by the
// same sums as where one thread does all splits.
struct SplitWork {
    int units = 0, splits = 0;  // splits of the longest unit; 0: units are not split
    char* shared = nullptr;
    size_t rows = 0, dim;

    SplitWork(const KvpAttention& layer, char* memory, int threads)
        : shared(memory), dim((size_t)padded(layer.v_head_dim)) {
        if (threads == 1) return;
        int longest = 0, widest = 0;
        for (int row = 0; row < layer.num_rows && units < 4 * threads; row++) {
            const int queries = layer.cu_seqlens[row + 1] - layer.cu_seqlens[row];
            units += units_of(layer, row);
            if (queries > 0 && layer.seq_lens[row] > longest) longest = layer.seq_lens[row];
            widest = queries > widest ? queries : widest;
        }
        rows = (size_t)(widest < queries_of_unit(layer) ? widest : queries_of_unit(layer)) * group_of(layer);
        const int most = (longest + SPLIT - 1) / SPLIT;
        const bool few = units < 4 * threads && most > 1 && (int64_t)units * most < MOST_PARTS;
        if (few && (size_t)units * most * part_bytes() <= attend_shared_bytes(threads)) splits = most;
    }

    size_t part_bytes() const { return (Partial::bytes(rows, dim) + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES; }

    Partial part(int unit, int split) const {
        return Partial(shared + ((size_t)unit * splits + split) * part_bytes(), rows, dim);
    }

    // One counter has both: draws in its low bits, parts that are done above.
    static constexpr int DONE = 1 << 20;
    static constexpr int MOST_PARTS = 1 << 11;

    static void wait_for(const std::atomic<int>& counter, int parts) {
        for (int round = 0; counter.load(std::memory_order_acquire) / DONE < parts; round++) {
            if (round < 1000) relax();
            else sched_yield();
        }
    }

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

}  // namespace

}  // namespace KVP_NS
