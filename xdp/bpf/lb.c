/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* lb.c - the life of a packet inside the kernel: parse - flow - service - punt - rewrite, in the order and with the
 * words of docs/architecture.md. The maps are here because bcc rewrites map calls in the main file only.
 *
 * Given at compile time: TABLES_FOLDER, NAME_ROWS of every map pinned there (xdp/compile.py), and OFFLOAD: 0 punts
 * every packet of a flow while its worker lives (engine afxdp), 1 forwards those of known flows here. */
#include "schema.h"
#include "hash.h"
#include "checksum.h"
#include "parse.h"
#include "rewrite.h"
#include "ipv6.h"

#include "tables.c"
#include "find.c"
#include "names.c"
#include "service.c"

TABLE(struct host, hosts, HOSTS_ROWS);
TABLE(struct datagram, datagrams, DATAGRAMS_ROWS);
TABLE(struct next_hop, next_hops, NEXT_HOPS_ROWS);
TABLE(struct worker, workers, WORKERS_ROWS);
TABLE(struct passage, passages, PASSAGES_ROWS);
TABLE(struct counters, xdp_counters, XDP_COUNTERS_ROWS);

struct queue {
	u32 ifindex;
	u32 index;
};
BPF_TABLE_PINNED("hash", struct queue, u32, queues, MAX_WORKERS, TABLES_FOLDER "/queues", 0);
BPF_TABLE_PINNED("lpm_trie", struct prefix, u32, routes, ROUTES_ROWS, TABLES_FOLDER "/routes", 1 /* BPF_F_NO_PREALLOC */);
BPF_XSKMAP(sockets, MAX_WORKERS, TABLES_FOLDER "/sockets");
BPF_TABLE_PINNED("prog", u32, u32, stages, STAGES, TABLES_FOLDER "/stages", 0);

enum { NO_READER = 0xffffffff, NO_SLOT = 0xffffffff };
enum { STATION_BITS = 0xffffffffffff };  /* of the first eight bytes of a frame, those of whom it is to */

/* A verdict on the way out: what xdp_lb() returns, and why. */
struct result {
	int action;
	enum reason reason;
};

enum { UNDECIDED = -1 };       /* no verdict yet: the packet may begin a connection */

/* What is to be decided about such a packet. */
struct question {
	u64 source[2];         /* of an IPv6 packet, as in its header */
	struct flow *old;      /* what was known of its five-tuple, and is over */
	enum reason why;       /* it would be punted for */
	u32 event;
	u32 now;
};

static inline struct result pass(enum reason reason)
{
	return (struct result){ XDP_PASS, reason };
}

static inline struct result drop(enum reason reason)
{
	return (struct result){ XDP_DROP, reason };
}

static inline bool is_vip(u32 addr, const struct control *words)
{
	return is_vip_of(addr, 0, words);
}

/* Punt: to the worker of this queue, if it lives: a reader that was stopped would swallow every frame. It is away when
 * the first frame that was punted since its last turn has waited for too long; asleep or awake makes no difference. */
static inline u32 reader_of(struct xdp_md *ctx, const struct control *words)
{
	struct queue queue = { ctx->ingress_ifindex, ctx->rx_queue_index };
	u32 *number = queues.lookup(&queue), index;
	struct worker *worker;
	u64 since;

	if (!number)
		return NO_READER;
	index = *number;
	worker = workers.lookup(&index);
	if (!worker || !worker->heartbeat)
		return NO_READER;
	since = *(volatile u64 *)&worker->waiting_since;
	return !since || bpf_jiffies64() - since <= words->stall_jiffies ? index : NO_READER;
}

static inline struct result punt(u32 reader, struct result otherwise, enum reason reason)
{
	struct worker *worker = workers.lookup(&reader);

	if (!worker || sockets.redirect_map(reader, XDP_ABORTED) != XDP_REDIRECT)
		return otherwise;
	if (!worker->waiting_since)
		worker->waiting_since = bpf_jiffies64();
	return (struct result){ XDP_REDIRECT, reason };
}

/* Where a frame would begin without its VLAN tags: but for its MAC addresses, it is an untagged one from there on. */
static inline void *untagged(struct xdp_md *ctx, u32 vlan_bytes)
{
	return (void *)(long)ctx->data + (vlan_bytes & VLAN_BYTES);  /* the mask tells the verifier */
}

