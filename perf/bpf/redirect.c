/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* redirect.c - the bar: every UDP and TCP packet gets the next hop's addresses and leaves by an interface, both known when this
 * was compiled. Nothing is looked up, nothing is counted. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include "words.h"

int redirect(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	const u64 dst_mac = DST_MAC, src_mac = SRC_MAC;

	if (data + FRAME_BYTES > end || eth->h_proto != __builtin_bswap16(ETH_P_IP) ||
	    (ip->protocol != IPPROTO_UDP && ip->protocol != IPPROTO_TCP))
		return XDP_PASS;
	__builtin_memcpy(eth->h_dest, &dst_mac, ETH_ALEN);
	__builtin_memcpy(eth->h_source, &src_mac, ETH_ALEN);
	return bpf_redirect(IFINDEX, 0);
}
