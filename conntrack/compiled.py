"""The flow table from compiled code: find, insert, touch, withdraw, sweep. Any number of writers, no locks.

How writers agree (docs/adr/0003):

* A slot is claimed by compare-and-swap of its tag from EMPTY to CLAIMED and filled; then its record says that it is
  published, which is what readers believe, and a second swap shows the tag, by which writers find each other.
* Readers look at a flow's home first, without its tag (docs/adr/0017): of most flows the record is the only line read.
* A connection claims two slots. The reply's record is published first, so that nobody can be answered before the reply
  is translated; then the original's.
* After each publication the writer looks for the key again, in both buckets. If it finds another record it rolls its
  own back, and never touches the other's: whoever published last sees the other one, so at most one stays, and a
  connection that is established cannot lose. Two writers may both roll back; then each tries again.
* Withdrawing is one compare-and-swap of the tag; who has done it takes `published` back. Both directions go: whoever
  withdraws looks at the other direction after its own swap, and an insertion looks at its reply after publishing the
  original, so no half is left.
* XDP, which cannot wait for a grace period, retires records instead of withdrawing them, and may claim a retired one
  for itself after a second. The sweep makes retired ones withdrawn, so that only one of the two frees a slot.
* Only the sweep (one thread) makes a withdrawn slot EMPTY again, after a grace period in which every XDP run has ended
  and every worker has turned. Until then readers may look at the record, and follow it to its peer: a slot whose record
  was ever published, or led to by a published one, is never emptied without grace. The sweep notes a withdrawn slot
  only when its peer is withdrawn as well, finishing what a writer that died left half done.

A connection is given as two five-tuples: `original` as the client sends it and `translated` as the endpoint gets it.
The reply's key is `translated` turned round, and it leaves as `original` turned round.
"""

from __future__ import annotations

import numpy as np

from xdp.atomic import compare_and_swap, fence, load_acquire, prefetch, store_release
from xdp.byteorder import swapped32
from xdp.hash import (
    first_place,
    hash_tuple,
    hit_count,
    hits_of,
    home_of,
    is_hit,
    lanes_equal,
    lowest_hit,
    second_place,
    tag_of,
)
from xdp.jit import compiled, inlined
from xdp.schema import Direction, Event, Limit, Protocol, State, Tag

MISS = -1  # no such flow
FULL = -2  # no slot in either bucket
TAKEN = -3  # the reply's key belongs to another connection

_WORDS = int(Limit.BUCKET_WORDS)
_TAGS = int(Limit.BUCKET_TAGS)
_EMPTY = np.uint64(Tag.EMPTY)
_CLAIMED = np.uint64(Tag.CLAIMED)
_WITHDRAWN = np.uint64(Tag.WITHDRAWN)
_RETIRED = np.uint64(Tag.RETIRED)
_FIRST = np.uint64(Tag.FIRST)
_LANE = np.uint64(0xFFFF)
_ONE = np.uint64(1)
_ORIGINAL = np.uint8(Direction.ORIGINAL)
_REPLY = np.uint8(Direction.REPLY)
_SYN_RECEIVED, _ESTABLISHED, _RESET = map(np.uint8, (State.SYN_RECEIVED, State.ESTABLISHED, State.RESET))
_SYN = int(Event.SYN)
_STATE_BITS, _SET_BITS = np.uint8(Limit.STATE_BITS), np.uint8(~Limit.STATE_BITS & 0xFF)
_PUBLISHED, _NOT_PUBLISHED = np.uint8(1), np.uint8(0)
_IPV6, _ICMP = int(Protocol.IPV6), int(Protocol.ICMP)
_ROOM_ENOUGH = int(Limit.ROOM_ENOUGH)
_AHEAD = 64  # words: where few are in use, that many hold the records that a core fetches at a time


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
def _hash_of(tables, addrs, ports, protocol):
    hash_key = tables.control[0].hash_key
    return hash_tuple(addrs, ports, protocol, hash_key[0], hash_key[1])


