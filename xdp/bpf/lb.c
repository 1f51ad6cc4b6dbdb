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

#define TABLE(leaf, name, rows) BPF_TABLE_PINNED("array", u32, leaf, name, rows, TABLES_FOLDER "/" #name, BPF_F_MMAPABLE)

TABLE(struct bucket, tags, TAGS_ROWS);
TABLE(struct flow, flows, FLOWS_ROWS);
TABLE(struct frontend, frontends, FRONTENDS_ROWS);
TABLE(struct service, services, SERVICES_ROWS);
TABLE(struct next_hop, next_hops, NEXT_HOPS_ROWS);
TABLE(struct control, control, CONTROL_ROWS);
TABLE(struct worker, workers, WORKERS_ROWS);
TABLE(struct machine, machine, MACHINE_ROWS);
TABLE(struct counters, xdp_counters, XDP_COUNTERS_ROWS);

struct queue {
	u32 ifindex;
	u32 index;
};
BPF_TABLE_PINNED("hash", struct queue, u32, queues, MAX_WORKERS, TABLES_FOLDER "/queues", 0);
BPF_XSKMAP(sockets, MAX_WORKERS, TABLES_FOLDER "/sockets");

_Static_assert(sizeof(struct flow) == 64, "a flow is one cache line");
_Static_assert(sizeof(struct bucket) == 32, "a bucket's tags are half a cache line");

/* A verdict on the way out: what xdp_lb() returns, and why. */
struct result {
	int action;
	enum reason reason;
};

static inline struct result pass(enum reason reason)
{
	return (struct result){ XDP_PASS, reason };
}

static inline struct result drop(enum reason reason)
{
	return (struct result){ XDP_DROP, reason };
}

/* Flow: the record of a five-tuple in one bucket, or none. */
static inline struct flow *find_in_bucket(u32 number, u64 tag, const struct tuple *tuple)
{
	struct bucket *bucket = tags.lookup(&number);
	u64 hits;
	int n;

	if (!bucket)
		return 0;
	hits = hits_of(bucket, tag);
	for (n = 0; n < BUCKET_TAGS && hits; n++) {
		u32 slot = number * BUCKET_TAGS + lowest_hit(hits);
		struct flow *flow = flows.lookup(&slot);

		if (flow && *(u64 *)&flow->src_addr == tuple->addrs && *(u32 *)&flow->src_port == tuple->ports &&
		    flow->protocol == tuple->protocol)
			return flow;
		hits &= hits - 1;
	}
	return 0;
}

static inline struct flow *find_flow(const struct tuple *tuple, const struct control *words)
{
	u64 hash = hash_tuple(tuple, words->hash_key[0], words->hash_key[1]);
	struct flow *flow = find_in_bucket(first_bucket(hash, TAGS_ROWS), tag_of(hash), tuple);

	return flow ? flow : find_in_bucket(second_bucket(hash, TAGS_ROWS), tag_of(hash), tuple);
}

/* A connection is past its deadline when neither direction was seen for the timeout of its state. Rarely more than the
 * first comparison. */
static inline bool is_expired(const struct flow *flow, u32 timeout, u32 now, const struct control *words)
{
	u32 number = flow->peer;
	struct flow *peer;

	if ((s32)(now - flow->last_seen) <= (s32)timeout || (s32)(now - words->aged_from) <= (s32)timeout)
		return false;
	peer = flows.lookup(&number);
	return !peer || (s32)(now - peer->last_seen) > (s32)timeout;
}

/* Service: the frontend of (address, port, protocol), or none. Port and protocol 0 ask whether it is a VIP. */
static inline struct frontend *find_frontend(u32 addr, u16 port, u32 protocol, const struct control *words)
{
	struct tuple key = { addr, port, protocol };
	u64 hash = hash_tuple(&key, words->hash_key[0], words->hash_key[1]);
	u64 wanted = (u64)1 << 56 | (u64)protocol << 48 | (u64)port << 32 | addr;
	u32 first = first_bucket(hash, FRONTENDS_ROWS / FRONTEND_WAYS) * FRONTEND_WAYS;
	u32 second = second_bucket(hash, FRONTENDS_ROWS / FRONTEND_WAYS) * FRONTEND_WAYS;
	struct frontend *frontend;
	u32 place;
	int way;

#pragma unroll
	for (way = 0; way < 2 * FRONTEND_WAYS; way++) {
		place = (way < FRONTEND_WAYS ? first : second) + way % FRONTEND_WAYS;
		frontend = frontends.lookup(&place);
		if (frontend && *(u64 *)frontend == wanted)
			return frontend;
	}
	return 0;
}

