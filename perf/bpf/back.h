/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* back.h - the frame goes back to where it came from. */
#pragma once
#include <linux/if_ether.h>

static inline int sent_back(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	u8 mac[ETH_ALEN];

	if (data + sizeof(*eth) > end)
		return XDP_ABORTED;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return XDP_TX;
}
