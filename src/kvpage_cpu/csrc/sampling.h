// From logits to tokens: the likeliest one, or one drawn by inverse CDF over the kept set (kvpage.api.sampling).
//
// A row's token depends on that row alone, to the bit: one thread works on a row, in blocks at fixed places.
#pragma once
#include "simd.h"

namespace KVP_NS {

// Bytes of scratch that a thread needs for sample(): 64-byte aligned.
size_t sample_scratch_bytes(int vocab_size);

// This thread's share of the rows.
void sample(const KvpSampling& call, char* scratch, int thread, int threads);

}  // namespace KVP_NS
