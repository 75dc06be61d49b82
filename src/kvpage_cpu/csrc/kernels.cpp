// The jobs of one instruction set.
#include "kernels.h"

#include "attention.h"
#include "decoder.h"
#include "elementwise.h"
#include "linear.h"
#include "sampling.h"

namespace KVP_NS {
namespace {

void pack_job(void* argument, int thread, int threads) {
    const PackJob& job = *(const PackJob*)argument;
    pack_weight(*job.linear, job.source, job.row_bytes, job.memory + thread * job.bytes, thread, threads);
}

size_t linear_bytes(const KvpLinear& linear, int64_t rows, int threads) {
    const int tile = rows < MAX_ROWS ? (int)rows : MAX_ROWS;
    const size_t widest = linear.padded > linear.outputs ? linear.padded : linear.outputs;
    return rows_bytes(linear, tile) + sizeof(float) * (widest + 16) * tile + threads * multiply_scratch_bytes();
}

void linear_job(void* argument, int thread, int threads) {
    const LinearJob& job = *(const LinearJob*)argument;
    const KvpLinear& linear = *job.linear;
    const int tile = job.rows < MAX_ROWS ? (int)job.rows : MAX_ROWS;
    char* const scratch = job.memory + rows_bytes(linear, tile) + thread * multiply_scratch_bytes();
    const size_t widest = linear.padded > linear.outputs ? linear.padded : linear.outputs;
    // Rows converted on the way in or out.
    float* const wide = (float*)(job.memory + rows_bytes(linear, tile) + threads * multiply_scratch_bytes());
    for (int64_t start = 0; start < job.rows; start += tile) {
        const int count = job.rows - start < tile ? (int)(job.rows - start) : tile;
        const Rows rows = rows_at(linear, count, job.memory);
        for (int r = thread; r < count; r += threads) {
            float* const own = wide + (size_t)r * widest;
            const char* const x = (const char*)job.x + (start + r) * job.x_stride * (job.x_type == KVP_F32 ? 4 : 2);
            read_plain(x, job.x_type, 0, linear.inputs, own);
            pack_row(rows, linear.inputs, r, own);
        }
        job.team->barrier();
        const bool direct = job.y_type == KVP_F32;
        Target target;
        target.y = direct ? (float*)job.y + start * job.y_stride : wide;
        target.stride = direct ? job.y_stride : (int64_t)widest;
        multiply(linear, rows, target, scratch, thread, threads);
        job.team->barrier();
        if (direct) continue;
        for (int r = thread; r < count; r += threads) {
            uint16_t* const y = (uint16_t*)job.y + (start + r) * job.y_stride;
            const float* const from = wide + (size_t)r * widest;
            int i = 0;
            for (; i + W <= linear.outputs; i += W) store_bf16(y + i, load(from + i));
            for (; i < linear.outputs; i++) y[i] = to_bf16(from[i]);
        }
        job.team->barrier();
    }
}

void read_rows_job(void* argument, int thread, int threads) {
    const ReadJob& job = *(const ReadJob*)argument;
    for (int64_t i = thread; i < job.rows; i += threads)
        read_row(*job.linear, (int)job.ids[i], job.out + i * job.linear->inputs);
}

void attend_job(void* argument, int thread, int threads) {
    const AttendJob& job = *(const AttendJob*)argument;
    attend(*job.layer, job.memory + thread * job.bytes, job.shared, *(std::atomic<int>*)job.next, threads);
}

// One head of a token, turned in place; `values` has it afterwards, as it was rounded.
void turn_head(const KvpRope& rope, int64_t token, char* head, int type, int dim, float* values) {
    const int64_t row = rope.positions[token] * (rope.rotary_dim / 2);
    read_plain(head, type, 0, dim, values);
    rotate(values, rope.cos + row, rope.sin + row, rope.rotary_dim, rope.interleaved);
    if (type == KVP_F32) {
        memcpy(head, values, sizeof(float) * (size_t)dim);
        return;
    }
    for (int i = 0; i < rope.rotary_dim; i++) {
        ((uint16_t*)head)[i] = to_bf16(values[i]);
        values[i] = from_bf16(((uint16_t*)head)[i]);
    }
}

// Tokens in runs, one a thread: neighbours share cache lines of K.
void write_kv_job(void* argument, int thread, int threads) {
    const WriteJob& job = *(const WriteJob*)argument;
    const KvpAttention& layer = *job.layer;
    const int type = layer.io_type;
    const int64_t size = type == KVP_F32 ? 4 : 2, end = job.tokens * (thread + 1) / threads;
    alignas(64) float k[512], v[512];
    for (int64_t token = job.tokens * thread / threads; token < end; token++) {
        for (int head = 0; job.rope && head < layer.heads; head++) {
            char* const q = (char*)layer.q + (token * layer.q_token + head * layer.q_head) * size;
            turn_head(*job.rope, token, q, type, layer.head_dim, k);
        }
        for (int head = 0; head < layer.kv_heads; head++) {
            char* const from_k = (char*)job.k + (token * job.k_token + head * job.k_head) * size;
            const char* const from_v = (const char*)job.v + (token * job.v_token + head * job.v_head) * size;
            if (job.rope) turn_head(*job.rope, token, from_k, type, layer.head_dim, k);
            if (job.slots[token] < 0) continue;
            if (!job.rope) read_plain(from_k, type, 0, layer.head_dim, k);
            read_plain(from_v, type, 0, layer.v_head_dim, v);
            write_head(layer, job.slots[token], head, k, v);
        }
    }
}

void sample_job(void* argument, int thread, int threads) {
    const SampleJob& job = *(const SampleJob*)argument;
    sample(*job.sampling, job.memory + thread * job.bytes, thread, threads);
}

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16"};

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    NAMES[KVP_ISA], pack_job,     linear_job,           read_rows_job,       attend_job, write_kv_job, step_job,
    logits_job,     sample_job,   linear_bytes,         attend_scratch_bytes, attend_shared_bytes,
    step_bytes,     logits_bytes, block_bytes,          sample_scratch_bytes,
};

}  // namespace KVP_NS
