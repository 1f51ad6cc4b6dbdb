/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* admit.c - a new connection decided inside the kernel, where userspace is away or the Service says so: a program of its
 * own, which lb.c calls last, so that the verifier looks at it once and not for each way that leads there. Part of lb.c.
 *
 * What conntrack/compiled.py and dataplane/admit.py do, by the same protocol over the same table; what a Service asks of
 * admission beyond Maglev is left to userspace. There is no waiting for a grace period in here: a record that XDP retires
 * may be reused by XDP a second later, which no run and no worker's turn takes; the sweep may free it in its own way
 * before. And a client on the link that nobody knew is answered on the way that it came. */

enum {
	SWAP_TRIES = 16,      /* of a word that others keep changing */
	CLAIM_TRIES = 4,
	HOST_TRIES = 8,
	ROW_TRIES = 8,        /* rows looked at for a free one */
	XDP_ENDPOINTS_TRIED = 2, /* when replies would clash; userspace tries more */
	LEARNED_MTU = 65535,  /* not known here: the driver is the judge */
};

/* Change the tag of a slot; false if it was not `expected`, or the word has just been changed by somebody else. */
static inline bool swap_once(u32 slot, u64 expected, u64 tag)
{
	u32 number = slot / BUCKET_TAGS, shift = (slot & 3) * 16;
	struct bucket *bucket = tags.lookup(&number);
	u64 *word, seen;

	if (!bucket)
		return false;
	word = &bucket->word[slot >> 2 & 3];
	seen = *(volatile u64 *)word;
	return (seen >> shift & 0xffff) == expected &&
	       __sync_bool_compare_and_swap(word, seen, (seen & ~(0xffffULL << shift)) | tag << shift);
}

/* The same, against others that change the word. */
static inline bool swap_tag(u32 slot, u64 expected, u64 tag)
{
	u32 n;

#pragma nounroll
	for (n = 0; n < SWAP_TRIES; n++)
		if (swap_once(slot, expected, tag))
			return true;
	return false;
}

static inline u64 tag_at(u32 slot)
{
	u32 number = slot / BUCKET_TAGS;
	struct bucket *bucket = tags.lookup(&number);

	return bucket ? *(volatile u64 *)&bucket->word[slot >> 2 & 3] >> (slot & 3) * 16 & 0xffff : TAG_CLAIMED;
}

/* Take a published record out of use, unless others are changing its word just now. */
static inline void retire_slot(u32 slot, u32 now)
{
	struct flow *flow = flows.lookup(&slot);
	u64 tag = tag_at(slot);

	if (!flow || tag < TAG_FIRST)
		return;
	flow->retired_at = now;
	if (swap_once(slot, tag, TAG_RETIRED))
		*(volatile u8 *)&flow->published = 0;
}

/* Retire both directions of a connection, the original's first. */
static inline void retire(struct flow *flow, u32 now)
{
	u32 other = flow->peer, own, is_reply = flow->direction == REPLY;
	struct flow *peer = flows.lookup(&other);

	if (!peer)
		return;
	own = peer->peer;
	if (flows.lookup(&own) != flow)
		return;
	retire_slot(is_reply ? other : own, now);
	retire_slot(is_reply ? own : other, now);
}

/* Claim a slot of a bucket, at home or beside it if possible; NO_SLOT if there is none. */
static inline u32 claim_in(u32 number, u32 home)
{
	struct bucket *bucket = tags.lookup(&number);
	u64 hits;
	u32 n, slot;

	if (!bucket)
		return NO_SLOT;
#pragma nounroll
	for (n = 0; n < CLAIM_TRIES; n++) {
		asm volatile("" ::: "memory");
		hits = hits_of(bucket, TAG_EMPTY);
		if (!hits)
			return NO_SLOT;
		slot = is_hit(hits, home) ? home : is_hit(hits, home ^ 1) ? home ^ 1 : lowest_hit(hits);
		slot += number * BUCKET_TAGS;
		if (swap_once(slot, TAG_EMPTY, TAG_CLAIMED))
			return slot;
	}
	return NO_SLOT;
}

