/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* generate.c - writes every header field of every frame and redirects it to an interface. It is run over live frames
 * (BPF_F_TEST_XDP_LIVE_FRAMES), whose pages come back with what the last receiver left in them. PROTOCOL and REPLY are
 * given when it is compiled. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>
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

static inline u32 halves(u32 word)
{
	return (word >> 16) + (word & 0xffff);
}

static inline u64 choose_flow(struct orders *order)
{
	u64 flow;

	if (order->word[ORDER_NEW_EVERY] && ++order->word[ORDER_SINCE_NEW] >= order->word[ORDER_NEW_EVERY]) {
		order->word[ORDER_SINCE_NEW] = 0;
		return order->word[ORDER_NEXT_NEW]++;
	}
	flow = order->word[ORDER_NEXT];
	order->word[ORDER_NEXT] = flow + 1 >= order->word[ORDER_FLOWS] ? 0 : flow + 1;
	return flow;
}

/* Of twelve frames seven have 64 bytes, four 594 and one 1518, check sequences included. All begin as the longest. */
static inline int mix(struct xdp_md *ctx, u64 turn)
{
	u32 turns = turn % 12;

	return turns < 11 ? bpf_xdp_adjust_tail(ctx, (turns < 7 ? FRAME_BYTES : 590) - LONGEST_FRAME) : 0;
}

static inline void write_udp(struct udphdr *udp, u32 sum, u16 udp_len)
{
	udp->len = __builtin_bswap16(udp_len);
	sum = (u16)~folded(sum + IPPROTO_UDP + 2 * udp_len);
	udp->check = __builtin_bswap16(sum ? sum : 0xffff);
}

static inline void write_tcp(struct tcphdr *tcp, u32 sum, u64 step)
{
	const u32 seq = step == STEP_SYN ? CLIENT_SEQ : step == STEP_LAST_ACK ? CLIENT_SEQ + 2 : CLIENT_SEQ + 1;
	const u32 ack = step == STEP_SYN ? 0 : step == STEP_LAST_ACK ? SERVER_SEQ + 2 : SERVER_SEQ + 1;
	const u16 flags = 0x5000 | (step == STEP_SYN ? 0x02 : step == STEP_FIN ? 0x11 : 0x10);

	tcp->seq = __builtin_bswap32(seq);
	tcp->ack_seq = __builtin_bswap32(ack);
	*((u16 *)tcp + 6) = __builtin_bswap16(flags);
	tcp->window = __builtin_bswap16(8192);
	tcp->urg_ptr = 0;
	sum += IPPROTO_TCP + sizeof(*tcp) + seq + ack + flags + 8192; /* the numbers are small */
	tcp->check = __builtin_bswap16(~folded(sum));
}

int generate(struct xdp_md *ctx)
{
	void *data, *end;
	struct ethhdr *eth;
	struct iphdr *ip;
	u16 *ports;
	u32 row = 0, client, server, sum;
	u16 client_port, server_port, total;
	struct orders *order = orders.lookup(&row);
	u64 flow, due;

	if (!order)
		return XDP_ABORTED;
	flow = choose_flow(order);
	if (order->word[ORDER_MIXED] && mix(ctx, flow))
		return XDP_ABORTED;
	data = (void *)(long)ctx->data;
	end = (void *)(long)ctx->data_end;
	eth = data;
	ip = data + sizeof(*eth);
	ports = (u16 *)(ip + 1);
	if (data + FRAME_BYTES > end)
		return XDP_ABORTED;
	client = order->word[ORDER_CLIENT] + flow / SOURCE_PORTS;
	client_port = FIRST_SOURCE_PORT + flow % SOURCE_PORTS;
	server = order->word[ORDER_SERVER];
	if (order->word[ORDER_SERVERS] > 1)
		server += flow % order->word[ORDER_SERVERS];
	server_port = order->word[ORDER_SERVER_PORT];
	total = PROTOCOL == IPPROTO_TCP ? TCP_BYTES : (long)end - (long)data - sizeof(*eth);

	__builtin_memcpy(eth->h_dest, &order->word[ORDER_DST_MAC], ETH_ALEN);
	__builtin_memcpy(eth->h_source, &order->word[ORDER_SRC_MAC], ETH_ALEN);
	eth->h_proto = __builtin_bswap16(ETH_P_IP);

	/* In host order throughout: a one's complement sum does not care, as long as it is stored in the same order. */
	sum = halves(client) + halves(server);
	*(u8 *)ip = 0x45;
	ip->tos = 0;
	ip->tot_len = __builtin_bswap16(total);
	ip->id = 0;
	ip->frag_off = __builtin_bswap16(0x4000); /* do not fragment */
	ip->ttl = 64;
	ip->protocol = PROTOCOL;
	ip->check = __builtin_bswap16(~folded(sum + 0x4500 + total + 0x4000 + (64 << 8 | PROTOCOL)));
	ip->saddr = __builtin_bswap32(REPLY ? server : client);
	ip->daddr = __builtin_bswap32(REPLY ? client : server);

	/* The payload is zero and nobody writes it, or it is a word and its complement: both sum up to nothing. */
	ports[0] = __builtin_bswap16(REPLY ? server_port : client_port);
	ports[1] = __builtin_bswap16(REPLY ? client_port : server_port);
	sum += client_port + server_port;
	if (PROTOCOL == IPPROTO_TCP) {
		write_tcp((void *)ports, sum, order->word[ORDER_STEP]);
		return bpf_redirect(order->word[ORDER_IFINDEX], 0);
	}
	write_udp((void *)ports, sum, total - sizeof(*ip));
	if (order->word[ORDER_STAMPED]) {
		due = bpf_ktime_get_ns() - order->word[ORDER_LATE];
		__builtin_memcpy(ports + 4, &due, sizeof(due));
		due = ~due;
		__builtin_memcpy(ports + 8, &due, sizeof(due));
	}
	return bpf_redirect(order->word[ORDER_IFINDEX], 0);
}
