"""The flow table from compiled code: find, insert, touch, withdraw, sweep. Any number of writers, no locks.

How writers agree (docs/adr/0003):

* A slot is claimed by compare-and-swap of its tag from EMPTY to CLAIMED, filled, and published by a second one.
* A connection claims two slots. The reply's record is published first, so that nobody can be answered before the reply
  is translated; then the original's.
* After each publication the writer looks for the key again, in both buckets. If it finds another record it rolls its
  own back, and never touches the other's: whoever published last sees the other one, so at most one stays, and a
  connection that is established cannot lose. Two writers may both roll back; then each tries again.
* Withdrawing is one compare-and-swap of the tag. Both directions go: whoever withdraws looks at the other direction
  after its own swap, and an insertion looks at its reply after publishing the original, so no half is left.
* Only the sweep (one thread) makes a withdrawn slot EMPTY again, after a grace period in which every XDP run has ended
  and every worker has turned. Until then readers may look at the record, and follow it to its peer: a slot whose record
  was ever published, or led to by a published one, is never emptied without grace. The sweep notes a withdrawn slot
  only when its peer is withdrawn as well, finishing what a writer that died left half done.

A connection is given as two five-tuples: `original` as the client sends it and `translated` as the endpoint gets it.
The reply's key is `translated` turned round, and it leaves as `original` turned round.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import compare_and_swap, fence, load_acquire, prefetch
from xdp.hash import first_bucket, hash_tuple, hit_count, hits_of, lanes_equal, lowest_hit, second_bucket, tag_of
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Limit, Tag

MISS = -1  # no such flow
FULL = -2  # no slot in either bucket
TAKEN = -3  # the reply's key belongs to another connection

_WORDS = int(Limit.BUCKET_WORDS)
_TAGS = int(Limit.BUCKET_TAGS)
_EMPTY = np.uint64(Tag.EMPTY)
_CLAIMED = np.uint64(Tag.CLAIMED)
_WITHDRAWN = np.uint64(Tag.WITHDRAWN)
_FIRST = np.uint64(Tag.FIRST)
_LANE = np.uint64(0xFFFF)
_ONE = np.uint64(1)
_ORIGINAL = np.uint8(Direction.ORIGINAL)
_REPLY = np.uint8(Direction.REPLY)
_ROOM_ENOUGH = 8  # with this many empty tags the first bucket is taken, so that most look-ups end there


@inlined
def turned_addrs(addrs):
    """Return a five-tuple's addresses with source and destination exchanged."""
    return addrs >> np.uint64(32) | addrs << np.uint64(32)


@inlined
def turned_ports(ports):
    """Return a five-tuple's ports with source and destination exchanged."""
    return np.uint32(ports >> np.uint32(16) | ports << np.uint32(16))


@inlined
def tag_at(tags, slot):
    """Return the tag of `slot` as u64."""
    return load_acquire(tags, slot >> 2) >> np.uint64((slot & 3) << 4) & _LANE


@inlined
def _swap_tag(tags, slot, expected, tag):
    """Change the tag of `slot` from `expected` to `tag`; return whether it was `expected`. A full barrier."""
    shift = np.uint64((slot & 3) << 4)
    while True:
        word = load_acquire(tags, slot >> 2)
        if word >> shift & _LANE != expected:
            return False
        if compare_and_swap(tags, slot >> 2, word, word & ~(_LANE << shift) | tag << shift):
            return True


@inlined
def _place_of(tables, addrs, ports, protocol):
    """Return (tag, first bucket, second bucket) of a five-tuple."""
    hash_key = tables.control[0].hash_key
    buckets = len(tables.tags) // _WORDS
    hashed = hash_tuple(addrs, ports, protocol, hash_key[0], hash_key[1])
    return tag_of(hashed), first_bucket(hashed, buckets), second_bucket(hashed, buckets)


@inlined
def _hits_in(tags, bucket, tag):
    """Return which slots of `bucket` have `tag`, as from `hits_of`."""
    word = bucket * _WORDS
    return hits_of(
        lanes_equal(load_acquire(tags, word), tag),
        lanes_equal(load_acquire(tags, word + 1), tag),
        lanes_equal(load_acquire(tags, word + 2), tag),
        lanes_equal(load_acquire(tags, word + 3), tag),
    )


@inlined
def _has_key(flows, slot, addrs, ports, protocol):
    record = flows[slot]
    return (
        ((np.uint64(record.dst_addr) << np.uint64(32) | np.uint64(record.src_addr)) == addrs)
        & ((np.uint32(record.dst_port) << np.uint32(16) | np.uint32(record.src_port)) == ports)
        & (record.protocol == protocol)
    )


