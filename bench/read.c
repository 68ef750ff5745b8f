/* Reads memory as fast as one thread can: for bench/limits.py, which calls it from as many threads as compute. */
#include <stddef.h>
#include <stdint.h>

/* The sum of `bytes` bytes (a multiple of 256) as 64-bit numbers, prefetching `ahead` bytes before each line is needed. */
uint64_t read_all(const uint64_t *from, size_t bytes, size_t ahead) {
    uint64_t sums[32] = {0};
    for (size_t i = 0; i < bytes / 8; i += 32) {
        if (ahead)
            for (size_t line = 0; line < 32; line += 8)
                __builtin_prefetch((const char *)(from + i + line) + ahead, 0, 3);
        for (size_t k = 0; k < 32; k++)
            sums[k] += from[i + k];
    }
    uint64_t sum = 0;
    for (size_t k = 0; k < 32; k++)
        sum += sums[k];
    return sum;
}
