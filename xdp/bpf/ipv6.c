/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv6.c - the life of an IPv6 packet inside the kernel: as in lb.c, with names in place of addresses. Part of lb.c.
 *
 * Beside it and not within, so that a packet of IPv4 meets none of this. New connections are userspace's: only there are
 * clients given names. */

TABLE(struct name, names, NAMES_ROWS);

/* The number of an address in network byte order, as it stands in tables; 0 without a name. Names that die may be found:
 * flows may use them. */
static inline u32 find_name(u64 first, u64 second, const struct control *words)
{
	struct tuple key = { first, second, second >> 32 };
	u64 hash = hash_tuple(&key, words->hash_key[0], words->hash_key[1]);
	u32 place = first_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS, way, state;
	struct name *name;

#pragma nounroll
	for (way = 0; way < 2 * NAME_WAYS; way++, place++) {
		if (way == NAME_WAYS)
			place = second_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS;
		name = names.lookup(&place);
		if (!name)
			continue;
		state = *(volatile u32 *)&name->state;
		asm volatile("" ::: "memory");
		if ((state == NAME_ALIVE || state == NAME_DYING) && name->addr[0] == first && name->addr[1] == second)
			return __builtin_bswap32(place);
	}
	return 0;
}

static inline struct name *name_of(__be32 number)
{
	u32 row = __builtin_bswap32(number);

	return names.lookup(&row);
}

/* A packet goes along its flow. */
static inline struct result forward_ipv6(struct xdp_md *ctx, const struct packet *packet, struct flow *flow, u8 event,
					 const struct machine *rules, u32 now, const struct control *words)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct name *source = name_of(flow->new_src_addr), *destination = name_of(flow->new_dst_addr);
	u32 number = flow->next_hop, length = end - data;
	struct next_hop *hop = next_hops.lookup(&number);
	enum reason refusal = refusal_of(hop, length);

	if (refusal == REASON_TOO_BIG)
		return punt(reader_of(ctx, words), drop(refusal), REASON_OVERSIZED);
	if (!hop || refusal != REASON_FORWARDED)  /* no program translates what leaves by way of the kernel */
		return drop(refusal == REASON_TO_KERNEL ? REASON_NOT_FORWARDABLE : refusal);
	if (!source || !destination)
		return pass(REASON_NOT_OURS);
	advance(flow, event, rules);
	if (rewrite_ipv6(data, end, packet->l4, flow, source, destination, hop))
		return pass(REASON_TOO_SHORT);
	touch(flow, now, 1, length);
	return (struct result){ bpf_redirect(hop->ifindex, 0), REASON_FORWARDED };
}

/* Who is to have the first packet of a connection: userspace, where it is a VIP's. */
static inline struct result decide_ipv6(struct xdp_md *ctx, const struct packet *packet, const u64 *source, u32 event,
					enum reason why, const struct machine *rules, const struct control *words)
{
	u32 destination = packet->tuple.addrs >> 32, row;
	struct frontend *frontend = 0;
	struct service *service;
	struct result result;
	bool is_of_vip;

	/* In this order it takes the verifier least. */
	is_of_vip = is_vip_of(destination, PROTOCOL_IPV6, words);
	if (why != REASON_UNSUMMED)
		frontend = find_frontend(destination, packet->tuple.ports >> 16, packet->tuple.protocol, words);
	if (!frontend && !is_of_vip)
		return pass(REASON_NOT_OURS);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (why == REASON_UNSUMMED)
		return drop(REASON_UNSUMMED);
	if (is_martian_ipv6(source))
		return drop(REASON_MARTIAN_SOURCE);
	if (!frontend)
		return punt(reader_of(ctx, words), drop(REASON_NOT_SERVED), REASON_VIP_STRAY);
	row = frontend->service;
	service = services.lookup(&row);
	if (service && service->mid_stream == MID_STREAM_PASS && rules->first_state[event & 7] == STATE_ADOPTED)
		return pass(REASON_MID_STREAM_PASSED);
	result = punt(reader_of(ctx, words), drop(REASON_STALLED_DROPPED), why);
	return result.action != XDP_REDIRECT && service && service->when_stalled == WHEN_STALLED_PASS ?
		pass(REASON_STALLED_PASSED) : result;
}

