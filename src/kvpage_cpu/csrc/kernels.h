// What one instruction set offers to library.cpp: jobs of a team and the memory they need.
#pragma once
#include "abi.h"
#include "team.h"

struct PackJob {
    const KvpLinear* linear;
    const char* source;
    int64_t row_bytes;
    char* memory;  // `bytes` a thread
    size_t bytes;
};

struct LinearJob {
    Team* team;
    const KvpLinear* linear;
    int64_t rows;
    const void* x;
    int32_t x_type;
    int64_t x_stride;
    void* y;
    int32_t y_type;
    int64_t y_stride;
    char* memory;
};

struct ReadJob {
    const KvpLinear* linear;
    int64_t rows;
    const int64_t* ids;
    float* out;
};

struct AttendJob {
    const KvpAttention* layer;
    char* memory;  // `bytes` a thread
    size_t bytes;
    char* shared;
    void* next;  // std::atomic<int>, 0
};

struct WriteJob {
    const KvpAttention* layer;
    const KvpRope* rope;  // null: q and k stay as they are
    const void* k;
    int64_t k_token, k_head;
    const void* v;
    int64_t v_token, v_head;
    const int64_t* slots;
    int64_t tokens;
};

struct StepJob {
    Team* team;
    const KvpModel* model;
    const KvpStep* step;
    char* memory;  // step_bytes()
};

struct LogitsJob {
    Team* team;
    const KvpModel* model;
    int64_t rows;
    const float* hidden;
    float* logits;
    char* memory;  // logits_bytes()
};

struct SampleJob {
    const KvpSampling* sampling;
    char* memory;  // `bytes` a thread
    size_t bytes;
};

struct Kernels {
    const char* name;
    Team::Job pack, linear, read_rows, attend, write_kv, step, logits, sample;
    size_t (*linear_bytes)(const KvpLinear&, int64_t rows, int threads);
    size_t (*attend_scratch)(const KvpAttention&);
    size_t (*attend_shared)(int threads);
    size_t (*step_bytes)(const KvpModel&, const KvpStep&, int threads);
    size_t (*logits_bytes)(const KvpModel&, int64_t rows, int threads);
    size_t (*block_bytes)(int, int, int, int, int);
    size_t (*sample_scratch)(int vocab_size);
};

// One a set; null where the library was built without it.
extern const Kernels* const KVP_KERNELS[KVP_NUM_ISAS];

namespace kvp_portable { extern const Kernels kernels; }
namespace kvp_avx2 { extern const Kernels kernels; }
namespace kvp_avx512 { extern const Kernels kernels; }
namespace kvp_avx512_bf16 { extern const Kernels kernels; }
