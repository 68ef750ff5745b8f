/* Which variants this processor, and this system, can run. */
#define _GNU_SOURCE
#include <string.h>
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define EXPORTED __attribute__((visibility("default")))

#if defined(__x86_64__)
/* Linux keeps the tiles' registers (feature 18) from a process that has not asked for them. */
static int may_use_tiles(void) {
    const long request = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    int tiles = d >> 24 & 1, bf16 = d >> 22 & 1, int8 = d >> 25 & 1;
    return tiles && bf16 && int8 && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

static int has_avx_vnni(void) {
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    return a >> 4 & 1;
}

EXPORTED int supports(const char *variant) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    int vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (strcmp(variant, "amx") == 0) return vnni && may_use_tiles();
    if (strcmp(variant, "avx512vnni") == 0) return vnni;
    if (strcmp(variant, "avxvnni") == 0) return avx2 && has_avx_vnni();
    if (strcmp(variant, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (strcmp(variant, "avx512") == 0) return avx512;
    if (strcmp(variant, "avx2") == 0) return avx2;
    return strcmp(variant, "portable") == 0;
}
#else
EXPORTED int supports(const char *variant) { return strcmp(variant, "portable") == 0; }
#endif