@inlined
def _find_in_bucket(tags, flows, bucket, tag, addrs, ports, protocol, besides):
    """Return the slot of `bucket` with this key, other than slot `besides`; or MISS."""
    hits = _hits_in(tags, bucket, tag)
    while hits:
        slot = bucket * _TAGS + lowest_hit(hits)
        if slot != besides and _has_key(flows, slot, addrs, ports, protocol):
            return slot
        hits &= hits - _ONE
    return MISS


@inlined
def _locate(tables, place, addrs, ports, protocol, besides):
    tag, first, second = place
    slot = _find_in_bucket(tables.tags, tables.flows, first, tag, addrs, ports, protocol, besides)
    if slot != MISS:
        return slot
    return _find_in_bucket(tables.tags, tables.flows, second, tag, addrs, ports, protocol, besides)


@compiled
def find(tables, addrs, ports, protocol):
    """Return the slot of the flow with this five-tuple, or MISS."""
    return _locate(tables, _place_of(tables, addrs, ports, protocol), addrs, ports, protocol, MISS)


@inlined
def is_older(now, then, timeout):
    """Tell whether more than `timeout` jiffies lie between `then` and `now` (lower 32 bits of a clock that wraps)."""
    return np.int32(np.uint32(now) - np.uint32(then)) > np.int32(timeout)


@compiled
def is_expired(tables, slot, now):
    """Tell whether neither direction of the connection at `slot` was seen for the timeout of its state."""
    flows, words = tables.flows, tables.control[0]
    timeout = tables.machine[0].timeout[flows[slot].state & 15]
    if not is_older(now, flows[slot].last_seen, timeout) or not is_older(now, words.aged_from, timeout):
        return False
    return is_older(now, flows[flows[slot].peer].last_seen, timeout)


@inlined
def _claim_in(tags, bucket):
    """Claim an empty slot of `bucket`; return it, or FULL."""
    while True:
        hits = _hits_in(tags, bucket, _EMPTY)
        if not hits:
            return FULL
        slot = bucket * _TAGS + lowest_hit(hits)
        if _swap_tag(tags, slot, _EMPTY, _CLAIMED):
            return slot


@inlined
def _claim(tags, place):
    """Claim a slot in the emptier of the two buckets of `place`; return it, or FULL."""
    _, first, second = place
    room = hit_count(_hits_in(tags, first, _EMPTY))
    if room < _ROOM_ENOUGH and hit_count(_hits_in(tags, second, _EMPTY)) > room:
        first, second = second, first
    slot = _claim_in(tags, first)
    return slot if slot != FULL else _claim_in(tags, second)


@compiled
def withdraw_slot(tags, slot):
    """Withdraw a published slot; return whether this call did it. The record stays for those who are looking at it."""
    while True:
        tag = tag_at(tags, slot)
        if tag < _FIRST:
            return False
        if _swap_tag(tags, slot, tag, _WITHDRAWN):
            return True


@inlined
def _is_peer(tags, flows, peer, slot):
    """Tell whether `peer` holds the published other direction of the record at `slot`."""
    return tag_at(tags, peer) >= _FIRST and np.int64(flows[peer].peer) == slot


@compiled
def withdraw(tables, slot):
    """Withdraw both directions of the connection at `slot`, the original's first: no new packet gets through half-way.

    Return whether this call withdrew any.
    """
    tags, flows = tables.tags, tables.flows
    peer = np.int64(flows[slot].peer)
    done = False
    if flows[slot].direction == _REPLY and _is_peer(tags, flows, peer, slot):
        done = withdraw_slot(tags, peer)
    done |= withdraw_slot(tags, slot)
    if _is_peer(tags, flows, peer, slot):
        done |= withdraw_slot(tags, peer)
    return done


@inlined
def _fold(total):
    total = (total & np.uint64(0xFFFF)) + (total >> np.uint64(16))
    total = (total & np.uint64(0xFFFF)) + (total >> np.uint64(16))
    return (total & np.uint64(0xFFFF)) + (total >> np.uint64(16))


@inlined
def _words_of(value):
    """Return the sum of the four 16-bit words of `value`."""
    m = np.uint64(0xFFFF)
    return (value & m) + (value >> np.uint64(16) & m) + (value >> np.uint64(32) & m) + (value >> np.uint64(48))


