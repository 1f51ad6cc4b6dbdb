/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* touch.c - the least that a table can cost: cache lines of a flow's own, TOUCHED of them, each read and written; then as
 * bare.c. No key is compared. No line waits for another one, unless IN_TURN: then each says where the next one is. */
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "back.h"

struct line {
	u64 packets, nothing, rest[6];
};

BPF_TABLE_PINNED("array", u32, struct line, lines, LINES_ROWS, TABLES_FOLDER "/lines", BPF_F_MMAPABLE);

int touch(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	struct udphdr *udp = (void *)(ip + 1);
	u64 hash;
	int n;

	if ((void *)(udp + 1) > end)
		return XDP_ABORTED;
	hash = ((u64)ip->saddr << 16 | udp->source) * 0x9e3779b97f4a7c15;
#pragma unroll
	for (n = 0; n < TOUCHED; n++) {
		u32 row = (hash >> 32) * LINES_ROWS >> 32;
		struct line *line = lines.lookup(&row);

		if (line)
			line->packets++;
		if (line && IN_TURN)
			hash ^= line->nothing;
		hash = (hash ^ hash >> 29) * 0xbb67ae8584caa73b;
	}
	return sent_back(ctx);
}
