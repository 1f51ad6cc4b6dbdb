/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* ipv4.h - the IPv4 header of the frames that are sent here, and what its checksum is made of. */
#pragma once

static inline u16 folded(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

static inline u32 halves(u32 word)
{
	return (word >> 16) + (word & 0xffff);
}

/* Addresses in host order throughout: a one's complement sum does not care, as long as it is stored in the same order. */
static inline void write_ipv4(struct iphdr *ip, u8 protocol, u32 source, u32 destination, u16 total)
{
	u32 sum = halves(source) + halves(destination);

	*(u8 *)ip = 0x45;
	ip->tos = 0;
	ip->tot_len = __builtin_bswap16(total);
	ip->id = 0;
	ip->frag_off = __builtin_bswap16(0x4000); /* do not fragment */
	ip->ttl = 64;
	ip->protocol = protocol;
	ip->check = __builtin_bswap16(~folded(sum + 0x4500 + total + 0x4000 + (64 << 8 | protocol)));
	ip->saddr = __builtin_bswap32(source);
	ip->daddr = __builtin_bswap32(destination);
}
