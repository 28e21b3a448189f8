// Runs in a guest: whether vector registers hold what a program put into them, whatever the kernel does meanwhile.
//
//   registers hold PROCESSES SECONDS BITS   processes that keep values of their own in all registers, and check them
//   registers signal SECONDS BITS           the same while signals come, whose handler overwrites and changes registers
//   registers frames                        signal frames on pages that are not there, read-only, or damaged
//   registers ptrace                        a tracer reads and writes a tracee's registers
//   registers spawn ROUNDS BITS             fork, vfork and exec beside values in registers
//   registers once BITS                     one round of values, silently: what `spawn` executes
//   registers worker                        a warm worker whose processes hold values across a snapshot
//
// Each prints a line `NAME rounds=N bad=N` and ends with 0 when nothing was bad. BITS is 256 or 512; where the processor has no
// such registers it ends with 77.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/elf.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define REGISTERS_MAX 32
#define REGISTER_BYTES 64
// How many turns of an empty loop the values stay in registers: about two milliseconds.
#define SPIN 4000000L
#define PAGE 4096

// Where the masks of 512-bit instructions lie behind the vectors, k0 to k7, 8 bytes each.
#define MASKS (REGISTERS_MAX * REGISTER_BYTES)

typedef uint8_t Registers[MASKS + 64] __attribute__((aligned(64)));

static int bits = 256;

static int count(void) { return bits == 512 ? 32 : 16; }
static int bytes_each(void) { return bits / 8; }

static void die(const char *what) {
    perror(what);
    exit(2);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void check_processor(void) {
    int has = bits == 512 ? __builtin_cpu_supports("avx512f") : __builtin_cpu_supports("avx2");
    if (!has) {
        printf("unsupported: this processor has no registers of %d bits\n", bits);
        exit(77);
    }
}

// A different value for every process, round, register and byte.
static void fill(Registers values, uint64_t seed) {
    for (size_t at = 0; at < sizeof(Registers); at += 8) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        memcpy(values + at, &seed, 8);
    }
}

static int wrong(const Registers wanted, const Registers found) {
    int sum = 0;
    for (int number = 0; number < count(); number++)
        sum += memcmp(wanted + number * REGISTER_BYTES, found + number * REGISTER_BYTES, bytes_each()) != 0;
    for (int mask = 1; bits == 512 && mask < 8; mask++)
        sum += memcmp(wanted + MASKS + mask * 8, found + MASKS + mask * 8, 2) != 0;
    return sum;
}

#define EACH16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define UPPER16(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define LOAD_YMM(n) "vmovdqu " #n "*64(%[in]), %%ymm" #n "\n"
#define KEEP_YMM(n) "vmovdqu %%ymm" #n ", " #n "*64(%[out])\n"
#define LOAD_ZMM(n) "vmovdqu64 " #n "*64(%[in]), %%zmm" #n "\n"
#define KEEP_ZMM(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%[out])\n"
#define MASKS7(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define LOAD_MASK(n) "kmovw 2048+" #n "*8(%[in]), %%k" #n "\n"
#define KEEP_MASK(n) "kmovw %%k" #n ", 2048+" #n "*8(%[out])\n"
#define CLOBBERS "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
    "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// Values are in registers from the first instruction to the last, and nothing else happens than WORK.
#define HOLD(RESULT, WORK, IN, OUT, ...)                                                                            \
    do {                                                                                                            \
        if (bits == 512)                                                                                            \
            __asm__ volatile(EACH16(LOAD_ZMM) UPPER16(LOAD_ZMM) MASKS7(LOAD_MASK) WORK                              \
                             EACH16(KEEP_ZMM) UPPER16(KEEP_ZMM) MASKS7(KEEP_MASK) "vzeroupper"                      \
                             : "+a"(RESULT) : [in] "r"(IN), [out] "r"(OUT), __VA_ARGS__ : CLOBBERS);                \
        else                                                                                                        \
            __asm__ volatile(EACH16(LOAD_YMM) WORK EACH16(KEEP_YMM) "vzeroupper"                                     \
                             : "+a"(RESULT) : [in] "r"(IN), [out] "r"(OUT), __VA_ARGS__ : CLOBBERS);                \
    } while (0)

