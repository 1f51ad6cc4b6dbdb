/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* restore.c - makes the frame the next flow's request or reply again, then calls the program whose cost is wanted.
 * Running a program repeatedly would feed it the packet that it has just rewritten. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "ipv4.h"
#include "words.h"

struct orders {
	u64 word[ORDERS];
};

BPF_TABLE_PINNED("array", u32, struct orders, orders, ORDERS_ROWS, TABLES_FOLDER "/orders", BPF_F_MMAPABLE);
BPF_TABLE_PINNED("prog", u32, u32, measured, MEASURED_ROWS, TABLES_FOLDER "/measured", 0);

/* The last 32 bits of an address are what it would be in IPv4. */
static inline void write_ipv6(u32 *words, u32 source, u32 destination)
{
	words[0] = __builtin_bswap32(0x60000000);
	words[1] = __builtin_bswap32((FRAME6_BYTES - ETH_HLEN - 40) << 16 | PROTOCOL << 8 | 64);
	words[2] = words[6] = __builtin_bswap32(PREFIX6);
	words[3] = words[4] = words[7] = words[8] = 0;
	words[5] = __builtin_bswap32(source);
	words[9] = __builtin_bswap32(destination);
}

int restore(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data + 4 * VLAN_TAGS;  /* but for its addresses, which are where the frame begins */
	u32 *tags = data + 2 * ETH_ALEN;
	struct udphdr *udp = (void *)(eth + 1) + (IPV6 ? 40 : sizeof(struct iphdr));
	u32 row = bpf_get_smp_processor_id(), client, server;
	struct orders *order = orders.lookup(&row);
	u64 flow, at;
	u16 port;

	if (!order || (void *)eth + (IPV6 ? FRAME6_BYTES : FRAME_BYTES) > end)
		return XDP_ABORTED;
	/* Not one after the other: neighbours in the table would lend each other their cache lines. */
	at = order->word[ORDER_NEXT];
	order->word[ORDER_NEXT] = at + 1 == order->word[ORDER_FLOWS] ? 0 : at + 1;
	flow = at * STRIDE % FLOWS;
	client = order->word[ORDER_CLIENT] + flow / SOURCE_PORTS;
	server = order->word[ORDER_SERVER];
	port = __builtin_bswap16(FIRST_SOURCE_PORT + flow % SOURCE_PORTS);

	if (VLAN_TAGS == 2)
		*tags++ = __builtin_bswap32(ETH_P_8021AD << 16 | VLAN);
	if (VLAN_TAGS)
		*tags = __builtin_bswap32(ETH_P_8021Q << 16 | VLAN);
	eth->h_proto = __builtin_bswap16(IPV6 ? ETH_P_IPV6 : ETH_P_IP);
	if (IPV6)
		write_ipv6((void *)(eth + 1), REPLY ? server : client, REPLY ? client : server);
	else
		write_ipv4((void *)(eth + 1), PROTOCOL, REPLY ? server : client, REPLY ? client : server, FRAME_BYTES - ETH_HLEN);
	udp->source = REPLY ? __builtin_bswap16(order->word[ORDER_SERVER_PORT]) : port;
	udp->dest = REPLY ? port : __builtin_bswap16(order->word[ORDER_SERVER_PORT]);
	udp->len = __builtin_bswap16(IPV6 ? FRAME6_BYTES - ETH_HLEN - 40 : FRAME_BYTES - ETH_HLEN - sizeof(struct iphdr));
	udp->check = 0x4321; /* nobody looks: what is measured updates it */
	if (PROTOCOL == IPPROTO_TCP)
		*((u8 *)udp + 13) = 0x10; /* ACK */
	measured.call(ctx, 0);
	return XDP_ABORTED;
}
