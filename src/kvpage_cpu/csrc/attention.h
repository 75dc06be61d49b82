// Paged attention: one kernel for decode rows and prompt chunks.
//
// A query's result has the same bits whatever tokens it is computed with: keys are taken in tiles at fixed absolute
// positions, merged in order, and the micro-kernels sum in one order for every number of queries.
#pragma once
#include <atomic>

#include "simd.h"

namespace KVP_NS {

// Bytes of one block of one layer, all heads.
size_t block_bytes(int kv_type, int kv_heads, int head_dim, int v_head_dim, int block_size);

// Stores one token of one KV head: k [head_dim], v [v_head_dim] at `slot` (block * block_size + offset). Only this
// slot's bytes are written.
void write_head(const KvpAttention& layer, int64_t slot, int head, const float* k, const float* v);

// Bytes of scratch that a thread needs for attend(), and bytes that all threads of a team share in it.
size_t attend_scratch_bytes(const KvpAttention& layer);
size_t attend_shared_bytes(int threads);

// This thread's share of the layer's queries; threads draw units of work from `next`, which starts at 0. `scratch` and
// `shared` are 64-byte aligned and hold anything.
void attend(const KvpAttention& layer, char* scratch, char* shared, std::atomic<int>& next, int threads);

}  // namespace KVP_NS