@inlined
def _first_bucket(tables, hashed):
    return first_place(hashed, len(tables.tags) // _WORDS)


@inlined
def _second_bucket(tables, hashed):
    """Return the second bucket of a hash; it may be the first one."""
    return second_place(hashed, len(tables.tags) // _WORDS)


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
def _has_key(tables, slot, addrs, ports, protocol):
    if load_acquire(tables.published, slot) == 0:  # first: what is published stays as it is until nobody looks
        return False
    record = tables.flows[slot]
    return (
        ((np.uint64(record.dst_addr) << np.uint64(32) | np.uint64(record.src_addr)) == addrs)
        & ((np.uint32(record.dst_port) << np.uint32(16) | np.uint32(record.src_port)) == ports)
        & (record.protocol == protocol)
    )


@inlined
def _find_in_bucket(tables, bucket, tag, addrs, ports, protocol, besides):
    """Return the slot of `bucket` with this key, other than slot `besides`; or MISS."""
    hits = _hits_in(tables.tags, bucket, tag)
    while hits:
        slot = bucket * _TAGS + lowest_hit(hits)
        if slot != besides and _has_key(tables, slot, addrs, ports, protocol):
            return slot
        hits &= hits - _ONE
    return MISS


@inlined
def _locate(tables, hashed, addrs, ports, protocol, besides):
    """Return the slot with this key other than `besides`, or MISS. By tags: what a writer must see is in them."""
    tag = tag_of(hashed)
    slot = _find_in_bucket(tables, _first_bucket(tables, hashed), tag, addrs, ports, protocol, besides)
    if slot == MISS:
        slot = _find_in_bucket(tables, _second_bucket(tables, hashed), tag, addrs, ports, protocol, besides)
    return slot


@inlined
def _home(tables, hashed):
    """Return the slot that a hash is at home in."""
    return _first_bucket(tables, hashed) * _TAGS + home_of(hashed)


@inlined
def _find_at_home(tables, hashed, addrs, ports, protocol):
    home = _home(tables, hashed)
    for slot in (home, home ^ 1):
        if _has_key(tables, slot, addrs, ports, protocol):
            return slot
    return MISS


@inlined
def find(tables, addrs, ports, protocol):
    """Return the slot of the flow with this five-tuple, or MISS."""
    hashed = _hash_of(tables, addrs, ports, protocol)
    slot = _find_at_home(tables, hashed, addrs, ports, protocol)
    return slot if slot != MISS else _find_by_tag(tables, hashed, addrs, ports, protocol)


@compiled
def _find_by_tag(tables, hashed, addrs, ports, protocol):
    """Return the slot of a flow that is not at home, or MISS. Most of what comes here is new."""
    return _locate(tables, hashed, addrs, ports, protocol, MISS)


@inlined
def is_older(now, then, timeout):
    """Tell whether more than `timeout` jiffies lie between `then` and `now` (lower 32 bits of a clock that wraps)."""
    return np.int32(np.uint32(now) - np.uint32(then)) > np.int32(timeout)


@inlined
def with_state(state, other):
    """Return the state of a flow that is in `other` from now on: its timeouts stay."""
    return np.uint8(state & _SET_BITS | other)


@compiled
def is_expired(tables, slot, now):
    """Tell whether neither direction of the connection at `slot` was seen for the timeout of its state."""
    flows, words = tables.flows, tables.control[0]
    timeout = tables.machine[0].timeout[flows[slot].state]
    if not is_older(now, flows[slot].last_seen, timeout) or not is_older(now, words.aged_from, timeout):
        return False
    return is_older(now, flows[flows[slot].peer].last_seen, timeout)


@inlined
def _claim_in(tags, bucket, home):
    """Claim an empty slot of `bucket`, at `home` or beside it if possible; return it, or FULL."""
    while True:
        hits = _hits_in(tags, bucket, _EMPTY)
        if not hits:
            return FULL
        number = lowest_hit(hits)
        if is_hit(hits, home):
            number = home
        elif is_hit(hits, home ^ 1):
            number = home ^ 1
        slot = bucket * _TAGS + number
        if _swap_tag(tags, slot, _EMPTY, _CLAIMED):
            return slot


@inlined
def _claim(tables, hashed):
    """Claim a slot for a hash, in its first bucket if that has room enough, else in the emptier one; or FULL."""
    tags, home = tables.tags, home_of(hashed)
    first, second = _first_bucket(tables, hashed), _second_bucket(tables, hashed)
    room = hit_count(_hits_in(tags, first, _EMPTY))
    if room < _ROOM_ENOUGH and hit_count(_hits_in(tags, second, _EMPTY)) > room:
        first, second = second, first
    slot = _claim_in(tags, first, home)
    return slot if slot != FULL else _claim_in(tags, second, home)


@compiled
def withdraw_slot(tables, slot):
    """Withdraw a published slot; return whether this call did it. The record stays for those who are looking at it."""
    while True:
        tag = tag_at(tables.tags, slot)
        if tag < _FIRST:
            return False
        if _swap_tag(tables.tags, slot, tag, _WITHDRAWN):
            store_release(tables.published, slot, _NOT_PUBLISHED)
            return True


@inlined
def _publish(tables, slot, tag):
    """Publish the record at `slot`, which the caller has claimed and filled."""
    store_release(tables.published, slot, _PUBLISHED)
    _swap_tag(tables.tags, slot, _CLAIMED, tag)


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
        done = withdraw_slot(tables, peer)
    done |= withdraw_slot(tables, slot)
    if _is_peer(tags, flows, peer, slot):
        done |= withdraw_slot(tables, peer)
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
def _sum_of_names(tables, addrs):
    """Return the sum of the 16-bit words of two IPv6 addresses, given as names."""
    source, destination = swapped32(np.uint32(addrs)), swapped32(np.uint32(addrs >> np.uint64(32)))
    return np.uint64(tables.names[source].sum) + np.uint64(tables.names[destination].sum)


@inlined
def _growth_of(tables, addrs, new_addrs, protocol):
    """Return what the sum of a pair of addresses grows by, not folded, as a u64."""
    if protocol & _IPV6:
        return np.uint64(2 * 0xFFFF) - _sum_of_names(tables, addrs) + _sum_of_names(tables, new_addrs)
    return _words_of(~addrs) + _words_of(new_addrs)


@inlined
def _fill(tables, slot, way, addrs, ports, new_addrs, new_ports, protocol, state, next_hop, peer, now):
    record = tables.flows[slot]
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
    addresses = _growth_of(tables, addrs, new_addrs, protocol)
    record.ip_delta = np.uint16(_fold(addresses + np.uint64(0xFFFE)))
    ports_sum = _words_of(np.uint64(~np.uint32(ports))) + _words_of(np.uint64(new_ports))
    covered = np.uint64(0) if protocol == _ICMP else addresses  # by ICMP's checksum the addresses are not (RFC 792)
    record.l4_delta = np.uint16(_fold(covered + ports_sum))
    record.state = state
    record.next_hop = next_hop
    record.peer = peer
    record.last_seen = now
    record.packets = 0
    record.bytes = 0


@inlined
def _prefetch_tags(tables, hashed):
    prefetch(tables.tags, _first_bucket(tables, hashed) * _WORDS)
    prefetch(tables.tags, _second_bucket(tables, hashed) * _WORDS)


@inlined
def look_ahead(tables, addrs, ports, protocol):
    """Ask for the lines that looking for a flow, and inserting it, will read first."""
    hashed = _hash_of(tables, addrs, ports, protocol)
    prefetch(tables.flows, _home(tables, hashed))
    _prefetch_tags(tables, hashed)


@compiled
def insert(tables, addrs, ports, new_addrs, new_ports, protocol, state, hop_out, hop_back, now):
    """Insert the connection of an original five-tuple and its translation; return the slot of the original's record.

    `hop_out` is the next hop towards the endpoint, `hop_back` towards the client. FULL: no slot. TAKEN: another
    connection has the reply's key, or another writer is inserting this one: look for it, then try again.
    """
    tags, flows = tables.tags, tables.flows
    reply_addrs, reply_ports = turned_addrs(new_addrs), turned_ports(new_ports)
    back_addrs, back_ports = turned_addrs(addrs), turned_ports(ports)
    hashed = _hash_of(tables, addrs, ports, protocol)
    reply_hashed = _hash_of(tables, reply_addrs, reply_ports, protocol)
    prefetch(flows, _home(tables, reply_hashed))
    _prefetch_tags(tables, reply_hashed)
    _prefetch_tags(tables, hashed)

    old = _locate(tables, reply_hashed, reply_addrs, reply_ports, protocol, MISS)
    if old != MISS:
        if not is_expired(tables, old, now):
            return TAKEN
        withdraw(tables, old)  # whose a packet's key is over is not asked either, swept or not
    reply = _claim(tables, reply_hashed)
    if reply == FULL:
        return FULL
    original = _claim(tables, hashed)
    if original == FULL:
        _swap_tag(tags, reply, _CLAIMED, _EMPTY)  # nobody has read it
        return FULL
    prefetch(flows, reply)
    prefetch(flows, original)
    _fill(
        tables,
        reply,
        _REPLY,
        reply_addrs,
        reply_ports,
        back_addrs,
        back_ports,
        protocol,
        state,
        hop_back,
        original,
        now,
    )
    _fill(tables, original, _ORIGINAL, addrs, ports, new_addrs, new_ports, protocol, state, hop_out, reply, now)

    _publish(tables, reply, tag_of(reply_hashed))
    if _locate(tables, reply_hashed, reply_addrs, reply_ports, protocol, reply) != MISS:
        withdraw_slot(tables, reply)
        _swap_tag(tags, original, _CLAIMED, _WITHDRAWN)  # not EMPTY: the reply has led readers here
        return TAKEN
    _publish(tables, original, tag_of(hashed))
    is_alone = _locate(tables, hashed, addrs, ports, protocol, original) == MISS
    if not is_alone or tag_at(tags, reply) != tag_of(reply_hashed):
        withdraw(tables, original)
        return TAKEN
    return original


@inlined
def _oldest_in(tables, bucket, rank, now, victim, age):
    """Return (slot, age) of the oldest connection of class `rank` in `bucket`, if older than the one given."""
    tags, flows, rules = tables.tags, tables.flows, tables.machine[0]
    for slot in range(bucket * _TAGS, (bucket + 1) * _TAGS):
        if tag_at(tags, slot) >= _FIRST and rules.early_drop[flows[slot].state & _STATE_BITS] == rank:
            idle = np.int64(np.int32(np.uint32(now) - flows[slot].last_seen))
            if idle > age:
                victim, age = slot, idle
    return victim, age


@inlined
def _drop_oldest(tables, hashed, now):
    """Withdraw the oldest unreplied, else closing, connection in the buckets of a hash, unless a slot is free soon."""
    tags = tables.tags
    first, second = _first_bucket(tables, hashed), _second_bucket(tables, hashed)
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
    done = _drop_oldest(tables, _hash_of(tables, addrs, ports, protocol), now)
    reply_hashed = _hash_of(tables, turned_addrs(new_addrs), turned_ports(new_ports), protocol)
    done |= _drop_oldest(tables, reply_hashed, now)
    return done


@inlined
def touch(tables, slot, event, length, now):
    """Note a packet of `length` bytes at `slot`: counters, last-seen, and the state of both records if it changes.

    A SYN of the client on an open connection does not keep it (find.c).
    """
    flows, rules = tables.flows, tables.machine[0]
    record = flows[slot]
    state = record.state
    new = rules.next_state[(state & _STATE_BITS) << 4 | (record.direction & 1) << 3 | event & 7] | state & _SET_BITS
    if new != state:
        record.state = new
        flows[record.peer].state = new
    if event != _SYN or record.direction != _ORIGINAL or state & _STATE_BITS <= _SYN_RECEIVED:
        record.last_seen = now
    record.packets += np.uint64(1)
    record.bytes += np.uint64(length)


@inlined
def ask_ahead(tags, flows, word):
    """Ask for records that a pass over all slots, now at the tags of `word`, will read: their misses overlap."""
    ahead = word + _AHEAD
    if ahead < len(tags):
        four = load_acquire(tags, ahead)
        for lane in range(4):
            if four >> np.uint64(lane << 4) & _LANE:
                prefetch(flows, ahead * 4 + lane)


@inlined
def _mark_names(record, named):
    """Note in `named` (u8, by row of names) which names a record uses."""
    named[swapped32(record.src_addr)] = 1
    named[swapped32(record.dst_addr)] = 1
    named[swapped32(record.new_src_addr)] = 1
    named[swapped32(record.new_dst_addr)] = 1


@compiled
def sweep(tables, start, stop, now, withdrawn, named):
    """Withdraw what has expired among slots [start, stop), whole words of tags, and note which are withdrawn there.

    `withdrawn` (i64 array, at least stop - start long) is filled from its start. In `named` (u8, by row of names) is
    noted which names the others use. Return how many slots were noted. A record looks at its own last-seen first, so a
    live table is read in one direction only.
    """
    tags, flows, rules, words = tables.tags, tables.flows, tables.machine[0], tables.control[0]
    noted = 0
    for word in range(start >> 2, stop >> 2):
        ask_ahead(tags, flows, word)
        if not load_acquire(tags, word):
            continue
        for slot in range(word << 2, word + 1 << 2):
            tag = tag_at(tags, slot)
            if tag >= _FIRST:
                record = flows[slot]
                state = record.state
                timeout = rules.timeout[with_state(state, _ESTABLISHED) if state & _STATE_BITS == _RESET else state]
                if record.protocol & _IPV6:
                    _mark_names(record, named)
                if is_older(now, record.last_seen, timeout) and is_older(now, words.aged_from, timeout):
                    peer = np.int64(record.peer)
                    if not _is_peer(tags, flows, peer, slot) or is_older(now, flows[peer].last_seen, timeout):
                        withdraw(tables, slot)
                        tag = tag_at(tags, slot)
            if tag == _RETIRED and _swap_tag(tags, slot, _RETIRED, _WITHDRAWN):
                tag = _WITHDRAWN
            if tag == _WITHDRAWN:
                peer = np.int64(flows[slot].peer)
                if _is_peer(tags, flows, peer, slot):
                    withdraw_slot(tables, peer)
                store_release(tables.published, slot, _NOT_PUBLISHED)  # who withdrew it may have died before
                withdrawn[noted] = slot
                noted += 1
    return noted


@compiled
def release(tags, withdrawn, count):
    """Make `count` slots of `withdrawn` empty again. The caller has seen a grace period since `sweep` noted them."""
    fence()
    for i in range(count):
        _swap_tag(tags, withdrawn[i], _WITHDRAWN, _EMPTY)


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
