"""The calls of the C library that compiled code makes: by symbol name, so that the callers can be cached.

Addresses are plain integers (`array.ctypes.data`), 0 is NULL. A result below zero means that `errno()` says why.
"""

from __future__ import annotations

from typing import Any

from xdp.intrinsics import External, cgutils, intrinsic, ir, types

MSG_DONTWAIT = 0x40
POLLIN = 0x001
POLLERR = 0x008
EINTR = 4
EAGAIN = 11
EBUSY = 16
ENETDOWN = 100
ENOBUFS = 105

# int sched_yield(void)
sched_yield = External("sched_yield", "int32()")
# int poll(struct pollfd *fds, nfds_t count, int timeout_ms)
poll = External("poll", "int32(uintp, uint64, int32)")
# ssize_t sendto(int fd, const void *buf, size_t len, int flags, const struct sockaddr *to, socklen_t to_len)
sendto = External("sendto", "int64(int32, uintp, uint64, int32, uintp, uint32)")
# ssize_t write(int fd, const void *buf, size_t len)
write = External("write", "int64(int32, uintp, uint64)")
# ssize_t recvfrom(int fd, void *buf, size_t len, int flags, struct sockaddr *from, socklen_t *from_len)
recvfrom = External("recvfrom", "int64(int32, uintp, uint64, int32, uintp, uintp)")

# void *memcpy(void *to, const void *from, size_t count)
memcpy = External("memcpy", "uintp(uintp, uintp, uint64)")


@intrinsic
def errno(typing_context):
    """Return the error number of this thread's last failed call."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32).as_pointer(), [])
        location = cgutils.get_or_insert_function(builder.module, kind, "__errno_location")
        return builder.load(builder.call(location, []))

    return types.int32(), generate


def _clock(number: int) -> Any:
    @intrinsic
    def read_ns(typing_context):
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i32, i64 = ir.IntType(32), ir.IntType(64)
            timespec = cgutils.alloca_once(builder, i64, size=2)
            kind = ir.FunctionType(i32, [i32, i64.as_pointer()])
            clock_gettime = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
            builder.call(clock_gettime, [i32(number), timespec])
            seconds = builder.load(timespec)
            nanoseconds = builder.load(builder.gep(timespec, [i32(1)]))
            return builder.add(builder.mul(seconds, i64(1_000_000_000)), nanoseconds)

        return types.int64(), generate

    return read_ns


monotonic_ns = _clock(1)  # CLOCK_MONOTONIC in nanoseconds: about 25 ns, no system call
coarse_ns = _clock(6)  # CLOCK_MONOTONIC_COARSE: that of the last tick, about 6 ns