/* Claim what XDP has retired in two buckets for long enough; what has expired there is retired, for the next time. */
static inline u32 reclaim(u32 first, u32 second, u32 now, const struct machine *rules, const struct control *words)
{
	struct flow *flow;
	u32 n, slot;
	u64 tag;

#pragma nounroll
	for (n = 0; n < 2 * BUCKET_TAGS; n++) {
		slot = (n & BUCKET_TAGS ? second : first) * BUCKET_TAGS + (n & (BUCKET_TAGS - 1));
		tag = tag_at(slot);
		flow = flows.lookup(&slot);
		if (!flow)
			return NO_SLOT;
		if (tag == TAG_RETIRED && now - flow->retired_at > words->hertz && swap_once(slot, TAG_RETIRED, TAG_CLAIMED))
			return slot;
		if (tag >= TAG_FIRST && is_expired(flow, rules->timeout[flow->state], now, words))
			retire(flow, now);
	}
	return NO_SLOT;
}

/* Claim a slot for a hash, in the first of its two buckets if that has room enough, else in the emptier one. */
static inline u32 claim(u64 hash, u32 now, const struct machine *rules, struct control *words)
{
	u32 first = bucket_of(hash, 0), second = bucket_of(hash, 1), slot, room, other, emptier;
	struct bucket *bucket = tags.lookup(&first);

	room = bucket ? hit_count(hits_of(bucket, TAG_EMPTY)) : 0;
	if (room < ROOM_ENOUGH) {
		bucket = tags.lookup(&second);
		other = bucket ? hit_count(hits_of(bucket, TAG_EMPTY)) : 0;
		if (other > room) {
			emptier = second;
			second = first;
			first = emptier;
		}
	}
	slot = claim_in(first, home_of(hash));
	if (slot == NO_SLOT)
		slot = claim_in(second, home_of(hash));
	if (slot == NO_SLOT)
		slot = reclaim(first, second, now, rules, words);
	return forgotten(slot, hash);
}

/* Read the record that a flow has if there is room at home, to have its line: behind a compare-and-swap it would be waited
 * for, and so would be all that is stored before the next one. */
static inline void fetch_home(u64 hash)
{
	u32 slot = bucket_of(hash, 0) * BUCKET_TAGS + home_of(hash);
	struct flow *flow = flows.lookup(&slot);

	if (flow)
		(void)*(volatile u8 *)&flow->published;
}

/* By tags, whether another record than slot `besides` has this key: what a writer must see is in them. In doubt, yes: that
 * two tags of a bucket equal the wanted one by chance is a matter of 10^-7. */
static inline bool is_elsewhere(const struct tuple *tuple, u64 hash, u32 besides)
{
	struct bucket *bucket;
	struct flow *flow;
	u32 n, number, slot;
	u64 hits;

#pragma nounroll
	for (n = 0; n < 2; n++) {
		number = bucket_of(hash, n);
		bucket = tags.lookup(&number);
		if (!bucket)
			return true;
		hits = hits_of(bucket, tag_of(hash));
		if (number == besides / BUCKET_TAGS)
			hits &= ~(1ULL << bit_of(besides & (BUCKET_TAGS - 1)));
		if (!hits)
			continue;
		slot = number * BUCKET_TAGS + lowest_hit(hits);
		flow = flows.lookup(&slot);
		if (!flow || is_record_of(flow, tuple) || hits & (hits - 1))
			return true;
	}
	return false;
}

/* Whether a reply's key belongs to another connection. One that has expired gives it up: it is not swept, or not yet. */
static inline bool is_taken(const struct tuple *reply, u64 hash, u32 now, const struct machine *rules,
			    const struct control *words)
{
	struct flow *flow;

	if (!is_elsewhere(reply, hash, NO_SLOT))
		return false;
	flow = find_by_tag(reply, hash);
	if (!flow || !is_expired(flow, rules->timeout[flow->state], now, words))
		return true;
	retire(flow, now);
	return is_elsewhere(reply, hash, NO_SLOT);
}

static inline u64 words_of(u64 value)
{
	return (value & 0xffff) + (value >> 16 & 0xffff) + (value >> 32 & 0xffff) + (value >> 48);
}

