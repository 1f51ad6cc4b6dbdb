/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv6.h - IPv6 packets from bytes to addresses and ports, and rewritten. Twin: dataplane/wire6.py, with the same guards
 * in the same order. */
#pragma once

enum {
	ETHERTYPE_IPV6 = 0x86dd,
	IPV6_MORE_OR_OFFSET = 0xfff9,
	IPV6_OFFSET = 0xfff8,
};

struct ipv6 {
	__u32  version_class_flow;
	__be16 payload_length;
	__u8   next_header;
	__u8   hop_limit;
	__u64  src_addr[2];    /* behind 22 bytes: aligned to two of them only, as is all in a frame */
	__u64  dst_addr[2];
};

static inline bool is_ipv6(void *data, void *end)
{
	struct ethernet *ethernet = data;

	return (void *)(ethernet + 1) <= end && ethernet->type == __builtin_bswap16(ETHERTYPE_IPV6);
}

/* What the extension headers that we walk over begin with; they are so many times eight bytes longer. That of a fragment
 * is eight bytes long, and says which of which datagram. */
struct extension_header {
	__u8   next_header;
	__u8   length;
	__be16 fragment;
	__be32 id;
};

/* A walk over extension headers: where in the frame it is, and what lies there. */
struct walk {
	__u32  at;
	__u8   next;
	__be16 fragment;       /* offset, and whether more follow; 0: of no datagram in fragments */
	__be32 id;
};

enum icmpv6_type { ICMPV6_FIRST_ERROR = 1, ICMPV6_LAST_ERROR = 4, ICMPV6_ECHO = 128, ICMPV6_ECHO_REPLY };  /* errors: those of RFC 4443 */

/* Whether an IPv6 packet has extension headers. */
static inline bool has_extensions(const struct packet *packet)
{
	return packet->l4 > sizeof(struct ethernet) + sizeof(struct ipv6);
}

/* Walk over extension headers, if there are any, in a packet that ends at offset `stop`. Return FORWARDED, or why they are
 * not walked to the end. Behind the header of a fragment there is nothing to walk over, unless it is the only one of its
 * datagram (RFC 6946). */
static inline enum reason walk_extensions(void *data, void *end, __u32 stop, struct walk *walk)
{
	__u32 at = walk->at, most = at + EXTENSION_BYTES, n;
	__u8 kind = walk->next;
	bool is_fragment;

	if (kind != EXTENSION_HOP_BY_HOP && kind != EXTENSION_ROUTING && kind != EXTENSION_FRAGMENT &&
	    kind != EXTENSION_DESTINATION)
		return REASON_FORWARDED;
	for (n = 0; n < EXTENSIONS; n++) {
		struct extension_header *extension = data + (at & 0x1ff);  /* the mask tells the verifier */

		if (at + sizeof(*extension) > stop || (void *)(extension + 1) > end)
			return REASON_TOO_SHORT;
		is_fragment = kind == EXTENSION_FRAGMENT;
		kind = extension->next_header;
		at += is_fragment ? sizeof(*extension) : (1 + extension->length) * sizeof(*extension);
		if (is_fragment && extension->fragment & __builtin_bswap16(IPV6_MORE_OR_OFFSET)) {
			walk->fragment = extension->fragment & __builtin_bswap16(IPV6_MORE_OR_OFFSET);
			walk->id = extension->id;
			break;
		}
		if (at > most)
			return REASON_NOT_TCP_UDP;
		if (kind != EXTENSION_ROUTING && kind != EXTENSION_FRAGMENT && kind != EXTENSION_DESTINATION)
			break;
	}
	if (at > stop)
		return REASON_TOO_SHORT;
	/* It is what it was, but the verifier cannot tell any more how many headers there were: it goes on once, not four
	 * times. */
	at ^= stop;
	asm volatile("" : "+r"(at));
	walk->at = (at ^ stop) & 0x1ff;
	walk->next = kind;
	return REASON_FORWARDED;
}

