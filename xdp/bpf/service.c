/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* service.c - the Service that an address leads to: the same question for packets and for sockets, over the same maps. Part
 * of lb.c and connect.c. */

TABLE(struct frontend, frontends, FRONTENDS_ROWS);
TABLE(struct service, services, SERVICES_ROWS);
TABLE(struct maglev_line, maglev, MAGLEV_ROWS);
TABLE(struct endpoint, endpoints, ENDPOINTS_ROWS);

/* Service: whether (address, port, protocol) is a frontend, and its row of services. A place is used again as soon as it is
 * free: what it says is believed if it is the same frontend's after that. */
static inline bool find_frontend(u32 addr, u16 port, u32 protocol, const struct control *words, u32 *service)
{
	struct tuple key = { addr, port, protocol };
	u64 hash = hash_tuple(&key, words->hash_key[0], words->hash_key[1]);
	u64 wanted = (u64)1 << 56 | (u64)protocol << 48 | (u64)port << 32 | addr;
	u32 place = first_place(hash, FRONTENDS_ROWS / FRONTEND_WAYS) * FRONTEND_WAYS, way;
	struct frontend *frontend;

#pragma nounroll
	for (way = 0; way < 2 * FRONTEND_WAYS; way++, place++) {
		if (way == FRONTEND_WAYS)
			place = second_place(hash, FRONTENDS_ROWS / FRONTEND_WAYS) * FRONTEND_WAYS;
		frontend = frontends.lookup(&place);
		if (!frontend || *(volatile u64 *)frontend != wanted)
			continue;
		*service = *(volatile u32 *)&frontend->service;
		if (*(volatile u64 *)frontend == wanted)
			return true;
	}
	return false;
}

/* Whether an address of a family (0 or PROTOCOL_IPV6) is a VIP: has a frontend, and is none of the node's own. Looked at
 * where no flow was found. */
static inline bool is_vip_of(u32 addr, u32 family, const struct control *words)
{
	u32 service;

	return find_frontend(addr, 0, family, words, &service);
}
