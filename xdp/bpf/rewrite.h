/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rewrite.h - a packet becomes what its flow record says. Twin: dataplane/wire.py. */
#pragma once

/* Rewrite a transport header, of which the ports and four bytes more lie before `end`; return 0, or -1 if TCP's does not. */
static inline int rewrite_transport(struct ports *ports, void *end, const struct flow *flow, bool is_udp)
{
	ports->src_port = flow->new_src_port;
	ports->dst_port = flow->new_dst_port;
	if (is_udp) {
		struct udp *udp = (void *)ports;

		if (udp->check) {  /* none stays none, and a sum of zero is sent as 0xffff (RFC 768, RFC 8200 section 8.1) */
			__u16 check = checksum_add(udp->check, flow->l4_delta);

			udp->check = check ? check : 0xffff;
		}
	} else {
		struct tcp *tcp = (void *)ports;

		if ((void *)(tcp + 1) > end)
			return -1;
		tcp->check = checksum_add(tcp->check, flow->l4_delta);
	}
	return 0;
}

/* Change both MAC addresses of a frame, twelve bytes, to those of a next hop. */
static inline void write_macs(struct ethernet *front, const struct next_hop *hop)
{
	*(__u64 *)front = *(const __u64 *)hop->dst_mac;
	*(__u32 *)(front->src_mac + 2) = *(const __u32 *)(hop->src_mac + 2);
}

/* Rewrite a packet that parse() accepted; return 0, or -1 if the frame is shorter than it said. Without a next hop it stays
 * as it is for the kernel to route: MAC addresses and TTL, which the flow's delta counts in. `front` is where the frame
 * begins, `data` so many bytes later as its VLAN tags have. */
static inline int rewrite(void *front, void *data, void *end, __u32 l4, const struct flow *flow,
			  const struct next_hop *hop)
{
	struct ethernet *ethernet = front;
	struct ipv4 *ip = data + sizeof(*ethernet);
	struct ports *ports = data + (l4 & 0x7f);  /* at most 14 + 60: the mask tells the verifier */

	if ((void *)(ethernet + 1) > end || (void *)(ip + 1) > end || (void *)(ports + 2) > end)
		return -1;
	if (hop)
		write_macs(ethernet, hop);
	ip->src_addr = flow->new_src_addr;
	ip->dst_addr = flow->new_dst_addr;
	ip->check = checksum_add(ip->check, hop ? flow->ip_delta : fold((__u32)flow->ip_delta + 1));
	if (hop)
		ip->ttl -= 1;
	return rewrite_transport(ports, end, flow, flow->protocol == PROTOCOL_UDP);
}

/* Change an ICMP error that leaves for a client into one about the packet that it has sent, whose destination we have
 * changed. `flow` is the record of its replies, `stop` where the packet ends; what parse_quote() accepted lies in the frame.
 * RFC 5508 section 4.2. Return 0, or -1 if it does not. */
static inline int translate_quote(void *data, void *end, __u32 l4, __u32 stop, const struct flow *flow)
{
	struct ipv4 *ip = data + sizeof(struct ethernet), *quote;
	struct icmp *icmp = data + (l4 & 0x7f);
	__u32 ports_at, check_at, addr_delta, port_delta, is_udp = flow->protocol == PROTOCOL_UDP;
	struct ports *ports;
	__u16 before, *check;

	quote = (void *)(icmp + 1);
	if ((void *)(ip + 1) > end || (void *)(quote + 1) > end)
		return -1;
	ports_at = (l4 & 0x7f) + sizeof(*icmp) + (quote->version_ihl & 15) * 4;
	ports = data + ports_at;
	if ((void *)(ports + 1) > end)
		return -1;
	addr_delta = fold((__u16)~flow->src_addr + (__u32)(__u16)(~flow->src_addr >> 16));
	addr_delta = fold(addr_delta + (__u16)flow->new_src_addr + (flow->new_src_addr >> 16));
	port_delta = fold((__u16)~flow->src_port + (__u32)flow->new_src_port);

	check_at = ports_at + (is_udp ? __builtin_offsetof(struct udp, check) : __builtin_offsetof(struct tcp, check));
	check = data + check_at;
	if (check_at + 2 <= stop && (void *)(check + 1) <= end && (!is_udp || *check)) {
		before = *check;
		*check = checksum_add(*check, fold(addr_delta + port_delta));
		if (is_udp && !*check)
			*check = 0xffff;
		icmp->check = checksum_add(icmp->check, fold((__u16)~before + (__u32)*check));
	}
	/* The address and its checksum cancel out in that of ICMP, unless it was wrong: it is to stay so. */
	before = quote->check;
	quote->check = checksum_add(quote->check, addr_delta);
	quote->dst_addr = flow->new_src_addr;
	icmp->check = checksum_add(icmp->check, fold(addr_delta + fold((__u16)~before + (__u32)quote->check)));
	ports->dst_port = flow->new_src_port;
	icmp->check = checksum_add(icmp->check, port_delta);

	ip->check = checksum_add(ip->check, fold(fold((__u16)~ip->src_addr + (__u32)(__u16)(~ip->src_addr >> 16)) +
						 (__u16)flow->new_src_addr + (flow->new_src_addr >> 16)));
	ip->src_addr = flow->new_src_addr;
	return 0;
}