@inlined
def _fill(flows, slot, way, addrs, ports, new_addrs, new_ports, protocol, state, next_hop, peer, now):
    record = flows[slot]
    record.src_addr = np.uint32(addrs)
    record.dst_addr = np.uint32(addrs >> np.uint64(32))
    record.src_port = np.uint16(ports)
    record.dst_port = np.uint16(ports >> np.uint32(16))
    record.protocol = protocol
    record.direction = way
    record.new_src_addr = np.uint32(new_addrs)
    record.new_dst_addr = np.uint32(new_addrs >> np.uint64(32))
    record.new_src_port = np.uint16(new_ports)
    record.new_dst_port = np.uint16(new_ports >> np.uint32(16))
    # RFC 1624 equation 3: ~old + new. TTL is the high byte of its word on the wire; as it lies here it falls by 1.
    addresses = _words_of(~addrs) + _words_of(new_addrs)
    record.ip_delta = np.uint16(_fold(addresses + np.uint64(0xFFFE)))
    ports_sum = _words_of(np.uint64(~np.uint32(ports))) + _words_of(np.uint64(new_ports))
    record.l4_delta = np.uint16(_fold(addresses + ports_sum))
    record.state = state
    record.next_hop = next_hop
    record.peer = peer
    record.last_seen = now
    record.packets = 0
    record.bytes = 0


@inlined
def _prefetch_tags(tags, place):
    prefetch(tags, place[1] * _WORDS)
    prefetch(tags, place[2] * _WORDS)


@compiled
def insert(tables, addrs, ports, new_addrs, new_ports, protocol, state, hop_out, hop_back, now):
    """Insert the connection of an original five-tuple and its translation; return the slot of the original's record.

    `hop_out` is the next hop towards the endpoint, `hop_back` towards the client. FULL: no slot. TAKEN: another
    connection has the reply's key, or another writer is inserting this one: look for it, then try again.
    """
    tags, flows = tables.tags, tables.flows
    reply_addrs, reply_ports = turned_addrs(new_addrs), turned_ports(new_ports)
    back_addrs, back_ports = turned_addrs(addrs), turned_ports(ports)
    place = _place_of(tables, addrs, ports, protocol)
    reply_place = _place_of(tables, reply_addrs, reply_ports, protocol)
    _prefetch_tags(tags, reply_place)
    _prefetch_tags(tags, place)

    if _locate(tables, reply_place, reply_addrs, reply_ports, protocol, MISS) != MISS:
        return TAKEN
    reply = _claim(tags, reply_place)
    if reply == FULL:
        return FULL
    original = _claim(tags, place)
    if original == FULL:
        _swap_tag(tags, reply, _CLAIMED, _EMPTY)  # nobody has read it
        return FULL
    prefetch(flows, reply)
    prefetch(flows, original)
    _fill(
        flows, reply, _REPLY, reply_addrs, reply_ports, back_addrs, back_ports, protocol, state, hop_back, original, now
    )
    _fill(flows, original, _ORIGINAL, addrs, ports, new_addrs, new_ports, protocol, state, hop_out, reply, now)

    _swap_tag(tags, reply, _CLAIMED, reply_place[0])
    if _locate(tables, reply_place, reply_addrs, reply_ports, protocol, reply) != MISS:
        withdraw_slot(tags, reply)
        _swap_tag(tags, original, _CLAIMED, _WITHDRAWN)  # not EMPTY: the reply has led readers here
        return TAKEN
    _swap_tag(tags, original, _CLAIMED, place[0])
    is_alone = _locate(tables, place, addrs, ports, protocol, original) == MISS
    if not is_alone or tag_at(tags, reply) != reply_place[0]:
        withdraw(tables, original)
        return TAKEN
    return original


@inlined
def _oldest_in(tables, bucket, rank, now, victim, age):
    """Return (slot, age) of the oldest connection of class `rank` in `bucket`, if older than the one given."""
    tags, flows, rules = tables.tags, tables.flows, tables.machine[0]
    for slot in range(bucket * _TAGS, (bucket + 1) * _TAGS):
        if tag_at(tags, slot) >= _FIRST and rules.early_drop[flows[slot].state & 15] == rank:
            idle = np.int64(np.int32(np.uint32(now) - flows[slot].last_seen))
            if idle > age:
                victim, age = slot, idle
    return victim, age


@inlined
def _drop_oldest(tables, place, now):
    """Withdraw the oldest unreplied, else closing, connection in the buckets of `place`, unless a slot is free soon."""
    tags = tables.tags
    _, first, second = place
    if _hits_in(tags, first, _EMPTY) | _hits_in(tags, second, _EMPTY):
        return False
    if _hits_in(tags, first, _WITHDRAWN) | _hits_in(tags, second, _WITHDRAWN):
        return False
    for rank in range(1, 3):
        victim, age = _oldest_in(tables, first, rank, now, MISS, -1)
        victim, age = _oldest_in(tables, second, rank, now, victim, age)
        if victim != MISS and withdraw(tables, victim):
            return True
    return False