/* How long a frame is without them. */
static inline u32 length_of(struct xdp_md *ctx, u32 vlan_bytes)
{
	u32 length = (void *)(long)ctx->data_end - untagged(ctx, vlan_bytes);

	asm volatile("" : "+r"(length));  /* lest something is added to an end first, which the verifier forbids */
	return length;
}

/* Why a frame cannot go to a next hop; FORWARDED if it can, TO_KERNEL if the kernel is to route it there. */
static inline enum reason refusal_of(const struct next_hop *hop, u32 length)
{
	if (!hop || hop->state == HOP_UNRESOLVED)
		return REASON_NO_NEXT_HOP;
	if (hop->state != HOP_FORWARD)
		return hop->state == HOP_KERNEL ? REASON_TO_KERNEL : REASON_NOT_FORWARDABLE;
	if (length > hop->mtu + sizeof(struct ethernet))
		return REASON_TOO_BIG;
	return REASON_FORWARDED;
}

/* Whether the kernel routes a flow's packets: userspace could only hand them back, one by one. */
static inline bool is_for_kernel(const struct flow *flow)
{
	u32 number = flow->next_hop;
	struct next_hop *hop = next_hops.lookup(&number);

	return hop && hop->state == HOP_KERNEL;
}

/* Whether they are left as they are here, and translated as they leave (egress.c). Userspace could only hand them back, and
 * in generic mode they would come by here again. Not those to an address of the node: the kernel would keep them. */
static inline bool is_left_to_egress(const struct flow *flow)
{
	return flow->direction == REPLY && flow->new_dst_addr == flow->dst_addr && is_for_kernel(flow);
}

/* Rewrite a packet of either family; return 0, or -1 if it cannot be. Without a next hop it is for the kernel to route. */
static inline int rewrite_any(struct xdp_md *ctx, const struct packet *packet, const struct flow *flow,
			      const struct next_hop *hop, const bool is_ipv6)
{
	void *front = (void *)(long)ctx->data, *data = untagged(ctx, packet->vlan_bytes), *end = (void *)(long)ctx->data_end;
	struct name *source, *destination;

	if (!is_ipv6)
		return rewrite(front, data, end, packet->l4, flow, hop);
	source = name_of(flow->new_src_addr);
	destination = name_of(flow->new_dst_addr);
	return source && destination ? rewrite_ipv6(front, data, end, packet->l4, flow, source, destination, hop) : -1;
}

/* Whether a packet would come from an address of the node, which its kernel takes from nobody: that of a masqueraded
 * request, or of a reply whose VIP is the node's own. */
static inline bool comes_from_here(const struct flow *flow, const bool is_ipv6, const struct control *words)
{
	if (flow->direction == REPLY)
		return !is_vip_of(flow->new_src_addr, is_ipv6 ? PROTOCOL_IPV6 : 0, words);
	return flow->new_src_addr != flow->src_addr && !reaches_itself(flow);
}

/* Rewrite for the kernel, which routes the packet, counts its TTL down and minds the MTU. It is to see client and endpoint
 * in both directions: a reply goes to it as it is, and is translated as it leaves (egress.c). An endpoint that reaches
 * itself is to see the VIP, and the reply of one that was masqueraded towards is to go on to its client. */
static inline struct result hand_over(struct xdp_md *ctx, const struct packet *packet, struct flow *flow, const bool is_ipv6,
				      u8 event, const struct machine *rules, u32 length, u32 now)
{
	struct control *words;
	u32 zero = 0;

	if (is_left_to_egress(flow))
		return pass(REASON_LEFT_TO_EGRESS);
	words = control.lookup(&zero);
	if (!words || comes_from_here(flow, is_ipv6, words))
		return drop(REASON_NOT_FORWARDABLE);
	if (rewrite_any(ctx, packet, flow, 0, is_ipv6))
		return pass(REASON_TOO_SHORT);
	advance(flow, event, rules);
	touch(flow, event, now, 1, length);
	return pass(REASON_TO_KERNEL);
}