static inline u16 fold64(u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* The sum of both addresses' words: of IPv6, of those that the names stand for. */
static inline u64 sum_of_names(u64 addrs)
{
	struct name *source = name_of(addrs), *destination = name_of(addrs >> 32);

	return source && destination ? (u64)source->sum + destination->sum : 0;
}

/* What the sum of a pair of addresses grows by, not folded. */
static inline u64 growth_of(const struct tuple *before, const struct tuple *after)
{
	if (before->protocol & PROTOCOL_IPV6)
		return 2 * 0xffff - sum_of_names(before->addrs) + sum_of_names(after->addrs);
	return words_of(~before->addrs) + words_of(after->addrs);
}

/* Fill the claimed record of the packets `before`, which leave as `after`. */
static inline void fill(struct flow *flow, const struct tuple *before, const struct tuple *after, u8 direction, u8 state,
			u32 next_hop, u32 peer, u32 now)
{
	u64 sum = growth_of(before, after);

	*(u64 *)&flow->src_addr = before->addrs;
	*(u32 *)&flow->src_port = before->ports;
	flow->protocol = before->protocol;
	flow->ip_delta = fold64(sum + 0xfffe); /* TTL is the low byte of its word as it lies here, and falls by 1 */
	*(u64 *)&flow->new_src_addr = after->addrs;
	*(u32 *)&flow->new_src_port = after->ports;
	flow->l4_delta = fold64(sum + words_of((u32)~before->ports) + words_of(after->ports));
	flow->state = state;
	flow->direction = direction;
	flow->next_hop = next_hop;
	flow->peer = peer;
	flow->last_seen = now;
	flow->packets = 0;
	flow->bytes = 0;
}

static inline bool publish(u32 slot, struct flow *flow, u64 tag)
{
	asm volatile("" ::: "memory");
	*(volatile u8 *)&flow->published = 1;
	return swap_tag(slot, TAG_CLAIMED, tag);
}

static inline struct tuple turned(const struct tuple *tuple)
{
	return (struct tuple){ tuple->addrs >> 32 | tuple->addrs << 32, tuple->ports >> 16 | tuple->ports << 16,
			       tuple->protocol };
}

/* Insert both directions of a connection whose reply's key nobody has; the original's slot, or NO_SLOT and `failure` says
 * why. */
static inline u32 insert(const struct tuple *before, const struct tuple *after, u8 state, u32 hop_out, u32 hop_back, u32 now,
			 const struct machine *rules, struct control *words, enum reason *failure)
{
	struct tuple reply = turned(after), back = turned(before);
	u64 hash = hash_tuple(before, words->hash_key[0], words->hash_key[1]);
	u64 reply_hash = hash_tuple(&reply, words->hash_key[0], words->hash_key[1]);
	struct flow *original_flow, *reply_flow;
	u32 original_slot, reply_slot;

	*failure = REASON_TABLE_FULL;
	reply_slot = claim(reply_hash, now, rules, words);
	reply_flow = flows.lookup(&reply_slot);
	if (!reply_flow)
		return NO_SLOT;
	original_slot = claim(hash, now, rules, words);
	original_flow = flows.lookup(&original_slot);
	if (!original_flow) {
		swap_tag(reply_slot, TAG_CLAIMED, TAG_EMPTY); /* nobody has read it */
		return NO_SLOT;
	}
	fill(reply_flow, &reply, &back, REPLY, state, hop_back, original_slot, now);
	fill(original_flow, before, after, ORIGINAL, state, hop_out, reply_slot, now);

	*failure = REASON_REPLY_CLASH;
	publish(reply_slot, reply_flow, tag_of(reply_hash));
	if (is_elsewhere(&reply, reply_hash, reply_slot)) {
		retire_slot(reply_slot, now);
		original_flow->retired_at = now;
		swap_tag(original_slot, TAG_CLAIMED, TAG_RETIRED); /* not EMPTY: the reply has led readers here */
		return NO_SLOT;
	}
	publish(original_slot, original_flow, tag_of(hash));
	if (is_elsewhere(before, hash, original_slot) || tag_at(reply_slot) != tag_of(reply_hash)) {
		retire(original_flow, now);
		return NO_SLOT;
	}
	return original_slot;
}

/* The word of `hosts` for an address or a name (host order): its own, or the free one where it would be; none if it is far
 * off. `seen` is what it said, 0 if it is free: it may be another's a moment later. */
static inline u64 *host_word(u32 address, u64 *seen)
{
	u32 place = address * 0x9e3779b97f4a7c15ULL >> 32, n;
	struct host *host;

	*seen = 0;
#pragma nounroll
	for (n = 0; n < HOST_TRIES; n++) {
		place &= HOSTS_ROWS - 1;
		host = hosts.lookup(&place);
		if (!host)
			return 0;
		*seen = *(volatile u64 *)host;
		if (!*seen || *seen >> 32 == address)
			return (u64 *)host;
		place++;
	}
	return 0;
}

/* Take a free row of next_hops for XDP to fill; none if it meets none. It looks on from where the last one was taken. */
static inline struct next_hop *take_row(u32 *row, struct control *words)
{
	u32 rows = NEXT_HOPS_ROWS / LEARNED_SHARE, n;
	u64 place = *(volatile u64 *)&words->learned;
	struct next_hop *hop;

	if (!rows)
		return 0;
#pragma nounroll
	for (n = 0; n < ROW_TRIES; n++) {
		*row = NEXT_HOPS_ROWS - rows + (u32)(place + n) % rows;
		hop = next_hops.lookup(row);
		if (hop && __sync_bool_compare_and_swap((u64 *)&hop->mtu, 0, (u64)ROW_TAKEN << 48))
			return hop;
	}
	__sync_fetch_and_add(&words->learned, ROW_TRIES);
	return 0;
}

/* Take a next hop for a client on the link: back to where its frame came from. Row 0, which leads nowhere, if none is left.
 * A row of an IPv6 client keeps its name, as those do that the control plane makes. */
static inline u32 learn(struct xdp_md *ctx, __be32 client, u64 *word, const bool is_ipv6, struct control *words)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct name *name = is_ipv6 ? name_of(client) : 0;
	struct ethernet *ethernet = data;
	struct next_hop *hop;
	u64 fresh, seen;
	u32 row;

	if ((void *)(ethernet + 1) > end)
		return 0;
	hop = take_row(&row, words);
	if (!hop)
		return 0;
	__builtin_memcpy(hop->dst_mac, ethernet->src_mac, 6);
	__builtin_memcpy(hop->src_mac, ethernet->dst_mac, 6);
	hop->ifindex = ctx->ingress_ifindex;
	hop->mtu = LEARNED_MTU;
	hop->prefix_len = is_ipv6 ? 128 : 32;
	hop->destination = client;
	hop->state = HOP_FORWARD;
	if (name)
		__sync_fetch_and_add(&name->pins, 1);
	fresh = (u64)__builtin_bswap32(client) << 32 | row;
	seen = __sync_val_compare_and_swap(word, 0, fresh);
	if (seen) {
		if (name)
			__sync_fetch_and_add(&name->pins, -1);
		*(volatile u64 *)&hop->mtu = 0; /* nobody has found it */
		return seen >> 32 == fresh >> 32 ? seen : 0;
	}
	*(volatile u8 *)&hop->used = ROW_OF_HOST;
	__sync_fetch_and_add(&words->learned, 1); /* the control plane looks for the row from here on */
	return row;
}

