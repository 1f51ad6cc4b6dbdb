/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv6.c - an IPv6 packet inside the kernel, up to where a connection may begin: as in lb.c, with names in place of
 * addresses. Part of lb.c.
 *
 * Beside it and not within, so that a packet of IPv4 meets none of this. */

/* What is neither TCP nor summed UDP in one piece: ours if it is to a VIP. */
static inline struct result handle_rest_ipv6(struct xdp_md *ctx, const struct packet *packet, enum reason found,
					     u32 destination, const struct control *words)
{
	if (!is_vip_of(destination, PROTOCOL_IPV6, words))
		return pass(found == REASON_VIP_FRAGMENT ? REASON_OTHER_FRAGMENT :
			    found == REASON_VIP_ECHO ? REASON_OTHER_ICMP :
			    found == REASON_UNSUMMED ? REASON_NOT_OURS : found);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (found == REASON_UNSUMMED)
		return drop(found);
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

static inline struct result handle_ipv6(struct xdp_md *ctx, struct packet *packet, struct question *question,
					const struct machine *rules, const struct control *words)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct flow *flow = 0;
	enum reason found;
	u32 name, other;
	u64 *addresses;

	found = parse_ipv6(data, end, packet);
	if (found == REASON_OTHER_ICMP && words->answers_arp)
		return handle_neighbour(ctx, words);
	if (found == REASON_NOT_IPV4 || found == REASON_TOO_SHORT || found == REASON_OTHER_ICMP)
		return pass(found);
	addresses = addresses_of(data, found);
	if ((void *)(addresses + 4) > end)
		return pass(REASON_TOO_SHORT);
	name = find_name(addresses[2], addresses[3], words);
	if (found != REASON_FORWARDED && found != REASON_ICMP_ERROR)
		return handle_rest_ipv6(ctx, packet, found, name, words);
	if (!name && found != REASON_ICMP_ERROR)
		return pass(REASON_NOT_OURS);
	other = find_name(addresses[0], addresses[1], words);
	packet->tuple.addrs = found == REASON_ICMP_ERROR ? (u64)other << 32 | name : (u64)name << 32 | other;
	question->now = bpf_jiffies64();
	if (name && other)
		flow = find_flow(&packet->tuple, words);
	if (found == REASON_ICMP_ERROR)
		return flow && !is_expired(flow, rules->timeout[flow->state], question->now, words) ?
			punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), found) : pass(REASON_OTHER_ICMP);
	question->source[0] = addresses[0];
	question->source[1] = addresses[1];
	return follow(ctx, packet, flow, true, question, rules, words);
}
