// Memory of one step: what lives in it, and how much of each.
#pragma once
#include <atomic>

#include "attention.h"
#include "linear.h"
#include "routing.h"

namespace KVP_NS {
namespace {  // nothing here may become a symbol that the linker shares between instruction sets

// Hands out parts of one piece of memory; without memory it only counts.
class Carver {
  public:
    explicit Carver(char* memory) : memory_(memory) {}

    template <class T> T* take(size_t count) {
        T* part = memory_ ? (T*)(memory_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return part;
    }

    size_t used() const { return used_; }

  private:
    char* memory_;
    size_t used_ = 0;
};

int64_t qkv_width(const KvpLayer& layer) {
    int64_t width = 0;
    for (int i = 0; i < layer.num_qkv; i++) width += layer.qkv[i].outputs;
    return width;
}
int64_t q_width(const KvpLayer& layer) { return (int64_t)layer.heads * layer.head_dim; }
int64_t attended_width(const KvpLayer& layer) { return (int64_t)layer.heads * layer.v_head_dim; }

// What `up` leaves for `down`: straight into its packed rows where that is possible.
bool flows_into_down(const KvpMlp& mlp) {
    const RowForm form = row_form(mlp.down);
    const bool takes_pieces = (form == RowForm::f32 || form == RowForm::bf16) && !mlp.down.permutation;
    return takes_pieces && mlp.num_up == 1 && mlp.down.inputs % PANEL == 0;
}
bool gates_in_product(const KvpMlp& mlp) { return mlp.gated && mlp.num_up == 1 && mlp.down.inputs % PANEL == 0; }

KvpAttention attention_of(const KvpModel& model, const KvpStep& step, int index) {
    const KvpLayer& layer = model.layers[index];
    const KvpGroup& group = step.groups[layer.kv_group];
    KvpAttention call = {};
    call.kv_type = model.kv_type;
    call.io_type = KVP_F32;
    call.heads = layer.heads;
    call.kv_heads = layer.kv_heads;
    call.head_dim = layer.head_dim;
    call.v_head_dim = layer.v_head_dim;
    call.block_size = group.block_size;
    call.window = layer.window;
    call.scale = layer.scale;
    call.softcap = layer.softcap;
    call.sinks = layer.sinks;
    call.num_rows = group.num_rows;
    call.cu_seqlens = group.cu_seqlens;
    call.seq_lens = group.seq_lens;
    call.tables = group.tables;
    call.table_stride = group.table_stride;
    call.kv = step.kv[index];
    call.q_head = layer.head_dim;
    call.out_head = layer.v_head_dim;
    return call;
}

// The widest that any layer's feed-forward part needs, in rows of a tile.
struct FeedSizes {
    explicit FeedSizes(int rows_of_tile) : tile(rows_of_tile) {}

    void rows(const KvpLinear& linear) { grow(widest_rows, rows_bytes(linear, tile)); }

    void mlp(const KvpMlp& part) {
        size_t outputs = 0;
        for (int i = 0; i < part.num_up; i++) {
            rows(part.up[i]);
            outputs += (size_t)part.up[i].outputs;
        }
        grow(widest_inner, rows_bytes(part.down, tile));
        if (!flows_into_down(part)) grow(widest_up, outputs);
    }

    void mixture(const KvpMixture& part) {
        rows(part.router);
        for (int i = 0; i < part.num_experts; i++) mlp(part.experts[i]);
        if (part.has_shared) mlp(part.shared);
        if (part.has_shared_gate) rows(part.shared_gate);
        grow(most_experts, (size_t)part.num_experts);
        grow(most_chosen, (size_t)part.top_k);
    }

    const int tile;
    size_t widest_rows = 0, widest_inner = 0, widest_up = 0, most_experts = 0, most_chosen = 0;

