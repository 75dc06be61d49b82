#include "attention.h"

#include "attention_cache.h"
#include "attention_softmax.h"

namespace KVP_NS {

#define KVP_MEMBER inline __attribute__((always_inline))

namespace {

constexpr int SPLIT = 1024;         // keys of a partial result; partial results are merged in order
constexpr int ROWS_OF_UNIT = 112;   // rows (query, head) of a unit of work, at least one query
constexpr size_t LINE_BYTES = 64;

int group_of(const KvpAttention& layer) { return layer.heads / layer.kv_heads; }

int queries_of_unit(const KvpAttention& layer) {
    const int queries = ROWS_OF_UNIT / group_of(layer);
    return queries > 1 ? queries : 1;
}

// Memory of one thread.
struct Scratch {
    char* queries;         // blocks of rows, each [elements / LINE][rows][LINE]
    float* sums;           // [rows][padded Dv], of the split that is being computed
    float* total_sums;     // the same, of all splits before it
    F* weight_sums;        // [rows] lanes, of the split
    float *largest, *total_largest, *total_weights;  // [rows]
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
        sums = (float*)take(rows * dim * 4);
        total_sums = (float*)take(rows * dim * 4);
        weight_sums = (F*)take(rows * sizeof(F));
        largest = (float*)take(rows * 4);
        total_largest = (float*)take(rows * 4);
        total_weights = (float*)take(rows * 4);
        scores = (float*)take((size_t)TALLEST * TILE * 4);
        weights = take((size_t)TALLEST * TILE * 4);
        staged_keys = take(codes ? (size_t)TILE * layer.head_dim * 2 : 0);
        staged_values = take(TILE * dim * 4);
        k_scales = (float*)take(codes ? TILE * 4 : 0);
        v_scales = (float*)take(codes ? TILE * 4 : 0);
        bytes = (size_t)(at - memory);
    }
};

using ScoreKernel = void (*)(const void*, const char* const*, int64_t, int, const char* const*, float*);
using ValueKernel = void (*)(const Values&, int, const float*, float*);

template <bool PAIRS, int M>
struct KernelsOf {
    static ScoreKernel score(int rows) {
        if (rows == M) return score_keys<PAIRS, M, keys_at_once(M) / W>;
        if constexpr (M > 1) return KernelsOf<PAIRS, M - 1>::score(rows);
        return nullptr;
    }
    static ValueKernel value(int rows, int vectors) {
        if (rows == M) {
            if constexpr (M <= FEW)
                if (vectors == 4) return add_values<PAIRS, M, 4>;
            return vectors == 2 ? add_values<PAIRS, M, 2> : add_values<PAIRS, M, 1>;
        }
        if constexpr (M > 1) return KernelsOf<PAIRS, M - 1>::value(rows, vectors);
        return nullptr;
    }
};

// Some queries of one sequence, with one KV head. Its rows are queries x heads of the group, queries outermost.
struct Unit {
    int row, head, first_query, queries;
};

// Keys [start, start + TILE) of a unit, each piece where the micro-kernels read it.
struct Tile {
    int start;
    const char *keys[PIECES], *values[PIECES];
};

struct Range {
    int first, last;
};

template <int KV_TYPE>
class Attention {
    static constexpr bool PAIRS = KV_TYPE != KVP_F32;
    static constexpr bool NARROW = Left<PAIRS>::LINE_VALUES > LINE;  // the left side of products is in bf16
    using Weight = typename Left<PAIRS>::Value;

  public:
    Attention(const KvpAttention& layer, char* memory)
        : layer_(layer), shape_(layer), scratch_(layer, memory), group_(group_of(layer)), dim_(padded(layer.v_head_dim)),
          elements_(layer.head_dim * LINE / Left<PAIRS>::LINE_VALUES),
          query_bytes_((elements_ + LINE - 1) / LINE * LINE * 4),
          key_stride_(KV_TYPE == KVP_I8 ? 4 * PIECE : shape_.step), scoring_{layer.scale, layer.softcap, KV_TYPE == KVP_I8 ? scratch_.k_scales : nullptr,
                   KV_TYPE == KVP_I8 ? scratch_.v_scales : nullptr} {}