/* Rewrite: send a packet along its flow. */
static inline struct result forward(struct xdp_md *ctx, const struct packet *packet, struct flow *flow, const bool is_ipv6,
				    u8 event, const struct machine *rules, u32 now)
{
	u32 number = flow->next_hop, length = length_of(ctx, packet->vlan_bytes);
	struct next_hop *hop = next_hops.lookup(&number);
	enum reason refusal = refusal_of(hop, length + more_vlan_bytes(packet->vlan_bytes));

	if (!hop || refusal != REASON_FORWARDED)
		return refusal == REASON_TO_KERNEL ? hand_over(ctx, packet, flow, is_ipv6, event, rules, length, now) :
						     drop(refusal);
	advance(flow, event, rules);
	if (rewrite_any(ctx, packet, flow, hop, is_ipv6))
		return pass(REASON_TOO_SHORT);
	touch(flow, event, now, 1, length);
	/* Back out of the same interface, too: on a veth, XDP_TX does not wake a peer that has GRO and no program. */
	return (struct result){ bpf_redirect(hop->ifindex, 0), REASON_FORWARDED };
}

/* Whether a frame is addressed to a group of hosts, all of them maybe. */
static inline bool is_for_many(struct xdp_md *ctx)
{
	u8 *front = (void *)(long)ctx->data;

	return (void *)(front + 1) <= (void *)(long)ctx->data_end && (*front & 1);
}

/* Whether a frame is addressed to another machine: by the MAC address of one host, and none of ours. An interface that
 * listens to all of them, and a bridge that floods, bring such. */
static inline bool is_for_another(struct xdp_md *ctx, const struct control *words)
{
	u64 *front = (void *)(long)ctx->data, station;
	u32 n;

	if ((void *)(front + 1) > (void *)(long)ctx->data_end)
		return false;
	station = *front & STATION_BITS;
#pragma unroll
	for (n = 0; n < STATIONS; n++)
		if (station == words->stations[n])
			return false;
	return words->stations[0] && !(station & 1);
}

/* ARP, while VIPs are announced: a question for one is punted, to be answered; who else claims one is heard by control,
 * through the kernel. */
static inline struct result handle_arp(struct xdp_md *ctx, const struct packet *packet, const struct control *words)
{
	struct arp *arp = parse_arp(untagged(ctx, packet->vlan_bytes), (void *)(long)ctx->data_end);

	if (!arp)
		return pass(REASON_NOT_IPV4);
	if (is_vip((u32)arp->sender[1] << 16 | arp->sender[0], words))
		return pass(REASON_VIP_CLAIMED);
	if (be16(arp->operation) == ARP_REQUEST && is_vip((u32)arp->target[1] << 16 | arp->target[0], words))
		return punt(reader_of(ctx, words), pass(REASON_STALLED_PASSED), REASON_VIP_ARP);
	return pass(REASON_NOT_IPV4);
}

/* Where a datagram in fragments is noted. */
static inline struct datagram *datagram_of(const struct packet *packet, const struct control *words)
{
	struct tuple key = { packet->tuple.addrs, packet->datagram, packet->datagram >> 32 };
	u32 place = first_place(hash_tuple(&key, words->hash_key[0], words->hash_key[1]), DATAGRAMS_ROWS);

	return datagrams.lookup(&place);
}

/* Whether the first fragment of this one's datagram was of a flow. */
static inline bool is_followed(const struct packet *packet, u32 now, const struct control *words)
{
	struct datagram *datagram = datagram_of(packet, words);

	return datagram && datagram->addrs == packet->tuple.addrs && datagram->which == packet->datagram &&
	       now - datagram->seen <= FRAGMENT_S * words->hertz;
}

/* Note a first fragment's datagram, if it is of a flow; it is a fragment like others then. */
static inline enum reason note_datagram(const struct packet *packet, const struct flow *flow, const struct machine *rules,
					u32 now, const struct control *words)
{
	struct datagram *datagram = datagram_of(packet, words);

	if (flow && datagram && !is_left_to_egress(flow) && !is_expired(flow, rules->timeout[flow->state], now, words)) {
		datagram->addrs = packet->tuple.addrs;
		datagram->which = packet->datagram;
		datagram->seen = now;
	}
	return REASON_VIP_FRAGMENT;
}

/* Whether the checksum of an IPv4 header is right: with it all words sum up to 0xffff (RFC 1071). */
static inline bool has_sound_checksum(struct xdp_md *ctx, const struct packet *packet)
{
	void *data = untagged(ctx, packet->vlan_bytes), *end = (void *)(long)ctx->data_end;
	u32 *word = data + sizeof(struct ethernet), at;
	u64 sum = 0;

#pragma nounroll
	for (at = sizeof(struct ethernet); at < sizeof(struct ethernet) + IPV4_BYTES && at < packet->l4; at += sizeof(*word)) {
		if ((void *)(word + 1) > end)
			return false;
		sum += *word++;
	}
	return fold_words(sum) == 0xffff;
}