/* The next hop back to the client of a five-tuple, row 0 without one. One on the link that is not known yet is learnt if it
 * may be. `key` says where it is looked for among the routes. */
static inline u32 way_back(struct xdp_md *ctx, __be32 client, const struct prefix *key, bool may_learn, struct control *words)
{
	u64 seen, *word = host_word(__builtin_bswap32(client), &seen);
	u32 *target;

	if (word && seen)
		return seen;
	target = routes.lookup((struct prefix *)key);
	if (!target || *target == TARGET_NO_ROUTE)
		return 0;
	if (*target != TARGET_ON_LINK)
		return *target;
	if (!word || !may_learn)
		return 0;
	return learn(ctx, client, word, key->family != 0, words);
}

/* What is to be known of a new connection's packet. */
struct newcomer {
	struct tuple tuple;    /* its client has a name now */
	struct prefix client;  /* its whole address */
	u64 digest;            /* in place of addresses where all nodes are to choose alike: names differ from node to node */
};

/* Look at the packet again for what tables do not have: IPv6 addresses. Of a client without a name, one is made, if there is
 * a route to it: else who invents addresses would use up names. */
static inline enum reason meet(struct xdp_md *ctx, const struct passage *passage, struct newcomer *who, struct control *words)
{
	struct ipv6 *ip = untagged(ctx, passage->vlan_bytes) + sizeof(struct ethernet);
	u64 seed = words->maglev_seed, destination;
	u32 name, *target;

	who->tuple = (struct tuple){ passage->addrs, passage->ports, passage->protocol };
	if (!(passage->protocol & PROTOCOL_IPV6)) {
		who->client = (struct prefix){ PREFIX_FAMILY_BITS + 32, 0, { passage->addrs } };
		who->digest = passage->addrs;
		return REASON_ADMITTED;
	}
	if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
		return REASON_VANISHED;
	who->client.length = PREFIX_FAMILY_BITS + 128;
	who->client.family = PROTOCOL_IPV6;
	__builtin_memcpy(who->client.network, ip->src_addr, 16);
	destination = hash_address(ip->dst_addr[0], ip->dst_addr[1], seed, ~seed);
	who->digest = hash_address(ip->src_addr[0], ip->src_addr[1], seed, ~seed) ^ (destination >> 32 | destination << 32);
	target = routes.lookup(&who->client);
	if (!target || *target == TARGET_NO_ROUTE)
		return REASON_NO_NEXT_HOP;
	name = intern(ip->src_addr[0], ip->src_addr[1], words);
	who->tuple.addrs = (passage->addrs & ~0xffffffffULL) | name;
	return name ? REASON_ADMITTED : REASON_NAMES_FULL;
}

