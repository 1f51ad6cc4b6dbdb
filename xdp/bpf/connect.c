/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* connect.c - sockets of this node that ask for a Service: service - choose - note. They are led to an endpoint as they
 * connect or send, so that their packets need no translation, and are told that they talk to the VIP.
 *
 * Each function is named after the hook of a cgroup that it is for (xdp/kernel.py). In a hook a return of 1 lets the call
 * go on, and 0 ends it. What comes past here, and what is passed here, are packets like others. */
#include "schema.h"
#include "hash.h"
#include "tables.c"
#include "names.c"
#include "service.c"

TABLE(struct counters, connect_counters, CONNECT_COUNTERS_ROWS);
BPF_TABLE_PINNED("lru_hash", struct led, struct vip, led_sockets, LED_SOCKETS, TABLES_FOLDER "/led_sockets", 0);

enum {
	END = 0,               /* what hooks return */
	GO_ON = 1,
	HOST_UNREACHABLE = -113, /* -EHOSTUNREACH, -ECONNREFUSED: include/uapi/asm-generic/errno.h */
	REFUSED = -111,
};

enum { MAPPED = 0xffff0000 };  /* the third word of an IPv4 address in an IPv6 one, as it lies in memory */

/* Where a socket is to go, or comes from. */
struct place {
	u64 addr[2];           /* as in struct led */
	u32 port;              /* as on the wire */
	u32 family;            /* 0 or PROTOCOL_IPV6: an IPv4 address is one, however it was written */
};

static inline struct place place_of_ipv4(u32 addr, u32 port)
{
	return (struct place){ { 0, (u64)addr << 32 | MAPPED }, port, 0 };
}

static inline struct place place_of_ipv6(const u64 addr[2], u32 port)
{
	bool is_mapped = !addr[0] && (u32)addr[1] == MAPPED;

	return (struct place){ { addr[0], addr[1] }, port, is_mapped ? 0 : PROTOCOL_IPV6 };
}

/* What a socket was given by its program, or by who has sent. The kernel has fields of its own for each family. */
static inline struct place read_place(struct bpf_sock_addr *ctx, const bool is_ipv6)
{
	u64 addr[2];

	if (!is_ipv6)
		return place_of_ipv4(ctx->user_ip4, ctx->user_port & 0xffff);
	addr[0] = ctx->user_ip6[0] | (u64)ctx->user_ip6[1] << 32;
	addr[1] = ctx->user_ip6[2] | (u64)ctx->user_ip6[3] << 32;
	return place_of_ipv6(addr, ctx->user_port & 0xffff);
}

static inline void write_place(struct bpf_sock_addr *ctx, const u64 addr[2], u32 port, const bool is_ipv6)
{
	if (is_ipv6) {
		ctx->user_ip6[0] = addr[0];
		ctx->user_ip6[1] = addr[0] >> 32;
		ctx->user_ip6[2] = addr[1];
		ctx->user_ip6[3] = addr[1] >> 32;
	} else {
		ctx->user_ip4 = addr[1] >> 32;
	}
	ctx->user_port = port;
}

/* The row that admits what goes to a place. LED if there is one, else why not. Clients on this node are inside the cluster. */
static inline enum reason find_service(const struct place *place, u32 protocol, const struct control *words, u32 *row)
{
	u32 addr = place->family ? find_name(place->addr[0], place->addr[1], words) : place->addr[1] >> 32;
	struct service *service;

	if (!find_frontend(addr, place->port, protocol | place->family, words, row))
		return is_vip_of(addr, place->family, words) ? REASON_NOT_SERVED : REASON_NOT_OURS;
	service = services.lookup(row);
	if (!service)
		return REASON_NOT_OURS;
	if (service->needs & NEEDS_RANGES)
		return REASON_LEFT_TO_PACKETS; /* which source address it will have, nobody knows yet */
	if (service->inside)
		*row = service->inside;
	return REASON_LED;
}

/* The endpoint for a socket, always the same one while the Service is; with affinity, one for all of a network namespace. */
static inline struct endpoint *choose(struct bpf_sock_addr *ctx, const struct service *service, const struct control *words)
{
	bool is_affine = service->needs & NEEDS_AFFINITY;
	struct tuple key = {
		is_affine ? bpf_get_netns_cookie(ctx) : bpf_get_socket_cookie(ctx), is_affine ? service->identity : 0, is_affine
	};
	u64 hash = hash_tuple(&key, words->maglev_seed, ~words->maglev_seed);
	u32 slot = service->first_slot + ((hash >> 32) * service->slots >> 32), line = slot / 16, row;
	struct maglev_line *slots = maglev.lookup(&line);

	if (!slots)
		return 0;
	row = slots->endpoint[slot & 15];
	return endpoints.lookup(&row);
}

