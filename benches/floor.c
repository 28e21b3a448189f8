/*
 * The least that N machines at once cost this host: a process each, with a KVM machine on a private mapping of one shared
 * image, up to the first I/O instruction of its guest. No pager, jail, devices or saved state: what forkd does on top is
 * what its time is to be compared with.
 *
 *     floor N MEMORY_MIB
 *
 * Prints one JSON object: milliseconds from before the first fork(2) until the last guest's first instruction
 * (`total_ms`), of each guest (`each_ms`), and how many failed. All machines stay alive until the last one is through.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LEAVES = 200, PML4 = 0x1000, PDPT = 0x2000, DIRECTORY = 0x3000, CODE = 0x8000, STACK = 0xa000 };

static double clock_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static int image_with_guest(size_t bytes)
{
	static const uint8_t guest[] = { 0xb0, 0x2a, 0xe6, 0x80, 0xeb, 0xfe }; /* mov al, 42; out 0x80, al; jmp . */
	const uint64_t pml4 = PDPT | 7, pdpt = DIRECTORY | 7, first_2m = 0x87;
	int image = memfd_create("floor", MFD_CLOEXEC);

	if (image < 0 || ftruncate(image, bytes) || pwrite(image, &pml4, 8, PML4) != 8 || pwrite(image, &pdpt, 8, PDPT) != 8 ||
	    pwrite(image, &first_2m, 8, DIRECTORY) != 8 || pwrite(image, guest, sizeof guest, CODE) != sizeof guest)
		return -1;
	return image;
}

/* Long mode in ring 3, where no kernel is needed, with the right to do I/O. */
static int set_registers(int vcpu)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = ~0u, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .s = 1, .db = 1, .g = 1 };
	struct kvm_regs registers = { .rip = CODE, .rsp = STACK, .rflags = 2 | 3 << 12 };
	struct kvm_sregs system;

	if (ioctl(vcpu, KVM_GET_SREGS, &system))
		return -1;
	system.cs = code;
	system.ds = system.es = system.fs = system.gs = system.ss = data;
	system.cr0 = 0x80050033;
	system.cr3 = PML4;
	system.cr4 = 0x620;
	system.efer = 0xd01;
	return ioctl(vcpu, KVM_SET_SREGS, &system) || ioctl(vcpu, KVM_SET_REGS, &registers);
}

static int show_processor(int kvm, int vcpu)
{
	struct kvm_cpuid2 *leaves = calloc(1, sizeof *leaves + LEAVES * sizeof(struct kvm_cpuid_entry2));

	if (!leaves)
		return -1;
	leaves->nent = LEAVES;
	return ioctl(kvm, KVM_GET_SUPPORTED_CPUID, leaves) || ioctl(vcpu, KVM_SET_CPUID2, leaves);
}

/* Memory comes before the interrupt controllers: the other way round the kernel waits for all its processors. */
static int machine_until_first_instruction(int image, size_t bytes)
{
	struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
	struct kvm_userspace_memory_region slot = { .memory_size = bytes };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, image, 0);

	if (kvm < 0 || vm < 0 || memory == MAP_FAILED)
		return -1;
	slot.userspace_addr = (uintptr_t)memory;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot) || ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) ||
	    ioctl(vm, KVM_CREATE_IRQCHIP, 0) || ioctl(vm, KVM_CREATE_PIT2, &pit))
		return -1;
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	int length = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	if (vcpu < 0 || length < 0 || show_processor(kvm, vcpu) || set_registers(vcpu))
		return -1;
	struct kvm_run *run = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED || ioctl(vcpu, KVM_RUN, 0))
		return -1;
	return run->exit_reason == KVM_EXIT_IO && run->io.port == 0x80 ? 0 : -1;
}

/* Runs in the child: tells that it is through, and lives on until the parent lets go. */
static void child(int image, size_t bytes, double started, double *through, int tell, int hold)
{
	char byte = 0;

	if (machine_until_first_instruction(image, bytes) == 0)
		*through = clock_ms() - started;
	if (write(tell, &byte, 1) == 1)
		(void)!read(hold, &byte, 1);
	_exit(0);
}

static void report(const double *through, int count)
{
	double last = 0;
	int failed = 0;

	printf("{\"each_ms\": [");
	for (int i = 0; i < count; i++) {
		failed += through[i] == 0;
		last = through[i] > last ? through[i] : last;
		printf("%s%.3f", i ? ", " : "", through[i]);
	}
	printf("], \"total_ms\": %.3f, \"failed\": %d}\n", last, failed);
}

int main(int argc, char **argv)
{
	int count = argc == 3 ? atoi(argv[1]) : 0, mib = argc == 3 ? atoi(argv[2]) : 0, tell[2], hold[2];
	size_t bytes = (size_t)mib << 20;

	if (count < 1 || mib < 2) {
		fprintf(stderr, "usage: floor N MEMORY_MIB\n");
		return 2;
	}
	int image = image_with_guest(bytes);
	double *through = mmap(NULL, count * sizeof *through, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (image < 0 || through == MAP_FAILED || pipe(tell) || pipe(hold)) {
		perror("floor");
		return 1;
	}
	double started = clock_ms();
	for (int i = 0; i < count; i++) {
		pid_t pid = fork();
		if (pid == 0) {
			close(tell[0]);
			close(hold[1]);
			child(image, bytes, started, &through[i], tell[1], hold[0]);
		}
		if (pid < 0) {
			perror("fork");
			break;
		}
	}
	char byte;
	close(tell[1]);
	for (int i = 0; i < count && read(tell[0], &byte, 1) == 1; i++)
		;
	report(through, count);
	close(hold[1]);
	while (wait(NULL) > 0)
		;
	return 0;
}
