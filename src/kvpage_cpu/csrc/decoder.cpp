// Phases of a layer, each ended by a barrier of the team; T tokens in tiles of at most MAX_ROWS:
//   every tile: norm and pack rows | q, k, v | norm, turn and store heads      then all tokens: attention
//   every tile: pack rows | out | norm and pack rows | gate and up | down      (or the router, then each expert so)
// K and V of all tokens of a layer are written before any token attends. Rows are shared out by their number, panels of
// a weight by the products themselves: neither changes a result. The last layer goes on only with wanted tokens.
#include "decoder.h"

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "routing.h"
#include "workspace.h"

namespace KVP_NS {
namespace {

// One thread's part of one step.
class Step {
  public:
    Step(const StepJob& job, int thread, int threads)
        : model_(*job.model), step_(*job.step), team_(*job.team), thread_(thread), threads_(threads),
          space_(*job.model, *job.step, threads, job.memory), scratch_(space_.scratch + thread * space_.scratch_size) {}

    void run() {
        float* const x = step_.hidden;
        embed(x);
        prepare();
        team_.barrier();
        const int wanted = step_.wanted ? step_.num_wanted : step_.num_tokens;
        for (int i = 0; i < model_.num_layers; i++) {
            const KvpLayer& layer = model_.layers[i];
            const bool narrows = i == model_.num_layers - 1 && wanted < step_.num_tokens;
            project(i, x);
            team_.barrier();
            KvpAttention call = attention_of(model_, step_, i);
            call.q = space_.qkv;
            call.q_token = qkv_width(layer);
            if (narrows) narrow(layer, x, call);
            const bool in_place = layer.head_dim == layer.v_head_dim;
            call.out = in_place ? const_cast<void*>(call.q) : space_.attended;
            call.out_token = in_place ? call.q_token : attended_width(layer);
            attend(call, scratch_, space_.shared, space_.units[i], threads_);
            team_.barrier();
            finish(layer, narrows ? space_.last_x : x, wanted_or_all(narrows, wanted), (float*)call.out, call.out_token);
        }
        team_.barrier();
        const bool narrowed = wanted < step_.num_tokens;
        for (int i = thread_; i < wanted; i += threads_) {
            float* const out = x + (int64_t)(narrowed ? step_.wanted[i] : i) * model_.hidden;
            const float* const last = narrowed ? space_.last_x + (int64_t)i * model_.hidden : out;
            normalise(model_.final_norm, model_.final_norm.weight, last, model_.hidden, out);
        }
    }

  private:
    int wanted_or_all(bool narrows, int wanted) const { return narrows ? wanted : step_.num_tokens; }

    void embed(float* x) {
        const int hidden = model_.hidden;
        for (int token = thread_; token < step_.num_tokens; token += threads_) {
            float* const row = x + (int64_t)token * hidden;
            if (model_.table) read_plain(model_.table, model_.table_type, step_.token_ids[token], hidden, row);
            else read_row(model_.packed_table, (int)step_.token_ids[token], row);
            if (model_.embed_scale != 1.0f)
                for (int i = 0; i < hidden; i++) row[i] *= model_.embed_scale;
            if (model_.positions) {
                float learned[256];  // in pieces: a table may be of another type than x
                const int64_t at = step_.positions[token] + model_.position_offset;
                const size_t size = model_.positions_type == KVP_F32 ? 4 : 2;
                const char* p = (const char*)model_.positions + at * hidden * (int64_t)size;
                for (int start = 0; start < hidden; start += 256) {
                    const int n = hidden - start < 256 ? hidden - start : 256;
                    read_plain(p + start * (int64_t)size, model_.positions_type, 0, n, learned);
                    join(row + start, learned, n, 1.0f);
                }
            }
        }
    }

    // Thread 0: counters of attention, and where the wanted rows of each sequence begin.
    void prepare() {
        if (thread_ != 0) return;
        for (int i = 0; i < model_.num_layers; i++) space_.units[i].store(0, std::memory_order_relaxed);
        const KvpGroup& group = step_.groups[0];
        int found = 0;
        space_.last_starts[0] = 0;
        for (int row = 0; row < group.num_rows; row++) {
            const int last = group.cu_seqlens[row + 1] - 1;
            const bool has_tokens = group.cu_seqlens[row + 1] > group.cu_seqlens[row];
            if (step_.wanted && has_tokens && found < step_.num_wanted && step_.wanted[found] == last) found++;
            space_.last_starts[row + 1] = found;
        }
    }

