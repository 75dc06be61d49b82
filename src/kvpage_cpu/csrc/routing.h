// Which experts of a mixture a token takes, and with what weights.
#pragma once
#include "simd.h"

namespace KVP_NS {

struct Choice {
    int32_t expert, row;
    float weight;
};

static inline float exp_of(float x) {
    float v[W];
    store(v, exp(splat(x)));
    return v[0];
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// Logits become scores, in place: sigmoids, or their softmax.
static inline void score(const KvpMixture& mixture, float* logits) {
    const int n = mixture.num_experts;
    if (mixture.sigmoid) {
        for (int i = 0; i < n; i++) logits[i] = sigmoid(logits[i]);
        return;
    }
    float most = logits[0], total = 0.0f;
    for (int i = 1; i < n; i++) most = logits[i] > most ? logits[i] : most;
    for (int i = 0; i < n; i++) total += logits[i] = exp_of(logits[i] - most);
    for (int i = 0; i < n; i++) logits[i] /= total;
}

static inline float rank_of(const KvpMixture& mixture, const float* scores, int expert) {
    return scores[expert] + (mixture.correction ? mixture.correction[expert] : 0.0f);
}

// What a group of experts is chosen by: its best rank, or the sum of its two best.
static inline float rank_of_group(const KvpMixture& mixture, const float* scores, int group) {
    const int size = mixture.num_experts / mixture.groups;
    float best = -__builtin_inff(), second = best;
    for (int i = group * size; i < (group + 1) * size; i++) {
        const float rank = rank_of(mixture, scores, i);
        if (rank > best) {
            second = best;
            best = rank;
        } else if (rank > second) {
            second = rank;
        }
    }
    return mixture.best_two ? best + second : best;
}

// Whether fewer than `limit` groups come before `group`: by rank, the lower number first on ties.
static inline bool is_open(const KvpMixture& mixture, const float* scores, int group) {
    const float own = rank_of_group(mixture, scores, group);
    int before = 0;
    for (int other = 0; other < mixture.groups; other++) {
        const float rank = other == group ? own : rank_of_group(mixture, scores, other);
        before += rank > own || (rank == own && other < group);
    }
    return before < mixture.chosen_groups;
}

// The experts of token `row`: top_k choices, the highest rank first, the lower number first on ties.
static inline void route(const KvpMixture& mixture, float* scores, int row, Choice* choices) {
    score(mixture, scores);
    const int size = mixture.groups ? mixture.num_experts / mixture.groups : mixture.num_experts;
    int found = 0;
    for (int first = 0; first < mixture.num_experts; first += size) {
        if (mixture.groups && !is_open(mixture, scores, first / size)) continue;
        for (int expert = first; expert < first + size; expert++) {
            const float rank = rank_of(mixture, scores, expert);
            int at = found;
            while (at > 0 && rank_of(mixture, scores, choices[at - 1].expert) < rank) at--;
            if (at == mixture.top_k) continue;
            found += found < mixture.top_k;
            for (int i = found - 1; i > at; i--) choices[i] = choices[i - 1];
            choices[at] = Choice{expert, row, scores[expert]};
        }
    }
    float total = 0.0f;
    for (int i = 0; i < found; i++) total += choices[i].weight;
    for (int i = 0; i < found; i++)
        choices[i].weight *= mixture.renormalise ? mixture.scale / total : mixture.scale;
}

// Choices in order of expert, within one in order of row; starts [num_experts + 1].
static inline void sort_by_expert(const KvpMixture& mixture, const Choice* choices, int count, int32_t* starts,
                                  Choice* sorted) {
    for (int i = 0; i <= mixture.num_experts; i++) starts[i] = 0;
    for (int i = 0; i < count; i++) starts[choices[i].expert + 1]++;
    for (int i = 0; i < mixture.num_experts; i++) starts[i + 1] += starts[i];
    for (int i = 0; i < count; i++) sorted[starts[choices[i].expert]++] = choices[i];
    for (int i = mixture.num_experts; i > 0; i--) starts[i] = starts[i - 1];
    starts[0] = 0;
}

}  // namespace KVP_NS
