// Sum `bytes` bytes with `threads` threads as fast as memory gives them. Compiled by probe.py where a compiler is there.
#include <pthread.h>
#include <stddef.h>

typedef long long Line __attribute__((vector_size(64)));
enum { AHEAD = 2048, MOST_THREADS = 256 };

typedef struct {
    const char* first;
    size_t bytes;
    Line sum;
} Part;

static void* read_part(void* argument) {
    Part* part = argument;
    Line a = {0}, b = {0}, c = {0}, d = {0};
    const char* end = part->first + part->bytes;
    for (const char* at = part->first; at < end; at += 4 * sizeof(Line)) {
        const Line* lines = (const Line*)at;
        for (int line = 0; line < 4; line++) __builtin_prefetch(at + AHEAD + line * sizeof(Line));
        a ^= lines[0];
        b ^= lines[1];
        c ^= lines[2];
        d ^= lines[3];
    }
    part->sum = a ^ b ^ c ^ d;
    return NULL;
}

// `memory` is aligned to 64 bytes; the calling thread reads too.
long long read_all(const char* memory, size_t bytes, int threads) {
    Part parts[MOST_THREADS];
    pthread_t handles[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    size_t each = bytes / threads / 256 * 256;
    for (int i = 0; i < threads; i++) {
        parts[i].first = memory + i * each;
        parts[i].bytes = each;
        if (i) pthread_create(&handles[i], NULL, read_part, &parts[i]);
    }
    read_part(&parts[0]);
    Line sum = parts[0].sum;
    for (int i = 1; i < threads; i++) {
        pthread_join(handles[i], NULL);
        sum ^= parts[i].sum;
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}