    // y = linear(..) of several layers with the same input, one behind another in target.y. `pack` packs this thread's
    // rows, once for all layers that read them alike. The results are complete after the next barrier.
    template <class Pack>
    void multiply_each(const KvpLinear* linears, int num_linears, int count, Target target, const Pack& pack) {
        Rows rows{};
        for (int i = 0; i < num_linears; i++) {
            if (i == 0 || !same_rows(linears[i - 1], linears[i])) {
                if (i > 0) team_.barrier();  // the product before still reads the rows
                rows = rows_at(linears[i], count, space_.rows);
                pack(rows);
                team_.barrier();
            }
            multiply(linears[i], rows, target, scratch_, thread_, threads_);
            target.y = target.y ? target.y + linears[i].outputs : nullptr;
        }
    }

    // norm(x) of a tile into packed rows.
    void pack_normed(const KvpNorm& norm, const float* x, const Rows& rows) {
        const int hidden = model_.hidden;
        float* const own = (float*)scratch_;
        for (int r = thread_; r < rows.count; r += threads_) {
            const float* row = x + (int64_t)r * hidden;
            if (norm.kind != KVP_NO_NORM) {
                normalise(norm, norm.weight, row, hidden, own);
                row = own;
            }
            pack_row(rows, hidden, r, row);
        }
    }

    // q, k and v of all tokens: k and v into the cache, q stays in qkv.
    void project(int index, const float* x) {
        const KvpLayer& layer = model_.layers[index];
        const int tiles = (step_.num_tokens + MAX_ROWS - 1) / MAX_ROWS;
        for (int tile = 0; tile < tiles; tile++) {
            const int start = (int)((int64_t)step_.num_tokens * tile / tiles);
            const int count = (int)((int64_t)step_.num_tokens * (tile + 1) / tiles) - start;
            Target target;
            target.y = space_.qkv + start * qkv_width(layer);
            target.stride = qkv_width(layer);
            multiply_each(layer.qkv, layer.num_qkv, count, target, [&](const Rows& rows) {
                pack_normed(layer.mixer_before, x + (int64_t)start * model_.hidden, rows);
            });
            team_.barrier();
            const int end = start + count * (thread_ + 1) / threads_;  // runs: neighbours share cache lines of K
            for (int token = start + count * thread_ / threads_; token < end; token++) store_heads(index, token);
        }
    }

    void store_heads(int index, int token) {
        const KvpLayer& layer = model_.layers[index];
        const KvpAttention call = attention_of(model_, step_, index);
        float* const q = space_.qkv + token * qkv_width(layer);
        float* const k = q + q_width(layer);
        const float* const v = k + (int64_t)layer.kv_heads * layer.head_dim;
        if (layer.qk_norm != KVP_NORM_OFF) {
            normalise_heads(layer.q_norm, layer.qk_norm, q, layer.heads, layer.head_dim);
            normalise_heads(layer.k_norm, layer.qk_norm, k, layer.kv_heads, layer.head_dim);
        }
        if (layer.rotary_dim > 0) {
            const int64_t at = step_.rope_positions[token] * (layer.rotary_dim / 2);
            const float *const cos = step_.cos[index] + at, *const sin = step_.sin[index] + at;
            for (int head = 0; head < layer.heads; head++)
                rotate(q + (int64_t)head * layer.head_dim, cos, sin, layer.rotary_dim, layer.interleaved);
            for (int head = 0; head < layer.kv_heads; head++)
                rotate(k + (int64_t)head * layer.head_dim, cos, sin, layer.rotary_dim, layer.interleaved);
        }
        const int64_t slot = step_.groups[layer.kv_group].slots[token];
        if (slot < 0) return;
        for (int head = 0; head < layer.kv_heads; head++)
            write_head(call, slot, head, k + (int64_t)head * layer.head_dim, v + (int64_t)head * layer.v_head_dim);
    }

    // From here on only wanted tokens: their x and q move together, and each sequence has at most one query.
    void narrow(const KvpLayer& layer, const float* x, KvpAttention& call) {
        const int64_t hidden = model_.hidden, width = q_width(layer);
        for (int i = thread_; i < step_.num_wanted; i += threads_) {
            const int64_t token = step_.wanted[i];
            memcpy(space_.last_x + i * hidden, x + token * hidden, sizeof(float) * (size_t)hidden);
            memcpy(space_.last_q + i * width, space_.qkv + token * qkv_width(layer), sizeof(float) * (size_t)width);
        }
        team_.barrier();
        call.q = space_.last_q;
        call.q_token = width;
        call.cu_seqlens = space_.last_starts;
    }

    // What follows attention, tile by tile: x [count, H] becomes the layer's result.
    void finish(const KvpLayer& layer, float* x, int count, const float* attended, int64_t stride) {
        const int tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
        for (int tile = 0; tile < tiles; tile++) {
            const int start = (int)((int64_t)count * tile / tiles);
            const int rows = (int)((int64_t)count * (tile + 1) / tiles) - start;
            finish_tile(layer, x + (int64_t)start * model_.hidden, rows, attended + start * stride, stride);
        }
    }