// Values of vector registers, of an x87 register and of the rounding mode, through so many turns of an empty loop.
static int spin(uint64_t seed, long turns) {
    Registers in, out;
    long ignored = 0;
    unsigned rounding = (unsigned)(seed & 3) << 13, mxcsr;
    double on_stack = (double)(seed & 0xffff), popped;
    fill(in, seed);
    _mm_setcsr(0x1f80 | rounding);
    __asm__ volatile("fldl %0" : : "m"(on_stack));
    HOLD(ignored, "mov %[turns], %%rcx\n 1: dec %%rcx\n jnz 1b\n", in, out, [turns] "r"(turns));
    __asm__ volatile("fstpl %0" : "=m"(popped));
    mxcsr = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return wrong(in, out) + (popped != on_stack) + ((mxcsr & 0x6000) != rounding);
}

// fork(2) or vfork(2) by its number, between loading and checking; both processes return. Inline, because after vfork(2) they
// share the frame that would be left twice.
static inline __attribute__((always_inline)) pid_t split(long number, uint64_t seed, int *bad) {
    static Registers in, outs[2];
    long result = number;
    fill(in, seed);
    Registers *out = &outs[number == SYS_vfork];
    HOLD(result, "syscall\n", in, *out, [unused] "r"(0L));
    *bad = wrong(in, *out);
    return (pid_t)result;
}

// Another processor, if there is one: the state has to travel.
static void move(unsigned round) {
    int processors = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (processors < 2 || round % 8)
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(round / 8 % processors, &set);
    sched_setaffinity(0, sizeof set, &set);
}

struct Tally {
    volatile long rounds, bad;
};

static struct Tally *shared(size_t number) {
    void *memory = mmap(0, number * sizeof(struct Tally), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static int report(const char *name, const struct Tally *tallies, int number) {
    long rounds = 0, bad = 0;
    int idle = 0;
    for (int at = 0; at < number; at++) {
        rounds += tallies[at].rounds;
        bad += tallies[at].bad;
        idle += tallies[at].rounds == 0;
    }
    printf("%s rounds=%ld bad=%ld\n", name, rounds, bad);
    return bad || idle ? 1 : 0;
}

static int hold(int processes, double seconds) {
    struct Tally *tallies = shared(processes);
    double end = now() + seconds;
    for (int number = 0; number < processes; number++) {
        if (fork())
            continue;
        do {
            long round = tallies[number].rounds++;
            move((unsigned)round + (unsigned)number * 8);
            tallies[number].bad += spin(((uint64_t)number << 32) + (uint64_t)round, SPIN) != 0;
        } while (now() < end);
        _exit(0);
    }
    int status, died = 0;
    while (wait(&status) > 0)
        died += status != 0;
    tallies[0].bad += died;
    return report("hold", tallies, processes);
}

static volatile sig_atomic_t signals;

// Overwrites every register; the main program's come back from the frame.
static void overwrite(int number, siginfo_t *info, void *context) {
    (void)number, (void)info, (void)context;
    spin((uint64_t)signals * 77 + 5, 1000);
    signals++;
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *), int flags) {
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | flags};
    if (sigaction(number, &action, 0))
        die("sigaction");
}

static int interrupted(double seconds) {
    struct Tally *tally = shared(1);
    handle(SIGALRM, overwrite, 0);
    struct itimerval every = {{0, 20000}, {0, 20000}};
    setitimer(ITIMER_REAL, &every, 0);
    for (double end = now() + seconds; now() < end; tally->rounds++)
        tally->bad += spin((uint64_t)tally->rounds + 1, SPIN * 4) != 0;
    memset(&every, 0, sizeof every);
    setitimer(ITIMER_REAL, &every, 0);
    if (!signals) {
        printf("signal: none came\n");
        return 1;
    }
    return report("signal", tally, 1);
}

