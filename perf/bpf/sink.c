/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sink.c - counts and drops the generator's packets; everything else goes to the kernel, which answers ARP. Told so, it
 * also looks closer at them, or answers. PROTOCOL, FAMILY and VLAN are given when it is compiled, as to the generator. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include "words.h"

enum {
	TAG_BYTES = VLAN ? VLAN_TAG : 0,
	IP_BYTES = FAMILY == 6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr),
	LEAST_FRAME = FAMILY == 6 ? FRAME6_BYTES : FRAME_BYTES,  /* without a tag */
	ADDRESS_BYTES = FAMILY == 6 ? 16 : 4,
	TYPE = FAMILY == 6 ? ETH_P_IPV6 : ETH_P_IP,
};

/* An IP header: two addresses end it. */
#if FAMILY == 6
typedef struct ipv6hdr ip_header;
#else
typedef struct iphdr ip_header;
#endif

struct seen_row {
	u64 word[SEENS];
};

struct told_row {
	u64 word[TOLDS];
};

struct delay_row {
	u64 count[DELAY_COLUMNS];
};

BPF_TABLE_PINNED("array", u32, struct seen_row, seen, SEEN_ROWS, TABLES_FOLDER "/seen", BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", u32, struct told_row, told, TOLD_ROWS, TABLES_FOLDER "/told", BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", u32, struct delay_row, delays, DELAYS_ROWS, TABLES_FOLDER "/delays", BPF_F_MMAPABLE);

static inline u32 sum_of(const u16 *words, u32 count)
{
	u32 sum = 0, n;

#pragma unroll
	for (n = 0; n < count; n++)
		sum += words[n];
	return sum;
}

static inline u16 folded(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static inline void *addresses_of(ip_header *ip)
{
	return (void *)(ip + 1) - 2 * ADDRESS_BYTES;
}

static inline u8 protocol_of(const ip_header *ip)
{
#if FAMILY == 6
	return ip->nexthdr;
#else
	return ip->protocol;
#endif
}

/* The length of what follows, as on the wire. */
static inline u16 length_of(const ip_header *ip)
{
#if FAMILY == 6
	return ip->payload_len;
#else
	return __builtin_bswap16(__builtin_bswap16(ip->tot_len) - IP_BYTES);
#endif
}

/* The sum of a packet's transport header and what is summed with it. What follows in a longer one is zero. */
static inline u16 transport_sum(ip_header *ip)
{
	const u32 bytes = PROTOCOL == IPPROTO_TCP ? sizeof(struct tcphdr) : LEAST_FRAME - ETH_HLEN - IP_BYTES;
	u32 pseudo = sum_of(addresses_of(ip), ADDRESS_BYTES) + __builtin_bswap16(PROTOCOL) + length_of(ip);

	return folded(sum_of((const u16 *)(ip + 1), bytes / 2) + pseudo);
}

/* Swap the two ends of the packet. No checksum changes by that. */
static inline void reflect(struct ethhdr *eth, ip_header *ip, u16 *ports)
{
	u8 mac[ETH_ALEN], address[ADDRESS_BYTES];
	void *source = addresses_of(ip), *destination = source + ADDRESS_BYTES;
	u16 port = ports[0];

	__builtin_memcpy(mac, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, mac, ETH_ALEN);
	__builtin_memcpy(address, source, ADDRESS_BYTES);
	__builtin_memcpy(source, destination, ADDRESS_BYTES);
	__builtin_memcpy(destination, address, ADDRESS_BYTES);
	ports[0] = ports[1];
	ports[1] = port;
}

/* Make of a client's SYN or FIN the server's. */
static inline void answer(ip_header *ip, struct tcphdr *tcp)
{
	u32 seq = tcp->syn ? __builtin_bswap32(SERVER_SEQ) : tcp->ack_seq;

	tcp->ack_seq = __builtin_bswap32(__builtin_bswap32(tcp->seq) + 1);
	tcp->seq = seq;
	tcp->ack = 1;
	tcp->check = 0;
	tcp->check = ~transport_sum(ip);
}

static inline void count_delay(u32 cpu, u64 due)
{
	struct delay_row *row = delays.lookup(&cpu);
	u64 delay = bpf_ktime_get_ns() - due;
	u32 power = 0, column;

	if (!row || (s64)delay < 0)
		return;
	delay = delay < 1 << 30 ? delay : (1 << 30) - 1;
	if (delay >> 16)
		power += 16;
	if (delay >> (power + 8))
		power += 8;
	if (delay >> (power + 4))
		power += 4;
	if (delay >> (power + 2))
		power += 2;
	if (delay >> (power + 1))
		power += 1;
	column = power < 4 ? delay : (power - 3) * DELAY_STEPS + (delay >> (power - 4) & (DELAY_STEPS - 1));
	if (column < DELAY_COLUMNS)
		row->count[column]++;
}

int sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	ip_header *ip = data + sizeof(*eth) + TAG_BYTES;
	u16 *ports = (u16 *)(ip + 1), *type = data + ETH_HLEN - 2 + TAG_BYTES;
	struct tcphdr *tcp = (void *)ports;
	u32 row = bpf_get_smp_processor_id(), first = 0, number;
	struct seen_row *counts;
	struct told_row *now;
	u64 due;

	/* The kernel cuts a TCP packet's padding off. */
	if (data + TAG_BYTES + (PROTOCOL == IPPROTO_TCP ? ETH_HLEN + IP_BYTES + sizeof(*tcp) : LEAST_FRAME) > end ||
	    *type != __builtin_bswap16(TYPE) || protocol_of(ip) != PROTOCOL)
		return XDP_PASS;
	counts = seen.lookup(&row);
	now = told.lookup(&first);
	if (!counts || !now)
		return XDP_ABORTED;
	counts->word[SEEN_PACKETS]++;
	if (ports[1] == __builtin_bswap16(ENDPOINT_PORT) || ports[0] == __builtin_bswap16(SERVICE_PORT))
		counts->word[SEEN_TRANSLATED]++;
	switch (now->word[TOLD_TASK]) {
	case TASK_VERIFY:
		if ((FAMILY == 4 && folded(sum_of((const u16 *)ip, sizeof(*ip) / 2)) != 0xffff) || transport_sum(ip) != 0xffff)
			counts->word[SEEN_WRONG]++;
		return XDP_DROP;
	case TASK_CONVERSE:
		if (PROTOCOL != IPPROTO_TCP || !(tcp->syn || tcp->fin))
			return XDP_DROP;
		reflect(eth, ip, ports);
		answer(ip, tcp);
		break;
	case TASK_REFLECT:
		reflect(eth, ip, ports);
		break;
	case TASK_TIME:
		if (FAMILY == 4 && PROTOCOL == IPPROTO_UDP) {
			__builtin_memcpy(&due, ports + 4, sizeof(due));
			count_delay(row, due);
		}
		return XDP_DROP;
	case TASK_WATCH:
		number = *(u32 *)((void *)(ip + 1) - sizeof(number));
		if (number == __builtin_bswap32(now->word[TOLD_ADDR]) && !counts->word[SEEN_FIRST])
			counts->word[SEEN_FIRST] = bpf_ktime_get_ns();
		return XDP_DROP;
	default:
		return XDP_DROP;
	}
	/* veth hands over what XDP_TX sent only to a peer with a program; what is redirected, to one with GRO too. */
	return bpf_redirect(ctx->ingress_ifindex, 0);
}