    void run(const Unit& unit) {
        start(unit);
        const Range seen = keys_of(0, rows_);
        for (int split = seen.first / SPLIT; split * SPLIT < seen.last; split++) {
            attend_split(split, seen);
            merge_split();
        }
        finish();
    }

  private:
    void start(const Unit& unit) {
        unit_ = unit;
        rows_ = unit.queries * group_;
        const int32_t* const starts = layer_.cu_seqlens + unit.row;
        first_token_ = (int64_t)starts[0] + unit.first_query;
        length_ = layer_.seq_lens[unit.row];
        first_position_ = length_ - (starts[1] - starts[0]) + unit.first_query;
        sequence_ = {(const char*)layer_.kv + unit.head * shape_.head,
                     layer_.tables + unit.row * layer_.table_stride, shape_.block, layer_.block_size};
        blocks_ = (rows_ + TALLEST - 1) / TALLEST;
        for (int block = 0; block < blocks_; block++) read_queries(block);
        for (int row = 0; row < rows_; row++) scratch_.total_largest[row] = NOTHING;
    }

    int block_start(int block) const { return rows_ * block / blocks_; }
    char* queries(int block) const { return scratch_.queries + (int64_t)block_start(block) * query_bytes_; }

    // The keys that any of the rows [first, last) sees.
    Range keys_of(int first, int last) const {
        const int from = first_position_ + first / group_, to = first_position_ + (last - 1) / group_;
        const int oldest = layer_.window > 0 && from >= layer_.window ? from - layer_.window + 1 : 0;
        return {oldest, to + 1};
    }

    void read_queries(int block) {
        const int first = block_start(block), rows = block_start(block + 1) - first;
        char* const out = queries(block);
        for (int m = 0; m < rows; m++) {
            const int row = first + m;
            const int64_t from = (first_token_ + row / group_) * layer_.q_token +
                                 ((int64_t)unit_.head * group_ + row % group_) * layer_.q_head;
            const char* const ahead = (const char*)layer_.q + (from + 3 * layer_.q_token) * (layer_.io_type == KVP_F32 ? 4 : 2);
            for (int d = 0; d < layer_.head_dim; d += LINE) {
                __builtin_prefetch(ahead + 4 * d);
                const int line = d / Left<PAIRS>::LINE_VALUES, within = d % Left<PAIRS>::LINE_VALUES;
                char* const to = out + ((int64_t)line * rows + m) * LINE_BYTES + within * sizeof(Weight);
                if (layer_.head_dim - d >= LINE) read_query(from + d, LINE, (Weight*)to);
                else read_query(from + d, LINE / 2, (Weight*)to);
            }
        }
    }

    // `count` (16 or 8) numbers of a query, rounded to bf16 where it is multiplied with bf16.
    KVP_MEMBER void read_query(int64_t from, int count, Weight* out) const {
        const bool wide = layer_.io_type == KVP_F32;
        const float* const floats = (const float*)layer_.q + from;
        const uint16_t* const halves = (const uint16_t*)layer_.q + from;
        if constexpr (NARROW) {
            if (!wide) memcpy(out, halves, sizeof(uint16_t) * (size_t)count);
            else if (count % W == 0) store_bf16(out, load(floats));
            else for (int i = 0; i < count; i++) out[i] = to_bf16(floats[i]);
        } else {
            if (wide) memcpy(out, floats, sizeof(float) * (size_t)count);
            else for (int i = 0; i < count; i++) out[i] = from_bf16(halves[i]);
            if (PAIRS && wide) for (int i = 0; i < count; i++) out[i] = from_bf16(to_bf16(floats[i]));
        }
    }

    void attend_split(int split, Range seen) {
        for (int row = 0; row < rows_; row++) {
            scratch_.largest[row] = NOTHING;
            scratch_.weight_sums[row] = zero();
        }
        memset(scratch_.sums, 0, sizeof(float) * (size_t)rows_ * dim_);
        if (seen.first < split * SPLIT) seen.first = split * SPLIT;
        if (seen.last > (split + 1) * SPLIT) seen.last = (split + 1) * SPLIT;
        Tile tiles[2];
        int current = 0;
        find(seen.first / TILE * TILE, seen, tiles[0]);
        for (int start = tiles[0].start; start < seen.last; start += TILE, current ^= 1) {
            const bool more = start + TILE < seen.last;
            if (more) find(start + TILE, seen, tiles[current ^ 1]);
            if (!more) tiles[current ^ 1] = tiles[current];
            const Tile& next = tiles[current ^ 1];
            stage(tiles[current], next, seen);
            for (int block = 0; block < blocks_; block++) attend_block(block, tiles[current], next);
        }
    }

