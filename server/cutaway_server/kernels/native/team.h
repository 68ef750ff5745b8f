/* The threads that compute together. Inside a parallel region all of them call the same functions, each with its Team;
   work goes out by number, so who does it changes no bits.

   A phase is: every thread takes tasks until there are none, then all meet. */
#ifndef CUTAWAY_TEAM_H
#define CUTAWAY_TEAM_H

#include <stdatomic.h>
#include <stdint.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

enum { SPINS = 2000 }; /* looks at the barrier, some microseconds, before a thread sleeps */
enum { MOST_THREADS = 256 };

typedef struct {
    _Alignas(64) _Atomic int64_t next;
} Counter;

typedef struct { /* what a team shares; zeroed before use */
    Counter tasks, near[MOST_THREADS];
    const void *shared; /* what one thread has for all to see, until they have met twice */
    _Alignas(64) _Atomic int32_t arrived;
    _Alignas(64) _Atomic int32_t generation;
    _Atomic int32_t sleeping;
} Crew;

typedef struct {
    int64_t me, threads;
    Crew *crew;
} Team;

/* The first of the next `n` tasks nobody has taken since all last met. */
static inline int64_t take(const Team *team, int64_t n) {
    return atomic_fetch_add_explicit(&team->crew->tasks.next, n, memory_order_relaxed);
}

/* One of tasks 0 to n - 1 that nobody has taken since all last met, or -1. A thread's own are neighbours, so that it reads
   on where it was; only when it has none left does it take another's. Not together with `take`. */
static inline int64_t take_near(const Team *team, int64_t n) {
    for (int64_t i = 0; i < team->threads; i++) {
        int64_t whose = (team->me + i) % team->threads;
        int64_t first = n * whose / team->threads, stop = n * (whose + 1) / team->threads;
        int64_t task = first + atomic_fetch_add_explicit(&team->crew->near[whose].next, 1, memory_order_relaxed);
        if (task < stop) return task;
    }
    return -1;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static inline void sleep_until_met(Crew *crew, int32_t generation) {
    atomic_fetch_add(&crew->sleeping, 1);
    while (atomic_load(&crew->generation) == generation) {
#if defined(__linux__)
        syscall(SYS_futex, &crew->generation, FUTEX_WAIT_PRIVATE, generation, 0, 0, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&crew->sleeping, 1);
}

static inline void count_from_zero(const Team *team) {
    Crew *crew = team->crew;
    atomic_store_explicit(&crew->tasks.next, 0, memory_order_relaxed);
    for (int64_t i = 0; i < team->threads; i++) atomic_store_explicit(&crew->near[i].next, 0, memory_order_relaxed);
}

/* Wait until all of the team are here; what each wrote before, all see after. Tasks count from 0 again. */
static inline void meet(const Team *team) {
    Crew *crew = team->crew;
    if (team->threads == 1) {
        count_from_zero(team);
        return;
    }
    int32_t generation = atomic_load(&crew->generation);
    if (atomic_fetch_add(&crew->arrived, 1) == team->threads - 1) {
        atomic_store(&crew->arrived, 0);
        count_from_zero(team);
        atomic_store(&crew->generation, generation + 1);
#if defined(__linux__)
        if (atomic_load(&crew->sleeping)) syscall(SYS_futex, &crew->generation, FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&crew->generation, memory_order_acquire) != generation) return;
        pause_briefly();
    }
    sleep_until_met(crew, generation);
}

#endif
