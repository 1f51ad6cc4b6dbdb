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
#include "ipv6.h"
#include "tables.c"
#include "find.c"
#include "names.c"

TABLE(struct counters, egress_counters, EGRESS_COUNTERS_ROWS);

enum {
	NEXT_PROGRAM = -1,     /* TCX_NEXT */
	ERROR_BYTES = 14 + 40 + EXTENSION_BYTES + 8 + 40 + EXTENSION_BYTES + 18, /* of an ICMP error, up to the checksum of what it quotes */
};

/* One end of a packet, and where it lies in it. */
struct end {
	u32 addr_at;
	u32 port_at;
	__be32 addr;           /* or name */
	__be16 port;
};

/* Rewrite: an end that was `old` becomes `new`. */
static inline void replace(struct __sk_buff *skb, u32 check, u32 protocol, struct end old, struct end new)
{
	u32 flags = protocol == PROTOCOL_UDP ? BPF_F_MARK_MANGLED_0 : 0;  /* none stays none, and a sum of zero is sent as 0xffff */

	/* With half a checksum there is the pseudo header in it, and not yet the ports: so they are told apart. */
	if (protocol != PROTOCOL_ICMP)
		bpf_l4_csum_replace(skb, check, old.addr, new.addr, flags | BPF_F_PSEUDO_HDR | sizeof(new.addr));
	bpf_l4_csum_replace(skb, check, old.port, new.port, flags | sizeof(new.port));
	bpf_l3_csum_replace(skb, sizeof(struct ethernet) + __builtin_offsetof(struct ipv4, check), old.addr, new.addr,
			    sizeof(new.addr));
	bpf_skb_store_bytes(skb, old.addr_at, &new.addr, sizeof(new.addr), 0);
	bpf_skb_store_bytes(skb, old.port_at, &new.port, sizeof(new.port), 0);
}

/* The same of IPv6, whose addresses are longer than what a checksum helper takes. There is always a checksum: half of one
 * may be zero, and so may a sum, which is sent as 0xffff. */
static inline void replace_ipv6(struct __sk_buff *skb, u32 check, bool is_udp, struct end old, struct end new)
{
	struct name *before = name_of(old.addr), *after = name_of(new.addr);
	u16 sum = 1;
	s64 grown;

	if (!before || !after)
		return;
	grown = bpf_csum_diff((void *)before->addr, sizeof(before->addr), (void *)after->addr, sizeof(after->addr), 0);
	bpf_l4_csum_replace(skb, check, 0, grown, BPF_F_PSEUDO_HDR);
	bpf_l4_csum_replace(skb, check, old.port, new.port, sizeof(new.port));
	bpf_skb_store_bytes(skb, old.addr_at, after->addr, sizeof(after->addr), 0);
	bpf_skb_store_bytes(skb, old.port_at, &new.port, sizeof(new.port), 0);
	if (is_udp && !bpf_skb_load_bytes(skb, check, &sum, sizeof(sum)) && !sum) {
		sum = 0xffff;
		bpf_skb_store_bytes(skb, check, &sum, sizeof(sum), 0);
	}
}

static inline bool is_of_echo(u32 protocol)
{
	return protocol == PROTOCOL_ICMP || protocol == (PROTOCOL_IPV6 | PROTOCOL_ICMPV6);
}

/* Rewrite: the source, which is all that changes where the client is elsewhere. */
static inline void translate(struct __sk_buff *skb, const struct packet *packet, const struct flow *flow)
{
	bool is_udp = (flow->protocol & ~PROTOCOL_IPV6) == PROTOCOL_UDP, is_ipv6 = flow->protocol & PROTOCOL_IPV6;
	bool is_echo = is_of_echo(flow->protocol);
	u32 check = packet->l4 + (is_echo ? __builtin_offsetof(struct icmp, check) :
				  is_udp  ? __builtin_offsetof(struct udp, check) :
					    __builtin_offsetof(struct tcp, check));
	u32 source_at = is_ipv6 ? __builtin_offsetof(struct ipv6, src_addr) : __builtin_offsetof(struct ipv4, src_addr);
	u32 destination_at = is_ipv6 ? __builtin_offsetof(struct ipv6, dst_addr) : __builtin_offsetof(struct ipv4, dst_addr);
	struct end source = { sizeof(struct ethernet) + source_at, packet->l4, flow->src_addr, flow->src_port };
	struct end destination = {
		sizeof(struct ethernet) + destination_at, packet->l4 + 2, flow->dst_addr, flow->dst_port
	};
	struct end new_source = { 0, 0, flow->new_src_addr, flow->new_src_port };
	struct end new_destination = { 0, 0, flow->new_dst_addr, flow->new_dst_port };

	if (is_echo) {  /* one identifier for both ends, which changes with the first */
		source.port_at = destination.port_at = packet->l4 + __builtin_offsetof(struct icmp, id);
		source.port = flow->dst_port;
		new_source.port = destination.port = new_destination.port;
	}
	if (is_ipv6)
		replace_ipv6(skb, check, is_udp, source, new_source);
	else
		replace(skb, check, flow->protocol, source, new_source);
	if (!reaches_itself(flow))
		return;
	if (is_ipv6)
		replace_ipv6(skb, check, is_udp, destination, new_destination);
	else
		replace(skb, check, flow->protocol, destination, new_destination);
}

