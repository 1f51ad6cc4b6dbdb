/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv6.c - an IPv6 packet inside the kernel, up to where a connection may begin: as in lb.c, with names in place of
 * addresses. Part of lb.c.
 *
 * Beside it and not within, so that a packet of IPv4 meets none of this. */

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
	u32 source, destination;
	enum reason found;
	u64 *addresses;

	found = parse_ipv6(data, end, packet);
	if (found == REASON_OTHER_ICMP && words->answers_arp)
		return handle_neighbour(ctx, words);
	if (found == REASON_NOT_IPV4 || found == REASON_TOO_SHORT || found == REASON_OTHER_ICMP)
		return pass(found);
	addresses = addresses_of(data, found, packet);
	if ((void *)(addresses + 4) > end)
		return pass(REASON_TOO_SHORT);
	destination = find_name(addresses[2], addresses[3], words);
	if (!destination && found == REASON_FORWARDED)
		return pass(REASON_NOT_OURS);
	source = find_name(addresses[0], addresses[1], words);
	packet->tuple.addrs = found == REASON_ICMP_ERROR ? (u64)source << 32 | destination :
							   (u64)destination << 32 | source;
	question->now = bpf_jiffies64();
	if (source && destination &&
	    (found == REASON_FORWARDED || found == REASON_ICMP_ERROR || found == REASON_FLOW_FRAGMENT))
		flow = find_flow(&packet->tuple, words);
	if (found == REASON_ICMP_ERROR)
		return flow && !is_expired(flow, rules->timeout[flow->state], question->now, words) ?
			punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), found) : pass(REASON_OTHER_ICMP);
	if (found == REASON_FLOW_FRAGMENT)
		found = note_datagram(packet, flow, rules, question->now, words);
	if (found != REASON_FORWARDED)
		return handle_rest(ctx, packet, found, PROTOCOL_IPV6, question->now, words);
	question->source[0] = addresses[0];
	question->source[1] = addresses[1];
	return follow(ctx, packet, flow, true, question, rules, words);
}
