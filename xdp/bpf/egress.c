/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* egress.c - replies of endpoints on this node, translated as they leave by an interface of ours: parse - flow - rewrite.
 *
 * A local kernel sends frames with half a checksum, and larger than the MTU, for the device to finish. An XDP program
 * could not tell; this one runs where that is known, and the helpers mind it. It drops nothing: what is not a reply that
 * it knows leaves as it is. A reply to the endpoint itself turns round. */
#include "schema.h"
#include "hash.h"
#include "checksum.h"
#include "parse.h"
#include "rewrite.h"
#include "find.c"

TABLE(struct counters, egress_counters, EGRESS_COUNTERS_ROWS);

enum {
	NEXT_PROGRAM = -1,     /* TCX_NEXT */
	ERROR_BYTES = 14 + 60 + 8 + 60 + 18, /* of an ICMP error, up to the checksum of what it quotes */
};

/* One end of a packet, and where it lies in it. */
struct end {
	u32 addr_at;
	u32 port_at;
	__be32 addr;
	__be16 port;
};

/* Rewrite: an end that was `old` becomes `new`. */
static inline void replace(struct __sk_buff *skb, const struct packet *packet, bool is_udp, struct end old, struct end new)
{
	u32 check = packet->l4 + (is_udp ? __builtin_offsetof(struct udp, check) : __builtin_offsetof(struct tcp, check));
	u32 flags = is_udp ? BPF_F_MARK_MANGLED_0 : 0;  /* none stays none, and a sum of zero is sent as 0xffff */

	/* With half a checksum there is the pseudo header in it, and not yet the ports: so they are told apart. */
	bpf_l4_csum_replace(skb, check, old.addr, new.addr, flags | BPF_F_PSEUDO_HDR | sizeof(new.addr));
	bpf_l4_csum_replace(skb, check, old.port, new.port, flags | sizeof(new.port));
	bpf_l3_csum_replace(skb, sizeof(struct ethernet) + __builtin_offsetof(struct ipv4, check), old.addr, new.addr,
			    sizeof(new.addr));
	bpf_skb_store_bytes(skb, old.addr_at, &new.addr, sizeof(new.addr), 0);
	bpf_skb_store_bytes(skb, old.port_at, &new.port, sizeof(new.port), 0);
}

/* Rewrite: the source, which is all that changes where the client is elsewhere. */
static inline void translate(struct __sk_buff *skb, const struct packet *packet, const struct flow *flow)
{
	u32 ip = sizeof(struct ethernet);
	bool is_udp = flow->protocol == PROTOCOL_UDP;
	struct end source = { ip + __builtin_offsetof(struct ipv4, src_addr), packet->l4, flow->src_addr, flow->src_port };
	struct end destination = { ip + __builtin_offsetof(struct ipv4, dst_addr), packet->l4 + 2, flow->dst_addr, flow->dst_port };

	replace(skb, packet, is_udp, source, (struct end){ 0, 0, flow->new_src_addr, flow->new_src_port });
	if (reaches_itself(flow))
		replace(skb, packet, is_udp, destination, (struct end){ 0, 0, flow->new_dst_addr, flow->new_dst_port });
}

/* Bytes of headers up to the payload, which every frame that this one becomes will have. */
static inline u32 header_bytes(struct __sk_buff *skb, const struct packet *packet)
{
	struct tcp *tcp = (void *)(long)skb->data + (packet->l4 & 0x7f);

	if (packet->tuple.protocol == PROTOCOL_UDP)
		return packet->l4 + sizeof(struct udp);
	return (void *)(tcp + 1) > (void *)(long)skb->data_end ? packet->l4 : packet->l4 + (tcp->offset >> 4) * 4;
}

static inline enum reason handle(struct __sk_buff *skb)
{
	u32 zero = 0, now = bpf_jiffies64(), event = EVENT_DATA, frames = skb->gso_segs, bytes = skb->len;
	struct packet packet = {};
	struct control *words = control.lookup(&zero);
	struct machine *rules = machine.lookup(&zero);
	enum reason found;
	struct flow *flow;

	if (!words || !rules)
		return REASON_NOT_OURS;
	found = parse_headers((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet);
	if (found == REASON_TOO_SHORT || found == REASON_ICMP_ERROR) {
		/* Headers may lie in fragments of the frame; and what is pulled may be written. */
		bpf_skb_pull_data(skb, skb->len < ERROR_BYTES ? skb->len : ERROR_BYTES);
		found = parse_headers((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet);
	}
	if (found == REASON_VIP_FRAGMENT || found == REASON_FLOW_FRAGMENT)
		return REASON_OTHER_FRAGMENT;
	if (found == REASON_VIP_ECHO)
		return REASON_OTHER_ICMP;
	if (found != REASON_FORWARDED && found != REASON_ICMP_ERROR)
		return found;
	flow = find_flow(&packet.tuple, words);
	if (!flow || flow->direction != REPLY || is_expired(flow, rules->timeout[flow->state], now, words))
		return found == REASON_ICMP_ERROR ? REASON_OTHER_ICMP : REASON_NOT_OURS;
	if (found == REASON_ICMP_ERROR && reaches_itself(flow))
		return REASON_OTHER_ICMP;  /* comes back, as what it is about did, and is userspace's then */
	if (found == REASON_ICMP_ERROR)
		return translate_quote((void *)(long)skb->data, (void *)(long)skb->data_end, packet.l4, skb->len, flow) ?
			REASON_TOO_SHORT : REASON_FORWARDED;
	if (packet.tuple.protocol == PROTOCOL_TCP)
		event = rules->event_of_flags[packet.tcp_flags & TCP_FLAGS];
	if (frames > 1)
		bytes += (frames - 1) * header_bytes(skb, &packet);
	advance(flow, event, rules);
	touch(flow, now, frames ? frames : 1, bytes);
	translate(skb, &packet, flow);
	return reaches_itself(flow) ? REASON_TO_KERNEL : REASON_FORWARDED;
}

/* To the ingress of the interface that a frame would leave by, addressed to it: the kernel takes it as received there. */
static inline int turn_round(struct __sk_buff *skb)
{
	u8 own[6];

	bpf_skb_load_bytes(skb, __builtin_offsetof(struct ethernet, src_mac), own, sizeof(own));
	bpf_skb_store_bytes(skb, __builtin_offsetof(struct ethernet, dst_mac), own, sizeof(own), 0);
	return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
}

int tc_egress(struct __sk_buff *skb)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct counters *row = egress_counters.lookup(&cpu);
	enum reason reason;

	/* From userspace, which got it from XDP and gives it back: as if XDP had let it pass. */
	if (skb->mark == TO_KERNEL_MARK) {
		skb->mark = 0;
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	reason = handle(skb);
	if (row)
		row->packets[reason & (MAX_REASONS - 1)] += 1;
	return reason == REASON_TO_KERNEL ? turn_round(skb) : NEXT_PROGRAM;
}
