/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* parse.h - from bytes to a five-tuple. Twin: dataplane/wire.py, with the same guards in the same order. */
#pragma once

enum {
	ETHERTYPE_IPV4 = 0x0800,
	IPV4_MORE_OR_OFFSET = 0x3fff,
	TCP_FLAGS = 0x3f,
};

/* Headers as they lie in the frame. They are not declared packed: clang would then read and write them by the byte. */
struct ethernet {
	__u8   dst_mac[6];
	__u8   src_mac[6];
	__be16 type;
};

struct ipv4 {
	__u8   version_ihl;
	__u8   tos;
	__be16 total_length;
	__be16 id;
	__be16 fragment;
	__u8   ttl;
	__u8   protocol;
	__u16  check;
	__be32 src_addr;
	__be32 dst_addr;
};

/* What TCP and UDP have in common, and what they have not. */
struct ports {
	__be16 src_port;
	__be16 dst_port;
};

struct tcp {
	struct ports ports;
	__be32 sequence;
	__be32 acknowledged;
	__u8   offset;
	__u8   flags;
	__be16 window;
	__u16  check;
	__be16 urgent;
};

struct udp {
	struct ports ports;
	__be16 length;
	__u16  check;
};

struct icmp {
	__u8   type;
	__u8   code;
	__u16  check;
	__u32  rest;
};

enum icmp_type { ICMP_UNREACHABLE = 3, ICMP_QUENCH = 4, ICMP_TIME_EXCEEDED = 11, ICMP_PARAMETER = 12 };

/* What parse() finds. Offsets are from the start of the frame. */
struct packet {
	struct tuple tuple;
	__u32 l4;          /* offset of the transport header */
	__u8  ttl;
	__u8  tcp_flags;
};

static inline __u16 be16(__be16 value)
{
	return __builtin_bswap16(value);
}

/* Take the five-tuple of an ICMP error's quote, turned round: the direction in which the error travels. The packet ends
 * at offset `stop`; the frame may go on with padding, of which the verifier knows the end only. */
static inline enum reason parse_quote(void *data, void *end, __u32 stop, struct packet *packet)
{
	struct icmp *icmp = data + packet->l4;
	struct ipv4 *ip = (void *)(icmp + 1);
	struct ports *ports;
	__u32 length;

	if (packet->l4 + sizeof(*icmp) + sizeof(*ip) > stop || (void *)(ip + 1) > end)
		return REASON_TOO_SHORT;
	if (icmp->type != ICMP_UNREACHABLE && icmp->type != ICMP_TIME_EXCEEDED &&
	    icmp->type != ICMP_PARAMETER && icmp->type != ICMP_QUENCH)
		return REASON_OTHER_ICMP;
	length = (ip->version_ihl & 15) * 4;
	if (ip->version_ihl >> 4 != 4 || length < sizeof(*ip))
		return REASON_OTHER_ICMP;
	if (ip->protocol != PROTOCOL_TCP && ip->protocol != PROTOCOL_UDP)
		return REASON_OTHER_ICMP;
	if (ip->fragment & __builtin_bswap16(0x1fff))
		return REASON_OTHER_ICMP;
	ports = (void *)ip + length;
	if (packet->l4 + sizeof(*icmp) + length + 8 > stop || (void *)ports + 8 > end)
		return REASON_TOO_SHORT;
	packet->tuple.addrs = (__u64)ip->src_addr << 32 | ip->dst_addr;
	packet->tuple.ports = (__u32)ports->src_port << 16 | ports->dst_port;
	packet->tuple.protocol = ip->protocol;
	return REASON_ICMP_ERROR;
}

/* Fill `packet` from the frame; return FORWARDED if it is TCP or UDP, else what it is. Of a fragment, addresses only;
 * of an ICMP error, what it quotes. Every length is checked before the bytes behind it are read. */
static inline enum reason parse(void *data, void *end, struct packet *packet)
{
	struct ethernet *ethernet = data;
	struct ipv4 *ip = (void *)(ethernet + 1);
	struct ports *ports;
	__u32 header, total;

	if ((void *)(ip + 1) > end)
		return (void *)(ethernet + 1) <= end && ethernet->type != __builtin_bswap16(ETHERTYPE_IPV4) ?
			REASON_NOT_IPV4 : REASON_TOO_SHORT;
	if (ethernet->type != __builtin_bswap16(ETHERTYPE_IPV4))
		return REASON_NOT_IPV4;
	if (ip->version_ihl >> 4 != 4)
		return REASON_NOT_IPV4;
	header = (ip->version_ihl & 15) * 4;
	total = be16(ip->total_length);
	if (header < sizeof(*ip) || total < header)
		return REASON_TOO_SHORT;
	if ((void *)ip + total > end)
		return REASON_TOO_SHORT;
	packet->tuple.addrs = (__u64)ip->dst_addr << 32 | ip->src_addr;
	packet->tuple.protocol = ip->protocol;
	packet->ttl = ip->ttl;
	packet->l4 = sizeof(*ethernet) + header;
	if (ip->fragment & __builtin_bswap16(IPV4_MORE_OR_OFFSET))
		return REASON_VIP_FRAGMENT;
	ports = (void *)ip + header;
	if (ip->protocol == PROTOCOL_TCP) {
		struct tcp *tcp = (void *)ports;

		if (total < header + sizeof(*tcp) || (void *)(tcp + 1) > end)
			return REASON_TOO_SHORT;
		packet->tcp_flags = tcp->flags & TCP_FLAGS;
	} else if (ip->protocol == PROTOCOL_UDP) {
		if (total < header + sizeof(struct udp) || (void *)ports + sizeof(struct udp) > end)
			return REASON_TOO_SHORT;
	} else if (ip->protocol == PROTOCOL_ICMP) {
		return parse_quote(data, end, sizeof(*ethernet) + total, packet);
	} else {
		return REASON_NOT_TCP_UDP;
	}
	packet->tuple.ports = (__u32)ports->dst_port << 16 | ports->src_port;
	return REASON_FORWARDED;
}