    void finish_tile(const KvpLayer& layer, float* x, int count, const float* attended, int64_t stride) {
        const int hidden = model_.hidden;
        const Rows mixer_rows = rows_at(layer.out, count, space_.rows);
        for (int r = thread_; r < count; r += threads_)
            pack_row(mixer_rows, layer.out.inputs, r, attended + (int64_t)r * stride);
        team_.barrier();
        const bool joins = !layer.parallel && layer.mixer_after.kind == KVP_NO_NORM;
        multiply(layer.out, mixer_rows, branch(layer, joins ? x : space_.mixed, joins), scratch_, thread_, threads_);
        team_.barrier();
        if (!joins) {
            for (int r = thread_; r < count; r += threads_) {
                float* const mixed = space_.mixed + (int64_t)r * hidden;
                after(layer.mixer_after, mixed);
                if (!layer.parallel) join(x + (int64_t)r * hidden, mixed, hidden, layer.multiplier);
            }
        }
        const bool same = layer.parallel && layer.ffn_before.kind == KVP_NO_NORM;
        const KvpNorm& before = same ? layer.mixer_before : layer.ffn_before;
        const bool ends = !layer.parallel && layer.ffn_after.kind == KVP_NO_NORM && !layer.mixture;
        if (layer.mixture) {
            mix(*layer.mixture, before, x, count);
        } else {
            const Rows inner_rows =
                feed(layer.mlp, count, [&](const Rows& rows) { pack_normed(before, x, rows); });
            multiply(layer.mlp.down, inner_rows, branch(layer, ends ? x : space_.fed, ends), scratch_, thread_,
                     threads_);
        }
        team_.barrier();
        if (ends) return;
        for (int r = thread_; r < count; r += threads_) {
            float* const fed = space_.fed + (int64_t)r * hidden;
            after(layer.ffn_after, fed);
            if (layer.parallel) join(fed, space_.mixed + (int64_t)r * hidden, hidden, 1.0f);
            join(x + (int64_t)r * hidden, fed, hidden, layer.multiplier);
        }
        // The next reader of these rows of x is the same thread, or waits at a barrier first.
    }

    // The inner activations of the feed-forward, packed for `down`; `pack` packs this thread's rows of its input. Ends
    // with a barrier.
    template <class Pack>
    Rows feed(const KvpMlp& mlp, int count, const Pack& pack) {
        const Rows inner_rows = rows_at(mlp.down, count, space_.inner_rows);
        const int inner = mlp.down.inputs;
        const Activation activation = (Activation)mlp.activation;
        const bool gates = gates_in_product(mlp), flows = flows_into_down(mlp);
        const int64_t stride = gates || !mlp.gated ? inner : 2 * (int64_t)inner;
        Target target;
        target.store = gates ? Store::gated : Store::set;
        target.activation = gates || !mlp.gated ? activation : Activation::none;
        if (flows) {
            target.next = &inner_rows;
        } else {
            target.y = space_.inner;
            target.stride = stride;
        }
        multiply_each(mlp.up, mlp.num_up, count, target, pack);
        team_.barrier();
        if (flows) return inner_rows;
        for (int r = thread_; r < count; r += threads_) {
            float* const row = space_.inner + r * stride;
            if (mlp.gated && !gates) {
                activate(activation, row, inner);
                for (int i = 0; i < inner; i++) row[i] *= row[inner + i];
            }
            pack_row(inner_rows, inner, r, row);
        }
        team_.barrier();
        return inner_rows;
    }

    // A mixture of experts over a tile: its sum into `fed`. Experts follow each other by number, so a token's sum has
    // one order whatever else is in the batch.
    void mix(const KvpMixture& mixture, const KvpNorm& before, const float* x, int count) {
        const int hidden = model_.hidden;
        for (int r = thread_; r < count; r += threads_) {
            float* const row = space_.normed + (int64_t)r * hidden;
            if (before.kind == KVP_NO_NORM) memcpy(row, x + (int64_t)r * hidden, sizeof(float) * (size_t)hidden);
            else normalise(before, before.weight, x + (int64_t)r * hidden, hidden, row);
            memset(space_.fed + (int64_t)r * hidden, 0, sizeof(float) * (size_t)hidden);
        }
        project_normed(mixture.router, count, space_.scores, mixture.num_experts);
        for (int r = thread_; r < count; r += threads_)
            route(mixture, space_.scores + (int64_t)r * mixture.num_experts, r, space_.choices + r * mixture.top_k);
        team_.barrier();
        if (thread_ == 0)
            sort_by_expert(mixture, space_.choices, count * mixture.top_k, space_.expert_starts, space_.by_expert);
        team_.barrier();
        for (int expert = 0; expert < mixture.num_experts; expert++) {
            const int first = space_.expert_starts[expert], chosen = space_.expert_starts[expert + 1] - first;
            if (chosen > 0) run_expert(mixture.experts[expert], space_.by_expert + first, chosen);
        }
        if (!mixture.has_shared) return;
        if (mixture.has_shared_gate) project_normed(mixture.shared_gate, count, space_.gates, 1);
        run_expert(mixture.shared, nullptr, count, mixture.has_shared_gate);
    }