    // Where the tile's pieces lie; those that no query sees are other pieces of it, of which scores are masked.
    void find(int start, Range seen, Tile& tile) const {
        tile.start = start;
        const int first = seen.first / PIECE * PIECE, last = (seen.last - 1) / PIECE * PIECE;
        for (int piece = 0; piece < PIECES; piece++) {
            int token = start + piece * PIECE;
            token = token < first ? first : token > last ? last : token;
            const char* const block = sequence_.block(token);
            const int within = token % sequence_.block_size;
            constexpr int BYTES = KV_TYPE == KVP_F32 ? 4 : KV_TYPE == KVP_BF16 ? 2 : 1;
            tile.keys[piece] = block + within * (KV_TYPE == KVP_I8 ? 2 : 4);
            tile.values[piece] = block + shape_.k + (int64_t)within * layer_.v_head_dim * BYTES;
        }
    }

    // Copies what the micro-kernels cannot read in place: codes, V of odd widths, V beside slots that are not written.
    void stage(Tile& tile, const Tile& next, Range seen) {
        const int first = seen.first > tile.start ? (seen.first - tile.start) / PIECE : 0;
        const int last = seen.last - tile.start < TILE ? (seen.last - tile.start + PIECE - 1) / PIECE : PIECES;
        const int written = length_ - tile.start;
        for (int piece = first; piece < last; piece++) {
            const bool whole = written >= (piece + 1) * PIECE;
            if constexpr (KV_TYPE == KVP_I8) stage_codes(tile, next, piece, written);
            else if (whole && dim_ == layer_.v_head_dim) continue;
            char* const out = scratch_.staged_values + (int64_t)piece * PIECE * dim_ * (PAIRS ? 2 : 4);
            const int count = whole ? PIECE : written - piece * PIECE;
            stage_value_piece<KV_TYPE>(tile.values[piece], next.values[piece], layer_.v_head_dim, dim_, count, out);
            tile.values[piece] = out;
        }
        if constexpr (KV_TYPE == KVP_I8)
            for (int piece = 0; piece < PIECES; piece++)  // the others: anything that is widened
                if (piece < first || piece >= last) tile.keys[piece] = tile.keys[first];
    }

    void stage_codes(Tile& tile, const Tile& next, int piece, int written) {
        const int token = tile.start + piece * PIECE, within = token % sequence_.block_size;
        const float* const scales = (const float*)(sequence_.block(token) + shape_.k + shape_.v) + within;
        float *const k = scratch_.k_scales + piece * PIECE, *const v = scratch_.v_scales + piece * PIECE;
        memcpy(k, scales, sizeof(float) * PIECE);
        for (int i = 0; i < PIECE; i++) v[i] = piece * PIECE + i < written ? scales[sequence_.block_size + i] : 0.0f;
        uint16_t* const out = (uint16_t*)scratch_.staged_keys + (int64_t)piece * PIECE * layer_.head_dim;
        widen_key_piece(tile.keys[piece], next.keys[piece], shape_.step, layer_.head_dim, out);
        tile.keys[piece] = (const char*)out;
    }