/* Take the ports of an ICMPv6 error's quote, turned round, or the identifier of an echo request or its reply. */
static inline enum reason parse_icmpv6(void *data, void *end, __u32 stop, struct packet *packet)
{
	struct icmp *icmp = data + (packet->l4 & 0xff);
	struct ipv6 *quote = (void *)(icmp + 1);
	struct walk walk = { .at = packet->l4 + sizeof(*icmp) + sizeof(*quote) };
	enum reason refusal;
	struct ports *ports;

	if (packet->l4 + sizeof(*icmp) > stop || (void *)(icmp + 1) > end)
		return REASON_TOO_SHORT;
	if (icmp->type == ICMPV6_ECHO || icmp->type == ICMPV6_ECHO_REPLY) {
		packet->tuple.protocol = PROTOCOL_IPV6 | PROTOCOL_ICMPV6;
		packet->tuple.ports = ports_of_echo(icmp, icmp->type == ICMPV6_ECHO_REPLY);
		return icmp->type == ICMPV6_ECHO ? REASON_VIP_ECHO : REASON_ECHO_REPLY;
	}
	if (icmp->type < ICMPV6_FIRST_ERROR || icmp->type > ICMPV6_LAST_ERROR)
		return REASON_OTHER_ICMP;
	if (walk.at > stop || (void *)(quote + 1) > end)
		return REASON_TOO_SHORT;
	if ((*(__u8 *)quote) >> 4 != 6)
		return REASON_OTHER_ICMP;
	walk.next = quote->next_header;
	refusal = walk_extensions(data, end, stop, &walk);
	if (refusal != REASON_FORWARDED)
		return refusal == REASON_TOO_SHORT ? refusal : REASON_OTHER_ICMP;
	if ((walk.next != PROTOCOL_TCP && walk.next != PROTOCOL_UDP && walk.next != PROTOCOL_ICMPV6) ||
	    walk.fragment & __builtin_bswap16(IPV6_OFFSET))
		return REASON_OTHER_ICMP;
	ports = data + (walk.at & 0x1ff);
	if (walk.at + 8 > stop || (void *)ports + 8 > end)
		return REASON_TOO_SHORT;
	icmp = (void *)ports;
	if (walk.next == PROTOCOL_ICMPV6 && icmp->type != ICMPV6_ECHO && icmp->type != ICMPV6_ECHO_REPLY)
		return REASON_OTHER_ICMP;
	packet->quoted = walk.at;
	packet->tuple.protocol = PROTOCOL_IPV6 | walk.next;
	packet->tuple.ports = walk.next == PROTOCOL_ICMPV6 ? ports_of_echo(icmp, icmp->type == ICMPV6_ECHO) :
							     (__u32)ports->src_port << 16 | ports->dst_port;
	return REASON_ICMP_ERROR;
}

enum neighbour_type {
	ROUTER_SOLICITATION = 133,
	NEIGHBOUR_SOLICITATION = 135,
	NEIGHBOUR_ADVERTISEMENT = 136,
	REDIRECT = 137,
};

/* Whether an ICMPv6 message, at `packet->l4`, is between neighbours: the kernel's, whoever it is to (RFC 4861). */
static inline bool is_discovery(void *data, void *end, const struct packet *packet)
{
	__u8 *type = data + (packet->l4 & 0xff);  /* the mask tells the verifier */

	return (void *)(type + 1) <= end && *type >= ROUTER_SOLICITATION && *type <= REDIRECT;
}

/* A question for a neighbour, or an answer, of RFC 4861 section 4.3. */
struct neighbour {
	__u8   type;
	__u8   code;
	__be16 check;
	__u32  flags;
	__u64  target[2];
};

/* Return what follows the IPv6 header of a frame that parse_ipv6() has seen, if it is such and no router has sent it on
 * (sections 7.1.1 and 7.1.2), else nothing. */
static inline struct neighbour *parse_neighbour(void *data, void *end)
{
	struct ipv6 *ip = data + sizeof(struct ethernet);
	struct neighbour *neighbour = (void *)(ip + 1);

	if ((void *)(neighbour + 1) > end || ip->next_header != PROTOCOL_ICMPV6 || ip->hop_limit != 255)
		return 0;
	if (be16(ip->payload_length) < sizeof(*neighbour) || neighbour->code)
		return 0;
	return neighbour->type == NEIGHBOUR_SOLICITATION || neighbour->type == NEIGHBOUR_ADVERTISEMENT ? neighbour : 0;
}

