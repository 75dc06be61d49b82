// The C ABI of kvpage's native CPU library: plain structs, mirrored field by field in kvpage_cpu/native.py.
//
// T tokens of a step, B rows (sequences), M rows of a product, K inputs, N outputs, H hidden size, D head dim.
// Every pointer is valid for the duration of the call; no function keeps one, but for a KvpModel's caller-owned arrays.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVP_EXPORT __attribute__((visibility("default")))

// Instruction sets, each a superset of those before it.
enum { KVP_PORTABLE = 0, KVP_AVX2 = 1, KVP_AVX512 = 2, KVP_AVX512_BF16 = 3, KVP_NUM_ISAS = 4 };

// Types of numbers in memory; F8 is float8_e4m3fn, C4 are codes of 4 bits that choose from a table.
enum { KVP_F32 = 0, KVP_BF16 = 1, KVP_I8 = 2, KVP_I4 = 3, KVP_F8 = 4, KVP_C4 = 5, KVP_F16 = 6, KVP_U8 = 7, KVP_I16 = 8 };

// Numbers of a weight's groups, [panel][K / group][32] of `type`, panels of all N. With `shared` they are integers, and
// `per_shared` groups are multiplied by one number of [panel][K / group / per_shared][32], of `shared_type`.
typedef struct KvpGroupNumbers {
    const void* values;    // null = none
    const void* shared;    // null = 1
    int32_t type, shared_type, per_shared;
} KvpGroupNumbers;

// A linear layer y[M, N] = x[M, K] * weight[N, K]^T + bias, its weight in panels of 32 outputs over the whole K:
//   f32  [K][32]          bf16 [K/2][32][2]          f8 [K/4][32][4]
//   int8 [K/4][32][4], w + 128 where an output has one scale, else q: weight = (q - zero) * scale + offset
//   int4 [K/8][32] dwords of 8 nibbles q (0..15), even k of the eight in the low half, odd k in the high half
//   (k = 0 2 4 6 | 1 3 5 7 from the lowest nibble up), weight = (q - zero) * scale + offset
//   c4   likewise, weight = table[q] * scale
// K is a multiple of 16 (f32), 32 (bf16), 64 (int8 and f8 of one scale an output), of `group` (all others); what a
// weight lacks is padded with weights that meet zeros of x.
// A panel takes the bytes of 32 rows of the plain [N, K] weight, which is therefore packed where it lies.
typedef struct KvpLinear {
    int32_t type;          // KVP_F32, KVP_BF16, KVP_I8, KVP_I4, KVP_F8, KVP_C4
    int32_t dynamic;       // 1: rows of x become int8 (int8: one scale a row, int4: one a group); 0: bf16 or f32
    int32_t outputs;       // N
    int32_t inputs;        // K as x has it
    int32_t padded;        // K as the panels have it
    int32_t group;         // inputs that share a scale: 16, 32, 64, 128 (dynamic int4: not 16); 0: int8, f8: all do
    int32_t zero;          // int4, int8: the code of 0 where there are no `zeros`; 128 where an output has one scale;
                           // other types: 0
    const void* panels;    // the N / 32 whole panels, 64-byte aligned
    const void* tail;      // the last panel where N % 32, with zero weights beyond N
    const float* output_scales;         // int8, f8 without groups: [N up to a multiple of 32]
    KvpGroupNumbers scales, zeros, offsets;
    const float* table;                 // c4: [16]
    const int32_t* permutation;         // [K]: column j of the weight is input permutation[j]; null = j
    const float* bias;                  // [N] or null
} KvpLinear;

enum { KVP_NO_NORM = 0, KVP_RMS = 1, KVP_LAYER = 2 };

typedef struct KvpNorm {
    int32_t kind;
    float eps;
    const float* weight;   // [n]; of a "1 + weight" norm already the sum
    const float* bias;     // [n] or null
} KvpNorm;

