/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* names.c - the name of an IPv6 address, and the address of a name. Part of lb.c and egress.c; twin: xdp/naming.py. */

TABLE(struct name, names, NAMES_ROWS);

static inline u64 hash_address(u64 first, u64 second, u64 key0, u64 key1)
{
	struct tuple key = { first, second, second >> 32 };

	return hash_tuple(&key, key0, key1);
}

/* The row of an address whose name is alive, dying or in state `also`, and is not `besides`; 0: none. */
static inline u32 find_row(u64 first, u64 second, u32 also, u32 besides, const struct control *words)
{
	u64 hash = hash_address(first, second, words->hash_key[0], words->hash_key[1]);
	u32 place = first_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS, way, state;
	struct name *name;

#pragma nounroll
	for (way = 0; way < 2 * NAME_WAYS; way++, place++) {
		if (way == NAME_WAYS)
			place = second_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS;
		name = names.lookup(&place);
		if (!name)
			continue;
		state = *(volatile u32 *)&name->state;
		asm volatile("" ::: "memory");
		if ((state == NAME_ALIVE || state == NAME_DYING || state == also) && name->addr[0] == first &&
		    name->addr[1] == second && place != besides)
			return forgotten(place, hash);
	}
	return 0;
}

/* The number of an address in network byte order, as it stands in tables; 0 without a name. Names that die may be found:
 * flows may use them. */
static inline u32 find_name(u64 first, u64 second, const struct control *words)
{
	return __builtin_bswap32(find_row(first, second, NAME_ALIVE, 0, words));
}

static inline struct name *name_of(__be32 number)
{
	u32 row = __builtin_bswap32(number);

	return names.lookup(&row);
}