  private:
    static void grow(size_t& most, size_t value) { most = value > most ? value : most; }
};

struct Workspace {
    float* qkv;           // [T, widest q + k + v]; attention writes over q where it can
    float* attended;      // [T, widest heads * Dv]
    float* inner;         // [tile, widest outputs of up]
    float *mixed, *fed;   // [tile, H]: what mixer and ffn give where it cannot be added at once
    // A mixture of experts: its input and one expert's output [tile, H], the router's scores [tile, experts], the shared
    // expert's gate [tile], and which experts each token takes, by token [tile, top_k] and by expert.
    float *normed, *expert_out, *scores, *gates;
    Choice *choices, *by_expert;
    int32_t* expert_starts;  // [experts + 1], into by_expert
    float *last_x, *last_q;  // [wanted, ..]
    int32_t* last_starts;    // [B + 1]
    char *rows, *inner_rows;
    std::atomic<int>* units;  // by layer: the next unit of attention
    char* shared;             // of attention's threads
    char* scratch;            // one part a thread
    size_t scratch_size;
    size_t bytes;

    Workspace(const KvpModel& model, const KvpStep& step, int threads, char* memory) {
        const int tokens = step.num_tokens, tile = tokens < MAX_ROWS ? tokens : MAX_ROWS;
        int64_t widest_qkv = 0, widest_q = 0, widest_attended = 0;
        FeedSizes sizes(tile);
        scratch_size = at_least(multiply_scratch_bytes(), sizeof(float) * model.hidden);
        for (int i = 0; i < model.num_layers; i++) {
            const KvpLayer& layer = model.layers[i];
            widest_qkv = at_least(widest_qkv, qkv_width(layer));
            widest_q = at_least(widest_q, q_width(layer));
            if (layer.head_dim != layer.v_head_dim)
                widest_attended = at_least(widest_attended, attended_width(layer));
            for (int part = 0; part < layer.num_qkv; part++) sizes.rows(layer.qkv[part]);
            sizes.rows(layer.out);
            if (layer.mixture) sizes.mixture(*layer.mixture);
            else sizes.mlp(layer.mlp);
            scratch_size = at_least(scratch_size, attend_scratch_bytes(attention_of(model, step, i)));
        }
        scratch_size = (scratch_size + 4095) / 4096 * 4096;
        const int sequences = model.num_layers ? step.groups[0].num_rows : 0;
        Carver parts(memory);
        qkv = parts.take<float>((size_t)tokens * widest_qkv);
        attended = parts.take<float>((size_t)tokens * widest_attended);
        inner = parts.take<float>((size_t)tile * sizes.widest_up);
        mixed = parts.take<float>((size_t)tile * model.hidden);
        fed = parts.take<float>((size_t)tile * model.hidden);
        normed = parts.take<float>(sizes.most_experts ? (size_t)tile * model.hidden : 0);
        expert_out = parts.take<float>(sizes.most_experts ? (size_t)tile * model.hidden : 0);
        scores = parts.take<float>((size_t)tile * sizes.most_experts);
        gates = parts.take<float>(sizes.most_experts ? tile : 0);
        choices = parts.take<Choice>((size_t)tile * sizes.most_chosen);
        by_expert = parts.take<Choice>((size_t)tile * sizes.most_chosen);
        expert_starts = parts.take<int32_t>(sizes.most_experts + 1);
        last_x = parts.take<float>((size_t)sequences * model.hidden);
        last_q = parts.take<float>((size_t)sequences * at_least(widest_q, widest_attended));
        last_starts = parts.take<int32_t>(sequences + 1);
        units = parts.take<std::atomic<int>>(model.num_layers);
        rows = parts.take<char>(sizes.widest_rows);
        inner_rows = parts.take<char>(sizes.widest_inner);
        shared = parts.take<char>(attend_shared_bytes(threads));
        scratch = parts.take<char>(scratch_size * threads);
        bytes = parts.used();
    }

  private:
    static int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
    static size_t at_least(size_t a, size_t b) { return a > b ? a : b; }
};

}  // namespace
}  // namespace KVP_NS
