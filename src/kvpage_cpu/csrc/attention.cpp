#include "attention.h"

#include "attention_cache.h"
#include "attention_softmax.h"
#include "attention_work.h"

namespace KVP_NS {

#define KVP_MEMBER inline __attribute__((always_inline))

namespace {

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
        : layer_(layer), shape_(layer), scratch_(layer, memory), group_(group_of(layer)),
          dim_(padded(layer.v_head_dim)), elements_(layer.head_dim * LINE / Left<PAIRS>::LINE_VALUES),
          query_bytes_((elements_ + LINE - 1) / LINE * LINE * 4),
          key_stride_(KV_TYPE == KVP_I8 ? 4 * PIECE : shape_.step),
          scoring_{layer.scale, layer.softcap, KV_TYPE == KVP_I8 ? scratch_.k_scales : nullptr,
                   KV_TYPE == KVP_I8 ? scratch_.v_scales : nullptr} {}

    // `following`: the unit that this thread does next, whose first keys are read meanwhile; or null.
    void run(const Unit& unit, const Unit* following) {
        Tile opening;
        if (following) {
            place(*following);
            const Range seen = keys_of(0, rows_);
            find(seen.first / TILE * TILE, seen, opening);
        }
        place(unit);
        for (int block = 0; block < blocks_; block++) read_queries(block);
        const Range seen = keys_of(0, rows_);
        for (int split = seen.first / SPLIT; split * SPLIT < seen.last; split++) {
            attend_split(split, seen, scratch_.split, following ? &opening : nullptr);
            merge(scratch_.split);
        }
        finish();
    }

    void run_split(const Unit& unit, int split, const Partial& part) {
        place(unit);
        const Range seen = keys_of(0, rows_);
        if (split * SPLIT >= seen.last || (split + 1) * SPLIT <= seen.first) return;
        for (int block = 0; block < blocks_; block++) read_queries(block);
        attend_split(split, seen, part, nullptr);
    }

    // What run() makes of the parts that run_split() made.
    void join_splits(const Unit& unit, int number, const SplitWork& work) {
        place(unit);
        const Range seen = keys_of(0, rows_);
        for (int split = seen.first / SPLIT; split * SPLIT < seen.last; split++) merge(work.part(number, split));
        finish();
    }

  private:
    void place(const Unit& unit) {
        unit_ = unit;
        rows_ = unit.queries * group_;
        const int32_t* const starts = layer_.cu_seqlens + unit.row;
        first_token_ = (int64_t)starts[0] + unit.first_query;
        length_ = layer_.seq_lens[unit.row];
        first_position_ = length_ - (starts[1] - starts[0]) + unit.first_query;
        sequence_ = {(const char*)layer_.kv + unit.head * shape_.head,
                     layer_.tables + unit.row * layer_.table_stride, shape_.block, layer_.block_size};
        blocks_ = (rows_ + TALLEST - 1) / TALLEST;
        for (int row = 0; row < rows_; row++) scratch_.total.largest[row] = NOTHING;
    }

    int block_start(int block) const { return rows_ * block / blocks_; }
    char* queries(int block) const { return scratch_.queries + (int64_t)block_start(block) * query_bytes_; }

    // The keys that any of the rows [first, last) sees.
    Range keys_of(int first, int last) const { return keys_of_queries(first / group_, (last - 1) / group_); }