/* Neither TCP nor UDP in one piece, of no flow: ours if it is to a VIP, where nothing is handed on that a router would
 * only send back. */
static inline struct result handle_rest(struct xdp_md *ctx, const struct packet *packet, enum reason found, u32 family,
					u32 now, const struct control *words)
{
	u32 row;

	if (found == REASON_UNSUMMED && packet->datagram)
		found = REASON_VIP_FRAGMENT; /* userspace is to drop it, so that the others do not wait for it */
	if (found == REASON_VIP_FRAGMENT && is_followed(packet, now, words))
		found = REASON_FLOW_FRAGMENT;
	else if (!is_vip_of(packet->tuple.addrs >> 32, family, words))
		return pass(found == REASON_VIP_FRAGMENT ? REASON_OTHER_FRAGMENT :
			    found == REASON_VIP_ECHO || found == REASON_ICMP_ERROR ? REASON_OTHER_ICMP :
			    found == REASON_UNSUMMED ? REASON_NOT_OURS : found);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (found == REASON_UNSUMMED)
		return drop(found);
	if (found == REASON_TOO_SHORT ||
	    (!family && found != REASON_FLOW_FRAGMENT && !has_sound_checksum(ctx, packet)))
		return drop(REASON_MALFORMED);
	if (found == REASON_ICMP_ERROR && !find_frontend(packet->tuple.addrs >> 32, packet->tuple.ports >> 16,
							 packet->tuple.protocol, words, &row))
		found = REASON_OTHER_ICMP;
	if (found == REASON_OTHER_ICMP || (found == REASON_VIP_ECHO && words->ping == PING_DROP))
		return drop(REASON_NOT_SERVED);
	if (found == REASON_NOT_TCP_UDP || found == REASON_ICMP_ERROR)
		return punt(reader_of(ctx, words), drop(REASON_NOT_SERVED),
			    found == REASON_ICMP_ERROR ? REASON_ICMP_ERROR : REASON_VIP_STRAY);
	return punt(reader_of(ctx, words), drop(REASON_STALLED_DROPPED), found);
}

/* Whether a packet is of a flow by what it quotes, or by its identifier: if there is one, it is userspace's. */
static inline bool is_icmp_of_flow(enum reason found)
{
	return found == REASON_ICMP_ERROR || found == REASON_ECHO_REPLY;
}

/* What that is if it is of no flow. Userspace may know whose the packet was that an error quotes, if it is to who has sent
 * that: to one of our frontends, which handle_rest() looks for. */
static inline enum reason of_no_flow(enum reason found, u32 sender, u32 destination)
{
	return found == REASON_ICMP_ERROR && sender == destination ? REASON_ICMP_ERROR : REASON_OTHER_ICMP;
}