static inline struct place place_of_endpoint(const struct endpoint *endpoint, u32 family)
{
	struct name *name;

	if (!family)
		return place_of_ipv4(endpoint->addr, endpoint->port);
	name = name_of(endpoint->addr);
	return name ? place_of_ipv6(name->addr, endpoint->port) : (struct place){};
}

static inline struct led key_of(struct bpf_sock_addr *ctx, const struct place *place)
{
	return (struct led){ bpf_get_socket_cookie(ctx), { place->addr[0], place->addr[1] }, place->port, ctx->protocol, {} };
}

/* Note what a socket asked for, unless it is noted. */
static inline void note(struct bpf_sock_addr *ctx, const struct place *endpoint, const struct place *asked)
{
	struct vip vip = { { asked->addr[0], asked->addr[1] }, asked->port, {} }, *known;
	struct led key = key_of(ctx, endpoint);

	known = led_sockets.lookup(&key);
	if (!known || known->addr[0] != vip.addr[0] || known->addr[1] != vip.addr[1] || known->port != vip.port)
		led_sockets.update(&key, &vip);
}

/* Lead a socket from a place to an endpoint: LED, and `place` is that; or why it is not. */
static inline enum reason lead(struct bpf_sock_addr *ctx, struct place *place, const struct control *words)
{
	struct endpoint *endpoint;
	struct service *service;
	struct place chosen;
	enum reason reason;
	u32 row = 0;

	if (ctx->protocol != PROTOCOL_TCP && ctx->protocol != PROTOCOL_UDP)
		return REASON_NOT_TCP_UDP;
	reason = find_service(place, ctx->protocol, words, &row);
	service = services.lookup(&row);
	if (reason != REASON_LED || !service)
		return reason;
	if (!service->slots)
		return service->is_elsewhere ? REASON_NO_LOCAL_ENDPOINT : REASON_NO_ENDPOINT;
	endpoint = choose(ctx, service, words);
	if (!endpoint)
		return REASON_NO_ENDPOINT;
	chosen = place_of_endpoint(endpoint, place->family);
	if (!chosen.port)
		return REASON_NO_ENDPOINT;
	note(ctx, &chosen, place);
	*place = chosen;
	return REASON_LED;
}

/* Count a reason. Unlike packets, callers interrupt one another on their CPU. */
static inline void count(enum reason reason)
{
	u32 cpu = bpf_get_smp_processor_id();
	struct counters *row = connect_counters.lookup(&cpu);

	if (row)
		__sync_fetch_and_add(&row->packets[reason & (MAX_REASONS - 1)], 1);
}

/* A program connects a socket, or sends by one that is not connected. */
static inline int go(struct bpf_sock_addr *ctx, const bool is_ipv6)
{
	struct place place = read_place(ctx, is_ipv6);
	enum reason reason = REASON_NOT_OURS;
	struct control *words;
	u32 zero = 0;

	words = control.lookup(&zero);
	if (words)
		reason = lead(ctx, &place, words);
	count(reason);
	if (reason / 32 == VERDICT_DROP) {
		bpf_set_retval(reason == REASON_NO_LOCAL_ENDPOINT ? HOST_UNREACHABLE : REFUSED);
		return END;
	}
	if (reason == REASON_LED)
		write_place(ctx, place.addr, place.port, is_ipv6);
	return GO_ON;
}

/* A program asks who the other end is, or who has sent what it received: the VIP, if it asked for that. */
static inline int tell(struct bpf_sock_addr *ctx, const bool is_ipv6)
{
	struct place place = read_place(ctx, is_ipv6);
	struct led key = key_of(ctx, &place);
	struct vip *vip = led_sockets.lookup(&key);

	if (vip)
		write_place(ctx, vip->addr, vip->port, is_ipv6);
	return GO_ON;
}

int connect4(struct bpf_sock_addr *ctx)
{
	return go(ctx, false);
}

int connect6(struct bpf_sock_addr *ctx)
{
	return go(ctx, true);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return go(ctx, false);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return go(ctx, true);
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	return tell(ctx, false);
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	return tell(ctx, true);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	return tell(ctx, false);
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	return tell(ctx, true);
}
