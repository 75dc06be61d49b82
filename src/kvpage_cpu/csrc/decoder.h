// The whole stack of decoder layers in one job of the team.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace KVP_NS {

size_t step_bytes(const KvpModel& model, const KvpStep& step, int threads);
size_t logits_bytes(const KvpModel& model, int64_t rows, int threads);
void step_job(void* job, int thread, int threads);
void logits_job(void* job, int thread, int threads);

}  // namespace KVP_NS