static inline struct result handle_icmp(struct xdp_md *ctx, const struct packet *packet, enum reason found,
					const struct flow *flow, const struct control *words)
{
	if (is_left_to_egress(flow))
		return pass(REASON_LEFT_TO_EGRESS);
	if (found == REASON_ECHO_REPLY && packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	return punt(reader_of(ctx, words),
		    found == REASON_ICMP_ERROR ? pass(REASON_STALLED_PASSED) : drop(REASON_STALLED_DROPPED), found);
}

/* Whether more headers follow than IPv4's or IPv6's own: options, or extension headers. */
static inline bool has_more_headers(const struct packet *packet, const bool is_ipv6)
{
	return is_ipv6 ? has_extensions(packet) : has_options(packet);
}

/* TCP or UDP in one piece: along its flow, if that is not over. */
static inline struct result follow(struct xdp_md *ctx, const struct packet *packet, struct flow *flow, const bool is_ipv6,
				   struct question *question, const struct machine *rules, const struct control *words)
{
	struct result result;
	bool is_over;

	question->old = flow;
	question->why = REASON_NEW_FLOW;
	question->event = EVENT_DATA;
	if (packet->tuple.protocol == (is_ipv6 ? PROTOCOL_IPV6 | PROTOCOL_TCP : PROTOCOL_TCP))
		question->event = rules->event_of_flags[packet->tcp_flags & TCP_FLAGS];
	if (!flow)
		return (struct result){ UNDECIDED, 0 };
	is_over = is_expired(flow, rules->timeout[flow->state], question->now, words);
	if (!is_over && question->event == EVENT_SYN && flow->direction == ORIGINAL && rules->reopens[flow->state & STATE_BITS]) {
		is_over = true;
		question->why = REASON_REOPENED;
	}
	if (!is_over) {
		if (packet->ttl <= 1)
			return pass(REASON_TTL_EXPIRED);
		/* If nobody reads, what is known goes on here until somebody does. Options are walked there: it would take the
		 * verifier more than all the rest. */
		if ((!OFFLOAD && !is_for_kernel(flow)) || (has_more_headers(packet, is_ipv6) && !is_left_to_egress(flow))) {
			result = punt(reader_of(ctx, words), drop(0), OFFLOAD ? REASON_OPTIONS : REASON_NOT_OFFLOADED);
			if (result.action == XDP_REDIRECT)
				return result;
		}
		result = forward(ctx, packet, flow, is_ipv6, question->event, rules, question->now);
		if (result.reason == REASON_TOO_BIG)
			return punt(reader_of(ctx, words), result, REASON_OVERSIZED);
		return result;
	}
	/* Over for every packet, so that those of others need not be asked; but for the SYN that begins another. */
	if ((flow->state & STATE_BITS) == STATE_RESET && (question->event != EVENT_SYN || flow->direction != ORIGINAL))
		return punt(reader_of(ctx, words), drop(REASON_ENDPOINT_REMOVED), REASON_TO_BE_RESET);
	return (struct result){ UNDECIDED, 0 };
}

/* What parsing has found where: that is not to be remembered for each way that it was found (find.c). */
static inline void forget_layout(struct packet *packet, u32 unknown)
{
	packet->l4 = forgotten(packet->l4, unknown) & 0xff;
	packet->tcp_flags = forgotten(packet->tcp_flags, unknown);
}

#include "intern.c"
#include "admit.c"
#include "ipv6.c"

static inline struct result handle_ipv4(struct xdp_md *ctx, struct packet *packet, enum reason found,
					struct question *question, const struct machine *rules, const struct control *words)
{
	struct ipv4 *ip = untagged(ctx, packet->vlan_bytes) + sizeof(struct ethernet);
	struct flow *flow;
	u32 now;

	if (found == REASON_NOT_IPV4 && words->answers_arp)
		return handle_arp(ctx, packet, words);
	if (found == REASON_NOT_IPV4 || (found == REASON_TOO_SHORT && !packet->tuple.addrs))
		return pass(found);
	if ((void *)(ip + 1) > (void *)(long)ctx->data_end)
		return pass(REASON_TOO_SHORT);
	if (is_for_many(ctx))
		return pass(REASON_FOR_MANY);

	question->now = now = bpf_jiffies64();
	forget_layout(packet, now);
	found = forgotten(found, now);
	packet->tuple.protocol = forgotten(packet->tuple.protocol, now) & 0xff;
	flow = found == REASON_FORWARDED || found == REASON_FLOW_FRAGMENT || is_icmp_of_flow(found) ?
	       find_flow(&packet->tuple, words) : 0;
	if (is_icmp_of_flow(found)) {
		if (flow && !is_expired(flow, rules->timeout[flow->state], now, words))
			return handle_icmp(ctx, packet, found, flow, words);
		found = of_no_flow(found, packet->tuple.addrs >> 32, ip->dst_addr);
		packet->tuple.addrs = (u64)ip->dst_addr << 32 | ip->src_addr; /* not those of the quote */
	}
	if (found == REASON_FLOW_FRAGMENT)
		found = note_datagram(packet, flow, rules, now, words);
	if (found != REASON_FORWARDED)
		return handle_rest(ctx, packet, found, 0, now, words);
	return follow(ctx, packet, flow, false, question, rules, words);
}

/* Whether a packet comes from an address that no host has: "this" network, loopback, multicast or broadcast. The kernel
 * would not route it either, but for most of "this" network. */
static inline bool is_martian(const struct packet *packet, const struct question *question, const bool is_ipv6)
{
	u32 source = packet->tuple.addrs;
	u8 network = source;

	if (is_ipv6)
		return is_martian_ipv6(question->source);
	return network == 0 || network == 127 || (network & 0xf0) == 0xe0 || source == 0xffffffff;
}

/* Whether a TCP or UDP header says of itself, or of its datagram, what can be (RFC 9293 section 3.1, RFC 768). */
static inline bool has_sound_lengths(struct xdp_md *ctx, const struct packet *packet, const bool is_ipv6)
{
	void *data = untagged(ctx, packet->vlan_bytes), *end = (void *)(long)ctx->data_end;
	struct ipv4 *ip = data + sizeof(struct ethernet);
	struct ipv6 *ip6 = (void *)ip;
	struct tcp *tcp = data + (packet->l4 & 0xff);  /* the mask tells the verifier */
	struct udp *udp = (void *)tcp;
	u32 length, room;

	if ((void *)(ip6 + 1) > end && (is_ipv6 || (void *)(ip + 1) > end))
		return false;
	if ((void *)(udp + 1) > end)
		return false;
	room = is_ipv6 ? sizeof(*ip6) + be16(ip6->payload_length) : be16(ip->total_length);
	room += sizeof(struct ethernet) - packet->l4;
	if ((packet->tuple.protocol & ~PROTOCOL_IPV6) == PROTOCOL_UDP) {
		length = be16(udp->length);
		return length >= sizeof(*udp) && length <= room;
	}
	if ((void *)(tcp + 1) > end)
		return false;
	length = (tcp->offset >> 4) * 4;
	return length >= sizeof(*tcp) && length <= room;
}

/* Hand a packet to the program that admits connections; what was known of its five-tuple is over. Coming back means that
 * there is none: userspace may know better. */
static inline struct result hand_on(struct xdp_md *ctx, const struct packet *packet, const struct question *question,
				    u32 service, u32 reader)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct passage *passage = passages.lookup(&cpu);

	if (question->old)
		retire(question->old, question->now);
	if (passage) {
		passage->addrs = packet->tuple.addrs;
		passage->ports = packet->tuple.ports;
		passage->protocol = packet->tuple.protocol;
		passage->slot = NO_SLOT;
		passage->l4 = packet->l4;
		passage->event = question->event;
		passage->service = service;
		passage->reader = reader;
		passage->why = question->why;
		passage->now = question->now;
		passage->vlan_bytes = packet->vlan_bytes;
		stages.call(ctx, STAGE_ADMIT);
	}
	return punt(reader, drop(REASON_STALLED_DROPPED), question->why);
}