/* Punt: to the worker of this queue, if it lives. A reader that was stopped would swallow every frame. */
static inline struct result punt(struct xdp_md *ctx, enum reason reason, u8 when_stalled, const struct control *words)
{
	struct queue queue = { ctx->ingress_ifindex, ctx->rx_queue_index };
	u32 *number = queues.lookup(&queue);
	struct worker *worker;
	int action;

	if (number) {
		u32 index = *number;

		worker = workers.lookup(&index);
		/* Either side of now: the worker reads the same clock a little differently. */
		if (worker && worker->heartbeat &&
		    (u32)bpf_jiffies64() - (u32)worker->heartbeat + words->stall_jiffies <= 2 * words->stall_jiffies) {
			action = sockets.redirect_map(index, XDP_ABORTED);
			if (action == XDP_REDIRECT)
				return (struct result){ action, reason };
		}
	}
	/* The place of admission inside XDP; until then a new flow waits for userspace, or goes to the kernel. */
	return when_stalled == WHEN_STALLED_PASS ? pass(REASON_STALLED_PASSED) : drop(REASON_STALLED_DROPPED);
}

/* Rewrite: send a packet along its flow. */
static inline struct result forward(struct xdp_md *ctx, const struct packet *packet, struct flow *flow,
				    const struct machine *rules, u32 now, const struct control *words)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	u32 number = flow->next_hop;
	struct next_hop *hop = next_hops.lookup(&number);
	u8 state = flow->state, event = EVENT_DATA, next;
	u32 length = end - data;

	if (packet->tuple.protocol == PROTOCOL_TCP)
		event = rules->event_of_flags[packet->tcp_flags & TCP_FLAGS];
	if (event == EVENT_SYN && flow->direction == ORIGINAL && rules->reopens[state & 15])
		return punt(ctx, REASON_REOPENED, WHEN_STALLED_DROP, words);
	if (packet->ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	if (!OFFLOAD) {
		struct result punted = punt(ctx, REASON_NOT_OFFLOADED, WHEN_STALLED_DROP, words);

		if (punted.action == XDP_REDIRECT)
			return punted;
		/* Nobody reads: what is known goes on here until somebody does. */
	}
	if (!hop || hop->state == HOP_UNRESOLVED)
		return drop(REASON_NO_NEXT_HOP);
	if (hop->state != HOP_FORWARD)
		return drop(REASON_NOT_FORWARDABLE);
	if (length > hop->mtu + sizeof(struct ethernet))
		return drop(REASON_TOO_BIG);

	next = rules->next_state[(state & 15) << 4 | (flow->direction & 1) << 3 | (event & 7)];
	if (next != state) {
		u32 peer_slot = flow->peer;
		struct flow *peer = flows.lookup(&peer_slot);

		flow->state = next;
		if (peer)
			peer->state = next;
	}
	if (rewrite(data, end, packet->l4, flow, hop))
		return pass(REASON_TOO_SHORT);
	if (flow->last_seen != now)  /* a line that nobody dirties stays shared */
		flow->last_seen = now;
	flow->packets += 1;
	flow->bytes += length;
	/* Back out of the same interface, too: on a veth, XDP_TX does not wake a peer that has GRO and no program. */
	return (struct result){ bpf_redirect(hop->ifindex, 0), REASON_FORWARDED };
}

static inline struct result handle(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct packet packet = {};
	struct control *words;
	struct machine *rules;
	struct frontend *frontend;
	struct service *service;
	struct flow *flow;
	enum reason found;
	u32 zero = 0, now, row;

	words = control.lookup(&zero);
	rules = machine.lookup(&zero);
	if (!words || !rules)
		return pass(REASON_NOT_OURS);

	found = parse(data, end, &packet);
	if (found == REASON_VIP_FRAGMENT)
		return find_frontend(packet.tuple.addrs >> 32, 0, 0, words) ?
			punt(ctx, found, WHEN_STALLED_DROP, words) : pass(REASON_OTHER_FRAGMENT);
	if (found != REASON_FORWARDED && found != REASON_ICMP_ERROR)
		return pass(found);

	now = bpf_jiffies64();
	flow = find_flow(&packet.tuple, words);
	if (flow && is_expired(flow, rules->timeout[flow->state & 15], now, words))
		flow = 0;
	if (found == REASON_ICMP_ERROR)
		return flow ? punt(ctx, found, WHEN_STALLED_PASS, words) : pass(REASON_OTHER_ICMP);
	if (flow)
		return forward(ctx, &packet, flow, rules, now, words);

	frontend = find_frontend(packet.tuple.addrs >> 32, packet.tuple.ports >> 16, packet.tuple.protocol, words);
	if (!frontend)
		return pass(REASON_NOT_OURS);
	if (packet.ttl <= 1)
		return pass(REASON_TTL_EXPIRED);
	row = frontend->service;
	service = services.lookup(&row);
	return punt(ctx, REASON_NEW_FLOW, service ? service->when_stalled : WHEN_STALLED_DROP, words);
}

int xdp_lb(struct xdp_md *ctx)
{
	struct result result = handle(ctx);
	u32 cpu = bpf_get_smp_processor_id();
	struct counters *row = xdp_counters.lookup(&cpu);

	if (row)
		row->packets[result.reason & (MAX_REASONS - 1)] += 1;
	return result.action;
}
