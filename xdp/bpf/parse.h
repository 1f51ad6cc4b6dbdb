/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* parse.h - from bytes to a five-tuple. Twin: dataplane/wire.py, with the same guards in the same order. */
#pragma once

enum {
	ETHERTYPE_IPV4 = 0x0800,
	IPV4_MORE_OR_OFFSET = 0x3fff,
	IPV4_OFFSET = 0x1fff,
	IPV4_BYTES = 60,             /* of the longest header */
	TCP_FLAGS = 0x3f,
	ETHERTYPE_ARP = 0x0806,
	ETHERTYPE_VLAN = 0x8100,     /* a tag of a customer's, or the only one */
	ETHERTYPE_SERVICE = 0x88a8,  /* a tag of a provider's */
	VLAN_ID = 0x0fff,
	VLAN_BYTES = 3 * VLAN_TAG_BYTES,  /* a mask: of one tag or two, added up */
	ARP_REQUEST = 1,
};

/* Headers as they lie in the frame. They are not declared packed: clang would then read and write them by the byte. */
struct ethernet {
	__u8   dst_mac[6];
	__u8   src_mac[6];
	__be16 type;
};

/* A VLAN tag, which stands where an untagged frame has its type (IEEE 802.1Q section 9.3). */
struct vlan_tag {
	__be16 type;
	__be16 control;        /* priority, whether it may be dropped first, and the VLAN */
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
	__be16 id;             /* of an echo request, and of its reply */
	__be16 sequence;
};

/* ARP for IPv4 over Ethernet. Addresses are not aligned: two halves each. */
struct arp {
	__be16 hardware;
	__be16 protocol;
	__be16 lengths;        /* 6 and 4 */
	__be16 operation;
	__u8   sender_mac[6];
	__be16 sender[2];
	__u8   target_mac[6];
	__be16 target[2];
};

enum icmp_type {
	ICMP_ECHO_REPLY = 0,
	ICMP_UNREACHABLE = 3,
	ICMP_QUENCH = 4,
	ICMP_ECHO = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETER = 12,
};

/* What parse() finds. Offsets are from the start of the frame, but for those of VLAN tags: they
 * stand between its MAC addresses and its type, so that what begins so much later is, but for these, an untagged one. */
struct packet {
	struct tuple tuple;
	__u64 datagram;    /* of a fragment: protocol and identification */
	__u32 l4;          /* offset of the transport header */
	__u32 quoted;      /* of an ICMPv6 error: that of the one that it quotes */
	__u32 vlan_bytes;  /* of its VLAN tags */
	__u8  ttl;
	__u8  tcp_flags;
};

/* Whether an IPv4 header has options. */
static inline bool has_options(const struct packet *packet)
{
	return packet->l4 > sizeof(struct ethernet) + sizeof(struct ipv4);
}

static inline __u16 be16(__be16 value)
{
	return __builtin_bswap16(value);
}

static inline bool is_vlan_tag(__be16 type)
{
	return type == __builtin_bswap16(ETHERTYPE_VLAN) || type == __builtin_bswap16(ETHERTYPE_SERVICE);
}

/* See which VLAN tags a frame has that is neither IPv4 nor IPv6. Store how many bytes they are and return FORWARDED if it
 * has some and its VLAN is one of `vlans`; else why it is passed. The outer tag tells the VLAN or, where that is a priority
 * tag, the inner one. */
static inline enum reason parse_vlan_tags(void *data, void *end, const __u64 *vlans, __u32 *bytes)
{
	struct vlan_tag *tag = data + __builtin_offsetof(struct ethernet, type);
	__u32 vlan, inner = 0, count = 1;

	if ((void *)&tag->control > end || !is_vlan_tag(tag->type))
		return REASON_NOT_IPV4;
	if ((void *)&tag[1].control > end)
		return REASON_TOO_SHORT;
	vlan = be16(tag->control) & VLAN_ID;
	if (is_vlan_tag(tag[1].type)) {
		if ((void *)&tag[2].control > end)
			return REASON_TOO_SHORT;
		if (is_vlan_tag(tag[2].type))
			return REASON_OTHER_VLAN;
		inner = be16(tag[1].control) & VLAN_ID;
		vlan = vlan ? vlan : inner;
		count = 2;
	}
	if (inner == RESERVED_VLAN || !(vlans[vlan / 64] >> vlan % 64 & 1))
		return REASON_OTHER_VLAN;
	*bytes = count * VLAN_TAG_BYTES;
	return REASON_FORWARDED;
}

/* How many bytes of VLAN tags count against the MTU: all but those of one, for which every link has room. */
static inline __u32 more_vlan_bytes(__u32 vlan_bytes)
{
	return (vlan_bytes & 2 * VLAN_TAG_BYTES) / 2;
}

/* Return what follows the Ethernet header of a frame if it is ARP for IPv4, else nothing. */
static inline struct arp *parse_arp(void *data, void *end)
{
	struct ethernet *ethernet = data;
	struct arp *arp = (void *)(ethernet + 1);

	if ((void *)(arp + 1) > end || ethernet->type != __builtin_bswap16(ETHERTYPE_ARP))
		return 0;
	if (be16(arp->hardware) != 1 || be16(arp->protocol) != ETHERTYPE_IPV4 || be16(arp->lengths) != 0x0604)
		return 0;
	return arp;
}

/* The ports that the identifier of an echo request stands for, or that of its reply: who is asked has port 0. */
static inline __u32 ports_of_echo(const struct icmp *icmp, bool is_reply)
{
	return is_reply ? (__u32)icmp->id << 16 : icmp->id;
}