/* Who decides on a new connection: XDP itself if the Service says so, else userspace; and while that is away, XDP again,
 * unless the Service would rather have such packets dropped or passed. */
static inline struct result decide(struct xdp_md *ctx, const struct packet *packet, const struct question *question,
				   const bool is_ipv6, const struct machine *rules, const struct control *words)
{
	u32 destination = packet->tuple.addrs >> 32, row, reader;
	bool is_frontend = find_frontend(destination, packet->tuple.ports >> 16, packet->tuple.protocol, words, &row);
	struct service *service;
	struct result result;

	if (!is_frontend && !is_vip_of(destination, is_ipv6 ? PROTOCOL_IPV6 : 0, words))
		return pass(REASON_NOT_OURS);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (is_martian(packet, question, is_ipv6))
		return drop(REASON_MARTIAN_SOURCE);
	if (!has_sound_lengths(ctx, packet, is_ipv6) || (!is_ipv6 && !has_sound_checksum(ctx, packet)))
		return drop(REASON_MALFORMED);
	reader = reader_of(ctx, words);
	if (!is_frontend)
		return punt(reader, drop(REASON_NOT_SERVED), REASON_VIP_STRAY);
	service = services.lookup(&row);
	/* Now or never: what is given back from userspace, as it was, would come by here again in generic mode. */
	if (service && service->mid_stream == MID_STREAM_PASS && rules->first_state[question->event & 7] == STATE_ADOPTED)
		return pass(REASON_MID_STREAM_PASSED);
	if (!service || service->needs || !service->admits_here || has_more_headers(packet, is_ipv6) || !OFFLOAD) {
		result = punt(reader, drop(REASON_STALLED_DROPPED), question->why);
		if (result.action == XDP_REDIRECT || !service || service->when_stalled == WHEN_STALLED_DROP)
			return result;
		if (service->when_stalled == WHEN_STALLED_PASS)
			return pass(REASON_STALLED_PASSED);
		if (service->needs)
			return result;
	}
	return hand_on(ctx, packet, question, row, reader);
}

