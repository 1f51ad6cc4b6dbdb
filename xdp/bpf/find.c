/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* find.c - the flow of a five-tuple: the same question for every program, over the same maps. Part of lb.c and egress.c. */

TABLE(struct bucket, tags, TAGS_ROWS);
TABLE(struct flow, flows, FLOWS_ROWS);
TABLE(struct machine, machine, MACHINE_ROWS);

/* Of a bucket, equal to one another and to the wanted one; a fifth is a matter of 10^-17. */
enum { SAME_TAGS = 4 };

_Static_assert(sizeof(struct flow) == 64, "a flow is one cache line");
_Static_assert(sizeof(struct bucket) == 32, "a bucket's tags are half a cache line");

/* The first (0) or the second (1) bucket of a hash. */
static inline u32 bucket_of(u64 hash, u32 n)
{
	return n ? second_place(hash, TAGS_ROWS) : first_place(hash, TAGS_ROWS);
}

/* Whether a record is published and of this five-tuple. What is published stays as it is until nobody looks, so that is
 * read first; the rest of the record is read only after it is ours. */
static inline bool is_record_of(const struct flow *flow, const struct tuple *tuple)
{
	bool is_published = *(const volatile u16 *)&flow->protocol == (1 << 8 | tuple->protocol);

	asm volatile("" ::: "memory");
	return is_published && *(u64 *)&flow->src_addr == tuple->addrs && *(u32 *)&flow->src_port == tuple->ports;
}

/* Flow: the record of a five-tuple in one bucket, or none. */
static inline struct flow *find_in_bucket(u32 number, u64 tag, const struct tuple *tuple)
{
	struct bucket *bucket = tags.lookup(&number);
	u64 hits;
	int n;

	if (!bucket)
		return 0;
	hits = hits_of(bucket, tag);
#pragma nounroll
	for (n = 0; n < SAME_TAGS && hits; n++) {
		u32 slot = number * BUCKET_TAGS + lowest_hit(hits);
		struct flow *flow = flows.lookup(&slot);

		if (flow && is_record_of(flow, tuple))
			return flow;
		hits &= hits - 1;
	}
	return 0;
}

/* The flow that lies at home, or beside. */
static inline struct flow *find_at_home(const struct tuple *tuple, u64 hash)
{
	u32 slot = bucket_of(hash, 0) * BUCKET_TAGS + home_of(hash), n;
	struct flow *flow;

#pragma unroll
	for (n = 0; n < 2; n++, slot ^= 1) {
		flow = flows.lookup(&slot);
		if (flow && is_record_of(flow, tuple))
			return flow;
	}
	return 0;
}

/* Anywhere in the two buckets of its hash. By tags, which lie close together: most of what comes here is new. */
static inline struct flow *find_by_tag(const struct tuple *tuple, u64 hash)
{
	struct flow *flow;
	u32 n;

#pragma nounroll
	for (n = 0; n < 2; n++) {
		flow = find_in_bucket(bucket_of(hash, n), tag_of(hash), tuple);
		if (flow)
			return flow;
	}
	return 0;
}

static inline struct flow *find_flow(const struct tuple *tuple, const struct control *words)
{
	u64 hash = hash_tuple(tuple, words->hash_key[0], words->hash_key[1]);
	struct flow *flow = find_at_home(tuple, hash);

	return flow ? flow : find_by_tag(tuple, hash);
}

/* A connection is past its deadline when neither direction was seen for the timeout of its state. Rarely more than the
 * first comparison. */
static inline bool is_expired(const struct flow *flow, u32 timeout, u32 now, const struct control *words)
{
	u32 number = flow->peer;
	struct flow *peer;

	if ((s32)(now - flow->last_seen) <= (s32)timeout || (s32)(now - words->aged_from) <= (s32)timeout)
		return false;
	peer = flows.lookup(&number);
	return !peer || (s32)(now - peer->last_seen) > (s32)timeout;
}

/* Whether an endpoint reaches itself through its Service by way of the kernel: in both directions the addresses of its
 * packets change places (dataplane/admit.py). */
static inline bool reaches_itself(const struct flow *flow)
{
	return flow->new_src_addr == flow->dst_addr && flow->new_dst_addr == flow->src_addr;
}

/* The connection's state after a packet, stored in both directions' records if it is another one. */
static inline void advance(struct flow *flow, u8 event, const struct machine *rules)
{
	u8 state = flow->state, next;

	next = rules->next_state[(state & STATE_BITS) << 4 | (flow->direction & 1) << 3 | (event & 7)] | (state & ~STATE_BITS);
	if (next != state) {
		u32 peer_slot = flow->peer;
		struct flow *peer = flows.lookup(&peer_slot);

		flow->state = next;
		if (peer)
			peer->state = next;
	}
}

/* Whether a packet is a SYN of the client on an open connection. It begins again from the same port: an endpoint that is
 * there would answer, and one that is dead is not to be held on to for as long as it tries. nf_conntrack ignores them, too. */
static inline bool begins_again(const struct flow *flow, u8 event)
{
	return event == EVENT_SYN && flow->direction == ORIGINAL && (flow->state & STATE_BITS) > STATE_SYN_RECEIVED;
}

/* A packet of this direction was seen now: so many frames of so many bytes on the wire. */
static inline void touch(struct flow *flow, u8 event, u32 now, u32 frames, u32 bytes)
{
	if (flow->last_seen != now && !begins_again(flow, event))  /* a line that nobody dirties stays shared */
		flow->last_seen = now;
	flow->packets += frames;
	flow->bytes += bytes;
}