/* Bytes of headers up to the payload, which every frame that this one becomes will have. */
static inline u32 header_bytes(struct __sk_buff *skb, const struct packet *packet)
{
	struct tcp *tcp = (void *)(long)skb->data + (packet->l4 & 0xff);

	if ((packet->tuple.protocol & ~PROTOCOL_IPV6) == PROTOCOL_UDP)
		return packet->l4 + sizeof(struct udp);
	return (void *)(tcp + 1) > (void *)(long)skb->data_end ? packet->l4 : packet->l4 + (tcp->offset >> 4) * 4;
}

/* What parsing has found, and where: the verifier is not to go on from here for each way that leads there. */
static inline void forget_how(struct packet *packet, u32 unknown)
{
	packet->l4 = forgotten(packet->l4, unknown) & 0xff;
	packet->quoted = forgotten(packet->quoted, unknown) & 0x1ff;
	packet->tcp_flags = forgotten(packet->tcp_flags, unknown);
	packet->tuple.protocol = forgotten(packet->tuple.protocol, unknown) & 0xff;
	packet->tuple.ports = forgotten(packet->tuple.ports, unknown);
}

/* Fill `packet` from a frame of either family whose headers lie there, with names in place of IPv6 addresses. */
static inline enum reason parse_any(struct __sk_buff *skb, struct packet *packet, const struct control *words)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	enum reason found = parse_headers(data, end, skb->len, packet);
	u64 *addresses;
	u32 first, second;

	if (found != REASON_NOT_IPV4 || !is_ipv6(data, end))
		return found;
	found = forgotten(parse_headers_ipv6(data, end, skb->len, packet), words->hertz);
	forget_how(packet, words->hertz);
	if (found != REASON_FORWARDED && found != REASON_UNSUMMED && found != REASON_ICMP_ERROR && found != REASON_ECHO_REPLY)
		return found;
	addresses = addresses_of(data, found, packet);
	if ((void *)(addresses + 4) > end)
		return REASON_TOO_SHORT;
	first = find_name(addresses[0], addresses[1], words);
	second = find_name(addresses[2], addresses[3], words);
	packet->tuple.addrs = found == REASON_ICMP_ERROR ? (u64)first << 32 | second : (u64)second << 32 | first;
	return found == REASON_UNSUMMED ? REASON_FORWARDED : found;  /* half a checksum may look like none */
}

/* An ICMP error that leaves is to be about what its destination has sent. */
static inline int complain(void *data, void *end, u32 size, const struct packet *packet, const struct flow *flow)
{
	struct name *old = name_of(flow->src_addr), *source = name_of(flow->new_src_addr);

	if (!(flow->protocol & PROTOCOL_IPV6))
		return translate_quote(data, end, packet->l4, size, flow);
	return old && source ? translate_quote_ipv6(data, end, packet, flow, old, source) : -1;
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
	found = parse_any(skb, &packet, words);
	if (found == REASON_TOO_SHORT || found == REASON_ICMP_ERROR) {
		/* Headers may lie in fragments of the frame; and what is pulled may be written. */
		bpf_skb_pull_data(skb, skb->len < ERROR_BYTES ? skb->len : ERROR_BYTES);
		found = parse_any(skb, &packet, words);
	}
	if (found == REASON_VIP_FRAGMENT || found == REASON_FLOW_FRAGMENT)
		return REASON_OTHER_FRAGMENT;
	if (found == REASON_VIP_ECHO)
		return REASON_OTHER_ICMP;
	if (found != REASON_FORWARDED && found != REASON_ICMP_ERROR && found != REASON_ECHO_REPLY)
		return found;
	found = forgotten(found, now);
	forget_how(&packet, now);
	flow = find_flow(&packet.tuple, words);
	if (!flow || flow->direction != REPLY || is_expired(flow, rules->timeout[flow->state], now, words))
		return found == REASON_FORWARDED ? REASON_NOT_OURS : REASON_OTHER_ICMP;
	/* About what comes back, it comes back, too, and is userspace's then; about echoes it leaves as it is (ADR 38). */
	if (found == REASON_ICMP_ERROR && (reaches_itself(flow) || is_of_echo(flow->protocol)))
		return REASON_OTHER_ICMP;
	if (found == REASON_ICMP_ERROR)
		return complain((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len, &packet, flow) ?
			REASON_TOO_SHORT : REASON_FORWARDED;
	if ((packet.tuple.protocol & ~PROTOCOL_IPV6) == PROTOCOL_TCP)
		event = rules->event_of_flags[packet.tcp_flags & TCP_FLAGS];
	else if (found == REASON_ECHO_REPLY)
		event = EVENT_ECHO;
	if (frames > 1)
		bytes += (frames - 1) * header_bytes(skb, &packet);
	advance(flow, event, rules);
	touch(flow, event, now, frames ? frames : 1, bytes);
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