static inline struct result handle(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct question question = {};
	struct packet packet = {};
	struct control *words;
	struct machine *rules;
	struct result result;
	enum reason found;
	bool is_six;
	u32 zero = 0;

	words = control.lookup(&zero);
	rules = machine.lookup(&zero);
	if (!words || !rules)
		return pass(REASON_NOT_OURS);
	if (is_for_another(ctx, words))
		return pass(REASON_OTHER_STATION);

	/* None. But the verifier is not to know it: tagged or not is all the same to it then, and it goes on once. */
	packet.vlan_bytes = words->hertz >> 28 & VLAN_BYTES;
	found = parse(data, end, &packet);
	is_six = found == REASON_NOT_IPV4 && is_ipv6(data, end);
	if (found == REASON_NOT_IPV4 && !is_six) {
		found = parse_vlan_tags(data, end, words->vlans, &packet.vlan_bytes);
		if (found == REASON_FORWARDED) {
			packet.vlan_bytes = forgotten(packet.vlan_bytes, words->hertz) & VLAN_BYTES;
			data = untagged(ctx, packet.vlan_bytes);
			found = parse(data, end, &packet);
			is_six = found == REASON_NOT_IPV4 && is_ipv6(data, end);
		} else if (found != REASON_NOT_IPV4) {
			return pass(found);
		}
	}
	result = is_six ? handle_ipv6(ctx, &packet, &question, rules, words) :
			  handle_ipv4(ctx, &packet, found, &question, rules, words);
	if (result.action != UNDECIDED)
		return result;
	forget_layout(&packet, question.now);
	packet.tuple.protocol = forgotten(packet.tuple.protocol, question.now) & 0xff;
	question.event = forgotten(question.event, question.now);
	question.why = forgotten(question.why, question.now);
	return is_six ? decide(ctx, &packet, &question, true, rules, words) :
			decide(ctx, &packet, &question, false, rules, words);
}

/* Count a verdict, and give it. */
static inline int settle(struct result result)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct counters *row = xdp_counters.lookup(&cpu);

	if (row)
		row->packets[result.reason & (MAX_REASONS - 1)] += 1;
	return result.action;
}

/* Every packet. */
int xdp_lb(struct xdp_md *ctx)
{
	return settle(handle(ctx));
}

/* STAGE_ADMIT: one that may begin a connection, from decide(). What cannot be decided here, userspace may know better. */
int xdp_admit(struct xdp_md *ctx)
{
	u32 cpu = bpf_get_smp_processor_id(), zero = 0, row;
	struct passage *passage = passages.lookup(&cpu);
	struct control *words = control.lookup(&zero);
	struct machine *rules = machine.lookup(&zero);
	struct service *service;
	enum reason reason;

	if (!passage || !words || !rules)
		return settle(drop(REASON_VANISHED));
	row = passage->service;
	service = services.lookup(&row);
	if (!service)
		return settle(drop(REASON_VANISHED));
	reason = admit(ctx, passage, service, rules, words);
	if (reason != REASON_ADMITTED)
		return settle(punt(passage->reader, drop(reason), passage->why));
	stages.call(ctx, STAGE_SEND);
	return settle(drop(REASON_VANISHED)); /* nobody is there to send it; its connection is, and the next packet goes on */
}

/* STAGE_SEND: the first packet of a connection that has just been admitted. */
int xdp_send(struct xdp_md *ctx)
{
	u32 cpu = bpf_get_smp_processor_id(), zero = 0, slot;
	struct passage *passage = passages.lookup(&cpu);
	struct machine *rules = machine.lookup(&zero);
	struct packet packet = {};
	struct result result;
	struct flow *flow;

	if (!passage || !rules)
		return settle(drop(REASON_VANISHED));
	slot = passage->slot;
	flow = flows.lookup(&slot);
	if (!flow)
		return settle(drop(REASON_VANISHED));
	packet.l4 = passage->l4;
	packet.vlan_bytes = passage->vlan_bytes;
	result = passage->protocol & PROTOCOL_IPV6 ?
			 forward(ctx, &packet, flow, true, passage->event, rules, passage->now) :
			 forward(ctx, &packet, flow, false, passage->event, rules, passage->now);
	if (result.reason == REASON_FORWARDED || result.reason == REASON_TO_KERNEL)
		result.reason = REASON_ADMITTED;
	return settle(result);
}