    void attend_block(int block, const Tile& tile, const Tile& next) {
        const int first = block_start(block), rows = block_start(block + 1) - first;
        Range seen = keys_of(first, first + rows);
        seen.first = seen.first > tile.start ? seen.first - tile.start : 0;
        seen.last = seen.last - tile.start < TILE ? seen.last - tile.start : TILE;
        if (seen.first >= seen.last) return;
        const Range pieces = {seen.first / PIECE, (seen.last + PIECE - 1) / PIECE};
        score(block, rows, pieces, tile);
        float factors[2 * LINE];
        weigh(first, rows, pieces, tile.start, factors);
        const char* const* const ahead = KV_TYPE == KVP_I8 ? tile.keys : next.keys;  // codes are prefetched by stage()
        const Values values = {scratch_.weights, tile.values, ahead, key_stride_, pieces.first, pieces.last, dim_};
        float* const sums = scratch_.sums + (int64_t)first * dim_;
        for (int column = 0; column < dim_;) {
            int vectors = rows <= FEW ? 4 : 2;
            while (vectors * W > dim_ - column) vectors /= 2;
            KernelsOf<PAIRS, TALLEST>::value(rows, vectors)(values, column, factors, sums);
            column += vectors * W;
        }
    }

    void score(int block, int rows, Range pieces, const Tile& tile) {
        const ScoreKernel kernel = KernelsOf<PAIRS, TALLEST>::score(rows);
        const int at_once = keys_at_once(rows);
        const char *keys[4], *ahead[4];
        for (int key = pieces.first * PIECE / at_once * at_once; key < pieces.last * PIECE; key += at_once) {
            for (int n = 0; n * W < at_once; n++) {
                const int piece = (key + n * W) / PIECE, within = (key + n * W) % PIECE;
                keys[n] = tile.keys[piece] + within * 4;
                ahead[n] = tile.values[piece] + within * elements_ / Left<PAIRS>::STEP * 4;
            }
            kernel(queries(block), keys, key_stride_, elements_, ahead, scratch_.scores + key);
        }
    }

    // Scores of a block become weights relative to each row's largest so far; factors: what the sums of the tiles
    // before are worth now.
    void weigh(int first, int rows, Range pieces, int start, float* factors) {
        float* const largest = scratch_.largest + first;
        float now[2 * LINE] = {}, change[2 * LINE] = {};
        const int from = pieces.first * PIECE, to = pieces.last * PIECE;
        const Scoring scoring = scoring_;
        const float factor = scoring.factor();
        float* const scores = scratch_.scores;
        for (int m = 0; m < rows; m++) {
            const Range seen = keys_of(first + m, first + m + 1);
            const float most = prepare_row(scoring, scores + m * TILE, from, to, seen.first - start, seen.last - start) * factor;
            const float before = largest[m];
            const float after = most > before ? most : before;
            now[m] = after == NOTHING ? 0.0f : after;
            change[m] = before - now[m];
            largest[m] = after;
        }
        for (int m = 0; m < rows; m += W) store(factors + m, power_of_two<false>(load(change + m)));
        F* const sums = scratch_.weight_sums + first;
        Weight* const weights = (Weight*)scratch_.weights;
        for (int m = 0; m < rows; m++) {
            const F sum = weigh_row<PAIRS>(scores + m * TILE, from, to, factor, now[m], scoring.v_scales,
                                           weights + m * PIECE, (int64_t)rows * PIECE);
            sums[m] = fma(sums[m], splat(factors[m]), sum);
        }
    }

    // The split's result joins those before it. A row that saw none of its keys stays as it is, to the bit.
    void merge_split() {
        for (int row = 0; row < rows_; row++) {
            const float largest = scratch_.largest[row], before = scratch_.total_largest[row];
            if (largest == NOTHING) continue;
            const float most = before > largest ? before : largest;
            const float weights = sum(scratch_.weight_sums[row]);
            const float own = power(largest - most), past = before == NOTHING ? 0.0f : power(before - most);
            float* const total = scratch_.total_sums + (int64_t)row * dim_;
            const float* const sums = scratch_.sums + (int64_t)row * dim_;
            scratch_.total_largest[row] = most;
            if (before == NOTHING) scratch_.total_weights[row] = weights;
            else scratch_.total_weights[row] = __builtin_fmaf(weights, own, scratch_.total_weights[row] * past);
            for (int i = 0; i < dim_; i += W) {
                const F part = settled(load(sums + i));
                store(total + i, before == NOTHING ? part : fma(part, splat(own), load(total + i) * splat(past)));
            }
        }
    }

    static float power(float x) {
        float lanes[W];
        store(lanes, power_of_two<false>(splat(x)));
        return lanes[0];
    }