    // y [count, outputs] of the mixture's input; begins and ends with a barrier.
    void project_normed(const KvpLinear& linear, int count, float* y, int64_t stride) {
        const Rows rows = rows_at(linear, count, space_.rows);
        team_.barrier();
        for (int r = thread_; r < count; r += threads_)
            pack_row(rows, model_.hidden, r, space_.normed + (int64_t)r * model_.hidden);
        team_.barrier();
        Target target;
        target.y = y;
        target.stride = stride;
        multiply(linear, rows, target, scratch_, thread_, threads_);
        team_.barrier();
    }

    // One expert on the tokens that take it (null: all, with weight 1 or by their gate), added to `fed`; ends with a
    // barrier.
    void run_expert(const KvpMlp& expert, const Choice* chosen, int count, bool gated = false) {
        const int64_t hidden = model_.hidden;
        const Rows inner_rows = feed(expert, count, [&](const Rows& rows) {
            for (int i = thread_; i < count; i += threads_)
                pack_row(rows, model_.hidden, i, space_.normed + (chosen ? chosen[i].row : i) * hidden);
        });
        Target target;
        target.y = space_.expert_out;
        target.stride = hidden;
        multiply(expert.down, inner_rows, target, scratch_, thread_, threads_);
        team_.barrier();
        for (int i = thread_; i < count; i += threads_) {
            const float weight = chosen ? chosen[i].weight : gated ? sigmoid(space_.gates[i]) : 1.0f;
            join(space_.fed + (chosen ? chosen[i].row : i) * hidden, space_.expert_out + i * hidden, (int)hidden, weight);
        }
        team_.barrier();
    }

    Target branch(const KvpLayer& layer, float* y, bool joins) const {
        Target target;
        target.store = joins ? Store::add : Store::set;
        target.multiplier = joins ? layer.multiplier : 1.0f;
        target.y = y;
        target.stride = model_.hidden;
        return target;
    }

    void after(const KvpNorm& norm, float* row) const {
        if (norm.kind != KVP_NO_NORM) normalise(norm, norm.weight, row, model_.hidden, row);
    }

    const KvpModel& model_;
    const KvpStep& step_;
    Team& team_;
    const int thread_, threads_;
    const Workspace space_;
    char* const scratch_;
};

}  // namespace

size_t step_bytes(const KvpModel& model, const KvpStep& step, int threads) {
    return Workspace(model, step, threads, nullptr).bytes;
}

void step_job(void* job, int thread, int threads) { Step(*(const StepJob*)job, thread, threads).run(); }

size_t logits_bytes(const KvpModel& model, int64_t rows, int threads) {
    const int tile = rows < MAX_ROWS ? (int)rows : MAX_ROWS;
    return rows_bytes(model.head, tile) + (size_t)threads * multiply_scratch_bytes();
}

void logits_job(void* argument, int thread, int threads) {
    const LogitsJob& job = *(const LogitsJob*)argument;
    const KvpModel& model = *job.model;
    const int tile = job.rows < MAX_ROWS ? (int)job.rows : MAX_ROWS;
    char* const scratch = job.memory + rows_bytes(model.head, tile) + thread * multiply_scratch_bytes();
    for (int64_t start = 0; start < job.rows; start += tile) {
        const int count = job.rows - start < tile ? (int)(job.rows - start) : tile;
        const Rows rows = rows_at(model.head, count, job.memory);
        for (int r = thread; r < count; r += threads)
            pack_row(rows, model.hidden, r, job.hidden + (start + r) * model.hidden);
        job.team->barrier();
        Target target;
        target.y = job.logits + start * model.vocab;
        target.stride = model.vocab;
        multiply(model.head, rows, target, scratch, thread, threads);
        job.team->barrier();
        if (model.head_scale == 1.0f && model.head_softcap == 0.0f) continue;
        for (int r = thread; r < count; r += threads) {
            float* const row = target.y + (int64_t)r * model.vocab;
            for (int i = 0; i < model.vocab; i++) row[i] *= model.head_scale;
            if (model.head_softcap > 0.0f) soft_cap(row, model.vocab, model.head_softcap);
        }
    }
}

}  // namespace KVP_NS
