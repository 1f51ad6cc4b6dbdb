/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* generate.c - writes every header field of every frame and redirects it to an interface. It is run over live frames
 * (BPF_F_TEST_XDP_LIVE_FRAMES), whose pages come back with what the last receiver left in them. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "words.h"

struct orders {
	u64 word[ORDERS];
};

BPF_TABLE_PINNED("array", u32, struct orders, orders, ORDERS_ROWS, TABLES_FOLDER "/orders", BPF_F_MMAPABLE);

static inline u16 folded(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

int generate(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct udphdr *udp = (void *)(ip + 1);
	u32 row = 0, src_addr, dst_addr, sum;
	u16 src_port, udp_len = FRAME_BYTES - sizeof(*eth) - sizeof(*ip);
	struct orders *order = orders.lookup(&row);
	u64 flow;

	if (!order || data + FRAME_BYTES > end)
		return XDP_ABORTED;
	flow = order->word[ORDER_NEXT];
	order->word[ORDER_NEXT] = flow + 1 == order->word[ORDER_FLOWS] ? 0 : flow + 1;
	src_addr = order->word[ORDER_SRC_ADDR] + flow / SOURCE_PORTS;
	src_port = FIRST_SOURCE_PORT + flow % SOURCE_PORTS;
	dst_addr = order->word[ORDER_DST_ADDR];

	__builtin_memcpy(eth->h_dest, &order->word[ORDER_DST_MAC], ETH_ALEN);
	__builtin_memcpy(eth->h_source, &order->word[ORDER_SRC_MAC], ETH_ALEN);
	eth->h_proto = __builtin_bswap16(ETH_P_IP);

	/* In host order throughout: a one's complement sum does not care, as long as it is stored in the same order. */
	sum = 0x4500 + (sizeof(*ip) + udp_len) + 0x4000 + (64 << 8 | IPPROTO_UDP);
	sum += (src_addr >> 16) + (src_addr & 0xffff) + (dst_addr >> 16) + (dst_addr & 0xffff);
	*(u8 *)ip = 0x45;
	ip->tos = 0;
	ip->tot_len = __builtin_bswap16(sizeof(*ip) + udp_len);
	ip->id = 0;
	ip->frag_off = __builtin_bswap16(0x4000); /* do not fragment */
	ip->ttl = 64;
	ip->protocol = IPPROTO_UDP;
	ip->check = __builtin_bswap16(~folded(sum));
	ip->saddr = __builtin_bswap32(src_addr);
	ip->daddr = __builtin_bswap32(dst_addr);

	/* The payload is zero and nobody writes it. */
	sum = IPPROTO_UDP + 2 * udp_len + src_port + (u16)order->word[ORDER_DST_PORT];
	sum += (src_addr >> 16) + (src_addr & 0xffff) + (dst_addr >> 16) + (dst_addr & 0xffff);
	sum = (u16)~folded(sum);
	udp->source = __builtin_bswap16(src_port);
	udp->dest = __builtin_bswap16(order->word[ORDER_DST_PORT]);
	udp->len = __builtin_bswap16(udp_len);
	udp->check = __builtin_bswap16(sum ? sum : 0xffff);
	return bpf_redirect(order->word[ORDER_IFINDEX], 0);
}
