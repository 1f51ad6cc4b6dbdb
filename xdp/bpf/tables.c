/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* tables.c - how a program declares a shared table, and the words that every program reads. Part of lb.c, egress.c and
 * connect.c. */

#define TABLE(leaf, name, rows) BPF_TABLE_PINNED("array", u32, leaf, name, rows, TABLES_FOLDER "/" #name, BPF_F_MMAPABLE)

TABLE(struct control, control, CONTROL_ROWS);

/* A value that the verifier knows nothing of any more, given one that it knows nothing of: what follows is then looked at
 * once, and not for each way that leads there. */
static inline u32 forgotten(u32 value, u32 unknown)
{
	value ^= unknown;
	asm volatile("" : "+r"(value));
	return value ^ unknown;
}
