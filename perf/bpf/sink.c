/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* sink.c - counts and drops the generator's packets; everything else goes to the kernel, which answers ARP. Told so, it
 * also checks their checksums, or sends them back so that a flow is seen in both directions. */
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>
#include "words.h"

struct seen_row {
	u64 word[SEENS];
};

BPF_TABLE_PINNED("array", u32, struct seen_row, seen, SEEN_ROWS, TABLES_FOLDER "/seen", BPF_F_MMAPABLE);

BPF_TABLE_PINNED("array", u32, u64, task, TASK_ROWS, TABLES_FOLDER "/task", BPF_F_MMAPABLE);

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

static inline bool is_wrong(const struct iphdr *ip, const struct udphdr *udp)
{
	const u32 udp_bytes = FRAME_BYTES - sizeof(struct ethhdr) - sizeof(*ip);
	u32 pseudo = sum_of((const u16 *)&ip->saddr, 4) + __builtin_bswap16(IPPROTO_UDP) + udp->len;

	return folded(sum_of((const u16 *)ip, sizeof(*ip) / 2)) != 0xffff ||
	       folded(sum_of((const u16 *)udp, udp_bytes / 2) + pseudo) != 0xffff;
}

/* Swap the two ends of the packet. No checksum changes by that. */
static inline void reflect(struct ethhdr *eth, struct iphdr *ip, struct udphdr *udp)
{
	u8 mac[ETH_ALEN];
	u32 addr = ip->saddr;
	u16 port = udp->source;

	__builtin_memcpy(mac, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, mac, ETH_ALEN);
	ip->saddr = ip->daddr;
	ip->daddr = addr;
	udp->source = udp->dest;
	udp->dest = port;
}

int sink(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	struct udphdr *udp = (void *)(ip + 1);
	u32 row = bpf_get_smp_processor_id(), first = 0;
	struct seen_row *counts;
	u64 *now;

	if (data + FRAME_BYTES > end || eth->h_proto != __builtin_bswap16(ETH_P_IP) || ip->protocol != IPPROTO_UDP)
		return XDP_PASS;
	counts = seen.lookup(&row);
	now = task.lookup(&first);
	if (!counts || !now)
		return XDP_ABORTED;
	counts->word[SEEN_PACKETS]++;
	if (udp->dest == __builtin_bswap16(ENDPOINT_PORT))
		counts->word[SEEN_TRANSLATED]++;
	if (*now == TASK_DROP)
		return XDP_DROP;
	if (*now == TASK_REFLECT) {
		reflect(eth, ip, udp);
		/* veth hands over what XDP_TX sent only to a peer with a program; what is redirected, to one with GRO too. */
		return bpf_redirect(ctx->ingress_ifindex, 0);
	}
	if (is_wrong(ip, udp))
		counts->word[SEEN_WRONG]++;
	return XDP_DROP;
}