    // Subnormals and -0 become 0: bf16 products do that to sums or not, by how many zero weights follow.
    static F settled(F x) { return choose((Lanes)(abs(x) < splat(1.17549435e-38f)), zero(), x); }

    void finish() {
        for (int row = 0; row < rows_; row++) {
            const int head = unit_.head * group_ + row % group_;
            float largest = scratch_.total_largest[row], share = 0.0f;
            if (largest != NOTHING) {
                float weights = scratch_.total_weights[row];
                share = 1.0f;
                if (layer_.sinks) {
                    const float sink = layer_.sinks[head] * LOG2_E, most = sink > largest ? sink : largest;
                    share = power(largest - most);
                    weights = __builtin_fmaf(weights, share, power(sink - most));
                }
                share /= weights;
            }
            write_result(row, head, share, largest == NOTHING);
        }
    }

    void write_result(int row, int head, float share, bool none) {
        const float* const sums = scratch_.total_sums + (int64_t)row * dim_;
        const int64_t at = (first_token_ + row / group_) * layer_.out_token + head * layer_.out_head;
        const int dim = layer_.v_head_dim;
        for (int i = 0; i < dim; i += W) {
            const F result = none ? zero() : load(sums + i) * splat(share);
            const int count = dim - i < W ? dim - i : W;
            if (layer_.io_type == KVP_F32) {
                float* const out = (float*)layer_.out + at + i;
                if (count == W) store(out, result);
                else store_some(out, result, count);
            } else {
                uint16_t* const out = (uint16_t*)layer_.out + at + i;
                if (count == W) store_bf16(out, result);
                else store_some(out, result, count);
            }
        }
    }

    static void store_some(float* out, F x, int count) {
        float lanes[W];
        store(lanes, x);
        memcpy(out, lanes, sizeof(float) * (size_t)count);
    }

    static void store_some(uint16_t* out, F x, int count) {
        uint16_t lanes[W];
        store_bf16(lanes, x);
        memcpy(out, lanes, sizeof(uint16_t) * (size_t)count);
    }

    const KvpAttention& layer_;
    const CacheShape shape_;
    Scratch scratch_;
    const int group_, dim_;
    const int elements_;        // of a query, as the left side of a product
    const int64_t query_bytes_;
    const int64_t key_stride_;  // bytes from step to step of K, as the micro-kernels read it
    const Scoring scoring_;

    Unit unit_ = {};
    Sequence sequence_ = {};
    int rows_ = 0, blocks_ = 0, first_position_ = 0, length_ = 0;
    int64_t first_token_ = 0;
};

// Walks over the units of a layer: rows from the last to the first (long prompts come last in a step, and go first
// here), a row's last queries first, then its heads.
class Units {
  public:
    explicit Units(const KvpAttention& layer) : layer_(layer), per_unit_(queries_of_unit(layer)), row_(layer.num_rows) {}

    // Unit number `index`, not below that of the call before; false after the last.
    bool find(int index, Unit& unit) {
        while (index >= first_ + count_) {
            if (--row_ < 0) return false;
            first_ += count_;
            const int queries = layer_.cu_seqlens[row_ + 1] - layer_.cu_seqlens[row_];
            count_ = layer_.seq_lens[row_] > 0 ? (queries + per_unit_ - 1) / per_unit_ * layer_.kv_heads : 0;
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

template <int KV_TYPE>
void attend_all(const KvpAttention& layer, char* scratch, std::atomic<int>& next) {
    Attention<KV_TYPE> attention(layer, scratch);
    Units units(layer);
    Unit unit;
    while (units.find(next.fetch_add(1, std::memory_order_relaxed), unit)) attention.run(unit);
}

}  // namespace

size_t attend_scratch_bytes(const KvpAttention& layer) { return Scratch(layer, nullptr).bytes; }

void attend(const KvpAttention& layer, char* scratch, std::atomic<int>& next, int, int) {
    if (layer.kv_type == KVP_F32) attend_all<KVP_F32>(layer, scratch, next);
    else if (layer.kv_type == KVP_BF16) attend_all<KVP_BF16>(layer, scratch, next);
    else attend_all<KVP_I8>(layer, scratch, next);
}

}  // namespace KVP_NS