@compiled
def drop_early(tables, addrs, ports, new_addrs, new_ports, protocol, now):
    """Make room for a connection that `insert` found none for, among those that may go first; return whether one went.

    Where its original or its reply finds both buckets full, the oldest unreplied connection is withdrawn, else the
    oldest that is closing. Its slot is free after a grace period. Established ones are never touched (C6, C7).
    """
    done = _drop_oldest(tables, _place_of(tables, addrs, ports, protocol), now)
    done |= _drop_oldest(tables, _place_of(tables, turned_addrs(new_addrs), turned_ports(new_ports), protocol), now)
    return done


@compiled
def touch(tables, slot, event, length, now):
    """Note a packet of `length` bytes at `slot`: counters, last-seen, and the state of both records if it changes."""
    flows, rules = tables.flows, tables.machine[0]
    record = flows[slot]
    state = record.state
    new = rules.next_state[(state & 15) << 4 | (record.direction & 1) << 3 | event & 7]
    if new != state:
        record.state = new
        flows[record.peer].state = new
    record.last_seen = now
    record.packets += np.uint64(1)
    record.bytes += np.uint64(length)


@compiled
def sweep(tables, start, stop, now, withdrawn):
    """Withdraw what has expired among slots [start, stop), and note which slots are withdrawn there.

    `withdrawn` (i64 array, at least stop - start long) is filled from its start. Return (slots in use, slots noted).
    A record looks at its own last-seen first, so a live table is read in one direction only.
    """
    tags, flows, rules, words = tables.tags, tables.flows, tables.machine[0], tables.control[0]
    used, noted = 0, 0
    for slot in range(start, stop):
        if not slot & 3 and not load_acquire(tags, slot >> 2):
            continue
        tag = tag_at(tags, slot)
        if tag >= _FIRST:
            record = flows[slot]
            timeout = rules.timeout[record.state & 15]
            used += 1
            if is_older(now, record.last_seen, timeout) and is_older(now, words.aged_from, timeout):
                peer = np.int64(record.peer)
                if not _is_peer(tags, flows, peer, slot) or is_older(now, flows[peer].last_seen, timeout):
                    withdraw(tables, slot)
                    used -= 1
                    tag = tag_at(tags, slot)
        if tag == _WITHDRAWN:
            peer = np.int64(flows[slot].peer)
            if _is_peer(tags, flows, peer, slot):
                withdraw_slot(tags, peer)
            withdrawn[noted] = slot
            noted += 1
    return used, noted


@compiled
def release(tags, withdrawn, count):
    """Make `count` slots of `withdrawn` empty again. The caller has seen a grace period since `sweep` noted them."""
    fence()
    for i in range(count):
        _swap_tag(tags, withdrawn[i], _WITHDRAWN, _EMPTY)


@compiled
def count_used(tags):
    """Return how many slots hold a published record."""
    used = 0
    for word in range(len(tags)):
        seen = load_acquire(tags, word)
        if seen:
            for lane in range(4):
                used += (seen >> np.uint64(lane << 4) & _LANE) >= _FIRST
    return used


@compiled
def used_slots(tags, flows, way, out):
    """Fill `out` (i64) with the slots of published records of direction `way`; return how many there are."""
    count = 0
    for slot in range(len(flows)):
        if not slot & 3 and not load_acquire(tags, slot >> 2):
            continue
        if tag_at(tags, slot) >= _FIRST and flows[slot].direction == way and count < len(out):
            out[count] = slot
            count += 1
    return count


@compiled
def claimed_slots(tags, out):
    """Fill `out` (i64) with the slots that are claimed; return how many there are, at most len(out)."""
    count = 0
    for slot in range(len(tags) * 4):
        if count < len(out) and tag_at(tags, slot) == _CLAIMED:
            out[count] = slot
            count += 1
    return count


@compiled
def abandon(tags, slots, count):
    """Withdraw slots that a writer claimed and will never publish: it died in between."""
    for i in range(count):
        _swap_tag(tags, slots[i], _CLAIMED, _WITHDRAWN)


@inlined
def endpoint_key(addr, port, protocol):
    """Return an endpoint as one u64, address and port as on the wire."""
    return np.uint64(addr) | np.uint64(port) << np.uint64(32) | np.uint64(protocol) << np.uint64(48)


@inlined
def _is_in(ascending, wanted):
    low, high = 0, len(ascending)
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low < len(ascending) and ascending[low] == wanted


@compiled
def withdraw_towards(tables, endpoints):
    """Withdraw the connections towards `endpoints`, a sorted u64 array of `endpoint_key`s; return how many."""
    tags, flows = tables.tags, tables.flows
    count = 0
    for slot in range(len(flows)):
        if not slot & 3 and not load_acquire(tags, slot >> 2):
            continue
        record = flows[slot]
        if (
            tag_at(tags, slot) >= _FIRST
            and record.direction == _ORIGINAL
            and _is_in(endpoints, endpoint_key(record.new_dst_addr, record.new_dst_port, record.protocol))
        ):
            count += withdraw(tables, slot)
    return count
