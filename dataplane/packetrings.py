"""The rings of AF_PACKET sockets, as compiled code uses them: frames are received in blocks, and sent from slots.

The kernel fills a block of the receive ring (TPACKET_V3) and hands it over when it is full or a millisecond old. Its
frames lie in it back to back; they are looked at, and rewritten, where they lie, and the block goes back when the next
one is asked for. A frame that leaves is copied into a slot of the transmit ring (TPACKET_V2); one system call sends
what is in the slots to one interface. A GSO frame, which may fit into no slot, is sent from where it lies.

Directly before every frame lies its VNET header (struct virtio_net_hdr): a checksum that a device is to finish, and the
size of the segments that a device is to cut it into. It goes out as it came in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane import vlans
from dataplane.libc import EINTR, MSG_DONTWAIT, POLLERR, errno, memcpy, poll, recvfrom, sendto
from dataplane.wire import TYPE_ARP, is_station
from dataplane.wire6 import is_solicitation
from xdp.atomic import load_acquire, store_release
from xdp.bundle import Bundle
from xdp.jit import compiled, inlined
from xdp.schema import FIRST_DROP, Reason
from xdp.unaligned import load16, load32, store16

VNET_BYTES = 10  # struct virtio_net_hdr: u8 flags, u8 gso_type, u16 hdr_len, gso_size, csum_start, csum_offset
VNET_GSO_TYPE, VNET_HEADER_LENGTH, VNET_GSO_SIZE, VNET_CSUM_START, VNET_CSUM_OFFSET = 1, 2, 4, 6, 8
VNET_NEEDS_CSUM = 1
GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 1, 4, 5

# A frame in a block: where it begins in the ring, its length, and FORWARDED or why it is left to the kernel at once.
FRAME = np.dtype([("addr", "i8"), ("len", "i4"), ("reason", "i4")])

SLOT_DATA = 32  # struct tpacket2_hdr; what is sent begins behind it
SOCKADDR_BYTES = 20  # struct sockaddr_ll
SOCKADDR_IFINDEX = 4  # its offset there

_STATUS, _PACKETS, _FIRST = 8, 12, 16  # struct tpacket_block_desc
_NEXT, _SNAPLEN, _LEN, _FRAME_STATUS, _MAC, _PKTTYPE = 0, 12, 16, 20, 24, 58  # struct tpacket3_hdr, sockaddr_ll behind
_VLAN_CONTROL, _VLAN_TYPE = 32, 36  # struct tpacket_hdr_variant1 in it: of the tag that the kernel has taken out
_KERNEL, _USER, _VLAN_VALID, _VLAN_TYPE_VALID = 0, 1, 1 << 4, 1 << 6
_TYPE_VLAN = 0x8100
_AVAILABLE, _SEND_REQUEST = 0, 1
_SLOT_STATUS, _SLOT_LEN = 0, 1  # struct tpacket2_hdr, in words of 32 bits
_HOST, _BROADCAST, _MULTICAST, _OTHER = range(4)  # sll_pkttype: to this interface, to all, to a group, to none of these
_TRIES = 3
_TX_FULL = int(Reason.TX_FULL)

# Places of Queue.at.
BLOCK, OFFSET, LEFT, IS_OPEN, HEAD, PENDING, EGRESS = range(7)


@dataclass(frozen=True, eq=False)
class Queue(Bundle):
    """The sockets of one worker.

    `frames` is the receive ring, `statuses` the same as u32 words; `slots` and `slot_words` are the transmit ring.
    `at` says how far both have got; `reasons` is what to count for the slots that are pending. `to` is a struct
    sockaddr_ll. `held` has room for frames that wait, a slot's worth each, and for an answer.
    """

    frames: npt.NDArray[np.uint8]
    statuses: npt.NDArray[np.uint32]
    block_bytes: int
    slots: npt.NDArray[np.uint8]
    slot_words: npt.NDArray[np.uint32]
    slot_bytes: int
    at: npt.NDArray[np.int64]
    reasons: npt.NDArray[np.int64]
    to: npt.NDArray[np.uint8]
    held: npt.NDArray[np.uint8]
    fd: int
    slots_fd: int
    large_fd: int


@inlined
def _status_word(queue):
    return queue.at[BLOCK] * np.int64(queue.block_bytes) // 4 + _STATUS // 4


@compiled
def _tag(frames, place, start):
    """Put back the tag that the kernel tells of in the header at `place`; there is room before the VNET header.

    What that says of places in the frame is made right.
    """
    is_told = load32(frames, place + _FRAME_STATUS) & np.uint32(_VLAN_TYPE_VALID) != 0
    kind = load16(frames, place + _VLAN_TYPE) if is_told else np.uint16(_TYPE_VLAN)
    vnet = start - VNET_BYTES
    to = vnet - vlans.VLAN_TAG_BYTES
    for i in range(VNET_BYTES):
        frames[to + i] = frames[vnet + i]
    for field in (VNET_HEADER_LENGTH, VNET_CSUM_START):
        if field == VNET_HEADER_LENGTH or frames[to] & np.uint8(VNET_NEEDS_CSUM):
            store16(frames, to + field, load16(frames, to + field) + np.uint16(vlans.VLAN_TAG_BYTES))
    vlans.insert(frames, start, kind, load32(frames, place + _VLAN_CONTROL))


@inlined
def _whose(frames, start, inner, length, kind, stations):
    """Return FORWARDED if a frame is to us, else why it is the kernel's. Behind a tag it has `length` bytes at `inner`.

    The kernel's word counts, which knows nothing yet of devices on top of the interface: that of `stations` beside it.
    """
    if kind == _HOST or (kind == _OTHER and stations[0] != 0 and is_station(frames, start, stations)):
        return Reason.FORWARDED
    if kind == _OTHER:
        return Reason.OTHER_STATION
    is_to_us = kind == _BROADCAST and load16(frames, inner + 12) == TYPE_ARP
    is_to_us |= kind == _MULTICAST and is_solicitation(frames, inner, length)
    return Reason.FORWARDED if is_to_us else Reason.NOT_IPV4


@compiled
def receive(queue, burst, limit, stations):
    """Fill `burst` (FRAME rows) with up to `limit` received frames; return how many.

    They stay where they are until the next call. One that is addressed to another machine or cut short is not ours; of
    those addressed to all, only ARP is, of those to a group, only questions for a neighbour. The kernel takes the outer
    VLAN tag out of every frame, if no driver has: it is put back.
    """
    at, frames = queue.at, queue.frames
    if at[LEFT] == 0 and at[IS_OPEN]:
        store_release(queue.statuses, _status_word(queue), _KERNEL)
        at[BLOCK] = (at[BLOCK] + 1) % (len(frames) // np.int64(queue.block_bytes))
        at[IS_OPEN] = 0
    if not at[IS_OPEN]:
        if load_acquire(queue.statuses, _status_word(queue)) & np.uint32(_USER) == 0:
            return 0
        block = at[BLOCK] * np.int64(queue.block_bytes)
        at[LEFT] = load32(frames, block + _PACKETS)
        at[OFFSET] = block + load32(frames, block + _FIRST)
        at[IS_OPEN] = 1
    count = min(np.int64(limit), at[LEFT])
    place = at[OFFSET]
    for i in range(count):
        length = load32(frames, place + _LEN)
        is_whole = load32(frames, place + _SNAPLEN) == length
        is_tagged = load32(frames, place + _FRAME_STATUS) & np.uint32(_VLAN_VALID) != 0
        burst[i].addr = place + load16(frames, place + _MAC)
        burst[i].len = length
        kind = frames[place + _PKTTYPE]
        inner = np.int64(burst[i].addr)
        if is_tagged and vlans.is_tag(frames, inner + 12):
            inner += vlans.VLAN_TAG_BYTES
        start, rest = np.int64(burst[i].addr), burst[i].addr + length - inner
        reason = np.int64(_whose(frames, start, inner, rest, kind, stations))
        burst[i].reason = reason if is_whole else np.int64(Reason.NOT_IPV4)
        if is_tagged and burst[i].reason == Reason.FORWARDED:
            _tag(frames, place, burst[i].addr)
            burst[i].addr -= vlans.VLAN_TAG_BYTES
            burst[i].len += vlans.VLAN_TAG_BYTES
        place += load32(frames, place + _NEXT)
    at[OFFSET] = place
    at[LEFT] -= count
    return count


@compiled
def unread(queue):
    """Return how many frames nobody has taken from the receive ring, a block that is being filled included."""
    blocks = len(queue.frames) // np.int64(queue.block_bytes)
    count = queue.at[LEFT]
    for step in range(np.int64(queue.at[IS_OPEN]), blocks):
        block = (queue.at[BLOCK] + step) % blocks * np.int64(queue.block_bytes)
        if load_acquire(queue.statuses, block // 4 + _STATUS // 4) & np.uint32(_USER) == 0:
            break
        count += load32(queue.frames, block + _PACKETS)
    return count


@compiled
def send(queue, frames, start, length, egress, reason, counters):
    """Send a frame, its VNET header before it, to interface `egress`, counted as `reason`, or TX_FULL if it cannot be.

    It leaves with the next `flush` at the latest; when `send` returns, its memory is not needed any more.
    """
    at = queue.at
    whole = length + VNET_BYTES
    if at[PENDING] and at[EGRESS] != np.int64(egress):
        flush(queue, counters)
    at[EGRESS] = np.int64(egress)
    if whole > np.int64(queue.slot_bytes) - SLOT_DATA or frames[start - VNET_BYTES + VNET_GSO_TYPE]:
        flush(queue, counters)
        _send_large(queue, frames, start, length, egress, reason, counters)
        return
    slots = len(queue.reasons)
    slot = (at[HEAD] + at[PENDING]) % slots
    word = slot * np.int64(queue.slot_bytes) // 4
    if at[PENDING] == slots or load_acquire(queue.slot_words, word + _SLOT_STATUS) != _AVAILABLE:
        flush(queue, counters)
        slot = at[HEAD]
        word = slot * np.int64(queue.slot_bytes) // 4
        if load_acquire(queue.slot_words, word + _SLOT_STATUS) != _AVAILABLE:
            counters.packets[_TX_FULL] += np.uint64(1)
            return
    data = slot * np.int64(queue.slot_bytes) + SLOT_DATA
    memcpy(queue.slots.ctypes.data + data, frames.ctypes.data + start - VNET_BYTES, whole)
    queue.slot_words[word + _SLOT_LEN] = np.uint32(whole)
    queue.reasons[slot] = reason
    store_release(queue.slot_words, word + _SLOT_STATUS, _SEND_REQUEST)
    at[PENDING] += 1


@inlined
def count(counters, reason):
    """Count a frame that was sent: for a reason that is a drop, it is our answer."""
    if reason >= FIRST_DROP and reason != _TX_FULL:
        counters.originated += np.uint64(1)
    counters.packets[reason] += np.uint64(1)


@inlined
def _address(queue, egress):
    for i in range(4):
        queue.to[SOCKADDR_IFINDEX + i] = np.uint8((np.int64(egress) >> (8 * i)) & 0xFF)
    return queue.to.ctypes.data


@compiled
def _send_large(queue, frames, start, length, egress, reason, counters):
    where = frames.ctypes.data + start - VNET_BYTES
    sent = np.int64(-1)
    for _ in range(_TRIES):
        sent = sendto(queue.large_fd, where, length + VNET_BYTES, MSG_DONTWAIT, _address(queue, egress), SOCKADDR_BYTES)
        if sent >= 0 or errno() != EINTR:
            break
    count(counters, reason if sent >= 0 else _TX_FULL)


@compiled
def flush(queue, counters):
    """Make the kernel send what is pending. What it does not take (a full queue, a device that is down) is dropped.

    Nothing is left for later: the next call may be for another interface.
    """
    at, slots = queue.at, len(queue.reasons)
    tries = 0
    while at[PENDING] and tries < _TRIES:
        sendto(queue.slots_fd, 0, 0, MSG_DONTWAIT, _address(queue, at[EGRESS]), SOCKADDR_BYTES)
        before = at[PENDING]
        while at[PENDING]:
            word = at[HEAD] * np.int64(queue.slot_bytes) // 4 + _SLOT_STATUS
            if load_acquire(queue.slot_words, word) == _SEND_REQUEST:
                break
            count(counters, queue.reasons[at[HEAD]])
            at[HEAD] = (at[HEAD] + 1) % slots
            at[PENDING] -= 1
        tries = tries + 1 if at[PENDING] == before else 0
    for step in range(at[PENDING]):  # the kernel goes on where it stopped: so do we
        word = (at[HEAD] + step) % slots * np.int64(queue.slot_bytes) // 4 + _SLOT_STATUS
        store_release(queue.slot_words, word, _AVAILABLE)
        counters.packets[_TX_FULL] += np.uint64(1)
    at[PENDING] = 0


@compiled
def wait(queue, polls, timeout_ms):
    """Sleep until a block is full, another of `polls` is ready or `timeout_ms` are over.

    `polls[0]` is the receiving socket. That its interface went down is told once, and noted.
    """
    polls[0].revents = 0
    if poll(polls.ctypes.data, len(polls), timeout_ms) > 0 and polls[0].revents & POLLERR:
        recvfrom(queue.fd, 0, 0, MSG_DONTWAIT, 0, 0)
