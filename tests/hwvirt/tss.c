// Preloaded into forkd in layer 1, to mend the emulator: a processor's task register always holds a *busy* segment
// (type 11), which is what KVM reports and takes back, but QEMU's I/O permission check wants type 9 and refuses every
// I/O instruction of user mode otherwise (helper_check_io, the same in QEMU 7.2 and 10). A guest that loads the
// register itself is not affected, a restored one is. Nothing else is changed.
#include <linux/kvm.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BUSY 2

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    struct kvm_sregs sregs;
    if (request == KVM_SET_SREGS) {
        sregs = *(struct kvm_sregs *)argument;
        sregs.tr.type &= ~BUSY;
        argument = &sregs;
    }
    return syscall(SYS_ioctl, fd, request, argument);
}
