/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* restore.c - makes the frame the next flow's request or reply again, then calls the program whose cost is wanted.
 * Running a program repeatedly would feed it the packet that it has just rewritten. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "words.h"

struct orders {
	u64 word[ORDERS];
};

BPF_TABLE_PINNED("array", u32, struct orders, orders, ORDERS_ROWS, TABLES_FOLDER "/orders", BPF_F_MMAPABLE);
BPF_TABLE_PINNED("prog", u32, u32, measured, MEASURED_ROWS, TABLES_FOLDER "/measured", 0);

int restore(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct udphdr *udp = (void *)(ip + 1);
	u32 row = bpf_get_smp_processor_id(), client;
	struct orders *order = orders.lookup(&row);
	u64 flow, at;
	u16 port;

	if (!order || data + FRAME_BYTES > end)
		return XDP_ABORTED;
	/* Not one after the other: neighbours in the table would lend each other their cache lines. */
	at = order->word[ORDER_NEXT];
	order->word[ORDER_NEXT] = at + 1 == order->word[ORDER_FLOWS] ? 0 : at + 1;
	flow = at * STRIDE % FLOWS;
	client = __builtin_bswap32(order->word[ORDER_CLIENT] + flow / SOURCE_PORTS);
	port = __builtin_bswap16(FIRST_SOURCE_PORT + flow % SOURCE_PORTS);

	eth->h_proto = __builtin_bswap16(ETH_P_IP);
	*(u8 *)ip = 0x45;
	ip->tos = 0;
	ip->tot_len = __builtin_bswap16(FRAME_BYTES - sizeof(*eth));
	ip->frag_off = __builtin_bswap16(0x4000);
	ip->ttl = 64;
	ip->protocol = PROTOCOL;
	ip->check = 0x1234; /* nobody looks: what is measured updates it */
	ip->saddr = REPLY ? __builtin_bswap32(order->word[ORDER_SERVER]) : client;
	ip->daddr = REPLY ? client : __builtin_bswap32(order->word[ORDER_SERVER]);
	udp->source = REPLY ? __builtin_bswap16(order->word[ORDER_SERVER_PORT]) : port;
	udp->dest = REPLY ? port : __builtin_bswap16(order->word[ORDER_SERVER_PORT]);
	udp->len = __builtin_bswap16(FRAME_BYTES - sizeof(*eth) - sizeof(*ip));
	udp->check = 0x4321;
	if (PROTOCOL == IPPROTO_TCP)
		*((u8 *)udp + 13) = 0x10; /* ACK */
	measured.call(ctx, 0);
	return XDP_ABORTED;
}