// Paged attention of one layer. A block holds for each KV head its K and then its V:
//   f32  K [D][bs], V [bs][Dv]    bf16 K [D/2][bs][2], V [bs/2][Dv][2]
//   int8 K codes [D/2][bs][2], V codes [bs/2][Dv][2], float scales of K [bs], float scales of V [bs]
// D and Dv are multiples of 8, bs of 16.
typedef struct KvpAttention {
    int32_t kv_type;       // KVP_F32, KVP_BF16, KVP_I8; products are in f32 for KVP_F32, else in bf16
    int32_t io_type;       // of q and out: KVP_F32 or KVP_BF16
    int32_t heads, kv_heads, head_dim, v_head_dim, block_size;
    int32_t window;        // tokens a query sees, itself included; 0 = all before it
    float scale, softcap;  // softcap 0 = off
    const float* sinks;    // [heads] or null
    int32_t num_rows;      // B
    const int32_t* cu_seqlens;   // [B + 1]
    const int32_t* seq_lens;     // [B]
    const int32_t* tables;       // [B, ..]
    int64_t table_stride;        // elements from row to row of `tables`
    void* kv;                    // one layer's blocks
    const void* q;               // [T, heads, D]: q_token, q_head elements apart
    void* out;                   // [T, heads, Dv], likewise; it may be q where D == Dv
    int64_t q_token, q_head, out_token, out_head;
} KvpAttention;

enum { KVP_SILU = 0, KVP_GELU = 1, KVP_GELU_TANH = 2, KVP_RELU = 3, KVP_RELU2 = 4 };
enum { KVP_NORM_OFF = 0, KVP_NORM_HEAD = 1, KVP_NORM_EACH_HEAD = 2, KVP_NORM_ALL = 3 };

typedef struct KvpMlp {
    KvpLinear up[2];           // outputs of the gate, then up, where gated: of one layer, or of two
    int32_t num_up;
    KvpLinear down;
    int32_t activation;
    int32_t gated;
} KvpMlp;

// A mixture of experts, as kvpage.api.model.MoESpec describes it.
typedef struct KvpMixture {
    int32_t num_experts, top_k;
    int32_t sigmoid;           // scores are sigmoids of the router's logits, else their softmax
    int32_t renormalise;
    float scale;
    int32_t groups, chosen_groups, best_two;  // groups 0 = all experts are one
    KvpLinear router;
    const float* correction;   // [num_experts] or null
    const KvpMlp* experts;
    int32_t has_shared, has_shared_gate;
    KvpMlp shared;
    KvpLinear shared_gate;     // one output
} KvpMixture;

// One decoder layer, as kvpage.api.model.LayerSpec describes it.
typedef struct KvpLayer {
    KvpNorm mixer_before, mixer_after, ffn_before, ffn_after, q_norm, k_norm;
    KvpLinear qkv[3];          // outputs of q, then k, then v: of one layer, or of several
    int32_t num_qkv;
    KvpLinear out;
    KvpMlp mlp;
    const KvpMixture* mixture; // in place of mlp, or null
    int32_t heads, kv_heads, head_dim, v_head_dim;
    int32_t qk_norm;           // what q_norm and k_norm are taken over
    int32_t window;            // as in KvpAttention, like the three below
    float scale, softcap;
    const float* sinks;
    int32_t rotary_dim;        // 0 = positions do not turn q and k
    int32_t interleaved;
    int32_t kv_group;
    int32_t parallel;          // residual: mixer and ffn read the same x
    float multiplier;          // of what joins the residual stream
} KvpLayer;

typedef struct KvpModel {
    int32_t num_layers, hidden, vocab, kv_type;
    const KvpLayer* layers;
    const void* table;         // embedding [vocab, hidden] of table_type, row by row; null: it is `packed_table`
    int32_t table_type;
    float embed_scale;
    KvpLinear packed_table;
    const void* positions;     // learned positions [.., hidden] of positions_type, or null
    int32_t positions_type;
    int32_t position_offset;
    KvpNorm final_norm;
    KvpLinear head;
    float head_scale, head_softcap;  // softcap 0 = off
} KvpModel;

// A KV group during one step.
typedef struct KvpGroup {
    int32_t num_rows, block_size;
    const int32_t *cu_seqlens, *seq_lens, *tables;
    int64_t table_stride;
    const int64_t* slots;      // [T]
} KvpGroup;

typedef struct KvpStep {
    int32_t num_tokens;        // T
    int32_t num_wanted;        // of `wanted`
    const int64_t *token_ids, *positions, *rope_positions;  // [T]
    const KvpGroup* groups;    // by kv_group
    void* const* kv;           // by layer
    const float* const* cos;   // by layer, [.., rotary_dim / 2], or null
    const float* const* sin;
    const int32_t* wanted;     // tokens whose hidden states will be read, ascending: each the last of a row; null = all
    float* hidden;             // [T, hidden]: the residual stream, at last the hidden states; other rows: undefined
} KvpStep;