/* Take the five-tuple of an ICMP error's quote, turned round: the direction in which the error travels; or the identifier
 * of an echo request or its reply. It ends at offset `stop`; the frame may go on with padding, of which the verifier knows
 * the end only. */
static inline enum reason parse_icmp(void *data, void *end, __u32 stop, struct packet *packet)
{
	struct icmp *icmp = data + packet->l4;
	struct ipv4 *ip = (void *)(icmp + 1);
	struct ports *ports;
	__u32 length;

	if (packet->l4 + sizeof(*icmp) > stop || (void *)(icmp + 1) > end)
		return REASON_TOO_SHORT;
	if (icmp->type == ICMP_ECHO || icmp->type == ICMP_ECHO_REPLY) {
		packet->tuple.ports = ports_of_echo(icmp, icmp->type == ICMP_ECHO_REPLY);
		return icmp->type == ICMP_ECHO ? REASON_VIP_ECHO : REASON_ECHO_REPLY;
	}
	if (icmp->type != ICMP_UNREACHABLE && icmp->type != ICMP_TIME_EXCEEDED &&
	    icmp->type != ICMP_PARAMETER && icmp->type != ICMP_QUENCH)
		return REASON_OTHER_ICMP;
	if (packet->l4 + sizeof(*icmp) + sizeof(*ip) > stop || (void *)(ip + 1) > end)
		return REASON_TOO_SHORT;
	length = (ip->version_ihl & 15) * 4;
	if (ip->version_ihl >> 4 != 4 || length < sizeof(*ip))
		return REASON_OTHER_ICMP;
	if (ip->protocol != PROTOCOL_TCP && ip->protocol != PROTOCOL_UDP && ip->protocol != PROTOCOL_ICMP)
		return REASON_OTHER_ICMP;
	if (ip->fragment & __builtin_bswap16(IPV4_OFFSET))
		return REASON_OTHER_ICMP;
	ports = (void *)ip + length;
	if (packet->l4 + sizeof(*icmp) + length + 8 > stop || (void *)ports + 8 > end)
		return REASON_TOO_SHORT;
	icmp = (void *)ports;
	if (ip->protocol == PROTOCOL_ICMP && icmp->type != ICMP_ECHO && icmp->type != ICMP_ECHO_REPLY)
		return REASON_OTHER_ICMP;
	packet->tuple.addrs = (__u64)ip->src_addr << 32 | ip->dst_addr;
	packet->tuple.ports = ip->protocol == PROTOCOL_ICMP ? ports_of_echo(icmp, icmp->type == ICMP_ECHO) :
							      (__u32)ports->src_port << 16 | ports->dst_port;
	packet->tuple.protocol = ip->protocol;
	return REASON_ICMP_ERROR;
}

/* Take the ports of a fragment that has them, the first of TCP or UDP: FLOW_FRAGMENT; VIP_FRAGMENT without them. */
static inline enum reason parse_fragment(struct ipv4 *ip, void *end, __u32 header, __u32 total, struct packet *packet)
{
	struct ports *ports = (void *)ip + header;

	packet->datagram = (__u32)ip->protocol << 16 | ip->id;
	if (ip->fragment & __builtin_bswap16(IPV4_OFFSET))
		return REASON_VIP_FRAGMENT;
	if (ip->protocol == PROTOCOL_TCP) {
		struct tcp *tcp = (void *)ports;

		if (total < header + sizeof(*tcp) || (void *)(tcp + 1) > end)
			return REASON_VIP_FRAGMENT;
		packet->tcp_flags = tcp->flags & TCP_FLAGS;
	} else if (ip->protocol != PROTOCOL_UDP || total < header + sizeof(struct udp) ||
		   (void *)ports + sizeof(struct udp) > end) {
		return REASON_VIP_FRAGMENT;
	}
	packet->tuple.ports = (__u32)ports->dst_port << 16 | ports->src_port;
	return REASON_FLOW_FRAGMENT;
}

/* Fill `packet` from a frame of `size` bytes, the headers of which lie before `end`; return FORWARDED if it is TCP or UDP,
 * else what it is. Of a fragment but a first one, of another protocol, or where lengths cannot be, addresses only; of an
 * echo request or its reply, the ports that its identifier stands for; of an ICMP error, what it quotes. Every length is
 * checked before the bytes behind it are read. */
static inline enum reason parse_headers(void *data, void *end, __u32 size, struct packet *packet)
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
	/* These have their places, whatever is said of lengths. */
	packet->tuple.addrs = (__u64)ip->dst_addr << 32 | ip->src_addr;
	packet->tuple.protocol = ip->protocol;
	packet->ttl = ip->ttl;
	header = (ip->version_ihl & 15) * 4;
	total = be16(ip->total_length);
	if (header < sizeof(*ip) || total < header)
		return REASON_TOO_SHORT;
	if (sizeof(*ethernet) + total > size)
		return REASON_TOO_SHORT;
	packet->l4 = sizeof(*ethernet) + header;
	if (ip->fragment & __builtin_bswap16(IPV4_MORE_OR_OFFSET))
		return parse_fragment(ip, end, header, total, packet);
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
		return parse_icmp(data, end, sizeof(*ethernet) + total, packet);
	} else {
		return REASON_NOT_TCP_UDP;
	}
	packet->tuple.ports = (__u32)ports->dst_port << 16 | ports->src_port;
	return REASON_FORWARDED;
}

/* The same of a frame that lies there whole. */
static inline enum reason parse(void *data, void *end, struct packet *packet)
{
	return parse_headers(data, end, end - data, packet);
}