/* Admit a packet's connection to the Service: ADMITTED, and passage->slot is its original's; or why not, which is the
 * caller's to punt or drop. */
static inline enum reason admit(struct xdp_md *ctx, struct passage *passage, const struct service *service,
				const struct machine *rules, struct control *words)
{
	u32 length = length_of(ctx, passage->vlan_bytes) + more_vlan_bytes(passage->vlan_bytes);
	u32 back, out = 0, place, line, row, attempt;
	u8 state = rules->first_state[passage->event & 7];
	struct tuple after, chosen_by, reply;
	struct newcomer who = {};
	struct maglev_line *slots;
	struct endpoint *endpoint;
	struct next_hop *way;
	enum reason reason;
	bool is_free = false;
	u64 hash, reply_hash;

	if (!state)
		return passage->event == EVENT_RST ? REASON_STRAY_RST : REASON_BAD_FLAGS;
	if (state == STATE_ADOPTED && service->mid_stream)
		return REASON_MID_STREAM_RESET;
	if (!service->slots)
		return service->is_elsewhere ? REASON_NO_LOCAL_ENDPOINT : REASON_NO_ENDPOINT;
	reason = meet(ctx, passage, &who, words);
	if (reason != REASON_ADMITTED)
		return reason;
	back = way_back(ctx, who.tuple.addrs, &who.client, passage->reader == NO_READER, words);
	way = next_hops.lookup(&back);
	if (!way || way->state == HOP_UNRESOLVED)  /* as row 0 always is */
		return REASON_NO_NEXT_HOP;
	chosen_by = who.tuple;
	chosen_by.addrs = who.digest;
	hash = hash_tuple(&chosen_by, words->maglev_seed, ~words->maglev_seed);
#pragma nounroll
	for (attempt = 0; attempt < XDP_ENDPOINTS_TRIED; attempt++) {
		place = ((hash >> 32) * service->slots >> 32) + attempt;
		place = service->first_slot + (place < service->slots ? place : place - service->slots);
		line = place / 16;
		slots = maglev.lookup(&line);
		if (!slots)
			return REASON_NO_ENDPOINT;
		row = slots->endpoint[place & 15];
		endpoint = endpoints.lookup(&row);
		if (!endpoint)
			return REASON_NO_ENDPOINT;
		if (endpoint->addr == (u32)who.tuple.addrs)
			return REASON_STALLED_DROPPED;  /* it reaches itself: userspace masquerades it */
		out = endpoint->next_hop;
		reason = refusal_of(next_hops.lookup(&out), length);
		if (reason != REASON_FORWARDED && reason != REASON_TO_KERNEL)
			return reason;
		after.addrs = (u64)endpoint->addr << 32 | (u32)who.tuple.addrs;
		after.ports = (u32)endpoint->port << 16 | (u16)who.tuple.ports;
		after.protocol = who.tuple.protocol;
		reply = turned(&after);
		reply_hash = hash_tuple(&reply, words->hash_key[0], words->hash_key[1]);
		fetch_home(reply_hash);
		is_free = !is_taken(&reply, reply_hash, passage->now, rules, words);
		if (is_free)
			break;
	}
	if (!is_free)
		return REASON_REPLY_CLASH;
	passage->slot = insert(&who.tuple, &after, state | service->timeouts, out, back, passage->now, rules, words, &reason);
	return passage->slot == NO_SLOT ? reason : REASON_ADMITTED;
}
