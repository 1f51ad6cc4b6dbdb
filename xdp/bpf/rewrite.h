/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* rewrite.h - a packet becomes what its flow record says. Twin: dataplane/wire.py. */
#pragma once

/* Rewrite a packet that parse() accepted; return 0, or -1 if the frame is shorter than it said. */
static inline int rewrite(void *data, void *end, __u32 l4, const struct flow *flow, const struct next_hop *hop)
{
	struct ethernet *ethernet = data;
	struct ipv4 *ip = (void *)(ethernet + 1);
	struct ports *ports = data + (l4 & 0x7f);  /* at most 14 + 60: the mask tells the verifier */

	if ((void *)(ip + 1) > end || (void *)(ports + 2) > end)
		return -1;
	*(__u64 *)ethernet = *(const __u64 *)hop->dst_mac;  /* both addresses, 12 bytes */
	*(__u32 *)(ethernet->src_mac + 2) = *(const __u32 *)(hop->src_mac + 2);
	ip->src_addr = flow->new_src_addr;
	ip->dst_addr = flow->new_dst_addr;
	ip->check = checksum_add(ip->check, flow->ip_delta);
	ip->ttl -= 1;
	ports->src_port = flow->new_src_port;
	ports->dst_port = flow->new_dst_port;
	if (flow->protocol == PROTOCOL_UDP) {
		struct udp *udp = (void *)ports;

		if (udp->check) {  /* none stays none, and a sum of zero is sent as 0xffff (RFC 768) */
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
