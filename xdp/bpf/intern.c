/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* intern.c - give an IPv6 address a name: one more writer beside those of xdp/naming.py, by the same steps. Part of lb.c.
 *
 * A name's sum and its state change as one word: BPF swaps 64 bits here. */

enum { INTERN_TRIES = 4 };     /* of writers that name one address at a time */

/* Change a name's state, and its sum; false if the word was not as `seen`. */
static inline bool swap_state(struct name *name, u64 seen, u32 sum, u32 state)
{
	return __sync_bool_compare_and_swap((u64 *)&name->sum, seen, (u64)state << 32 | sum);
}

/* A free row of a bucket, 0 without one; and how many there are. */
static inline u32 free_in(u32 row, u32 *count)
{
	u32 way, found = 0;
	struct name *name;

	*count = 0;
#pragma nounroll
	for (way = 0; way < NAME_WAYS; way++, row++) {
		name = names.lookup(&row);
		if (!row || !name || *(volatile u32 *)&name->state != NAME_FREE)
			continue;
		found = row;
		*count += 1;
	}
	return found;
}

/* A free row for an address, in the emptier of its buckets; 0 without one. */
static inline u32 free_row(u64 first, u64 second, const struct control *words)
{
	u64 hash = hash_address(first, second, words->hash_key[0], words->hash_key[1]);
	u32 one, other, count, more;

	one = free_in(first_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS, &count);
	other = free_in(second_place(hash, NAMES_ROWS / NAME_WAYS) * NAME_WAYS, &more);
	return more > count ? other : one;
}

/* Make a name that was found alive again; false if it is being let go. */
static inline bool keep_alive(struct name *name)
{
	u64 seen = *(volatile u64 *)&name->sum;

	return seen >> 32 == NAME_ALIVE || (seen >> 32 == NAME_DYING && swap_state(name, seen, seen, NAME_ALIVE));
}

/* Fill a free row; false if somebody else took it, or names the same address. */
static inline bool fill_name(struct name *name, u32 row, u64 first, u64 second, struct control *words)
{
	u64 address[2] = { first, second }, seen = *(volatile u64 *)&name->sum;
	u32 sum = sum_of_address(address);

	if (seen >> 32 != NAME_FREE || !swap_state(name, seen, seen, NAME_CLAIMED))
		return false;
	__sync_fetch_and_add(&words->names, 1);
	name->addr[0] = first;
	name->addr[1] = second;
	swap_state(name, (u64)NAME_CLAIMED << 32 | (u32)seen, sum, NAME_CANDIDATE); /* what others do is seen after it */
	if (!find_row(first, second, NAME_CANDIDATE, row, words))
		return swap_state(name, (u64)NAME_CANDIDATE << 32 | sum, sum, NAME_ALIVE);
	swap_state(name, (u64)NAME_CANDIDATE << 32 | sum, sum, NAME_FREE); /* nobody reads a candidate */
	__sync_fetch_and_add(&words->names, -1);
	return false;
}

/* The number of a client's address, alive, in network byte order: the one that it has, or a new one. 0: there is no room. */
static inline u32 intern(u64 first, u64 second, struct control *words)
{
	struct name *name;
	u32 row, n;

#pragma nounroll
	for (n = 0; n < INTERN_TRIES; n++) {
		row = find_row(first, second, NAME_ALIVE, 0, words);
		name = names.lookup(&row);
		if (row && name && keep_alive(name))
			break;
		if (row)
			continue;
		if (words->names >= NAMES_ROWS - NAMES_ROWS / NAMES_KEPT)
			return 0;
		row = free_row(first, second, words);
		name = names.lookup(&row);
		if (!row || !name)
			return 0;
		if (fill_name(name, row, first, second, words))
			break;
	}
	return n < INTERN_TRIES ? __builtin_bswap32(row) : 0;
}