static uint8_t *frame_state(void *context) { return (uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs; }

static void change_xmm7(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    memset(frame_state(context) + 160 + 7 * 16, 0xa5, 16);
}
static void damage_header(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    frame_state(context)[512 + 8 + 3] = 0xff;
}
static void damage_mxcsr(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    memset(frame_state(context) + 24, 0xff, 4);
}
static void claim_everything(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    memset(frame_state(context) + 512, 0xff, 8);
}

// An alternate stack of so many pages, none of which is there yet.
static void fresh_stack(size_t pages, int protection) {
    uint8_t *memory = mmap(0, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack_t stack = {.ss_sp = memory, .ss_size = pages * PAGE};
    if (memory == MAP_FAILED || sigaltstack(&stack, 0))
        die("sigaltstack");
}

// How a process ends that gets a signal with this handler on such a stack.
static int end_of(void (*handler)(int, siginfo_t *, void *), size_t pages, int protection) {
    pid_t pid = fork();
    if (!pid) {
        fresh_stack(pages, protection);
        handle(SIGUSR1, handler, SA_ONSTACK);
        raise(SIGUSR1);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    return status;
}

static int frames(void) {
    struct Tally *tally = shared(1);
    // Frames straddle pages in every way that their alignment allows.
    for (size_t pages = 3; pages < 11; pages++, tally->rounds++)
        tally->bad += end_of(overwrite, pages, PROT_READ | PROT_WRITE) != 0;
    tally->bad += WTERMSIG(end_of(overwrite, 8, PROT_READ)) != SIGSEGV;
    tally->bad += WTERMSIG(end_of(overwrite, 8, PROT_NONE)) != SIGSEGV;
    tally->bad += WTERMSIG(end_of(damage_header, 8, PROT_READ | PROT_WRITE)) != SIGSEGV;
    tally->bad += WTERMSIG(end_of(damage_mxcsr, 8, PROT_READ | PROT_WRITE)) != SIGSEGV;
    // What a frame claims beyond what the processor has is masked by the kernel.
    int status = end_of(claim_everything, 8, PROT_READ | PROT_WRITE);
    tally->bad += status != 0 && WTERMSIG(status) != SIGSEGV;
    tally->rounds += 5;
    // A frame is what the processor gets back.
    handle(SIGUSR1, change_xmm7, 0);
    Registers in, out;
    long result = SYS_tkill;
    fill(in, 9);
    HOLD(result, "syscall\n", in, out, "D"((long)gettid()), "S"((long)SIGUSR1));
    memset(in + 7 * REGISTER_BYTES, 0xa5, 16);
    tally->bad += wrong(in, out) != 0;
    tally->rounds++;
    return report("frames", tally, 1);
}

// The tracee's registers while it stops with its values in them.
static int traced(void) {
    struct Tally *tally = shared(1);
    for (uint64_t seed = 1; seed <= 5; seed++, tally->rounds++) {
        Registers in, out;
        fill(in, seed);
        pid_t pid = fork();
        if (!pid) {
            ptrace(PTRACE_TRACEME, 0, 0, 0);
            long result = SYS_tkill;
            HOLD(result, "syscall\n", in, out, "D"((long)gettid()), "S"((long)SIGSTOP));
            // The tracer has turned its registers round.
            for (size_t at = 0; at < 16 * 16; at++)
                in[at / 16 * REGISTER_BYTES + at % 16] ^= 0xff;
            _exit(wrong(in, out) != 0);
        }
        int status;
        waitpid(pid, &status, 0);
        uint8_t state[PAGE];
        struct iovec part = {state, sizeof state};
        if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &part))
            die("PTRACE_GETREGSET");
        int bad = 0;
        for (int number = 0; number < 16; number++) {
            bad |= memcmp(state + 160 + number * 16, in + number * REGISTER_BYTES, 16);
            // The upper halves, where AVX state lies on every processor so far.
            bad |= memcmp(state + 576 + number * 16, in + number * REGISTER_BYTES + 16, 16);
        }
        for (size_t at = 160; at < 160 + 16 * 16; at++)
            state[at] ^= 0xff;
        if (ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &part))
            die("PTRACE_SETREGSET");
        ptrace(PTRACE_CONT, pid, 0, 0);
        waitpid(pid, &status, 0);
        tally->bad += bad || status;
    }
    return report("ptrace", tally, 1);
}

