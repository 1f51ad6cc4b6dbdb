/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* count.c - counts every frame for reason VERDICT_REASON and hands it to the kernel, unless the stall word of the
 * control table says otherwise: what a test needs to see both sides of a shared table. */
#include <linux/if_ether.h>
#include <linux/if_vlan.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <linux/icmp.h>
#include <linux/if_arp.h>
#include "schema.h"

BPF_TABLE_PINNED("array", u32, struct counters, xdp_counters, XDP_COUNTERS_ROWS, TABLES_FOLDER "/xdp_counters",
		 BPF_F_MMAPABLE);
BPF_TABLE_PINNED("array", u32, struct control, control, CONTROL_ROWS, TABLES_FOLDER "/control", BPF_F_MMAPABLE);

_Static_assert(sizeof(struct ethhdr) == 14 && sizeof(struct vlan_hdr) == 4 && sizeof(struct arphdr) == 8, "layer 2");
_Static_assert(sizeof(struct iphdr) == 20 && sizeof(struct ipv6hdr) == 40, "layer 3");
_Static_assert(sizeof(struct tcphdr) == 20 && sizeof(struct udphdr) == 8 && sizeof(struct icmphdr) == 8, "layer 4");

int count(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	u32 row = 0;
	struct counters *counters = xdp_counters.lookup(&row);
	struct control *words = control.lookup(&row);

	if (!counters || !words || (void *)(eth + 1) > end)
		return XDP_ABORTED;
	__sync_fetch_and_add(&counters->packets[VERDICT_REASON], 1);
	if (words->stall_jiffies == 0xd20b)
		return XDP_DROP;
	return XDP_PASS;
}