// One token a row of logits: the likeliest, or one drawn as kvpage.api.sampling.SamplingKernel.draw says.
typedef struct KvpSampling {
    int32_t type;              // of the logits: KVP_F32 or KVP_BF16
    int32_t num_rows, vocab_size;
    const void* logits;        // [num_rows, vocab_size]
    int64_t logits_stride;     // elements from row to row
    const float* temperature;  // [num_rows], 0 = the likeliest; null: all 0, and the four below are not read
    const int64_t* top_k;      // [num_rows], 0 = all
    const double* top_p;       // [num_rows], 1 = all
    const float* min_p;        // [num_rows], 0 = all
    const float* uniforms;     // [num_rows], in [0, 1)
    int64_t* token_ids;        // [num_rows]; -1 where a row has no token
} KvpSampling;

typedef struct KvpContext KvpContext;

KVP_EXPORT int kvp_abi_version(void);          // native.py must agree
KVP_EXPORT int kvp_best_isa(void);             // of this processor, among those that were built
KVP_EXPORT const char* kvp_isa_name(int isa);  // null: no such set in this library

// A context computes with one instruction set on a team of threads that all contexts of the same size share; calls on
// it, and on its siblings, take turns. Null: no such set, or no memory, or no threads.
KVP_EXPORT KvpContext* kvp_open(int isa, int threads);
KVP_EXPORT void kvp_close(KvpContext* context);

// All of these return 0 or one of:
enum { KVP_NO_MEMORY = 1, KVP_FORKED = 2 };

// Packs a plain weight into linear->panels and ->tail; see pack_weight in linear.h.
KVP_EXPORT int kvp_pack(KvpContext* context, const KvpLinear* linear, const void* source, int64_t row_bytes);

// y [rows, N] = linear(x [rows, K]); rows are `stride` elements apart, types KVP_F32 or KVP_BF16.
KVP_EXPORT int kvp_linear(KvpContext* context, const KvpLinear* linear, int64_t rows, const void* x, int32_t x_type,
                          int64_t x_stride, void* y, int32_t y_type, int64_t y_stride);

// Rows `ids` of the weight, as floats [rows, K].
KVP_EXPORT int kvp_read_rows(KvpContext* context, const KvpLinear* linear, int64_t rows, const int64_t* ids,
                             float* out);

KVP_EXPORT int kvp_attend(KvpContext* context, const KvpAttention* layer);

// k [tokens, kv_heads, D], v [tokens, kv_heads, Dv] of layer->io_type to `slots`; -1 = write nothing.
KVP_EXPORT int kvp_write_kv(KvpContext* context, const KvpAttention* layer, const void* k, int64_t k_token,
                            int64_t k_head, const void* v, int64_t v_token, int64_t v_head, const int64_t* slots,
                            int64_t tokens);

// Rotary tables: cos, sin [rows, rotary_dim / 2]; token i takes row positions[i]. Pairs (i, i + rotary_dim / 2) turn, or
// (2i, 2i + 1) where interleaved.
typedef struct KvpRope {
    const float *cos, *sin;
    const int64_t* positions;
    int32_t rotary_dim, interleaved;
} KvpRope;

// kvp_write_kv after layer->q and k are turned in place, all tokens of them, in f32 and rounded once.
KVP_EXPORT int kvp_rope_write(KvpContext* context, const KvpAttention* layer, const KvpRope* rope, void* k,
                              int64_t k_token, int64_t k_head, const void* v, int64_t v_token, int64_t v_head,
                              const int64_t* slots, int64_t tokens);
KVP_EXPORT int64_t kvp_block_bytes(int32_t kv_type, int32_t kv_heads, int32_t head_dim, int32_t v_head_dim,
                                   int32_t block_size);

// Every layer, and the final norm.
KVP_EXPORT int kvp_step(KvpContext* context, const KvpModel* model, const KvpStep* step);

// logits [rows, vocab] of hidden [rows, hidden].
KVP_EXPORT int kvp_logits(KvpContext* context, const KvpModel* model, int64_t rows, const float* hidden,
                          float* logits);

KVP_EXPORT int kvp_sample(KvpContext* context, const KvpSampling* sampling);

// Bytes a second at which the team reads `bytes` bytes of memory: what decoding one sequence is bound by.
KVP_EXPORT double kvp_read_bandwidth(KvpContext* context, const void* memory, int64_t bytes);

#ifdef __cplusplus
}
#endif
