/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv6.c - an IPv6 packet inside the kernel, up to where a connection may begin: as in lb.c, with names in place of
 * addresses. Part of lb.c.
 *
 * Beside it and not within, so that a packet of IPv4 meets none of this. */

/* Neighbour discovery, while VIPs are announced: a question for one is punted, as by ARP (lb.c). */
static inline struct result handle_neighbour(struct xdp_md *ctx, const struct packet *packet,
					     const struct control *words)
{
	struct neighbour *neighbour = parse_neighbour(untagged(ctx, packet->vlan_bytes), (void *)(long)ctx->data_end);
	u32 name = neighbour ? find_name(neighbour->target[0], neighbour->target[1], words) : 0;

	if (!neighbour || !name || !is_vip_of(name, PROTOCOL_IPV6, words))
		return pass(REASON_OTHER_ICMP);
	if (neighbour->type == NEIGHBOUR_ADVERTISEMENT)
		return pass(REASON_VIP_CLAIMED);
	return punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), REASON_VIP_ARP);
}

/* Give a packet the five-tuple of what its ICMPv6 error quotes, turned round; return whether both ends have names. */
static inline bool name_quote(struct packet *packet, const struct ipv6 *quote, const struct control *words)
{
	u32 destination = find_name(quote->dst_addr[0], quote->dst_addr[1], words);
	u32 source = find_name(quote->src_addr[0], quote->src_addr[1], words);

	packet->tuple.addrs = (u64)source << 32 | destination;
	return source && destination;
}

/* Names are looked up first, so that the verifier looks at it once, and not for everything that parsing may find. */
static inline struct result handle_ipv6(struct xdp_md *ctx, struct packet *packet, struct question *question,
					const struct machine *rules, const struct control *words)
{
	void *data = untagged(ctx, packet->vlan_bytes), *end = (void *)(long)ctx->data_end;
	struct ipv6 *ip = data + sizeof(struct ethernet);
	struct flow *flow = 0;
	u32 source, destination;
	enum reason found;
	bool may_be_known, is_live = false;

	if ((void *)(ip + 1) > end)
		return pass(REASON_TOO_SHORT);
	destination = find_name(ip->dst_addr[0], ip->dst_addr[1], words);
	source = destination ? find_name(ip->src_addr[0], ip->src_addr[1], words) : 0;
	packet->tuple.addrs = (u64)destination << 32 | source;
	question->source[0] = ip->src_addr[0];
	question->source[1] = ip->src_addr[1];
	question->now = bpf_jiffies64();
	found = parse_ipv6(data, end, packet);
	if (found == REASON_OTHER_ICMP && is_discovery(data, end, packet))
		return words->answers_arp ? handle_neighbour(ctx, packet, words) : pass(found);
	if (found == REASON_NOT_IPV4 || !packet->tuple.protocol)
		return pass(found);
	if (is_for_many(ctx))
		return pass(REASON_FOR_MANY);
	if (!destination && found == REASON_FORWARDED)
		return pass(REASON_NOT_OURS);
	found = forgotten(found, question->now);
	forget_layout(packet, question->now);
	may_be_known = source && (found == REASON_FORWARDED || found == REASON_FLOW_FRAGMENT || found == REASON_ECHO_REPLY ||
				  found == REASON_UNSUMMED);
	if (found == REASON_ICMP_ERROR) {
		struct ipv6 *quote = data + (packet->l4 & 0xff) + sizeof(struct icmp);

		if ((void *)(quote + 1) > end)
			return pass(REASON_TOO_SHORT);
		may_be_known = name_quote(packet, quote, words);
	}
	if (may_be_known)
		flow = find_flow(&packet->tuple, words);
	if (found == REASON_UNSUMMED || is_icmp_of_flow(found))
		is_live = flow && !is_expired(flow, rules->timeout[flow->state], question->now, words);
	if (is_icmp_of_flow(found)) {
		if (flow && is_live)
			return handle_icmp(ctx, packet, found, flow, words);
		found = of_no_flow(found, packet->tuple.addrs >> 32, destination);
		packet->tuple.addrs = (u64)destination << 32 | source; /* not those of the quote */
	}
	if (found == REASON_UNSUMMED && is_live && !packet->datagram)
		return drop(found);
	if (found == REASON_FLOW_FRAGMENT)
		found = note_datagram(packet, flow, rules, question->now, words);
	if (found != REASON_FORWARDED)
		return handle_rest(ctx, packet, found, PROTOCOL_IPV6, question->now, words);
	return follow(ctx, packet, flow, true, question, rules, words);
}
