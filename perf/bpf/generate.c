/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* generate.c - writes every header field of every frame and redirects it to an interface. It is run over live frames
 * (BPF_F_TEST_XDP_LIVE_FRAMES), whose pages come back with what the last receiver left in them. PROTOCOL, REPLY,
 * FAMILY (4 or 6) and VLAN (0: no tag) are given when it is compiled. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "ipv4.h"
#include "words.h"

enum {
	TAG_BYTES = VLAN ? VLAN_TAG : 0,
	IP_BYTES = FAMILY == 6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr),
	LEAST_FRAME = TAG_BYTES + (FAMILY == 6 ? FRAME6_BYTES : FRAME_BYTES),
};

struct orders {
	u64 word[ORDERS];
};

BPF_TABLE_PINNED("array", u32, struct orders, orders, ORDERS_ROWS, TABLES_FOLDER "/orders", BPF_F_MMAPABLE);

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

	return turns < 11 ? bpf_xdp_adjust_tail(ctx, (turns < 7 ? LEAST_FRAME : 590) - LONGEST_FRAME) : 0;
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

static inline void write_address(void *address, const u64 *net, u32 number)
{
	__builtin_memcpy(address, net, sizeof(*net));
	*(u32 *)(address + 8) = 0;
	*(u32 *)(address + 12) = __builtin_bswap32(number);
}

static inline void write_ipv6(struct ipv6hdr *ip, const struct orders *order, u32 source, u32 destination, u16 payload)
{
	*(u32 *)ip = __builtin_bswap32(6 << 28);
	ip->payload_len = __builtin_bswap16(payload);
	ip->nexthdr = PROTOCOL;
	ip->hop_limit = 64;
	write_address(&ip->saddr, &order->word[REPLY ? ORDER_SERVER_NET : ORDER_CLIENT_NET], source);
	write_address(&ip->daddr, &order->word[REPLY ? ORDER_CLIENT_NET : ORDER_SERVER_NET], destination);
}

int generate(struct xdp_md *ctx)
{
	void *data, *end, *ip;
	struct ethhdr *eth;
	u16 *ports, *type;
	u32 row = 0, client, server, sum;
	u16 client_port, server_port, length;
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
	ip = data + sizeof(*eth) + TAG_BYTES;
	ports = ip + IP_BYTES;
	if (data + LEAST_FRAME > end)
		return XDP_ABORTED;
	client = order->word[ORDER_CLIENT] + flow / SOURCE_PORTS;
	client_port = FIRST_SOURCE_PORT + flow % SOURCE_PORTS;
	server = order->word[ORDER_SERVER];
	if (order->word[ORDER_SERVERS] > 1)
		server += flow % order->word[ORDER_SERVERS];
	server_port = order->word[ORDER_SERVER_PORT];
	length = PROTOCOL == IPPROTO_TCP ? sizeof(struct tcphdr) :
					   (long)end - (long)data - sizeof(*eth) - TAG_BYTES - IP_BYTES;

	__builtin_memcpy(eth->h_dest, &order->word[ORDER_DST_MAC], ETH_ALEN);
	__builtin_memcpy(eth->h_source, &order->word[ORDER_SRC_MAC], ETH_ALEN);
	type = &eth->h_proto;
	if (VLAN) {
		*type++ = __builtin_bswap16(ETH_P_8021Q);
		*type++ = __builtin_bswap16(VLAN);
	}
	*type = __builtin_bswap16(FAMILY == 6 ? ETH_P_IPV6 : ETH_P_IP);

	sum = halves(client) + halves(server);
	if (FAMILY == 6) {
		write_ipv6(ip, order, REPLY ? server : client, REPLY ? client : server, length);
		sum += order->word[ORDER_NET_SUM];
	} else {
		write_ipv4(ip, PROTOCOL, REPLY ? server : client, REPLY ? client : server, IP_BYTES + length);
	}

	/* The payload is zero and nobody writes it, or it is a word and its complement: both sum up to nothing. */
	ports[0] = __builtin_bswap16(REPLY ? server_port : client_port);
	ports[1] = __builtin_bswap16(REPLY ? client_port : server_port);
	sum += client_port + server_port;
	if (PROTOCOL == IPPROTO_TCP) {
		write_tcp((void *)ports, sum, order->word[ORDER_STEP]);
		return bpf_redirect(order->word[ORDER_IFINDEX], 0);
	}
	write_udp((void *)ports, sum, length);
	if (FAMILY == 4 && order->word[ORDER_STAMPED]) {
		due = bpf_ktime_get_ns() - order->word[ORDER_LATE];
		__builtin_memcpy(ports + 4, &due, sizeof(due));
		due = ~due;
		__builtin_memcpy(ports + 8, &due, sizeof(due));
	}
	return bpf_redirect(order->word[ORDER_IFINDEX], 0);
}