/* Take the ports of TCP or UDP at `packet->l4`; return `whole`, UNSUMMED, or `broken` if its header does not fit, or it is
 * something else. */
static inline enum reason parse_ports(void *data, void *end, __u32 stop, __u8 protocol, enum reason whole,
				      enum reason broken, struct packet *packet)
{
	struct ports *ports = data + (packet->l4 & 0xff);  /* the mask tells the verifier */

	packet->tuple.protocol |= protocol;
	if (protocol == PROTOCOL_TCP) {
		struct tcp *tcp = (void *)ports;

		if (packet->l4 + sizeof(*tcp) > stop || (void *)(tcp + 1) > end)
			return broken;
		packet->tcp_flags = tcp->flags & TCP_FLAGS;
	} else {
		struct udp *udp = (void *)ports;

		if (protocol != PROTOCOL_UDP || packet->l4 + sizeof(*udp) > stop || (void *)(udp + 1) > end)
			return broken;
		if (!udp->check)
			whole = REASON_UNSUMMED;
	}
	packet->tuple.ports = (__u32)ports->dst_port << 16 | ports->src_port;
	return whole;
}

/* Fill `packet`, but for its addresses, from an IPv6 frame of `size` bytes, the headers of which lie before `end`; return
 * FORWARDED if it is TCP or UDP in one piece, else what it is. Of an ICMP error, what it quotes. The caller has seen the
 * Ethernet type. */
static inline enum reason parse_headers_ipv6(void *data, void *end, __u64 size, struct packet *packet)
{
	struct ipv6 *ip = data + sizeof(struct ethernet);
	struct walk walk = { .at = sizeof(struct ethernet) + sizeof(*ip) };
	enum reason refusal;
	__u32 stop;

	if ((void *)(ip + 1) > end)
		return REASON_TOO_SHORT;
	if ((*(__u8 *)ip) >> 4 != 6)
		return REASON_NOT_IPV4;
	packet->tuple.protocol = PROTOCOL_IPV6;
	packet->ttl = ip->hop_limit;
	stop = sizeof(struct ethernet) + sizeof(*ip) + be16(ip->payload_length);
	if (stop > size)
		return REASON_TOO_SHORT;
	walk.next = ip->next_header;
	refusal = walk_extensions(data, end, stop, &walk);
	if (refusal != REASON_FORWARDED)
		return refusal;
	packet->l4 = walk.at;
	if (walk.fragment) {
		packet->tuple.protocol |= walk.next;
		packet->datagram = (__u64)(PROTOCOL_IPV6 | walk.next) << 32 | walk.id;
		return walk.fragment & __builtin_bswap16(IPV6_OFFSET) ? REASON_VIP_FRAGMENT :
			parse_ports(data, end, stop, walk.next, REASON_FLOW_FRAGMENT, REASON_VIP_FRAGMENT, packet);
	}
	if (walk.next == PROTOCOL_ICMPV6)
		return parse_icmpv6(data, end, stop, packet);
	if (walk.next != PROTOCOL_TCP && walk.next != PROTOCOL_UDP)
		return REASON_NOT_TCP_UDP;
	return parse_ports(data, end, stop, walk.next, REASON_FORWARDED, REASON_TOO_SHORT, packet);
}

/* The same of a frame that lies there whole. */
static inline enum reason parse_ipv6(void *data, void *end, struct packet *packet)
{
	return parse_headers_ipv6(data, end, end - data, packet);
}

/* Where the addresses of a packet begin: of an ICMP error, those of its quote, which are to be turned round. */
static inline __u64 *addresses_of(void *data, enum reason found, const struct packet *packet)
{
	__u32 at = found == REASON_ICMP_ERROR ? (packet->l4 & 0xff) + sizeof(struct icmp) : sizeof(struct ethernet);

	return ((struct ipv6 *)(data + at))->src_addr;
}