    Range keys_of_queries(int first, int last) const {
        const int from = first_position_ + first, to = first_position_ + last;
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
            const int64_t third = from + 3 * layer_.q_token;  // of the queries that are read after this
            const char* const ahead = (const char*)layer_.q + third * (layer_.io_type == KVP_F32 ? 4 : 2);
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

    // `after`: what is read after the last of these keys; or null.
    void attend_split(int split, Range seen, const Partial& part, const Tile* after) {
        part_ = part;
        for (int row = 0; row < rows_; row++) {
            part_.largest[row] = NOTHING;
            scratch_.weight_sums[row] = zero();
        }
        memset(part_.sums, 0, sizeof(float) * (size_t)rows_ * dim_);
        if (seen.first < split * SPLIT) seen.first = split * SPLIT;
        if (seen.last > (split + 1) * SPLIT) {
            seen.last = (split + 1) * SPLIT;
            after = nullptr;
        }
        Tile tiles[2];
        int current = 0;
        find(seen.first / TILE * TILE, seen, tiles[0]);
        for (int start = tiles[0].start; start < seen.last; start += TILE, current ^= 1) {
            const bool more = start + TILE < seen.last;
            if (more) find(start + TILE, seen, tiles[current ^ 1]);
            if (!more) tiles[current ^ 1] = after ? *after : tiles[current];
            const Tile& next = tiles[current ^ 1];
            stage(tiles[current], next, seen);
            for (int block = 0; block < blocks_; block++) attend_block(block, tiles[current], next);
        }
        for (int row = 0; row < rows_; row++) part_.weights[row] = sum(scratch_.weight_sums[row]);
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
        float* const sums = part_.sums + (int64_t)first * dim_;
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
        float* const largest = part_.largest + first;
        float now[2 * LINE] = {}, change[2 * LINE] = {};
        const int from = pieces.first * PIECE, to = pieces.last * PIECE;
        const Scoring scoring = scoring_;
        const float factor = scoring.factor();
        float* const scores = scratch_.scores;
        int query = first / group_, head = first % group_;
        for (int m = 0; m < rows; m++) {
            const Range seen = keys_of_queries(query, query);
            if (++head == group_) head = 0, query++;
            const float found =
                prepare_row(scoring, scores + m * TILE, from, to, seen.first - start, seen.last - start);
            const float before = largest[m], most = found * factor;
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

    // A split's result joins those before it. A row that saw none of its keys stays as it is, to the bit.
    void merge(const Partial& part) {
        const Partial& total = scratch_.total;
        for (int row = 0; row < rows_; row++) {
            const float largest = part.largest[row], before = total.largest[row];
            if (largest == NOTHING) continue;
            const float most = before > largest ? before : largest;
            const float own = power(largest - most), past = before == NOTHING ? 0.0f : power(before - most);
            float* const sums = total.sums + (int64_t)row * dim_;
            const float* const more = part.sums + (int64_t)row * dim_;
            total.largest[row] = most;
            if (before == NOTHING) total.weights[row] = part.weights[row];
            else total.weights[row] = __builtin_fmaf(part.weights[row], own, total.weights[row] * past);
            for (int i = 0; i < dim_; i += W) {
                const F x = settled(load(more + i));
                store(sums + i, before == NOTHING ? x : fma(x, splat(own), load(sums + i) * splat(past)));
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
            const float largest = scratch_.total.largest[row];
            float share = 0.0f;
            if (largest != NOTHING) {
                float weights = scratch_.total.weights[row];
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
        const float* const sums = scratch_.total.sums + (int64_t)row * dim_;
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

    Partial part_;
    Unit unit_ = {};
    Sequence sequence_ = {};
    int rows_ = 0, blocks_ = 0, first_position_ = 0, length_ = 0;
    int64_t first_token_ = 0;
};

template <int KV_TYPE>
void attend_all(const KvpAttention& layer, char* scratch, char* shared, std::atomic<int>& next, int threads) {
    Attention<KV_TYPE> attention(layer, scratch);
    const SplitWork work(layer, shared, threads);
    Units units(layer);
    Unit unit;
    if (work.splits == 0) {
        // A thread knows its next unit, and reads ahead for it, where there are enough to share them out so.
        const bool ahead = layer.num_rows >= 2 * threads;
        const auto draw = [&](Unit& found) { return units.find(next.fetch_add(1, std::memory_order_relaxed), found); };
        Unit following;
        for (bool more = draw(unit); more; unit = following) {
            const bool known = ahead && draw(following);
            attention.run(unit, known ? &following : nullptr);
            more = known || (!ahead && draw(following));
        }
        return;
    }
    const int parts = work.units * work.splits;
    const auto draw = [&next] { return next.fetch_add(1, std::memory_order_relaxed) % SplitWork::DONE; };
    int index = draw();
    for (; index < parts; index = draw()) {
        const int number = index / work.splits, split = index % work.splits;
        units.find(number, unit);
        attention.run_split(unit, split, work.part(number, split));
        next.fetch_add(SplitWork::DONE, std::memory_order_release);
    }
    if (index >= parts + work.units) return;
    SplitWork::wait_for(next, parts);
    for (Units again(layer); index < parts + work.units; index = draw()) {
        again.find(index - parts, unit);
        attention.join_splits(unit, index - parts, work);
    }
}

}  // namespace

size_t attend_scratch_bytes(const KvpAttention& layer) { return Scratch(layer, nullptr).bytes; }

size_t attend_shared_bytes(int threads) { return threads == 1 ? 0 : (size_t)threads << 21; }

void attend(const KvpAttention& layer, char* scratch, char* shared, std::atomic<int>& next, int threads) {
    if (layer.kv_type == KVP_F32) attend_all<KVP_F32>(layer, scratch, shared, next, threads);
    else if (layer.kv_type == KVP_BF16) attend_all<KVP_BF16>(layer, scratch, shared, next, threads);
    else attend_all<KVP_I8>(layer, scratch, shared, next, threads);
}

}  // namespace KVP_NS