static int spawn(char *self, int rounds) {
    struct Tally *tally = shared(1);
    for (int round = 0; round < rounds; round++, tally->rounds++) {
        int bad, status;
        pid_t pid = split(SYS_fork, (uint64_t)round + 1, &bad);
        if (!pid)
            _exit(bad != 0);
        waitpid(pid, &status, 0);
        tally->bad += bad || status;
        pid = split(SYS_vfork, (uint64_t)round + 1000, &bad);
        if (!pid) {
            if (bad)
                _exit(1);
            execl(self, self, "once", bits == 512 ? "512" : "256", (char *)0);
            _exit(127);
        }
        waitpid(pid, &status, 0);
        tally->bad += bad || status;
    }
    return report("spawn", tally, 1);
}

// Holds values until the shared number changes, which is after the snapshot.
static void hold_until_changed(volatile long *number, struct Tally *tally, uint64_t seed) {
    for (;; tally->rounds++) {
        Registers in, out;
        long seen = *number;
        fill(in, seed + (uint64_t)seen);
        HOLD(seen, "1: pause\n cmp %%rax, (%[number])\n je 1b\n", in, out, [number] "r"(number));
        tally->bad += wrong(in, out) != 0;
    }
}

static int worker(void) {
    enum { HOLDERS = 3 };
    struct Tally *tallies = shared(HOLDERS + 1);
    volatile long *number = &tallies[HOLDERS].rounds;
    for (int holder = 0; holder < HOLDERS; holder++)
        if (!fork()) {
            bits = holder % 2 && __builtin_cpu_supports("avx512f") ? 512 : 256;
            hold_until_changed(number, &tallies[holder], (uint64_t)holder * 1000 + 1);
        }
    setvbuf(stdout, 0, _IOLBF, 0);
    puts("{\"ready\":true}");
    static char line[65536];
    while (fgets(line, sizeof line, stdin)) {
        if (!strstr(line, "\"op\":\"eval\""))
            continue;
        long before = *number, bad = 0, done = 0;
        ++*number;
        // Each of them finds out when it has its turn.
        for (double end = now() + 30; done < HOLDERS && now() < end; usleep(1000))
            for (int holder = done = bad = 0; holder < HOLDERS; holder++) {
                done += tallies[holder].rounds > before;
                bad += tallies[holder].bad;
            }
        printf("{\"answer\":\"held=%ld bad=%ld\"}\n", done, bad);
    }
    return 0;
}

int main(int arguments, char **argument) {
    const char *what = arguments > 1 ? argument[1] : "";
    if (!strcmp(what, "worker"))
        return worker();
    if (arguments > 2)
        bits = atoi(argument[arguments - 1]) == 512 ? 512 : 256;
    check_processor();
    if (!strcmp(what, "hold") && arguments == 5)
        return hold(atoi(argument[2]), atof(argument[3]));
    if (!strcmp(what, "once"))
        return spin(1, SPIN) != 0;
    if (!strcmp(what, "signal") && arguments == 4)
        return interrupted(atof(argument[2]));
    if (!strcmp(what, "frames"))
        return frames();
    if (!strcmp(what, "ptrace"))
        return traced();
    if (!strcmp(what, "spawn") && arguments == 4)
        return spawn(argument[0], atoi(argument[2]));
    fprintf(stderr, "see the top of registers.c\n");
    return 2;
}