/* Whether a packet comes from an address that no host has: none, loopback, an IPv4-mapped one or multicast (RFC 4291
 * sections 2.5 and 2.7). No router sends the first two on, and no host may send from the last. */
static inline bool is_martian_ipv6(const __u64 *source)
{
	__u64 low = source[1];

	if (source[0])
		return (__u8)source[0] == 0xff;
	return !low || low == __builtin_bswap64(1) || (__u32)low == __builtin_bswap32(0xffff);
}

/* Rewrite an IPv6 packet that parse_ipv6() accepted, to what the names of its flow record's new addresses stand for;
 * return 0, or -1 if the frame is shorter than it said. Without a next hop it stays as it is for the kernel to route. */
static inline int rewrite_ipv6(void *front, void *data, void *end, __u32 l4, const struct flow *flow,
			       const struct name *source, const struct name *destination, const struct next_hop *hop)
{
	struct ethernet *ethernet = front;
	struct ipv6 *ip = data + sizeof(*ethernet);
	struct ports *ports = data + (l4 & 0xff);  /* at most 14 + 40 + EXTENSION_BYTES + 8: the mask tells the verifier */

	if ((void *)(ethernet + 1) > end || (void *)(ip + 1) > end || (void *)(ports + 2) > end)
		return -1;
	if (hop) {
		write_macs(ethernet, hop);
		ip->hop_limit -= 1;
	}
	ip->src_addr[0] = source->addr[0];
	ip->src_addr[1] = source->addr[1];
	ip->dst_addr[0] = destination->addr[0];
	ip->dst_addr[1] = destination->addr[1];
	return rewrite_transport(ports, end, flow, flow->protocol == (PROTOCOL_IPV6 | PROTOCOL_UDP));
}

/* The folded sum of an address's words. */
static inline __u32 sum_of_address(const __u64 *address)
{
	__u64 sum = (address[0] & 0xffffffff) + (address[0] >> 32) + (address[1] & 0xffffffff) + (address[1] >> 32);

	return fold_words(sum);
}

/* As translate_quote(), of ICMPv6; `old` is the name of the address that becomes `source`. The checksum of ICMPv6 covers
 * the addresses of the packet, too (RFC 4443 section 2.3). */
static inline int translate_quote_ipv6(void *data, void *end, const struct packet *packet, const struct flow *flow,
				       const struct name *old, const struct name *source)
{
	struct ipv6 *ip = data + sizeof(struct ethernet), *quote;
	struct icmp *icmp = data + (packet->l4 & 0xff);
	__u32 check_at, addr_delta, outer_delta, port_delta, is_udp = flow->protocol == (PROTOCOL_IPV6 | PROTOCOL_UDP);
	struct ports *ports = data + (packet->quoted & 0x1ff);
	__u16 before, *check;

	quote = (void *)(icmp + 1);
	if ((void *)(ip + 1) > end || (void *)(quote + 1) > end || (void *)(ports + 1) > end)
		return -1;
	addr_delta = fold(0xffff - old->sum + source->sum);
	outer_delta = fold(0xffff - sum_of_address(ip->src_addr) + source->sum);
	port_delta = fold((__u16)~flow->src_port + (__u32)flow->new_src_port);

	check_at = (packet->quoted & 0x1ff) +
		   (is_udp ? __builtin_offsetof(struct udp, check) : __builtin_offsetof(struct tcp, check));
	check = data + check_at;
	if (check_at + 2 <= sizeof(struct ethernet) + sizeof(*ip) + be16(ip->payload_length) && (void *)(check + 1) <= end) {
		before = *check;
		*check = checksum_add(*check, fold(addr_delta + port_delta));
		if (is_udp && !*check)
			*check = 0xffff;
		icmp->check = checksum_add(icmp->check, fold((__u16)~before + (__u32)*check));
	}
	icmp->check = checksum_add(icmp->check, fold(fold(addr_delta + outer_delta) + port_delta));
	quote->dst_addr[0] = ip->src_addr[0] = source->addr[0];
	quote->dst_addr[1] = ip->src_addr[1] = source->addr[1];
	ports->dst_port = flow->new_src_port;
	return 0;
}
