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

enum { KVP_F32 = 0, KVP_BF16 = 1, KVP_I8 = 2, KVP_I4 = 3 };  // types of numbers in memory

// A linear layer y[M, N] = x[M, K] * weight[N, K]^T + bias, its weight in panels of 32 outputs over the whole K:
//   f32  [K][32]          bf16 [K/2][32][2]          int8 [K/4][32][4] as unsigned w + 128
//   int4 [K/8][32] dwords of 8 nibbles q (0..15), even k of the eight in the low half, odd k in the high half
//   (k = 0 2 4 6 | 1 3 5 7 from the lowest nibble up), weight = (q - 8) * scale + offset
// K is a multiple of 16 (f32), 32 (bf16), 64 (int8), of `group` (int4); what a weight lacks is padded with zero weights.
// A panel takes the bytes of 32 rows of the plain [N, K] weight, which is therefore packed where it lies.
typedef struct KvpLinear {
    int32_t type;          // KVP_F32, KVP_BF16, KVP_I8, KVP_I4
    int32_t dynamic;       // 1: rows of x become int8 (int8: one scale a row, int4: one a group); 0: bf16 or f32
    int32_t outputs;       // N
    int32_t inputs;        // K as x has it
    int32_t padded;        // K as the panels have it
    int32_t group;         // int4: inputs that share a scale, 32, 64 or 128
    const void* panels;    // the N / 32 whole panels, 64-byte aligned
    const void* tail;      // the last panel where N % 32, with zero weights beyond N
    const void* scales;    // int8: float [N up to a multiple of 32]; int4: bf16 [panel][K / group][32], panels of all N
    const void* offsets;   // int4: bf16 likewise, or null = 0
    const float* bias;     // [N] or null
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

#ifdef __cplusplus
}
#endif