/* An echo request, a fragment, or another protocol: ours if it is to a VIP. */
static inline struct result handle_rest_ipv6(struct xdp_md *ctx, const struct packet *packet, enum reason found,
					     u32 destination, const struct control *words)
{
	if (!is_vip_of(destination, PROTOCOL_IPV6, words))
		return pass(found == REASON_VIP_FRAGMENT ? REASON_OTHER_FRAGMENT :
			    found == REASON_VIP_ECHO ? REASON_OTHER_ICMP : found);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (found == REASON_VIP_FRAGMENT)
		return drop(REASON_IPV6_FRAGMENT);
	if (found == REASON_NOT_TCP_UDP)
		return punt(reader_of(ctx, words), drop(REASON_NOT_SERVED), REASON_VIP_STRAY);
	return words->answers_echo ? punt(reader_of(ctx, words), drop(REASON_STALLED_DROPPED), REASON_VIP_ECHO) :
				     drop(REASON_NOT_SERVED);
}

/* Neighbour discovery, while VIPs are announced: a question for one is punted, as by ARP (lb.c). */
static inline struct result handle_neighbour(struct xdp_md *ctx, const struct control *words)
{
	struct neighbour *neighbour = parse_neighbour((void *)(long)ctx->data, (void *)(long)ctx->data_end);
	u32 name = neighbour ? find_name(neighbour->target[0], neighbour->target[1], words) : 0;

	if (!neighbour || !name || !is_vip_of(name, PROTOCOL_IPV6, words))
		return pass(REASON_OTHER_ICMP);
	if (neighbour->type == NEIGHBOUR_ADVERTISEMENT)
		return pass(REASON_VIP_CLAIMED);
	return punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), REASON_VIP_ARP);
}

static inline struct result handle_ipv6(struct xdp_md *ctx, const struct machine *rules, const struct control *words)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	enum reason found, why = REASON_NEW_FLOW;
	struct packet packet = {};
	u32 now, event = EVENT_DATA, name, other;
	struct flow *flow = 0;
	u64 *addresses;

	found = parse_ipv6(data, end, &packet);
	if (found == REASON_OTHER_ICMP && words->answers_arp)
		return handle_neighbour(ctx, words);
	if (found == REASON_NOT_IPV4 || found == REASON_TOO_SHORT || found == REASON_OTHER_ICMP)
		return pass(found);
	addresses = addresses_of(data, found);
	if ((void *)(addresses + 4) > end)
		return pass(REASON_TOO_SHORT);
	name = find_name(addresses[2], addresses[3], words);
	if (found != REASON_FORWARDED && found != REASON_UNSUMMED && found != REASON_ICMP_ERROR)
		return handle_rest_ipv6(ctx, &packet, found, name, words);
	if (!name && found != REASON_ICMP_ERROR)
		return pass(REASON_NOT_OURS);
	other = find_name(addresses[0], addresses[1], words);
	packet.tuple.addrs = found == REASON_ICMP_ERROR ? (u64)other << 32 | name : (u64)name << 32 | other;
	now = bpf_jiffies64();
	if (found == REASON_UNSUMMED)
		why = found;
	else if (name && other)
		flow = find_flow(&packet.tuple, words);
	if (found == REASON_ICMP_ERROR)
		return flow && !is_expired(flow, rules->timeout[flow->state], now, words) ?
			punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), found) : pass(REASON_OTHER_ICMP);
	if (packet.tuple.protocol == (PROTOCOL_IPV6 | PROTOCOL_TCP))
		event = rules->event_of_flags[packet.tcp_flags & TCP_FLAGS];
	if (flow && !is_expired(flow, rules->timeout[flow->state], now, words)) {
		if (event != EVENT_SYN || flow->direction != ORIGINAL || !rules->reopens[flow->state & STATE_BITS]) {
			struct result result;

			if (packet.ttl <= 1)
				return pass(REASON_TTL_EXPIRED);
			if (!OFFLOAD || has_extensions(&packet)) {
				result = punt(reader_of(ctx, words), drop(0), OFFLOAD ? REASON_OPTIONS : REASON_NOT_OFFLOADED);
				if (result.action == XDP_REDIRECT)
					return result;
			}
			return forward_ipv6(ctx, &packet, flow, event, rules, now, words);
		}
		why = REASON_REOPENED;
	} else if (flow && (flow->state & STATE_BITS) == STATE_RESET && (event != EVENT_SYN || flow->direction != ORIGINAL)) {
		return punt(reader_of(ctx, words), drop(REASON_ENDPOINT_REMOVED), REASON_TO_BE_RESET);
	}
	return decide_ipv6(ctx, &packet, addresses, event, why, rules, words);
}
